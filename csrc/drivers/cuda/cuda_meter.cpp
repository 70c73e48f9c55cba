#include "drivers/cuda/cuda_meter.h"

#include <algorithm>

namespace pie::cuda {
namespace {

// What a timed batch keeps of its weight when the next one comes: some steps' layers count.
constexpr double kKept = 0.98;

}  // namespace

Meter::~Meter() {
  for (auto& [key, lane] : lanes_) {
    for (const Batch& batch : lane.pending) {
      if (batch.start == nullptr) continue;
      api_.cuEventDestroy(batch.start);
      api_.cuEventDestroy(batch.end);
    }
  }
  if (started_ != nullptr) api_.cuEventDestroy(started_);
  for (const CUevent event : spare_) api_.cuEventDestroy(event);
}

CUevent Meter::take_event() {
  if (!spare_.empty()) {
    const CUevent event = spare_.back();
    spare_.pop_back();
    return event;
  }
  CUevent event = nullptr;
  check(api_.cuEventCreate(&event, CU_EVENT_DEFAULT), "cuEventCreate");
  return event;
}

void Meter::before(Stream stream) {
  if (!sampling_) return;
  if (started_ == nullptr) started_ = take_event();
  check(api_.cuEventRecord(started_, reinterpret_cast<CUstream>(stream)), "cuEventRecord");
}

void Meter::after(Stream stream, Direction direction, int64_t bytes, int64_t copies) {
  Batch batch{bytes, copies, nullptr, nullptr};
  if (sampling_ && started_ != nullptr) {
    batch.end = take_event();
    batch.start = std::exchange(started_, nullptr);
    check(api_.cuEventRecord(batch.end, reinterpret_cast<CUstream>(stream)), "cuEventRecord");
  }
  lanes_[{stream, direction}].pending.push_back(batch);
}

// Counts the oldest pending batch.
void Meter::count(Lane& lane) {
  const Batch batch = lane.pending.front();
  lane.pending.pop_front();
  double seconds = -1;
  if (batch.start != nullptr) {
    float milliseconds = 0;
    const CUresult result = api_.cuEventElapsedTime(&milliseconds, batch.start, batch.end);
    if (result == CUDA_SUCCESS) {
      lane.timed_bytes = kKept * lane.timed_bytes + static_cast<double>(batch.bytes);
      lane.timed_seconds = kKept * lane.timed_seconds + milliseconds * 1e-3;
      seconds = milliseconds * 1e-3;
    }
    spare_.push_back(batch.start);
    spare_.push_back(batch.end);
  }
  lane.done.bytes += batch.bytes;
  lane.done.copies += batch.copies;
  if (seconds < 0 && lane.timed_bytes > 0) {
    seconds = lane.timed_seconds / lane.timed_bytes * static_cast<double>(batch.bytes);
  }
  lane.done.seconds += std::max(seconds, 0.0);
}

// A stream is in order: what lies before a timed batch that is complete, is complete.
void Meter::settle(Stream stream, Lane& lane) {
  if (lane.pending.empty()) return;
  if (api_.cuStreamQuery(reinterpret_cast<CUstream>(stream)) == CUDA_SUCCESS) {
    while (!lane.pending.empty()) count(lane);
    return;
  }
  size_t complete = 0;
  for (size_t i = 0; i < lane.pending.size(); ++i) {
    if (lane.pending[i].end == nullptr) continue;
    if (api_.cuEventQuery(lane.pending[i].end) != CUDA_SUCCESS) break;
    complete = i + 1;
  }
  while (complete-- > 0) count(lane);
}

void Meter::forget(Stream stream) {
  for (const Direction direction : {Direction::kHostToDevice, Direction::kDeviceToHost}) {
    const auto found = lanes_.find({stream, direction});
    if (found == lanes_.end()) continue;
    while (!found->second.pending.empty()) count(found->second);
    Counters& ended = ended_[static_cast<int>(direction)];
    ended.bytes += found->second.done.bytes;
    ended.copies += found->second.done.copies;
    ended.seconds += found->second.done.seconds;
    lanes_.erase(found);
  }
}

Counters Meter::counters(Direction direction) {
  Counters sum = ended_[static_cast<int>(direction)];
  for (auto& [key, lane] : lanes_) {
    if (key.second != direction) continue;
    settle(key.first, lane);
    sum.bytes += lane.done.bytes;
    sum.copies += lane.done.copies;
    sum.seconds += lane.done.seconds;
  }
  return sum;
}

}  // namespace pie::cuda
