// The runs of steps, checked.
#pragma once

#include <vector>

#include "memory/arena.h"
#include "memory/pool.h"

namespace pie {

using Runs = std::vector<pie_run>;

// Reads plans, and keeps the loads of the newest: the next may mean them again.
class PlanReader {
 public:
  PlanReader(const Geometry& geometry, const Pool& pool) : geometry_(geometry), pool_(pool) {}

  struct Moves {
    Runs stores, promotions;
    bool stores_first, after_all;             // rules 24 and 25
    bool stores_after_all, promotions_first;  // rules 26 and 27
  };
  // Throws PIE_ERR_PLAN and changes nothing unless all flags are known, each run lies in the blocks
  // that it may name, in one chunk of rows that is there, and no row is both stored to and promoted
  // from: the promotion would read either content. `newest`: the step before, whose loads the plan
  // may mean.
  Moves read(const pie_plan& plan, int64_t newest);
  const Runs& loads() const { return loads_; }
  void forget() { loads_.clear(); }

 private:
  Runs checked(const char* name, const pie_run* runs, int64_t count, int64_t low,
               int64_t high) const;
  void check_held(const char* name, const Runs& runs) const;

  const Geometry& geometry_;
  const Pool& pool_;
  Runs loads_;
};

int64_t blocks_of(const Runs& runs);

}  // namespace pie
