// Sizes that this driver and this machine can have.
#pragma once

#include "drivers/driver.h"
#include "memory/arena.h"

namespace pie {

// Chunks of the pool that are there from the start: all when negative, at least one.
int64_t chunks_at_start(const Geometry& geometry, int64_t chunks);

// Throws PIE_ERR_CONFIG for sizes that cannot work with the driver, PIE_ERR_TRANSFER when more
// memory is wanted at start than is free.
Geometry fitting(const pie_geometry& given, const Driver& driver, int64_t chunks);

}  // namespace pie
