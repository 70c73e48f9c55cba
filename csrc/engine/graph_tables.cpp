#include "engine/graph_tables.h"

#include <string>
#include <utility>

namespace pie {
namespace {

constexpr size_t kWord = sizeof(uint64_t);

int64_t checked_room(int64_t pieces) {
  if (pieces >= 1 && pieces <= GraphTables::kMostPieces) return pieces;
  throw Error(PIE_ERR_CONFIG, "tables for graphs hold 1 to " +
                                  std::to_string(GraphTables::kMostPieces) + " pieces, not " +
                                  std::to_string(pieces));
}

// Tables begin where a wide load may.
size_t aligned(size_t bytes) { return (bytes + 15) / 16 * 16; }

}  // namespace

// A slot has, in this order: the count of layers, the numbers, the count that came home, the tables
// one after the other. On the device the count that came home is not there.
GraphTables::GraphTables(Driver& driver, int64_t layers, int64_t pieces)
    : driver_(driver),
      layers_(layers),
      room_(checked_room(pieces)),
      slot_bytes_(aligned((at(layers) + 2) * kWord + at(layers * pieces) * sizeof(CopyOp))),
      memory_(driver, slot_bytes_),
      staging_(driver, kSlots * slot_bytes_),
      counts_(memory_.address() + kWord),
      tables_(memory_.address() + aligned((at(layers) + 1) * kWord)) {
  slots_.reserve(kSlots);
  for (size_t i = 0; i < kSlots; ++i) slots_.emplace_back(driver);
}

uint64_t* GraphTables::words(size_t slot) const {
  return reinterpret_cast<uint64_t*>(staging_.data() + slot * slot_bytes_);
}

void GraphTables::fill(Stream compute, int64_t step, const LayerPieces& pieces, int64_t first) {
  Slot& slot = slots_[next_];
  // What was copied from this buffer is there, and its count was looked at, before it is written.
  driver_.event_synchronize(slot.over);
  check(slot, words(next_) + header_words());
  uint64_t* const header = words(next_);
  if (!pieces.empty() && pieces != there_) {
    there_.clear();
    auto* piece = reinterpret_cast<CopyOp*>(header + header_words() + 1);
    const size_t row = pieces.size() * sizeof(CopyOp);
    const CopyRows rows{
        tables_,    at(room_) * sizeof(CopyOp), reinterpret_cast<Address>(piece), row, row,
        at(layers_)};
    for (uint64_t l = 0; l < at(layers_); ++l) {
      for (const LayerPiece& p : pieces) {
        *piece++ = {p.dst + l * p.dst_stride, p.src + l * p.src_stride, p.bytes};
      }
    }
    driver_.copy_rows(compute, Direction::kHostToDevice, rows);
    there_ = pieces;
  }
  header[0] = 0;
  for (int64_t l = 0; l < layers_; ++l) header[1 + l] = l < first ? 0 : pieces.size();
  filled_ = true;
  const size_t bytes = header_words() * kWord;
  driver_.copy_rows(compute, Direction::kHostToDevice,
                    {copied(), bytes, reinterpret_cast<Address>(header), bytes, bytes, 1});
  step_ = step;
}

void GraphTables::empty(Stream compute) {
  Slot& slot = slots_[next_];
  const auto home = reinterpret_cast<Address>(words(next_) + header_words());
  driver_.copy_rows(compute, Direction::kDeviceToHost, {home, kWord, copied(), kWord, kWord, 1});
  driver_.memset_async(compute, counts_, 0, at(layers_) * kWord);
  driver_.event_record(slot.over, compute);
  filled_ = false;
  slot.step = step_;
  newest_ = next_;
  next_ = (next_ + 1) % kSlots;
}

void GraphTables::drop(Stream idle) {
  if (!filled_) return;
  driver_.memset_async(idle, counts_, 0, at(layers_) * kWord);
  driver_.stream_synchronize(idle);
  filled_ = false;
}

void GraphTables::check(Slot& slot, const uint64_t* copied) {
  const int64_t step = std::exchange(slot.step, -1);
  if (step < 0 || *copied == static_cast<uint64_t>(layers_)) return;
  throw Error(PIE_ERR_GATE, "the graph of step " + std::to_string(step) + " copied " +
                                std::to_string(*copied) + " layers and not " +
                                std::to_string(layers_) +
                                ". What its attention read may be another layer's KV");
}

void GraphTables::check(bool wait) {
  for (size_t i = 0; i < kSlots; ++i) {
    const size_t at = (next_ + i) % kSlots;  // the oldest first
    Slot& slot = slots_[at];
    if (slot.step < 0) continue;
    if (wait) driver_.event_synchronize(slot.over);
    if (wait || driver_.event_query(slot.over)) check(slot, words(at) + header_words());
  }
}

}  // namespace pie
