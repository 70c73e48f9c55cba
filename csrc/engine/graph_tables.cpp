#include "engine/graph_tables.h"

#include <cstddef>
#include <cstring>
#include <string>
#include <utility>

namespace pie {
namespace {

int64_t checked_room(int64_t pieces) {
  if (pieces >= 1 && pieces <= GraphTables::kMostPieces) return pieces;
  throw Error(PIE_ERR_CONFIG, "tables for graphs hold 1 to " +
                                  std::to_string(GraphTables::kMostPieces) + " pieces, not " +
                                  std::to_string(pieces));
}

}  // namespace

// A slot, and the memory on the device, have the header and then the table.
GraphTables::GraphTables(Driver& driver, int64_t layers, int64_t head, int64_t pieces)
    : driver_(driver),
      layers_(layers),
      head_(head),
      room_(checked_room(pieces)),
      slot_bytes_(sizeof(Header) + static_cast<size_t>(room_) * sizeof(TablePiece)),
      memory_(driver, slot_bytes_),
      staging_(driver, kSlots * slot_bytes_) {
  slots_.reserve(kSlots);
  for (size_t i = 0; i < kSlots; ++i) slots_.emplace_back(driver);
}

GraphTables::Header& GraphTables::staged(size_t slot) const {
  return *reinterpret_cast<Header*>(staging_.data() + slot * slot_bytes_);
}

void GraphTables::fill(Stream compute, int64_t step, const TablePieces& pieces) {
  Slot& slot = slots_[next_];
  // What was copied from this buffer is there, and its count was looked at, before it is written.
  driver_.event_synchronize(slot.over);
  Header& header = staged(next_);
  check(slot, header);
  const auto send = [&](Address to, const void* from, size_t bytes) {
    driver_.copy_own(compute, Direction::kHostToDevice, to, reinterpret_cast<Address>(from), bytes);
  };
  if (!pieces.empty() && pieces != there_) {
    there_.clear();
    const size_t bytes = pieces.size() * sizeof(TablePiece);
    std::memcpy(&header + 1, pieces.data(), bytes);
    send(table(), &header + 1, bytes);
    there_ = pieces;
  }
  header.copied = header.head = 0;
  header.others = pieces.size();
  filled_ = true;
  send(copied(), &header, offsetof(Header, home));
  step_ = step;
}

void GraphTables::empty(Stream compute) {
  Slot& slot = slots_[next_];
  const auto home = reinterpret_cast<Address>(&staged(next_).home);
  driver_.copy_own(compute, Direction::kDeviceToHost, home, copied(), sizeof(uint64_t));
  clear(compute);
  driver_.event_record(slot.over, compute);
  filled_ = false;
  slot.step = step_;
  newest_ = next_;
  next_ = (next_ + 1) % kSlots;
}

void GraphTables::drop(Stream idle) {
  if (!filled_) return;
  clear(idle);
  driver_.stream_synchronize(idle);
  filled_ = false;
}

void GraphTables::clear(Stream stream) {
  constexpr size_t kNumbers = offsetof(Header, home) - offsetof(Header, head);
  driver_.memset_async(stream, memory_.address() + offsetof(Header, head), 0, kNumbers);
}

void GraphTables::check(Slot& slot, const Header& staged) {
  const int64_t step = std::exchange(slot.step, -1);
  if (step < 0 || staged.home == static_cast<uint64_t>(layers_)) return;
  throw Error(PIE_ERR_GATE, "the graph of step " + std::to_string(step) + " copied " +
                                std::to_string(staged.home) + " layers and not " +
                                std::to_string(layers_) +
                                ". What its attention read may be another layer's KV");
}

void GraphTables::check(bool wait) {
  for (size_t i = 0; i < kSlots; ++i) {
    const size_t at = (next_ + i) % kSlots;  // the oldest first
    Slot& slot = slots_[at];
    if (slot.step < 0) continue;
    if (wait) driver_.event_synchronize(slot.over);
    if (wait || driver_.event_query(slot.over)) check(slot, staged(at));
  }
}

}  // namespace pie
