// Random plans against a model of what every page must hold, for builds with a sanitizer.
//
//   random_plans FIRST_SEED COUNT [DRIVER]
//
// The driver "cuda" runs over the tests' stand-in for libcuda, found by LD_LIBRARY_PATH.
//
// Each seed draws a geometry, an inline or an asynchronous compute, faults that delay and tear
// copies, and some steps: gated, ungated, idle and aborted. The compute is host callbacks that
// write and check pages through the layer's own view; nothing waits between steps, so on the
// asynchronous stream several are in flight. Draft layers do so behind each step. A second thread
// gives chunks back that hold nothing, and takes them again, beside the steps. Prints the first
// wrong page and returns 1.
#include <algorithm>
#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <map>
#include <random>
#include <set>
#include <string>
#include <thread>

#include "engine/engine.h"
#include "random_pages.h"

namespace {

class Scenario {
 public:
  Scenario(uint64_t seed, const std::string& driver)
      : random_(seed), engine_(geometry(driver), driver, 0, 0, -1), g_(engine_.geometry()) {
    resident_.assign(static_cast<size_t>(g_.resident), 0);
    rows_.assign(static_cast<size_t>(g_.rows), 0);
    if (seed % 2 == 0) compute_ = engine_.driver().stream_create();
    const auto late = static_cast<int>(1 + pick(3)), torn = static_cast<int>(1 + pick(3));
    const bool is_late = chance(60), is_torn = chance(30);
    if (driver != "host") {
      const Standin standin;
      standin.clear();
      if (is_late) standin.delay(late, 0, 0.4, seed);
      if (is_torn) standin.tear(torn, 0.2);
      return;
    }
    if (is_late) engine_.driver().inject(PIE_FAULT_LATE, late, 0, 0.4, seed);
    if (is_torn) engine_.driver().inject(PIE_FAULT_TORN, torn, 0.2, 0, seed);
  }

  ~Scenario() {
    if (resizer_.joinable()) resizer_.join();
  }

  int run(int steps) {
    for (int i = 0; i < steps; ++i) {
      const int64_t kind = pick(10);
      ++number_;
      if (kind == 0) {
        ungated();
      } else {
        planned(kind == 1, kind == 2);
      }
      if (chance(30)) resize();
    }
    engine_.abort_step();
    engine_.driver().synchronize();
    for (int64_t l = 0; l < g_.row_pages; ++l) {
      Task task{&layout_, &wrong_, number_, l, held(), false};
      run_task(&task);
      for (size_t r = 0; r < rows_.size(); ++r) {
        if (rows_[r] == 0) continue;
        const auto* page =
            reinterpret_cast<const uint8_t*>(engine_.pool().page(static_cast<int64_t>(r), l));
        if (!holds(page, rows_[r], l, g_.page) && wrong_++ == 0) {
          std::printf("row %zu layer %ld does not hold %ld\n", r, l, rows_[r]);
        }
      }
    }
    return wrong_;
  }

 private:
  int64_t pick(int64_t n) { return static_cast<int64_t>(random_() % static_cast<uint64_t>(n)); }
  bool chance(int percent) { return pick(100) < percent; }

  pie_geometry geometry(const std::string& driver) {
    const int64_t layers = 1 + pick(6), rows = 2 + pick(12), drafts = pick(3);
    const auto unit = static_cast<int64_t>(pie::make_driver(driver, 0)->granularity());
    return {layers, 40 + pick(3000), 3 + pick(8), 1 + pick(6),     1 + pick(layers),
            rows,   1 + pick(rows),  unit,        layers + drafts, drafts};
  }

  // A run from a block and a row that both allow it, as long as they do.
  template <typename Block, typename Row>
  void draw(pie::Runs& runs, int64_t low, int64_t high, Block block_ok, Row row_ok) {
    pie_run run{low + pick(high - low), pick(g_.rows), 0};
    const int64_t longest = 1 + pick(3);
    while (run.count < longest && run.block + run.count < high && run.row + run.count < g_.rows &&
           block_ok(run.block + run.count) && row_ok(run.row + run.count) &&
           (run.row + run.count) / g_.chunk_rows == run.row / g_.chunk_rows) {
      ++run.count;
    }
    if (run.count > 0) runs.push_back(run);
  }

  Id& resident(int64_t block) { return resident_[static_cast<size_t>(block)]; }
  Id& row(int64_t row) { return rows_[static_cast<size_t>(row)]; }

  std::vector<PageWork> held() {
    std::vector<PageWork> pages;
    for (int64_t b = 0; b < g_.resident; ++b) {
      if (resident(b) != 0) pages.push_back({b, resident(b)});
    }
    return pages;
  }

  std::vector<PageWork> draw_writes(const std::map<int64_t, bool>& promoted) {
    std::vector<PageWork> writes;
    for (int64_t b = 0; b < g_.resident; ++b) {
      if (promoted.count(b) == 0 && chance(40)) {
        resident(b) = next_id_++;
        writes.push_back({b, resident(b)});
      }
    }
    return writes;
  }

  void launch(int64_t layer, const std::vector<PageWork>& pages, bool write) {
    tasks_.push_back({&layout_, &wrong_, number_, layer, pages, write});
    engine_.driver().launch_host(compute_, run_task, &tasks_.back());
  }

  void ungated() {
    const auto writes = draw_writes({});
    for (int64_t l = 0; l < g_.row_pages; ++l) {
      launch(l, writes, true);
      launch(l, held(), false);
    }
  }

  // Gives a chunk back that holds nothing, in a second thread; half of them it takes again.
  void resize() {
    const int64_t chunk = pick(g_.num_chunks), first = chunk * g_.chunk_rows;
    for (int64_t r = first; r < first + g_.rows_of_chunk(chunk); ++r) {
      if (row(r) != 0) return;
    }
    if (resizer_.joinable()) resizer_.join();
    const bool again = chance(50);
    gone_.insert(chunk);
    resizer_ = std::thread([this, chunk, again] {
      engine_.release_chunk(chunk);
      if (again) engine_.commit_chunk(chunk);
    });
  }

  void need(int64_t chunk) {
    if (gone_.count(chunk) == 0) return;
    resizer_.join();
    for (const int64_t c : gone_) engine_.commit_chunk(c);
    gone_.clear();
  }

  void planned(bool idle, bool abort) {
    for (Id& id : rows_) {
      if (chance(15)) id = 0;  // freed: a later store may take it
    }
    pie::Runs stores, promotions, loads;
    std::map<int64_t, bool> stored_rows, promoted_blocks;
    for (int i = 0; i < 3; ++i) {
      const size_t before = stores.size();
      draw(
          stores, 0, g_.resident, [&](int64_t b) { return resident(b) != 0; },
          [&](int64_t r) { return row(r) == 0; });
      if (stores.size() == before) continue;
      const pie_run& run = stores.back();
      need(run.row / g_.chunk_rows);
      for (int64_t k = 0; k < run.count; ++k) {
        row(run.row + k) = resident(run.block + k);
        stored_rows[run.row + k] = true;
        if (chance(70)) resident(run.block + k) = 0;
      }
    }
    for (int i = 0; i < 2; ++i) {
      const size_t before = promotions.size();
      draw(
          promotions, 0, g_.resident, [&](int64_t b) { return resident(b) == 0; },
          [&](int64_t r) { return row(r) != 0 && stored_rows.count(r) == 0; });
      if (promotions.size() == before) continue;
      const pie_run& run = promotions.back();
      for (int64_t k = 0; k < run.count; ++k) {
        resident(run.block + k) = row(run.row + k);
        promoted_blocks[run.block + k] = true;
      }
    }
    const auto known = [&](const pie_run& run) {
      for (int64_t k = 0; k < run.count; ++k) {
        if (row(run.row + k) == 0) return false;
      }
      return true;
    };
    const bool same = chance(40) && loads_step_ + 1 == number_ &&
                      std::all_of(loads_.begin(), loads_.end(), known);
    if (!same) {
      std::map<int64_t, bool> used;
      for (int i = 0; i < 3; ++i) {
        const size_t before = loads.size();
        draw(
            loads, g_.resident, g_.resident + g_.pooled,
            [&](int64_t b) { return used.count(b) == 0; }, [&](int64_t r) { return row(r) != 0; });
        if (loads.size() == before) continue;
        for (int64_t k = 0; k < loads.back().count; ++k) used[loads.back().block + k] = true;
      }
      loads_ = loads;
    }
    loads_step_ = number_;
    const auto size = [](const pie::Runs& runs) { return static_cast<int64_t>(runs.size()); };
    const pie_plan plan{number_,
                        stores.data(),
                        size(stores),
                        promotions.data(),
                        size(promotions),
                        loads_.data(),
                        same ? -1 : size(loads_),
                        0};
    if (idle) {
      engine_.run_idle(plan, compute_);
      return;
    }
    gated(plan, abort ? pick(g_.layers) : -1, promoted_blocks);
  }

  void gated(const pie_plan& plan, int64_t stop, const std::map<int64_t, bool>& promoted) {
    const auto writes = draw_writes(promoted);
    auto reads = held();
    for (const pie_run& run : loads_) {
      for (int64_t k = 0; k < run.count; ++k) reads.push_back({run.block + k, row(run.row + k)});
    }
    engine_.set_option(PIE_OPTION_HEAD_FIRST, chance(75));
    engine_.begin_step(plan, compute_);
    for (int64_t l = 0; l < g_.layers; ++l) {
      if (l == stop) break;
      engine_.before_write(l);
      launch(l, writes, true);
      engine_.before_attention(l);
      launch(l, reads, false);
      engine_.after_attention(l);
    }
    if (stop < 0) {
      const bool early = chance(50);  // Drafts may run before the step is closed, or after it.
      if (!early) engine_.end_step();
      for (int64_t l = g_.layers; l < g_.row_pages; ++l) {
        launch(l, writes, true);
        launch(l, reads, false);
      }
      if (early) engine_.end_step();
      return;
    }
    engine_.abort_step();
    for (const PageWork& work : writes) resident(work.block) = 0;  // half-written
  }

  std::mt19937_64 random_;
  std::atomic<int> wrong_{0};
  std::deque<Task> tasks_;  // stay until the engine, which runs them, is gone
  pie::Engine engine_;
  const pie::Geometry& g_;
  const Layout layout_{engine_.arena().base(), g_.shift, g_.layer_stride, g_.page};
  pie::Stream compute_ = 0;
  std::vector<Id> resident_, rows_;
  pie::Runs loads_;
  int64_t loads_step_ = 0, number_ = 0;
  Id next_id_ = 1;
  std::set<int64_t> gone_;  // chunks that the second thread gave back, or is giving back
  std::thread resizer_;     // joinable while gone_ is not empty
};

}  // namespace

int main(int count, char** arguments) {
  const auto first = static_cast<uint64_t>(count > 1 ? std::atoll(arguments[1]) : 1);
  const auto seeds = static_cast<uint64_t>(count > 2 ? std::atoll(arguments[2]) : 20);
  const std::string driver = count > 3 ? arguments[3] : "host";
  for (uint64_t seed = first; seed < first + seeds; ++seed) {
    if (Scenario(seed, driver).run(30) != 0) {
      std::printf("seed %lu: wrong bytes\n", static_cast<unsigned long>(seed));
      return 1;
    }
    if (driver == "host") continue;
    for (const char* what : {"standin_violations", "standin_live"}) {
      const std::string text = Standin().found(what);
      if (text.empty()) continue;
      std::printf("seed %lu: %s: %s\n", static_cast<unsigned long>(seed), what, text.c_str());
      return 1;
    }
  }
  std::printf("%lu seeds, no wrong byte\n", static_cast<unsigned long>(seeds));
  return 0;
}
