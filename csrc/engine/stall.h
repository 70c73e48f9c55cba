// How long a compute stream stood at the gates of a step, where a wait does not block the caller.
#pragma once

#include <vector>

#include "drivers/owned.h"

namespace pie {

// One step at a time is timed, by events around its waits; the result is there once they have all
// passed, some steps later. Two events with a wait between them that is over lie some microseconds
// apart, too: a pair around a wait for nothing tells how far, and that is no stall.
class StallClock {
 public:
  explicit StallClock(Driver& driver) : driver_(driver), nothing_(driver) {}

  // Time the coming step, unless the last timed one is still under way. True if it is timed.
  bool begin(int64_t step, Stream compute);
  // The wait itself, with events around it while a step is timed.
  void wait(Stream compute, Event event);
  void end() { timing_ = false; }
  // The step that begin() was of has no gates.
  void leave() {
    if (timing_) drop();
  }
  // No result of what is under way: its streams failed or were aborted.
  void drop();

  struct Result {
    int64_t step = -1;  // -1: none is complete
    double seconds = 0;
  };
  Result collect();

 private:
  struct Pair {
    OwnedEvent before, after;
  };
  void timed_wait(const Pair& pair, Stream compute, Event event);

  Driver& driver_;
  std::vector<Pair> pairs_;  // the first one is the one that waits for nothing
  OwnedEvent nothing_;       // never recorded
  size_t used_ = 0;
  int64_t step_ = -1;
  bool timing_ = false;
};

}  // namespace pie
