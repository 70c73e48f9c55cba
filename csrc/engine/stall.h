// How long a compute stream stood at the gates of a step.
#pragma once

#include <vector>

#include "drivers/owned.h"

namespace pie {

// Where a wait blocks the caller, each step is timed by the clock. Else one step at a time is
// timed, by events around its waits; the result is there once they have all passed, some steps
// later. Two events with a wait between them that is over lie some microseconds apart, too: a pair
// around a wait for nothing tells how far, and that is no stall.
class StallClock {
 public:
  explicit StallClock(Driver& driver) : driver_(driver), nothing_(driver) {}

  // A step begins. `events`: it is timed by events where that is how, unless the last one that was
  // is still under way.
  void begin(int64_t step, Stream compute, bool events);
  // The wait itself, timed.
  void wait(Event event);
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
  void timed_wait(const Pair& pair, Event event);

  Driver& driver_;
  std::vector<Pair> pairs_;  // the first one is the one that waits for nothing
  OwnedEvent nothing_;       // never recorded
  size_t used_ = 0;
  int64_t step_ = -1;    // timed by events; -1: none
  bool timing_ = false;  // the newest step is that
  int64_t newest_ = -1;  // the step that began last
  Stream compute_ = 0;   // its compute stream
  double blocked_ = 0;   // seconds that its waits blocked the caller
};

}  // namespace pie
