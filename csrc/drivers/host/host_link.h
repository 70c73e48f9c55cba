// The emulated link of the host driver: copies, their speed, their counters and their faults.
#pragma once

#include <chrono>
#include <mutex>
#include <random>

#include "drivers/driver.h"

namespace pie {

using Clock = std::chrono::steady_clock;

// One shared link per direction. Thread-safe.
class HostLink {
 public:
  // bytes_per_s <= 0: as fast as memcpy. Else a batch takes at least bytes / bytes_per_s.
  // Throws PIE_ERR_CONFIG for a speed at which a copy would take for ever.
  explicit HostLink(double bytes_per_s);

  // Copies in the calling thread. Throws on an injected failure; what was copied before it stays.
  void copy(Direction direction, const CopyOp* ops, size_t count);
  Counters counters(Direction direction) const;
  // Throws PIE_ERR_CONFIG for an unknown fault, or times that are not from 0 to a minute.
  void inject(int fault, int directions, double a, double b, uint64_t seed);

 private:
  struct Lane {
    Counters done;
    Clock::time_point free_at{};
    int64_t fail_in = 0;                          // 0: never
    double late_min = 0, late_max = 0, torn = 0;  // milliseconds
    std::mt19937_64 random{0};
  };
  struct Orders {
    int64_t fail_index = -1;
    double late = 0, torn = 0;
  };
  Orders take_orders(Lane& lane, size_t count);

  const double bytes_per_s_;
  mutable std::mutex mutex_;
  Lane lanes_[2];
};

// Sleeps until the time, to some microseconds where a core is free.
void sleep_until(Clock::time_point when);

}  // namespace pie
