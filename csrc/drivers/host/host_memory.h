// Device memory of the host driver: memfd handles mapped into a reserved range, aliases allowed.
#pragma once

#include "drivers/driver.h"

namespace pie::host_memory {

Handle create(size_t bytes);
void release(Handle handle) noexcept;
void map(Address address, size_t bytes, Handle handle);
void set_access(Address address, size_t bytes);
void unmap(Address address, size_t bytes) noexcept;

}  // namespace pie::host_memory
