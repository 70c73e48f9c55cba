#include "arena.h"

#include <string>

namespace pie {
namespace {

int64_t round_up(int64_t value, int64_t multiple) {
  return (value + multiple - 1) / multiple * multiple;
}

}  // namespace

Geometry::Geometry(const pie_geometry& given)
    : layers(given.num_layers),
      page(given.page_bytes),
      resident(given.resident_blocks),
      pooled(given.pooled_blocks),
      slots(given.ring_slots),
      rows(given.rows),
      chunk_rows(given.chunk_rows),
      granularity(given.granularity) {
  if (layers < 1 || page < 1 || resident < 1 || pooled < 1 || slots < 1 || slots > layers ||
      rows < 1 || chunk_rows < 1 || granularity < 1) {
    throw Error(PIE_ERR_CONFIG,
                "geometry: L = " + std::to_string(layers) + ", p = " + std::to_string(page) +
                    ", R = " + std::to_string(resident) + ", W = " + std::to_string(pooled) +
                    ", B = " + std::to_string(slots) + ", rows = " + std::to_string(rows) +
                    ", chunk_rows = " + std::to_string(chunk_rows) + ", g = " +
                    std::to_string(granularity) + "; all must be at least 1, and B at most L");
  }
  layer_resident_bytes = round_up(resident * page, granularity);
  shift = layer_resident_bytes - resident * page;
  slot_bytes = round_up(pooled * page, granularity);
  layer_stride = layer_resident_bytes + slot_bytes;
  virtual_bytes = layers * layer_stride;
  num_chunks = (rows + chunk_rows - 1) / chunk_rows;
  device_bytes = layers * layer_resident_bytes + slots * slot_bytes;
  host_bytes = rows * layers * page;
}

DeviceBlock::DeviceBlock(Driver& driver, size_t bytes)
    : bytes_(static_cast<size_t>(
          round_up(static_cast<int64_t>(bytes), static_cast<int64_t>(driver.granularity())))),
      range_(driver, bytes_, 0),
      mapping_(driver, range_.address(), bytes_, Physical(driver, bytes_).handle()) {
  driver.set_access(address(), bytes_);
  driver.zero(address(), bytes_);
}

Arena::Arena(Driver& driver, const Geometry& geometry)
    : geometry_(geometry),
      range_(driver, static_cast<size_t>(geometry.virtual_bytes),
             static_cast<size_t>(geometry.granularity)) {
  const auto own = static_cast<size_t>(geometry.layer_resident_bytes);
  const auto slot = static_cast<size_t>(geometry.slot_bytes);
  std::vector<Physical> ring;
  for (int64_t s = 0; s < geometry.slots; ++s) ring.emplace_back(driver, slot);
  mappings_.reserve(static_cast<size_t>(2 * geometry.layers));
  for (int64_t l = 0; l < geometry.layers; ++l) {
    const Address at = base() + static_cast<Address>(l * geometry.layer_stride);
    const Physical pages(driver, own);
    mappings_.emplace_back(driver, at, own, pages.handle());
    mappings_.emplace_back(driver, at + own, slot,
                           ring[static_cast<size_t>(l % geometry.slots)].handle());
  }
  driver.set_access(base(), static_cast<size_t>(geometry.virtual_bytes));
  for (int64_t l = 0; l < geometry.layers; ++l) {  // each slot once: no alias is written beside it
    const Address at = base() + static_cast<Address>(l * geometry.layer_stride);
    driver.zero(at, l < geometry.slots ? own + slot : own);
  }
}

}  // namespace pie
