#include "engine/draft_pages.h"

namespace pie {

DraftPages::DraftPages(const Geometry& geometry) : geometry_(geometry) { forget(); }

void DraftPages::forget() {
  if (geometry_.drafts == 0) return;
  row_of_.assign(at(geometry_.pooled), -1);
  page_of_.assign(at(geometry_.rows), -1);
}

void DraftPages::stored(const Runs& stores) {
  if (geometry_.drafts == 0) return;
  for (const pie_run& run : stores) {
    for (int64_t row = run.row; row < run.row + run.count; ++row) {
      int64_t& page = page_of_[at(row)];
      if (page >= 0) row_of_[at(page)] = -1;
      page = -1;
    }
  }
}

Runs DraftPages::missing(const Runs& loads) {
  Runs found;
  if (geometry_.drafts == 0) return found;
  for (const pie_run& run : loads) {
    for (int64_t i = 0; i < run.count; ++i) {
      const int64_t block = run.block + i, row = run.row + i;
      if (row_of_[at(block - geometry_.resident)] == row) continue;
      pair(block - geometry_.resident, row);
      const bool follows = !found.empty() && i > 0 &&
                           found.back().block + found.back().count == block &&
                           found.back().row + found.back().count == row;
      if (follows) {
        ++found.back().count;
      } else {
        found.push_back({block, row, 1});
      }
    }
  }
  return found;
}

// One page a row, so that a store to the row finds it.
void DraftPages::pair(int64_t page, int64_t row) {
  int64_t& old_row = row_of_[at(page)];
  if (old_row >= 0) page_of_[at(old_row)] = -1;
  int64_t& old_page = page_of_[at(row)];
  if (old_page >= 0) row_of_[at(old_page)] = -1;
  old_row = row;
  old_page = page;
}

}  // namespace pie
