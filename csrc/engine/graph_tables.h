// What the copies in captured graphs read: a table on the device, filled before each replay.
#pragma once

#include <cstddef>
#include <vector>

#include "drivers/owned.h"
#include "memory/arena.h"
#include "memory/pool.h"

namespace pie {

// A table of pieces for all layers, their number, which is 0 for the layers of the head, and one
// count of the layers that were copied, at addresses that do not change. Between the steps in
// graphs the number is 0: a replay that nobody announced copies nothing. They are written in the
// order of the compute stream, from pinned memory that is used in turn: a replay never finds a
// table that is being written.
class GraphTables {
 public:
  static constexpr int64_t kMostPieces = 65536;
  // The head: layers that no graph copies. Throws PIE_ERR_CONFIG or PIE_ERR_TRANSFER, leaving
  // nothing behind.
  GraphTables(Driver& driver, int64_t layers, int64_t head, int64_t pieces);

  int64_t room() const { return room_; }
  Address table() const { return memory_.address() + sizeof(Header); }
  Address count(int64_t layer) const {
    return memory_.address() + (layer < head_ ? offsetof(Header, head) : offsetof(Header, others));
  }
  Address copied() const { return memory_.address() + offsetof(Header, copied); }

  // A replay submitted after this copies these pieces. Blocks only when all buffers are those of
  // steps under way. Throws PIE_ERR_GATE as check() does.
  void fill(Stream compute, int64_t step, const TablePieces& pieces);
  // After that replay: takes its count of layers home, and empties the table.
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
  struct Header {
    uint64_t copied, head, others;  // the count of layers; numbers of pieces
    uint64_t home;                  // the count that came home; of buffers only
  };
  struct Slot {
    explicit Slot(Driver& driver) : over(driver) {}
    OwnedEvent over;    // compute: the step's replay is over, and its count is here
    int64_t step = -1;  // whose count is awaited; -1: none
  };
  Header& staged(size_t slot) const;
  void check(Slot& slot, const Header& staged);
  void clear(Stream stream);

  Driver& driver_;
  const int64_t layers_, head_, room_;
  const size_t slot_bytes_;
  DeviceBlock memory_;
  HostBlock staging_;
  std::vector<Slot> slots_;
  size_t next_ = 0, newest_ = 0;
  int64_t step_ = -1;    // that fill() was for
  TablePieces there_;    // what the table holds
  bool filled_ = false;  // the numbers on the device may be other than 0
};

}  // namespace pie
