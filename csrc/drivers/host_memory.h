// Device memory of the host driver: memfd handles mapped into a reserved range, aliases allowed.
#pragma once

#include "../driver.h"

namespace pie::host_memory {

size_t granularity();
Address reserve(size_t bytes, size_t alignment);
void unreserve(Address address, size_t bytes) noexcept;
Handle create(size_t bytes);
void release(Handle handle) noexcept;
void map(Address address, size_t bytes, Handle handle);
void set_access(Address address, size_t bytes);
void unmap(Address address, size_t bytes) noexcept;
void* host_alloc(size_t bytes);
void host_free(void* pointer, size_t bytes) noexcept;

}  // namespace pie::host_memory
