// The inside of a step: opening, submitting one layer's copies, checking, closing.
#include <algorithm>
#include <chrono>
#include <string>
#include <utility>

#include "engine/engine.h"

namespace pie {
namespace {

using Now = std::chrono::steady_clock;

// Of steps that load, this share is timed where timing takes events on streams: they cost a
// microsecond or two each, and a step needs two a layer.
constexpr int64_t kSampleEvery = 4;

constexpr int64_t kMostStep = int64_t{1} << 62;

}  // namespace

void Engine::open_step(const pie_plan& plan, bool forward, Stream compute) {
  if (step_.open) {
    throw Error(PIE_ERR_STATE, "step " + std::to_string(plan.step) + " begins inside step " +
                                   std::to_string(step_.number) + "; end or abort that first");
  }
  if (capturing()) throw Error(PIE_ERR_STATE, "a step begins inside a capture; end that first");
  check_streams();
  check_replays(false);
  driver_->stream_error(compute);  // throws where there is no such stream
  if (plan.step < 0 || plan.step > kMostStep) {
    throw Error(PIE_ERR_PLAN, "step " + std::to_string(plan.step) + " is not one of 0 to " +
                                  std::to_string(kMostStep));
  }
  const int64_t resident = geometry_.resident;
  Step step;
  step.number = plan.step;
  step.compute = compute;
  step.stores = checked_runs(geometry_, "store", plan.stores, plan.num_stores, 0, resident);
  step.promotions =
      checked_runs(geometry_, "promotion", plan.promotions, plan.num_promotions, 0, resident);
  check_disjoint_rows(step.stores, step.promotions);
  check_held("store", step.stores);
  check_held("promotion", step.promotions);
  if (plan.num_loads >= 0) {
    Runs loads = checked_runs(geometry_, "load", plan.loads, plan.num_loads, resident,
                              resident + geometry_.pooled);
    check_held("load", loads);
    loads_ = std::move(loads);
  } else if (!loads_.empty() && last_step_ + 1 != plan.step) {
    throw Error(PIE_ERR_PLAN, "step " + std::to_string(plan.step) +
                                  " wants the loads of the step before, but the newest step here "
                                  "is " +
                                  std::to_string(last_step_));
  } else {
    check_held("load", loads_);
  }
  step.forward = forward;
  step.gates.reserve(geometry_.layers);
  step.streams_in = !step.promotions.empty() || (forward && !loads_.empty());
  step.stats.step = plan.step;
  step.open = true;
  step.before = last_compute_;
  step.barrier = need_barrier_ || last_step_ + 1 != plan.step || step.before != compute;
  step_ = std::move(step);
  last_step_ = plan.step;
  last_compute_ = compute;
  // Counted by steps that copy: their numbers may keep a rhythm of their own.
  if (forward) ++gated_steps_;
  const bool sampled = !forward || gated_steps_ % kSampleEvery == 0;
  driver_->sample(sampled);
  if (forward && sampled) stall_.begin(plan.step, compute);
}

// Rule 3: whatever the compute did since the newest step here comes before the copies; and on a
// compute stream that is new, after them.
void Engine::submit_barrier() {
  if (!step_.barrier) return;
  driver_->event_record(events_->barrier, step_.compute);
  driver_->stream_wait(h2d_, events_->barrier);
  driver_->stream_wait(d2h_, events_->barrier);
  need_barrier_ = false;
  if (step_.before == step_.compute) return;
  const auto last = static_cast<size_t>(geometry_.layers - 1);
  for (const Stream stream : {Stream{h2d_}, Stream{d2h_}, step_.compute}) {
    driver_->stream_wait(stream, events_->done[last]);
  }
  driver_->stream_wait(step_.compute, events_->stored[last]);
  driver_->stream_wait(step_.compute, events_->ready[last]);
  // Rule 20: the tables are emptied after the replay.
  if (graphs_ != nullptr) driver_->stream_wait(step_.compute, graphs_->tables.emptied());
}

// Rule 1: after the last compute that wrote or read the pages (done), and after every earlier load
// that reads the rows to be written (ready).
void Engine::submit_store(int64_t layer) {
  const auto l = static_cast<size_t>(layer);
  driver_->stream_wait(d2h_, events_->done[l]);
  driver_->stream_wait(d2h_, events_->ready[l]);
  if (!debug(PIE_DEBUG_SKIP_STORES)) {
    step_.stats.bytes_stored += copy_runs(d2h_, Direction::kDeviceToHost, step_.stores, layer);
  }
  driver_->event_record(events_->stored[l], d2h_);
  store_pending_[l] = true;
  step_.next_store = layer + 1;
}

// Rule 2: after the last user of the slot, after the last compute on the layer's own pages (for
// promotions), and after the stores of the rows and from the pages it names.
void Engine::submit_load(int64_t layer) {
  const auto l = static_cast<size_t>(layer);
  int64_t& user = slot_user_[static_cast<size_t>(layer % geometry_.slots)];
  if (user >= 0) driver_->stream_wait(h2d_, events_->done[static_cast<size_t>(user)]);
  if (!step_.promotions.empty()) driver_->stream_wait(h2d_, events_->done[l]);
  driver_->stream_wait(h2d_, events_->stored[l]);
  if (!debug(PIE_DEBUG_SKIP_LOADS)) {
    const int64_t promoted = copy_runs(h2d_, Direction::kHostToDevice, step_.promotions, layer);
    const bool fill = step_.forward && !loads_.empty();
    if (debug(PIE_DEBUG_POISON) && fill) {
      driver_->memset_async(h2d_, arena_.page(layer, geometry_.resident), 0xFF,
                            static_cast<size_t>(geometry_.pooled * geometry_.page));
    }
    const int64_t loaded = fill ? copy_runs(h2d_, Direction::kHostToDevice, loads_, layer) : 0;
    step_.stats.bytes_promoted += promoted;
    step_.stats.bytes_loaded += promoted + loaded;
  }
  driver_->event_record(events_->ready[l], h2d_);
  user = layer;
  step_.next_load = layer + 1;
}

int64_t Engine::copy_runs(Stream stream, Direction direction, const Runs& runs, int64_t layer) {
  if (runs.empty()) return 0;
  scratch_.clear();
  int64_t bytes = 0;
  for (const pie_run& run : runs) {
    const Address device = arena_.page(layer, run.block);
    const Address host = pool_.page(run.row, layer);
    const auto size = static_cast<size_t>(run.count * geometry_.page);
    const bool in = direction == Direction::kHostToDevice;
    scratch_.push_back(CopyOp{in ? device : host, in ? host : device, size});
    bytes += run.count * geometry_.page;
  }
  driver_->copy_batch(stream, direction, scratch_.data(), scratch_.size());
  step_.stats.copies += static_cast<int64_t>(scratch_.size());
  return bytes;
}

// Seconds that a wait blocked this thread are stall; on a real stream events tell, in a sample.
void Engine::wait_on_compute(Event event) {
  if (!driver_->stream_is_inline(step_.compute)) return stall_.wait(step_.compute, event);
  const auto start = Now::now();
  try {
    driver_->stream_wait(step_.compute, event);
  } catch (const Error&) {
    check_streams();  // says which copy failed
    throw;
  }
  step_.stats.stall_seconds += std::chrono::duration<double>(Now::now() - start).count();
}

void Engine::check_streams() {
  for (const auto& [stream, name] : {std::pair<Stream, const char*>{h2d_, "loads"},
                                     std::pair<Stream, const char*>{d2h_, "stores"}}) {
    const std::string text = driver_->stream_error(stream);
    if (!text.empty())
      throw Error(PIE_ERR_TRANSFER, std::string("stream of ") + name + ": " + text);
  }
}

void Engine::check_layer(int64_t layer) const {
  if (!step_.open && !capturing()) {
    throw Error(PIE_ERR_STATE, "a gate was called without begin_step");
  }
  if (step_.open && step_.in_graph) {
    throw Error(PIE_ERR_STATE, "a gate was called in step " + std::to_string(step_.number) +
                                   ", which runs in a graph");
  }
  if (layer < 0 || layer >= geometry_.layers) {
    throw Error(PIE_ERR_GATE, "no layer " + std::to_string(layer) + "; there are " +
                                  std::to_string(geometry_.layers));
  }
}

void Engine::check_held(const char* name, const Runs& runs) const {
  for (const pie_run& run : runs) {
    if (pool_.holds(run.row)) continue;
    throw Error(PIE_ERR_PLAN, std::string(name) + " of row " + std::to_string(run.row) +
                                  ": its chunk of the pool is not there");
  }
}

pie_stats Engine::close_step() {
  step_.open = false;
  const Counters in = driver_->counters(Direction::kHostToDevice);
  const Counters out = driver_->counters(Direction::kDeviceToHost);
  step_.stats.bytes_finished = in.bytes - reported_in_.bytes;
  step_.stats.load_seconds = in.seconds - reported_in_.seconds;
  step_.stats.store_seconds = out.seconds - reported_out_.seconds;
  reported_in_ = in;
  reported_out_ = out;
  step_.stats.gates = step_.in_graph ? geometry_.layers : step_.gates.passed();
  stall_.end();
  if (driver_->stream_is_inline(step_.compute)) {
    step_.stats.stall_step = step_.number;
  } else {
    const StallClock::Result found = stall_.collect();
    step_.stats.stall_step = found.step;
    step_.stats.stall_seconds = found.seconds;
  }
  return step_.stats;
}

}  // namespace pie
