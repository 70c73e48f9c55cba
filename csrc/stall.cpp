#include "stall.h"

namespace pie {

bool StallClock::begin(int64_t step, Stream compute) {
  timing_ = step_ < 0 && !driver_.stream_is_inline(compute);
  if (timing_) {
    step_ = step;
    used_ = 0;
  }
  return timing_;
}

void StallClock::wait(Stream compute, Event event) {
  if (!timing_) return driver_.stream_wait(compute, event);
  if (used_ == pairs_.size()) {
    pairs_.push_back(Pair{OwnedEvent(driver_, true), OwnedEvent(driver_, true)});
  }
  const Pair& pair = pairs_[used_++];
  driver_.event_record(pair.before, compute);
  driver_.stream_wait(compute, event);
  driver_.event_record(pair.after, compute);
}

void StallClock::drop() {
  timing_ = false;
  step_ = -1;
}

StallClock::Result StallClock::collect() {
  if (step_ < 0 || timing_) return {};
  if (used_ > 0 && !driver_.event_query(pairs_[used_ - 1].after)) return {};
  Result result{step_, 0};
  for (size_t i = 0; i < used_; ++i) {
    result.seconds += driver_.event_elapsed(pairs_[i].before, pairs_[i].after);
  }
  step_ = -1;
  return result;
}

}  // namespace pie
