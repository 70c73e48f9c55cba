#include "memory/pool.h"

#include <string>

namespace pie {

Pool::Pool(Driver& driver, const Geometry& geometry, int64_t chunks)
    : driver_(driver), geometry_(geometry), chunks_(static_cast<size_t>(geometry.num_chunks)) {
  for (int64_t c = 0; c < chunks; ++c) commit(c);
}

void Pool::throw_not_held(int64_t row) {
  throw Error(PIE_ERR_PLAN, "row " + std::to_string(row) + ": its chunk of the pool is not there");
}

void Pool::commit(int64_t chunk) {
  std::lock_guard<std::mutex> lock(mutex_);
  Chunk& target = chunks_[static_cast<size_t>(chunk)];
  if (!target.block) {
    target.block.emplace(driver_, static_cast<size_t>(bytes_of(chunk)));
    bytes_ += bytes_of(chunk);
  }
  target.address.store(target.block->address(), std::memory_order_release);
}

void Pool::hide(int64_t chunk) {
  chunks_[static_cast<size_t>(chunk)].address.store(0, std::memory_order_release);
}

void Pool::drop(int64_t chunk) {
  std::lock_guard<std::mutex> lock(mutex_);
  Chunk& target = chunks_[static_cast<size_t>(chunk)];
  if (!target.block || target.address.load(std::memory_order_acquire) != 0) return;
  target.block.reset();
  bytes_ -= bytes_of(chunk);
}

}  // namespace pie
