#include "engine/stall.h"

#include <algorithm>

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
  for (const Event meant : {Event{nothing_}, event}) {
    if (meant == nothing_ && used_ > 0) continue;  // Once a step, ahead of the first wait.
    if (used_ == pairs_.size()) {
      pairs_.push_back(Pair{OwnedEvent(driver_, true), OwnedEvent(driver_, true)});
    }
    timed_wait(pairs_[used_++], compute, meant);
  }
}

void StallClock::timed_wait(const Pair& pair, Stream compute, Event event) {
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
  const auto seconds = [&](size_t i) {
    return driver_.event_elapsed(pairs_[i].before, pairs_[i].after);
  };
  const double least = used_ > 0 ? seconds(0) : 0;
  for (size_t i = 1; i < used_; ++i) result.seconds += std::max(0.0, seconds(i) - least);
  step_ = -1;
  return result;
}

}  // namespace pie
