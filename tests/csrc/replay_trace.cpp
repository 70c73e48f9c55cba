// Replays traces of tests/helpers/trace.py over the engine, for builds with a
// sanitizer.
//
//   replay_trace TRACE...
//
// A trace has the plans that vLLM's scheduler and the policy made, and what the
// model of each step writes and must find. The compute is host callbacks on a
// stream of its own; two steps are in flight, as with the asynchronous
// scheduler. Prints the first wrong page and returns 1.
#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <fstream>
#include <memory>
#include <string>
#include <vector>

#include "testing.h"

namespace {

constexpr int64_t kLayerTag = int64_t{1} << 40;

struct Write {
  int64_t block, slot, tag;
};

struct Read {
  int64_t block;
  std::vector<int64_t> tags;
};

struct Step {
  bool planned = false;
  int64_t number = 0, forward = 0, flags = 0, num_loads = 0;
  std::vector<pie_run> stores, promotions, loads;
  std::vector<Write> writes;
  std::vector<Read> reads;
};

[[noreturn]] void fail(const std::string& text) {
  std::fprintf(stderr, "%s\n", text.c_str());
  std::exit(1);
}

void must(int code) {
  if (code != PIE_OK) fail(pie_last_error());
}

int64_t next(std::istream& in) {
  int64_t value;
  if (!(in >> value)) fail("the trace ends too early");
  return value;
}

std::vector<pie_run> runs(std::istream& in, int64_t count) {
  std::vector<pie_run> result;
  for (int64_t i = 0; i < count; ++i) {
    const int64_t block = next(in), row = next(in);
    result.push_back({block, row, next(in)});
  }
  return result;
}

Step read_step(std::istream& in) {
  Step step;
  step.planned = next(in) != 0;
  if (step.planned) {
    step.number = next(in);
    step.forward = next(in);
    step.flags = next(in);
    step.stores = runs(in, next(in));
    step.promotions = runs(in, next(in));
    step.num_loads = next(in);
    step.loads = runs(in, step.num_loads);
  }
  for (int64_t left = next(in); left > 0; --left) {
    const int64_t block = next(in), slot = next(in);
    step.writes.push_back({block, slot, next(in)});
  }
  for (int64_t left = next(in); left > 0; --left) {
    Read read{next(in), {}};
    for (int64_t tags = next(in); tags > 0; --tags) read.tags.push_back(next(in));
    step.reads.push_back(std::move(read));
  }
  return step;
}

class Replay {
 public:
  explicit Replay(std::istream& in) {
    const uint64_t seed = static_cast<uint64_t>(next(in));
    int64_t* sizes = &g_.num_layers;
    for (size_t i = 0; i < sizeof(g_) / sizeof(int64_t); ++i) sizes[i] = next(in);
    steps_left_ = next(in);
    must(pie_open(&g_, "host", 0, 0, -1, &engine_));
    must(pie_test_inject(engine_, PIE_FAULT_LATE, 3, 0, 0.2, seed));
    must(pie_stream_create(engine_, &compute_));
    int64_t bytes;
    must(pie_arena(engine_, &arena_, &bytes));
    const int64_t own = g_.resident_blocks * g_.page_bytes, g = g_.granularity;
    shift_ = (g - own % g) % g;
    stride_ = shift_ + own + (g_.pooled_blocks * g_.page_bytes + g - 1) / g * g;
  }

  ~Replay() {
    must(pie_stream_synchronize(engine_, compute_));
    must(pie_close(engine_));
  }

  int64_t run(std::istream& in) {
    int64_t done = 0;
    for (; steps_left_ > 0 && wrong_ == 0; --steps_left_, ++done) {
      steps_.push_back(std::make_unique<Step>(read_step(in)));
      submit(*steps_.back());
      events_.push_back(0);
      must(pie_event_create(engine_, &events_.back()));
      must(pie_event_record(engine_, events_.back(), compute_));
      if (events_.size() > 1)
        must(pie_test_event_synchronize(engine_, events_[events_.size() - 2]));
    }
    must(pie_stream_synchronize(engine_, compute_));
    return wrong_ ? -1 : done;
  }

 private:
  struct Task {
    Replay* replay;
    const Step* step;
    int64_t layer;
  };

  void submit(const Step& step) {
    const auto size = [](const auto& list) { return static_cast<int64_t>(list.size()); };
    const pie_plan plan{
        step.number,           step.stores.data(), size(step.stores), step.promotions.data(),
        size(step.promotions), step.loads.data(),  step.num_loads,    step.flags};
    pie_stats stats;
    const bool gated = step.planned && step.forward != 0;
    if (step.planned && !gated) must(pie_run_idle(engine_, &plan, compute_, &stats));
    if (gated) must(pie_begin_step(engine_, &plan, compute_));
    for (int64_t layer = 0; layer < g_.num_layers; ++layer) {
      tasks_.push_back({this, &step, layer});
      if (gated) must(pie_before_write(engine_, layer));
      must(pie_test_launch_host(engine_, compute_, write, &tasks_.back()));
      if (gated) must(pie_before_attention(engine_, layer));
      must(pie_test_launch_host(engine_, compute_, check, &tasks_.back()));
      if (gated) must(pie_after_attention(engine_, layer));
    }
    if (gated) must(pie_end_step(engine_, &stats));
  }

  int64_t* page(int64_t layer, int64_t block) const {
    const int64_t offset = layer * stride_ + shift_ + block * g_.page_bytes;
    return reinterpret_cast<int64_t*>(arena_ + static_cast<uint64_t>(offset));
  }

  static void write(void* argument) {
    const Task& task = *static_cast<Task*>(argument);
    for (const Write& w : task.step->writes) {
      task.replay->page(task.layer, w.block)[w.slot] = w.tag + task.layer * kLayerTag;
    }
  }

  static void check(void* argument) {
    const Task& task = *static_cast<Task*>(argument);
    for (const Read& read : task.step->reads) {
      const int64_t* found = task.replay->page(task.layer, read.block);
      for (size_t i = 0; i < read.tags.size(); ++i) {
        if (found[i] == read.tags[i] + task.layer * kLayerTag) continue;
        if (task.replay->wrong_++ == 0) {
          std::printf("layer %ld block %ld slot %zu holds foreign KV\n", task.layer, read.block, i);
        }
        break;
      }
    }
  }

  pie_geometry g_{};
  pie_engine* engine_ = nullptr;
  uint64_t compute_ = 0, arena_ = 0;
  int64_t shift_ = 0, stride_ = 0, steps_left_ = 0;
  std::atomic<int> wrong_{0};
  std::deque<std::unique_ptr<Step>> steps_;
  std::deque<Task> tasks_;
  std::vector<uint64_t> events_;
};

}  // namespace

int main(int count, char** arguments) {
  int64_t steps = 0;
  for (int i = 1; i < count; ++i) {
    std::ifstream in(arguments[i]);
    Replay replay(in);
    const int64_t done = replay.run(in);
    if (done < 0) {
      std::printf("%s: wrong bytes\n", arguments[i]);
      return 1;
    }
    steps += done;
  }
  std::printf("%ld steps, no wrong byte\n", steps);
  return 0;
}
