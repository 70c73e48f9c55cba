// Pages of CPU memory: reserved ranges, and memory with a page behind every address.
#pragma once

#include <cstddef>

#include "drivers/driver.h"

namespace pie::pages {

size_t size();

// An aligned range without memory. Throws PIE_ERR_TRANSFER, as all of these do.
Address reserve(size_t bytes, size_t alignment);
void unreserve(Address address, size_t bytes) noexcept;

// Puts a page behind every address, so that no step pays for faults. Contents do not change.
void populate(void* address, size_t bytes, const char* what, unsigned threads = 1);

// Zeroed, populated, with huge pages where the kernel has them. numa_node < 0: anywhere; else near
// that node. Never on a node without CPUs; see placement.h.
void* take(size_t bytes, int numa_node = -1, unsigned threads = 1);
void give_back(void* pointer, size_t bytes) noexcept;

}  // namespace pie::pages
