// Counts copies of the CUDA driver: bytes of all, time of a sample.
//
// An event that takes time costs a microsecond or two of the stream. So only some batches are
// timed, and the others are taken to have been as fast as the newest of these, about.
#pragma once

#include <deque>
#include <map>
#include <utility>
#include <vector>

#include "drivers/cuda/cuda_api.h"
#include "drivers/driver.h"

namespace pie::cuda {

// One thread calls everything.
class Meter {
 public:
  explicit Meter(const Api& api) : api_(api) {}
  ~Meter();
  Meter(const Meter&) = delete;
  Meter& operator=(const Meter&) = delete;

  void sample(bool on) { sampling_ = on; }

  // Around a batch: before() ahead of its submission, after() once it was submitted.
  void before(Stream stream);
  void after(Stream stream, Direction direction, int64_t bytes, int64_t copies);
  // Counts what is pending on the stream, which is idle and about to end.
  void forget(Stream stream);

  Counters counters(Direction direction);

 private:
  struct Batch {
    int64_t bytes, copies;
    CUevent start, end;  // null unless it is timed
  };
  struct Lane {
    std::deque<Batch> pending;
    Counters done;
    double timed_bytes = 0, timed_seconds = 0;  // of the newest timed ones, the older for less
  };
  CUevent take_event();
  void settle(Stream stream, Lane& lane);
  void count(Lane& lane);

  const Api& api_;
  bool sampling_ = true;
  CUevent started_ = nullptr;
  std::vector<CUevent> spare_;
  std::map<std::pair<Stream, Direction>, Lane> lanes_;
  Counters ended_[2];  // of streams that are gone
};

}  // namespace pie::cuda
