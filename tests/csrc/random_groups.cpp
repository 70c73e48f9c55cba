// Random plans of a model with two groups of layers, against a model of what every page must hold.
//
//   random_groups FIRST_SEED COUNT [DRIVER [LACKING]]
//
// The layers of one group have gates, and its blocks the pool. Those of the other have neither, as
// sliding windows: they write and read resident pages of blocks of their own, in regions that they
// share with the first group and in others. Where they have no others, these blocks are stored and
// restored, too, as those of a preempted request. Neither have what zeroes or copies blocks ahead
// of the first layer, and what drafts after the last. An id goes from one group to the other within
// a step; plans have the flags that this asks for and no more, but for LACKING, bits that no plan
// has.
//
// The driver "cuda" runs over the tests' stand-in for libcuda, found by LD_LIBRARY_PATH, whose race
// check is told all that the compute accesses. Copies come late and torn. Prints the first wrong
// page or unordered access and returns 1.
#include <algorithm>
#include <cstdlib>
#include <deque>
#include <map>
#include <optional>
#include <random>
#include <set>

#include "random_pages.h"
#include "testing.h"

namespace {

using Runs = std::vector<pie_run>;
using Pages = std::vector<PageWork>;

void must(int code) {
  if (code == PIE_OK) return;
  std::printf("error: %s\n", pie_last_error());
  std::exit(2);
}

enum class Owner { kNone, kPool, kWindow };

struct Block {
  Owner owner = Owner::kNone;
  Id id = 0;
  bool stored = false, promoted = false;  // in this step
  bool ungated = false;  // used without a gate since the layers with gates passed last
};

// Compute of a step: ahead of the layers, and in those of either group.
struct Compute {
  Pages zeroed, copied_from, copied, early, windows, writes;
};

class Scenario {
 public:
  Scenario(uint64_t seed, const std::string& driver, int64_t lacking)
      : random_(seed), lacking_(lacking) {
    draw_model(driver);
    must(pie_open(&g_, driver.c_str(), 0, 0, -1, &engine_));
    int64_t bytes = 0;
    must(pie_arena(engine_, &layout_.arena, &bytes));
    const int64_t own = g_.resident_blocks * g_.page_bytes, unit = g_.granularity;
    layout_.page = g_.page_bytes;
    layout_.shift = (unit - own % unit) % unit;
    layout_.stride = bytes / g_.num_regions;
    if (seed % 2 == 0) must(pie_stream_create(engine_, &compute_));
    const auto late = static_cast<int>(1 + pick(3)), torn = static_cast<int>(1 + pick(3));
    const bool is_torn = chance(30);
    if (driver != "host") {
      standin_.emplace();
      standin_->clear();
      standin_->delay(late, 0, 0.3, seed);
      if (is_torn) standin_->tear(torn, 0.2);
      return;
    }
    must(pie_test_inject(engine_, PIE_FAULT_LATE, late, 0, 0.3, seed));
    if (is_torn) must(pie_test_inject(engine_, PIE_FAULT_TORN, torn, 0.2, 0, seed));
  }
  ~Scenario() { must(pie_close(engine_)); }

  int run(int steps) {
    for (int i = 0; i < steps && wrong_ == 0; ++i) {
      const int64_t kind = pick(12);
      ++number_;
      if (kind == 0) {
        unplanned();
      } else {
        planned(kind == 1, kind == 2);
      }
    }
    must(pie_abort_step(engine_));
    must(pie_stream_synchronize(engine_, compute_));
    check_all();
    return wrong_;
  }
  int64_t flagged(int64_t flag) const {
    const auto found = flagged_.find(flag);
    return found == flagged_.end() ? 0 : found->second;
  }

 private:
  int64_t pick(int64_t n) { return static_cast<int64_t>(random_() % static_cast<uint64_t>(n)); }
  bool chance(int percent) { return pick(100) < percent; }
  Id& row(int64_t row) { return rows_[static_cast<size_t>(row)]; }
  Block& block(int64_t block) { return blocks_[static_cast<size_t>(block)]; }

  void draw_model(const std::string& driver) {
    const int64_t layers = 1 + pick(5), rows = 2 + pick(12);
    windows_ = 1 + pick(6);
    int64_t unit = 0;
    must(pie_granularity(driver.c_str(), &unit));
    g_ = {layers,
          40 + pick(1500),
          4 + pick(8),
          1 + pick(5),
          1 + pick(layers),
          rows,
          1 + pick(rows),
          unit,
          std::max(layers, windows_) + pick(2)};
    blocks_.resize(static_cast<size_t>(g_.resident_blocks));
    rows_.assign(static_cast<size_t>(rows), 0);
    for (int64_t l = 0, w = 0; l + w < layers + windows_;) {
      const bool gated = w == windows_ || (l < layers && chance(50));
      order_.push_back({gated, gated ? l++ : w++});
    }
  }

  void launch(int64_t region, const Pages& pages, bool write) {
    if (pages.empty()) return;
    for (const PageWork& work : pages) {
      if (!standin_) break;
      standin_->access(compute_, layout_.address(region, work.block), layout_.page, write);
    }
    tasks_.push_back({&layout_, &wrong_, number_, region, pages, write});
    must(pie_test_launch_host(engine_, compute_, run_task, &tasks_.back()));
  }

  // Whether rows hold all pages of a window's block.
  bool windows_kept() const { return windows_ <= g_.num_layers; }

  Pages held(Owner owner) {
    Pages pages;
    for (int64_t b = 0; b < g_.resident_blocks; ++b) {
      if (block(b).owner == owner && block(b).id != 0) pages.push_back({b, block(b).id});
    }
    return pages;
  }

  // A run from a block and a row that both allow it, as long as they do; `take` has each pair.
  template <typename Ok, typename Take>
  void draw(Runs& runs, int64_t low, int64_t high, Ok ok, Take take) {
    pie_run run{low + pick(high - low), pick(g_.rows), 0};
    const int64_t longest = 1 + pick(3);
    while (run.count < longest && run.block + run.count < high && run.row + run.count < g_.rows &&
           ok(run.block + run.count, run.row + run.count) &&
           (run.row + run.count) / g_.chunk_rows == run.row / g_.chunk_rows) {
      take(run.block + run.count, run.row + run.count);
      ++run.count;
    }
    if (run.count > 0) runs.push_back(run);
  }

  void release() {
    for (Id& id : rows_) {
      if (chance(15)) id = 0;  // freed: a later store may take it
    }
    for (Block& b : blocks_) {
      b.stored = b.promoted = false;
      if (!chance(b.owner == Owner::kWindow ? 30 : 10)) continue;
      b.owner = Owner::kNone;
      b.id = 0;
    }
  }

  void draw_moves() {
    stores_.clear(), promotions_.clear();
    windows_stored_ = windows_filled_ = false;
    std::vector<bool> stored_rows(rows_.size());
    for (int i = 0; i < 3; ++i) {
      draw(
          stores_, 0, g_.resident_blocks,
          [&](int64_t b, int64_t r) {
            const Owner owner = block(b).owner;
            const bool kept = owner == Owner::kPool || (owner == Owner::kWindow && windows_kept());
            return kept && block(b).id != 0 && row(r) == 0;
          },
          [&](int64_t b, int64_t r) {
            row(r) = block(b).id;
            if (block(b).owner == Owner::kWindow) {
              windows_stored_ = true;
              of_windows_.insert(row(r));
            }
            stored_rows[static_cast<size_t>(r)] = block(b).stored = true;
            if (chance(70)) block(b).owner = Owner::kNone, block(b).id = 0;
          });
    }
    for (int i = 0; i < 3; ++i) {
      draw(
          promotions_, 0, g_.resident_blocks,
          [&](int64_t b, int64_t r) {
            return block(b).owner == Owner::kNone && row(r) != 0 &&
                   !stored_rows[static_cast<size_t>(r)];
          },
          [&](int64_t b, int64_t r) {
            const bool window = of_windows_.count(row(r)) > 0;
            block(b).owner = window ? Owner::kWindow : Owner::kPool, block(b).id = row(r);
            block(b).promoted = true;
            windows_filled_ |= window;
          });
    }
  }

  // Whether the loads are those of the step before.
  bool draw_loads() {
    const bool known = std::all_of(loads_.begin(), loads_.end(), [&](const pie_run& run) {
      for (int64_t k = 0; k < run.count; ++k) {
        if (row(run.row + k) == 0 || of_windows_.count(row(run.row + k)) > 0) return false;
      }
      return true;
    });
    const bool same = known && loads_step_ + 1 == number_ && chance(40);
    loads_step_ = number_;
    if (same) return true;
    loads_.clear();
    std::vector<bool> used(static_cast<size_t>(g_.pooled_blocks));
    const auto at = [&](int64_t b) { return static_cast<size_t>(b - g_.resident_blocks); };
    for (int i = 0; i < 3; ++i) {
      draw(
          loads_, g_.resident_blocks, g_.resident_blocks + g_.pooled_blocks,
          [&](int64_t b, int64_t r) {
            return !used[at(b)] && row(r) != 0 && of_windows_.count(row(r)) == 0;
          },
          [&](int64_t b, int64_t) { used[at(b)] = true; });
    }
    return false;
  }

  // Free blocks go to either group, also those that are being stored, and blocks are written.
  Compute claim() {
    Compute work;
    const Pages known = held(Owner::kPool);
    for (int64_t i = 0; i < g_.resident_blocks; ++i) {
      Block& b = block(i);
      if (b.promoted) continue;
      const bool free = b.owner == Owner::kNone;
      if (free && chance(30)) continue;
      if (free ? chance(60) : b.owner == Owner::kWindow) {
        b.owner = Owner::kWindow;
        if (!free && chance(50)) continue;
        b.id = next_id_++;
        (chance(30) ? work.early : work.windows).push_back({i, b.id});
        continue;
      }
      b.owner = Owner::kPool;
      const PageWork* source = free && !known.empty() && chance(20)
                                   ? &known[static_cast<size_t>(pick(known.size()))]
                                   : nullptr;
      if (source != nullptr && !block(source->block).promoted) {
        b.id = source->id;
        work.copied_from.push_back(*source);
        work.copied.push_back({i, b.id});
        continue;
      }
      if (!free && chance(60)) continue;
      if (free && chance(40)) work.zeroed.push_back({i, next_id_++});
      b.id = next_id_++;
      work.writes.push_back({i, b.id});
    }
    return work;
  }

  int64_t flags(const Compute& work) {
    int64_t flags = 0;
    for (const Pages* pages : {&work.zeroed, &work.copied, &work.early, &work.windows}) {
      for (const PageWork& page : *pages) {
        if (block(page.block).stored) flags |= PIE_PLAN_STORES_FIRST;
      }
    }
    for (const Block& b : blocks_) {
      if (b.promoted && b.ungated) flags |= PIE_PLAN_AFTER_ALL;
    }
    if (windows_stored_) flags |= PIE_PLAN_STORES_AFTER_ALL;
    if (windows_filled_) flags |= PIE_PLAN_PROMOTIONS_FIRST;
    for (int64_t flag = 1; flag <= flags; flag *= 2) flagged_[flag] += (flags & flag) != 0;
    return flags & ~lacking_;
  }

  void planned(bool idle, bool abort) {
    release();
    draw_moves();
    const bool same = draw_loads();
    const Compute work = idle ? Compute() : claim();
    const auto size = [](const Runs& runs) { return static_cast<int64_t>(runs.size()); };
    const pie_plan plan{number_,
                        stores_.data(),
                        size(stores_),
                        promotions_.data(),
                        size(promotions_),
                        loads_.data(),
                        same ? -1 : size(loads_),
                        flags(work)};
    pie_stats stats;
    if (idle) return must(pie_run_idle(engine_, &plan, compute_, &stats));
    must(pie_set_option(engine_, PIE_OPTION_HEAD_FIRST, chance(75)));
    must(pie_begin_step(engine_, &plan, compute_));
    ahead(work);
    if (!layers(work, true, abort ? pick(order_.size()) : -1)) {
      must(pie_abort_step(engine_));
      for (const Pages* pages : {&work.writes, &work.windows}) {
        for (const PageWork& page : *pages) block(page.block).id = 0;  // half-written
      }
      for (Block& b : blocks_) b.ungated = false;
      return;
    }
    must(pie_end_step(engine_, &stats));
    for (Block& b : blocks_) b.ungated = b.owner == Owner::kWindow;
    if (chance(50)) draft();
  }

  void unplanned() {
    release();
    const Compute work = claim();
    ahead(work);
    layers(work, false, -1);
    for (Block& b : blocks_) b.ungated = false;  // Rule 3.
  }

  // What comes ahead of the layers, in all regions where the block has a page.
  void ahead(const Compute& work) {
    for (int64_t r = 0; r < g_.num_layers; ++r) {
      launch(r, work.zeroed, true);
      launch(r, work.copied_from, false);
      launch(r, work.copied, true);
    }
    for (int64_t r = 0; r < windows_; ++r) launch(r, work.early, true);
  }

  // False where it stops at one.
  bool layers(const Compute& work, bool gates, int64_t stop) {
    Pages reads = held(Owner::kPool);
    for (const pie_run& run : loads_) {
      if (!gates) break;
      for (int64_t k = 0; k < run.count; ++k) reads.push_back({run.block + k, row(run.row + k)});
    }
    for (const auto& [gated, region] : order_) {
      if (stop-- == 0) return false;
      if (!gated) {
        launch(region, work.windows, true);
        launch(region, held(Owner::kWindow), false);
        continue;
      }
      if (gates) must(pie_before_write(engine_, region));
      launch(region, work.writes, true);
      if (gates) must(pie_before_attention(engine_, region));
      launch(region, reads, false);
      if (gates) must(pie_after_attention(engine_, region));
    }
    return true;
  }

  // After the step: blocks of windows are written once more.
  void draft() {
    Pages pages = held(Owner::kWindow);
    for (PageWork& page : pages) page.id = block(page.block).id = next_id_++;
    for (int64_t r = 0; r < windows_; ++r) launch(r, pages, true);
  }

  void check_all() {
    for (int64_t r = 0; r < g_.num_regions; ++r) {
      Pages pages;
      if (r < windows_) pages = held(Owner::kWindow);
      const Pages others = held(Owner::kPool);
      if (r < g_.num_layers) pages.insert(pages.end(), others.begin(), others.end());
      Task task{&layout_, &wrong_, number_, r, pages, false};
      run_task(&task);
      for (int64_t i = 0; i < g_.rows && r < g_.num_layers; ++i) {
        uint64_t page = 0;
        must(pie_row_page(engine_, i, r, &page));
        if (of_windows_.count(row(i)) > 0 && r >= windows_) continue;
        if (row(i) == 0 || holds(reinterpret_cast<uint8_t*>(page), row(i), r, layout_.page)) {
          continue;
        }
        if (wrong_++ == 0) std::printf("row %ld layer %ld does not hold %ld\n", i, r, row(i));
      }
    }
  }

  std::mt19937_64 random_;
  const int64_t lacking_;
  std::optional<Standin> standin_;  // of the driver "cuda"
  std::atomic<int> wrong_{0};
  std::deque<Task> tasks_;
  pie_geometry g_{};
  pie_engine* engine_ = nullptr;
  Layout layout_{};
  uint64_t compute_ = 0;
  int64_t windows_ = 0;                          // layers without gates
  std::vector<std::pair<bool, int64_t>> order_;  // the model's layers: with gates?, region
  std::vector<Block> blocks_;
  std::vector<Id> rows_;
  Runs stores_, promotions_, loads_;
  int64_t loads_step_ = 0, number_ = 0;
  std::set<Id> of_windows_;  // contents of windows' blocks that were stored
  bool windows_stored_ = false, windows_filled_ = false;  // in this step
  std::map<int64_t, int64_t> flagged_;                    // steps by flag
  Id next_id_ = 1;
};

}  // namespace

int main(int count, char** arguments) {
  const auto first = static_cast<uint64_t>(count > 1 ? std::atoll(arguments[1]) : 1);
  const auto seeds = static_cast<uint64_t>(count > 2 ? std::atoll(arguments[2]) : 20);
  const std::string driver = count > 3 ? arguments[3] : "host";
  const int64_t lacking = count > 4 ? std::atoll(arguments[4]) : 0;
  const int64_t all[] = {PIE_PLAN_STORES_FIRST, PIE_PLAN_AFTER_ALL, PIE_PLAN_STORES_AFTER_ALL,
                         PIE_PLAN_PROMOTIONS_FIRST};
  int64_t steps[4] = {};
  for (uint64_t seed = first; seed < first + seeds; ++seed) {
    const auto number = static_cast<unsigned long>(seed);
    bool wrong = false;
    {
      Scenario scenario(seed, driver, lacking);
      wrong = scenario.run(40) != 0;
      for (int i = 0; i < 4; ++i) steps[i] += scenario.flagged(all[i]);
    }
    if (wrong) std::printf("seed %lu: wrong bytes\n", number);
    for (const char* what : {"standin_violations", "standin_live"}) {
      if (driver == "host") break;
      const std::string text = Standin().found(what);
      if (text.empty()) continue;
      std::printf("seed %lu: %s: %s\n", number, what, text.c_str());
      wrong = true;
    }
    if (wrong) return 1;
  }
  std::printf("%lu seeds, no wrong byte; steps with each flag:", static_cast<unsigned long>(seeds));
  for (const int64_t count : steps) std::printf(" %ld", static_cast<long>(count));
  std::printf("\n");
  return 0;
}
