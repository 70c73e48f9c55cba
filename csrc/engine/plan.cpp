#include "engine/plan.h"

#include <algorithm>
#include <string>

namespace pie {
namespace {

std::string text(const char* name, const pie_run& run) {
  return std::string(name) + " run (block " + std::to_string(run.block) + ", row " +
         std::to_string(run.row) + ", count " + std::to_string(run.count) + ")";
}

}  // namespace

Runs checked_runs(const Geometry& geometry, const char* name, const pie_run* runs, int64_t count,
                  int64_t low, int64_t high) {
  // No step has more: each run has a row, and a block, of its own.
  const int64_t most = std::max(geometry.rows, geometry.resident + geometry.pooled);
  if (count < 0 || count > most || (count > 0 && runs == nullptr)) {
    throw Error(PIE_ERR_PLAN, std::to_string(count) + " " + name + " runs" +
                                  (runs == nullptr ? " at a null pointer" : "") + "; 0 to " +
                                  std::to_string(most) + " can be");
  }
  for (int64_t i = 0; i < count; ++i) {
    const pie_run& run = runs[i];
    // Written so that no sum can overflow.
    if (run.count < 1 || run.count > geometry.resident + geometry.pooled ||
        run.count > geometry.rows || run.block < low || run.block > high - run.count ||
        run.row < 0 || run.row > geometry.rows - run.count) {
      throw Error(PIE_ERR_PLAN, text(name, run) + " leaves blocks [" + std::to_string(low) + ", " +
                                    std::to_string(high) + ") or rows [0, " +
                                    std::to_string(geometry.rows) + ")");
    }
    if (run.row / geometry.chunk_rows != (run.row + run.count - 1) / geometry.chunk_rows) {
      throw Error(PIE_ERR_PLAN, text(name, run) + " crosses a chunk of " +
                                    std::to_string(geometry.chunk_rows) + " rows");
    }
  }
  return count > 0 ? Runs(runs, runs + count) : Runs();
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

int64_t blocks_of(const Runs& runs) {
  int64_t blocks = 0;
  for (const pie_run& run : runs) blocks += run.count;
  return blocks;
}

}  // namespace pie
