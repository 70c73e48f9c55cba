// What the copies in captured graphs read: tables on the device, filled before each replay.
#pragma once

#include <vector>

#include "drivers/owned.h"
#include "memory/arena.h"
#include "memory/pool.h"

namespace pie {

// A run as all layers have it: in layer l both ends lie l strides further.
struct LayerPiece {
  Address dst, src;
  uint64_t bytes, dst_stride, src_stride;
  bool operator==(const LayerPiece& o) const {
    return dst == o.dst && src == o.src && bytes == o.bytes && dst_stride == o.dst_stride &&
           src_stride == o.src_stride;
  }
};
using LayerPieces = std::vector<LayerPiece>;

// For each layer a table of pieces and their number, and one count of the layers that were copied,
// at addresses that do not change. Between the steps in graphs all numbers are 0: a replay that
// nobody announced copies nothing. They are written in the order of the compute stream, from pinned
// memory that is used in turn: a replay never finds a table that is being written.
class GraphTables {
 public:
  static constexpr int64_t kMostPieces = 65536;
  // Throws PIE_ERR_CONFIG or PIE_ERR_TRANSFER, leaving nothing behind.
  GraphTables(Driver& driver, int64_t layers, int64_t pieces);

  int64_t room() const { return room_; }
  Address table(int64_t layer) const { return tables_ + at(layer * room_) * sizeof(CopyOp); }
  Address count(int64_t layer) const { return counts_ + at(layer) * sizeof(uint64_t); }
  Address copied() const { return memory_.address(); }

  // A replay submitted after this copies these pieces in the layers from `first` on. Blocks only
  // when all buffers are those of steps under way. Throws PIE_ERR_GATE as check() does.
  void fill(Stream compute, int64_t step, const LayerPieces& pieces, int64_t first);
  // After that replay: takes its count of layers home, and empties the tables.
  void empty(Stream compute);
  // The same of a step that was given up; the compute is idle. Later replays copy nothing.
  void drop(Stream idle);
  // Throws PIE_ERR_GATE for the first step whose replay is known to have copied other than all
  // layers; each step is complained of once. wait: until all are known.
  void check(bool wait);
  // The newest empty(): what a new compute stream has to wait for.
  Event emptied() const { return slots_[newest_].over; }

 private:
  static constexpr size_t kSlots = 4;  // a few more than steps are in flight
  struct Slot {
    explicit Slot(Driver& driver) : over(driver) {}
    OwnedEvent over;    // compute: the step's replay is over, and its count is here
    int64_t step = -1;  // whose count is awaited; -1: none
  };
  static size_t at(int64_t i) { return static_cast<size_t>(i); }
  size_t header_words() const { return at(layers_ + 1); }  // the count of layers, the numbers
  uint64_t* words(size_t slot) const;
  void check(Slot& slot, const uint64_t* copied);

  Driver& driver_;
  const int64_t layers_, room_;
  const size_t slot_bytes_;
  DeviceBlock memory_;
  HostBlock staging_;
  const Address counts_, tables_;
  std::vector<Slot> slots_;
  size_t next_ = 0, newest_ = 0;
  int64_t step_ = -1;    // that fill() was for
  LayerPieces there_;    // what the tables hold
  bool filled_ = false;  // the numbers on the device may be other than 0
};

}  // namespace pie
