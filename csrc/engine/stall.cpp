#include "engine/stall.h"

#include <algorithm>
#include <chrono>

namespace pie {
namespace {

using Now = std::chrono::steady_clock;

}  // namespace

void StallClock::begin(int64_t step, Stream compute, bool events) {
  newest_ = step;
  compute_ = compute;
  blocked_ = 0;
  if (!events) return;
  timing_ = step_ < 0 && !driver_.stream_is_inline(compute);
  if (timing_) {
    step_ = step;
    used_ = 0;
  }
}

void StallClock::wait(Event event) {
  if (driver_.stream_is_inline(compute_)) {
    const auto start = Now::now();
    driver_.stream_wait(compute_, event);
    blocked_ += std::chrono::duration<double>(Now::now() - start).count();
    return;
  }
  if (!timing_) return driver_.stream_wait(compute_, event);
  for (const Event meant : {Event{nothing_}, event}) {
    if (meant == nothing_ && used_ > 0) continue;  // Once a step, ahead of the first wait.
    if (used_ == pairs_.size()) {
      pairs_.push_back(Pair{OwnedEvent(driver_, true), OwnedEvent(driver_, true)});
    }
    timed_wait(pairs_[used_++], meant);
  }
}

void StallClock::timed_wait(const Pair& pair, Event event) {
  driver_.event_record(pair.before, compute_);
  driver_.stream_wait(compute_, event);
  driver_.event_record(pair.after, compute_);
}

void StallClock::drop() {
  timing_ = false;
  step_ = -1;
}

StallClock::Result StallClock::collect() {
  if (driver_.stream_is_inline(compute_)) return {newest_, blocked_};
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
