// Device memory of the host driver, mapped into a reserved range: memfd handles, which may be
// mapped several times, and private memory, which is faster because it has huge pages.
#pragma once

#include "../driver.h"

namespace pie::host_memory {

size_t granularity();
Address reserve(size_t bytes);
void unreserve(Address address, size_t bytes) noexcept;
Handle create(size_t bytes);
void release(Handle handle) noexcept;
void map(Address address, size_t bytes, Handle handle);
void map_own(Address address, size_t bytes);
void set_access(Address address, size_t bytes);
void unmap(Address address, size_t bytes) noexcept;
void* host_alloc(size_t bytes);
void host_free(void* pointer, size_t bytes) noexcept;

}  // namespace pie::host_memory
