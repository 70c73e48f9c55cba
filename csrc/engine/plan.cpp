#include "engine/plan.h"

#include <algorithm>
#include <string>
#include <utility>

namespace pie {
namespace {

constexpr int64_t kMostStep = int64_t{1} << 62;
constexpr int64_t kFlags = PIE_PLAN_STORES_FIRST | PIE_PLAN_AFTER_ALL | PIE_PLAN_STORES_AFTER_ALL |
                           PIE_PLAN_PROMOTIONS_FIRST;

std::string text(const char* name, const pie_run& run) {
  return std::string(name) + " run (block " + std::to_string(run.block) + ", row " +
         std::to_string(run.row) + ", count " + std::to_string(run.count) + ")";
}

void check_disjoint_rows(const Runs& stores, const Runs& promotions) {
  if (stores.empty() || promotions.empty()) return;
  const auto by_row = [](const pie_run& a, const pie_run& b) { return a.row < b.row; };
  Runs a = stores, b = promotions;
  std::sort(a.begin(), a.end(), by_row);
  std::sort(b.begin(), b.end(), by_row);
  for (size_t i = 0, j = 0; i < a.size() && j < b.size();) {
    if (a[i].row + a[i].count <= b[j].row) {
      ++i;
    } else if (b[j].row + b[j].count <= a[i].row) {
      ++j;
    } else {
      throw Error(PIE_ERR_PLAN, text("promotion", b[j]) + " reads rows that " +
                                    text("store", a[i]) + " of the same step writes");
    }
  }
}

}  // namespace

PlanReader::Moves PlanReader::read(const pie_plan& plan, int64_t newest) {
  const std::string step = "step " + std::to_string(plan.step);
  if (plan.step < 0 || plan.step > kMostStep) {
    throw Error(PIE_ERR_PLAN, step + " is not one of 0 to " + std::to_string(kMostStep));
  }
  if ((plan.flags & ~kFlags) != 0) {
    throw Error(PIE_ERR_PLAN, step + " has the flags " + std::to_string(plan.flags) +
                                  ", some of which are not known");
  }
  const int64_t resident = geometry_.resident;
  Moves moves{checked("store", plan.stores, plan.num_stores, 0, resident),
              checked("promotion", plan.promotions, plan.num_promotions, 0, resident),
              (plan.flags & PIE_PLAN_STORES_FIRST) != 0,
              (plan.flags & PIE_PLAN_AFTER_ALL) != 0,
              (plan.flags & PIE_PLAN_STORES_AFTER_ALL) != 0,
              (plan.flags & PIE_PLAN_PROMOTIONS_FIRST) != 0};
  check_disjoint_rows(moves.stores, moves.promotions);
  check_held("store", moves.stores);
  check_held("promotion", moves.promotions);
  if (plan.num_loads >= 0) {
    Runs loads = checked("load", plan.loads, plan.num_loads, resident, resident + geometry_.pooled);
    check_held("load", loads);
    loads_ = std::move(loads);
  } else if (!loads_.empty() && newest + 1 != plan.step) {
    throw Error(PIE_ERR_PLAN, step + " wants the loads of the step before, but the newest step " +
                                  "here is " + std::to_string(newest));
  } else {
    check_held("load", loads_);
  }
  return moves;
}

Runs PlanReader::checked(const char* name, const pie_run* runs, int64_t count, int64_t low,
                         int64_t high) const {
  // No step has more: each run has a row, and a block, of its own.
  const int64_t most = std::max(geometry_.rows, geometry_.resident + geometry_.pooled);
  if (count < 0 || count > most || (count > 0 && runs == nullptr)) {
    throw Error(PIE_ERR_PLAN, std::to_string(count) + " " + name + " runs" +
                                  (runs == nullptr ? " at a null pointer" : "") + "; 0 to " +
                                  std::to_string(most) + " can be");
  }
  for (int64_t i = 0; i < count; ++i) {
    const pie_run& run = runs[i];
    // Written so that no sum can overflow.
    if (run.count < 1 || run.count > geometry_.resident + geometry_.pooled ||
        run.count > geometry_.rows || run.block < low || run.block > high - run.count ||
        run.row < 0 || run.row > geometry_.rows - run.count) {
      throw Error(PIE_ERR_PLAN, text(name, run) + " leaves blocks [" + std::to_string(low) + ", " +
                                    std::to_string(high) + ") or rows [0, " +
                                    std::to_string(geometry_.rows) + ")");
    }
    if (run.row / geometry_.chunk_rows != (run.row + run.count - 1) / geometry_.chunk_rows) {
      throw Error(PIE_ERR_PLAN, text(name, run) + " crosses a chunk of " +
                                    std::to_string(geometry_.chunk_rows) + " rows");
    }
  }
  return count > 0 ? Runs(runs, runs + count) : Runs();
}

void PlanReader::check_held(const char* name, const Runs& runs) const {
  for (const pie_run& run : runs) {
    if (pool_.holds(run.row)) continue;
    throw Error(PIE_ERR_PLAN, std::string(name) + " of row " + std::to_string(run.row) +
                                  ": its chunk of the pool is not there");
  }
}

int64_t blocks_of(const Runs& runs) {
  int64_t blocks = 0;
  for (const pie_run& run : runs) blocks += run.count;
  return blocks;
}

}  // namespace pie
