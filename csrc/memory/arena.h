// The device side: N regions of own pages, L of them with a layer that has a pool, and B ring slots
// that all share but the D regions of draft layers, which have pages of their own for pooled
// blocks.
#pragma once

#include <vector>

#include "drivers/driver.h"

namespace pie {

// pie_geometry with the derived sizes of pie_vllm/geometry.py. Throws PIE_ERR_CONFIG.
class Geometry {
 public:
  explicit Geometry(const pie_geometry& given);

  int64_t layers, page, resident, pooled, slots, rows, chunk_rows, granularity, regions, drafts;
  int64_t row_pages;  // L + D
  int64_t shift, layer_resident_bytes, slot_bytes, layer_stride, virtual_bytes;
  int64_t num_chunks, device_bytes, host_bytes;

  int64_t page_offset(int64_t layer, int64_t block) const {
    return layer * layer_stride + shift + block * page;
  }
  bool is_draft(int64_t region) const { return region >= layers && region < row_pages; }
  // Bytes of the first chunks of the pool.
  int64_t bytes_of_chunks(int64_t chunks) const {
    return (chunks < num_chunks ? chunks * chunk_rows : rows) * row_pages * page;
  }
  int64_t rows_of_chunk(int64_t chunk) const {
    return chunk + 1 < num_chunks ? chunk_rows : rows - chunk * chunk_rows;
  }
};

// An address range of the driver.
class Reservation {
 public:
  Reservation(Driver& driver, size_t bytes, size_t alignment)
      : driver_(driver), bytes_(bytes), address_(driver.reserve(bytes, alignment)) {}
  ~Reservation() { driver_.unreserve(address_, bytes_); }
  Reservation(const Reservation&) = delete;
  Reservation& operator=(const Reservation&) = delete;
  Address address() const { return address_; }

 private:
  Driver& driver_;
  const size_t bytes_;
  const Address address_;
};

// A physical allocation; once mapped, the mappings keep the memory.
class Physical {
 public:
  Physical(Driver& driver, size_t bytes) : driver_(&driver), handle_(driver.create(bytes)) {}
  Physical(Physical&& other) noexcept : driver_(other.driver_), handle_(other.handle_) {
    other.driver_ = nullptr;
  }
  Physical(const Physical&) = delete;
  Physical& operator=(const Physical&) = delete;
  ~Physical() {
    if (driver_ != nullptr) driver_->release(handle_);
  }
  Handle handle() const { return handle_; }

 private:
  Driver* driver_;
  Handle handle_;
};

// One mapping; ends with its unmap.
class Mapping {
 public:
  Mapping(Driver& driver, Address address, size_t bytes, Handle handle)
      : driver_(&driver), address_(address), bytes_(bytes) {
    driver.map(address, bytes, handle);
  }
  Mapping(Mapping&& other) noexcept
      : driver_(other.driver_), address_(other.address_), bytes_(other.bytes_) {
    other.driver_ = nullptr;
  }
  Mapping(const Mapping&) = delete;
  Mapping& operator=(const Mapping&) = delete;
  ~Mapping() {
    if (driver_ != nullptr) driver_->unmap(address_, bytes_);
  }

 private:
  Driver* driver_;
  Address address_;
  size_t bytes_;
};

// Zeroed device memory of its own.
class DeviceBlock {
 public:
  DeviceBlock(Driver& driver, size_t bytes);
  Address address() const { return range_.address(); }

 private:
  const size_t bytes_;
  const Reservation range_;
  const Mapping mapping_;
};

// Maps everything once; a failure half-way gives all of it back. No work may use the memory when
// the arena ends.
class Arena {
 public:
  Arena(Driver& driver, const Geometry& geometry);

  Address base() const { return range_.address(); }
  // A page through the layer's own view: the address that attention reads.
  Address page(int64_t layer, int64_t block) const {
    return base() + static_cast<Address>(geometry_.page_offset(layer, block));
  }

 private:
  const Geometry& geometry_;
  Reservation range_;
  std::vector<Mapping> mappings_;  // after range_: unmapped before the range goes
};

}  // namespace pie
