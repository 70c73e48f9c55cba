#include "memory/fitting.h"

#include <string>

#include "drivers/free_memory.h"

namespace pie {
namespace {

// Memory is taken page by page, without a look: what is not there ends in the kernel killing
// processes, and not in an error.
void check_free(const Geometry& geometry, const Driver& driver, int64_t chunks) {
  const int64_t device = driver.device_is_host() ? geometry.device_bytes : 0;
  const int64_t pool = geometry.bytes_of_chunks(chunks);
  const int64_t left = free_memory();
  if (left < 0 || (device <= left && pool <= left - device)) return;
  throw Error(PIE_ERR_TRANSFER,
              "geometry: " + std::to_string(device) +
                  " bytes of CPU memory for the device's KV and " + std::to_string(pool) +
                  " for the pool are wanted at start, but " + std::to_string(left) +
                  " are free on this machine or within its cgroup's limit; lower "
                  "--kv-cache-memory-bytes or --pie-pool-gib, or free memory");
}

}  // namespace

int64_t chunks_at_start(const Geometry& geometry, int64_t chunks) {
  if (chunks < 0 || chunks > geometry.num_chunks) return geometry.num_chunks;
  return chunks > 0 ? chunks : 1;
}

Geometry fitting(const pie_geometry& given, const Driver& driver, int64_t chunks) {
  const Geometry geometry(given);
  const auto g = static_cast<int64_t>(driver.granularity());
  if (geometry.granularity % g != 0) {
    throw Error(PIE_ERR_CONFIG, "geometry: granularity " + std::to_string(geometry.granularity) +
                                    " is not a multiple of the driver's " + std::to_string(g));
  }
  check_free(geometry, driver, chunks_at_start(geometry, chunks));
  return geometry;
}

}  // namespace pie
