// The host side: rows in chunks, laid out [chunk][layer][row][page].
#pragma once

#include <vector>

#include "arena.h"

namespace pie {

// Zeroed, registered host memory of the driver.
class HostBlock {
 public:
  HostBlock(Driver& driver, size_t bytes)
      : driver_(&driver), bytes_(bytes), pointer_(driver.host_alloc(bytes)) {}
  HostBlock(HostBlock&& other) noexcept
      : driver_(other.driver_), bytes_(other.bytes_), pointer_(other.pointer_) {
    other.pointer_ = nullptr;
  }
  HostBlock(const HostBlock&) = delete;
  HostBlock& operator=(const HostBlock&) = delete;
  ~HostBlock() {
    if (pointer_ != nullptr) driver_->host_free(pointer_, bytes_);
  }
  uint8_t* data() const { return static_cast<uint8_t*>(pointer_); }
  Address address() const { return reinterpret_cast<Address>(pointer_); }

 private:
  Driver* driver_;
  size_t bytes_;
  void* pointer_;
};

class Pool {
 public:
  Pool(Driver& driver, const Geometry& geometry);

  // Pages of neighbouring rows of one chunk and layer follow one another.
  Address page(int64_t row, int64_t layer) const {
    const int64_t chunk = row / geometry_.chunk_rows;
    const int64_t inside = row - chunk * geometry_.chunk_rows;
    const int64_t index = layer * geometry_.rows_of_chunk(chunk) + inside;
    return chunks_[static_cast<size_t>(chunk)].address() +
           static_cast<Address>(index * geometry_.page);
  }

 private:
  const Geometry& geometry_;
  std::vector<HostBlock> chunks_;
};

}  // namespace pie
