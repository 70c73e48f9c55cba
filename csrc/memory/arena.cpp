#include "memory/arena.h"

#include <string>

#include "memory/checked.h"

namespace pie {
namespace {

// Most chunks of a pool: 64 TiB of 64 MiB each. The table of chunks has an entry for each.
constexpr int64_t kMostChunks = int64_t{1} << 20;

std::string text_of(const Geometry& g) {
  return "geometry: L = " + std::to_string(g.layers) + ", N = " + std::to_string(g.regions) +
         ", D = " + std::to_string(g.drafts) + ", p = " + std::to_string(g.page) +
         ", R = " + std::to_string(g.resident) + ", W = " + std::to_string(g.pooled) +
         ", B = " + std::to_string(g.slots) + ", rows = " + std::to_string(g.rows) +
         ", chunk_rows = " + std::to_string(g.chunk_rows) +
         ", g = " + std::to_string(g.granularity) + "; ";
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
      granularity(given.granularity),
      regions(given.num_regions),
      drafts(given.draft_layers) {
  if (layers < 1 || page < 1 || resident < 1 || pooled < 1 || slots < 1 || slots > layers ||
      rows < 1 || chunk_rows < 1 || granularity < 1 || drafts < 0 || regions < layers ||
      drafts > regions - layers) {
    throw Error(PIE_ERR_CONFIG,
                text_of(*this) +
                    "all must be at least 1, but D at least 0; B at most L, and L + D at most N");
  }
  const std::string text = text_of(*this);
  const int64_t own = product(resident, page, text + "R * p");
  layer_resident_bytes = rounded_up(own, granularity, text + "R * p rounded up to g");
  shift = layer_resident_bytes - own;
  slot_bytes = rounded_up(product(pooled, page, text + "W * p"), granularity,
                          text + "W * p rounded up to g");
  layer_stride = sum(layer_resident_bytes, slot_bytes, text + "R * p + W * p");
  virtual_bytes = product(regions, layer_stride, text + "N * (R * p + W * p)");
  // Not above virtual_bytes: B is at most L, and L + D at most N.
  device_bytes = regions * layer_resident_bytes + (slots + drafts) * slot_bytes;
  row_pages = layers + drafts;
  const int64_t row = product(row_pages, page, text + "(L + D) * p");
  host_bytes = product(rows, row, text + "rows * (L + D) * p");
  product(chunk_rows, row, text + "chunk_rows * (L + D) * p");
  num_chunks = (rows - 1) / chunk_rows + 1;
  if (num_chunks > kMostChunks) {
    throw Error(PIE_ERR_CONFIG, text + std::to_string(num_chunks) + " chunks, at most " +
                                    std::to_string(kMostChunks) + " can be; raise chunk_rows");
  }
}

DeviceBlock::DeviceBlock(Driver& driver, size_t bytes)
    : bytes_(static_cast<size_t>(rounded_up(static_cast<int64_t>(bytes),
                                            static_cast<int64_t>(driver.granularity()),
                                            "device memory of " + std::to_string(bytes)))),
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
  mappings_.reserve(static_cast<size_t>(2 * geometry.regions));
  for (int64_t l = 0; l < geometry.regions; ++l) {
    const Address at = base() + static_cast<Address>(l * geometry.layer_stride);
    const Physical pages(driver, own);
    mappings_.emplace_back(driver, at, own, pages.handle());
    if (geometry.is_draft(l)) {
      mappings_.emplace_back(driver, at + own, slot, Physical(driver, slot).handle());
    } else {
      mappings_.emplace_back(driver, at + own, slot,
                             ring[static_cast<size_t>(l % geometry.slots)].handle());
    }
  }
  driver.set_access(base(), static_cast<size_t>(geometry.virtual_bytes));
  for (int64_t l = 0; l < geometry.regions; ++l) {  // each slot once: no alias is written beside it
    const Address at = base() + static_cast<Address>(l * geometry.layer_stride);
    driver.zero(at, l < geometry.slots || geometry.is_draft(l) ? own + slot : own);
  }
}

}  // namespace pie
