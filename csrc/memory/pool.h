// The host side: rows in chunks, laid out [chunk][layer][row][page], draft
// layers after the others. Chunks come and go.
#pragma once

#include <atomic>
#include <memory>
#include <mutex>
#include <optional>
#include <vector>

#include "memory/arena.h"

namespace pie {

// Zeroed, registered host memory of the driver.
class HostBlock {
 public:
  HostBlock(Driver& driver, size_t bytes)
      : driver_(driver), bytes_(bytes), pointer_(driver.host_alloc(bytes)) {}
  HostBlock(const HostBlock&) = delete;
  HostBlock& operator=(const HostBlock&) = delete;
  ~HostBlock() { driver_.host_free(pointer_, bytes_); }
  uint8_t* data() const { return static_cast<uint8_t*>(pointer_); }
  Address address() const { return reinterpret_cast<Address>(pointer_); }

 private:
  Driver& driver_;
  const size_t bytes_;
  void* const pointer_;
};

// commit and release may be called by a second thread; everything else by the engine's.
class Pool {
 public:
  // Commits the first `chunks` chunks.
  Pool(Driver& driver, const Geometry& geometry, int64_t chunks);

  // Where the row's chunk is. Throws PIE_ERR_PLAN where it is not held: an address in it would be a
  // small number.
  Address chunk_of(int64_t row) const {
    const Address base = at(row / geometry_.chunk_rows);
    if (base == 0) throw_not_held(row);
    return base;
  }
  // Pages of neighbouring rows of one chunk and layer follow one another. Throws as chunk_of().
  Address page(int64_t row, int64_t layer) const {
    const Address base = chunk_of(row);
    const int64_t chunk = row / geometry_.chunk_rows;
    const int64_t inside = row - chunk * geometry_.chunk_rows;
    const int64_t index = layer * geometry_.rows_of_chunk(chunk) + inside;
    return base + static_cast<Address>(index * geometry_.page);
  }
  bool holds(int64_t row) const { return at(row / geometry_.chunk_rows) != 0; }

  // Throws PIE_ERR_TRANSFER when the memory cannot be had. A chunk that is there stays as it is.
  void commit(int64_t chunk);
  // No later step may name its rows. hide() and then, when no copy of them is under way, drop().
  void hide(int64_t chunk);
  void drop(int64_t chunk);
  int64_t bytes() const { return bytes_.load(std::memory_order_relaxed); }

 private:
  struct Chunk {
    std::atomic<Address> address{0};  // 0: not to be used
    std::optional<HostBlock> block;
  };
  [[noreturn]] static void throw_not_held(int64_t row);
  Address at(int64_t chunk) const {
    return chunks_[static_cast<size_t>(chunk)].address.load(std::memory_order_acquire);
  }
  int64_t bytes_of(int64_t chunk) const {
    return geometry_.rows_of_chunk(chunk) * geometry_.row_pages * geometry_.page;
  }

  Driver& driver_;
  const Geometry& geometry_;
  std::vector<Chunk> chunks_;
  std::mutex mutex_;  // of the blocks
  std::atomic<int64_t> bytes_{0};
};

}  // namespace pie
