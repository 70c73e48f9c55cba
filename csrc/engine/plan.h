// The runs of one step, checked.
#pragma once

#include <vector>

#include "memory/arena.h"

namespace pie {

using Runs = std::vector<pie_run>;

// Copies the runs. Throws PIE_ERR_PLAN unless every run has count >= 1, lies in one chunk of rows
// and in blocks [low, high).
Runs checked_runs(const Geometry& geometry, const char* name, const pie_run* runs, int64_t count,
                  int64_t low, int64_t high);

// Throws PIE_ERR_PLAN when a row is both stored to and promoted from: the promotion would read
// either content.
void check_disjoint_rows(const Runs& stores, const Runs& promotions);

int64_t blocks_of(const Runs& runs);

}  // namespace pie
