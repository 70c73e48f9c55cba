// Which draft pages of pooled blocks hold what their rows do.
#pragma once

#include <vector>

#include "engine/plan.h"
#include "memory/arena.h"

namespace pie {

// A draft layer reads its pages of pooled blocks in place, many times after one copy. A page is as
// good as its row until the row is stored to again, so nobody has to say which ones to fill: what a
// step loads into the ring tells all pooled blocks that its drafts read.
class DraftPages {
 public:
  explicit DraftPages(const Geometry& geometry);

  // A step stores to these rows: pages that were filled from them are old.
  void stored(const Runs& stores);
  // The blocks of `loads` whose pages do not hold their rows, as runs; they do from now on.
  Runs missing(const Runs& loads);
  // No page is known to hold anything.
  void forget();

 private:
  static size_t at(int64_t index) { return static_cast<size_t>(index); }
  void pair(int64_t page, int64_t row);

  const Geometry& geometry_;
  std::vector<int64_t> row_of_;   // by pooled block, from the first one on; -1: of no row
  std::vector<int64_t> page_of_;  // by row: the page that holds it; -1: none
};

}  // namespace pie
