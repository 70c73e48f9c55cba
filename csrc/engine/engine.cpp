#include "engine/engine.h"

#include <exception>
#include <utility>

#include "engine/self_test.h"
#include "memory/fitting.h"

namespace pie {
namespace {

// Where timing takes events on streams, one in so many steps that load is timed: events cost a
// microsecond or two each, and a step needs two a layer.
constexpr int64_t kSampleEvery = 4;

}  // namespace

Engine::Engine(const pie_geometry& geometry, const std::string& driver, double link_bytes_per_s,
               uint32_t debug, int64_t chunks)
    : debug_(debug),
      driver_(make_driver(driver, link_bytes_per_s)),
      geometry_(fitting(geometry, *driver_, chunks)),
      arena_(*driver_, geometry_),
      pool_(*driver_, geometry_, chunks_at_start(geometry_, chunks)),
      order_(*driver_, geometry_.layers, geometry_.slots),
      plans_(geometry_, pool_),
      pieces_(*driver_, geometry_, arena_, pool_),
      table_(*driver_, geometry_, pieces_),
      draft_pages_(geometry_),
      graphs_(*driver_, geometry_, pieces_, kHead) {}

Engine::~Engine() { driver_->synchronize(); }

void Engine::set_option(int option, bool on) {
  if (step_.open) throw Error(PIE_ERR_STATE, "an option is set inside a step");
  if (option == PIE_OPTION_HEAD_FIRST) {
    head_first_ = on;
  } else if (option == PIE_OPTION_OVERLAP) {
    driver_->prefer_overlap(on);
  } else {
    throw Error(PIE_ERR_CONFIG, "no option " + std::to_string(option));
  }
}

bool Engine::begin_step(const pie_plan& plan, Stream compute, bool graph) {
  open_step(plan, true, compute);
  step_.fits = graph && fits_graph();
  or_abort([&] {
    order_.submit_barrier(step_.after_all, step_.stores_after_all, graphs_.emptied());
    if (moves_drafts()) order_.drafts_begin();
    if (step_.promotions_first && !step_.promotions.empty()) fill_first();
    submit_first(head_first_ && !step_.stores_first ? kHead : geometry_.layers,
                 head_first_ || step_.fits ? kHead : geometry_.slots);
    if (step_.stores_first && !step_.stores.empty()) {
      order_.after_all_stores();
      order_.drafts_wait();
    }
  });
  return step_.fits;
}

void Engine::open_step(const pie_plan& plan, bool forward, Stream compute) {
  if (step_.open) {
    throw Error(PIE_ERR_STATE, "step " + std::to_string(plan.step) + " begins inside step " +
                                   std::to_string(step_.number) + "; end or abort that first");
  }
  if (graphs_.capturing()) {
    throw Error(PIE_ERR_STATE, "a step begins inside a capture; end that first");
  }
  order_.check_streams();
  graphs_.check(false);
  driver_->stream_error(compute);  // throws where there is no such stream
  PlanReader::Moves moves = plans_.read(plan, order_.newest_step());
  const Runs none;
  const Runs& loads = forward ? plans_.loads() : none;
  table_.divide(moves.promotions, loads);
  Step step;
  step.number = plan.step;
  step.compute = compute;
  step.stores_first = moves.stores_first;
  step.after_all = moves.after_all;
  step.stores_after_all = moves.stores_after_all;
  step.promotions_first = moves.promotions_first;
  step.stores = std::move(moves.stores);
  step.promotions = std::move(moves.promotions);
  step.forward = forward;
  step.gates.reserve(geometry_.layers);
  step.streams_in = !step.promotions.empty() || !loads.empty();
  step.promoted_bytes = blocks_of(step.promotions) * geometry_.page;
  step.loaded_bytes = blocks_of(loads) * geometry_.page;
  step.stats.step = plan.step;
  step.open = true;
  draft_pages_.stored(step.stores);
  step.draft_loads = draft_pages_.missing(loads);
  step_ = std::move(step);
  order_.open_step(plan.step, compute);
  // Counted by steps that copy: their numbers may keep a rhythm of their own.
  if (forward) ++gated_steps_;
  const bool sampled = !forward || gated_steps_ % kSampleEvery == 0;
  driver_->sample(sampled);
  order_.stall().begin(plan.step, compute, forward && sampled);
}

// Runs a part of an open step; what fails in it ends the step, and is what the caller hears of.
template <typename Body>
void Engine::or_abort(Body&& body) {
  try {
    body();
  } catch (const Error&) {
    try {
      abort_step();
    } catch (const Error&) {
      step_.open = false;  // The device is lost; every later call says so.
    }
    throw;
  }
}

// Rule 21: what is not submitted yet of the first layers, stores first: a load means the newest
// record of its layer's store.
void Engine::submit_first(int64_t stores, int64_t loads) {
  if (!step_.stores.empty()) {
    while (step_.next_store < stores) submit_store(step_.next_store);
    if (step_.next_store == geometry_.layers) submit_draft_stores();
  }
  if (!step_.streams_in || debug(PIE_DEBUG_LATE_SUBMIT)) return;
  while (step_.next_load < loads) submit_load(step_.next_load);
}

void Engine::submit_store(int64_t layer) {
  order_.before_store(layer);
  if (!debug(PIE_DEBUG_SKIP_STORES)) {
    copy(Direction::kDeviceToHost, step_.stores, layer);
    step_.stats.bytes_stored += blocks_of(step_.stores) * geometry_.page;
  }
  order_.after_store(layer);
  step_.next_store = layer + 1;
}

void Engine::submit_load(int64_t layer) {
  order_.before_load(layer, !step_.promotions.empty());
  if (!debug(PIE_DEBUG_SKIP_LOADS)) {
    const bool fill = step_.forward && step_.loaded_bytes > 0;
    if (debug(PIE_DEBUG_POISON) && fill) poison(layer);
    copy(Direction::kHostToDevice, table_.promotions(), layer);
    if (fill) copy(Direction::kHostToDevice, table_.loads(), layer);
    step_.stats.copies += table_.copy(order_.h2d(), layer, fill);
    step_.stats.bytes_promoted += step_.promoted_bytes;
    step_.stats.bytes_loaded += step_.promoted_bytes + (fill ? step_.loaded_bytes : 0);
  }
  order_.after_load(layer);
  step_.next_load = layer + 1;
  if (step_.next_load == geometry_.layers) submit_draft_loads();
}

bool Engine::moves_drafts() const {
  if (geometry_.drafts == 0) return false;
  return !(step_.stores.empty() && step_.promotions.empty() && step_.draft_loads.empty());
}

// Rule 28: behind all else of the step, on either stream.
void Engine::submit_draft_stores() {
  if (geometry_.drafts == 0 || step_.stores.empty() || step_.drafts_stored) return;
  step_.drafts_stored = true;
  order_.before_draft_stores();
  if (!debug(PIE_DEBUG_SKIP_STORES)) {
    for (int64_t l = geometry_.layers; l < geometry_.row_pages; ++l) {
      copy(Direction::kDeviceToHost, step_.stores, l);
      step_.stats.bytes_stored += blocks_of(step_.stores) * geometry_.page;
    }
  }
  order_.after_draft_stores();
}

void Engine::submit_draft_loads() {
  if (step_.promotions.empty() && step_.draft_loads.empty()) return;
  if (geometry_.drafts == 0 || step_.drafts_loaded) return;
  step_.drafts_loaded = true;
  order_.before_draft_loads();
  if (!debug(PIE_DEBUG_SKIP_LOADS)) {
    const bool fill = step_.forward && !debug(PIE_DEBUG_SKIP_DRAFTS);
    const int64_t filled = fill ? blocks_of(step_.draft_loads) * geometry_.page : 0;
    for (int64_t l = geometry_.layers; l < geometry_.row_pages; ++l) {
      copy(Direction::kHostToDevice, step_.promotions, l);
      if (fill) copy(Direction::kHostToDevice, step_.draft_loads, l);
      step_.stats.bytes_promoted += step_.promoted_bytes;
      step_.stats.bytes_loaded += step_.promoted_bytes + filled;
    }
  }
  order_.after_draft_loads();
}

// Rule 27: the promotions of all layers, ahead of the step's loads. From then on it has loads
// alone.
void Engine::fill_first() {
  submit_first(geometry_.layers, 0);  // Rule 21: stores first.
  for (int64_t l = 0; l < geometry_.layers; ++l) {
    order_.before_load(l, true);
    if (!debug(PIE_DEBUG_SKIP_LOADS)) {
      copy(Direction::kHostToDevice, table_.promotions(), l);
      step_.stats.copies += table_.copy(order_.h2d(), l, false);
      step_.stats.bytes_promoted += step_.promoted_bytes;
      step_.stats.bytes_loaded += step_.promoted_bytes;
    }
    order_.after_load(l);
  }
  submit_draft_loads();  // Promotions are known no longer after this.
  order_.after_all_promotions();
  step_.promotions.clear();
  step_.promoted_bytes = 0;
  step_.streams_in = !plans_.loads().empty();
  table_.divide(step_.promotions, plans_.loads());
}

void Engine::finish_promotions() {
  step_.forward = false;
  if (step_.promotions.empty()) return;
  while (step_.next_load < geometry_.layers) submit_load(step_.next_load);
}

// One batch of the copy engines.
void Engine::copy(Direction direction, const Runs& runs, int64_t layer) {
  if (runs.empty()) return;
  const bool in = direction == Direction::kHostToDevice;
  scratch_.clear();
  for (const pie_run& run : runs) {
    const Address device = arena_.page(layer, run.block);
    const Address host = pool_.page(run.row, layer);
    const auto size = static_cast<size_t>(run.count * geometry_.page);
    scratch_.push_back(CopyOp{in ? device : host, in ? host : device, size});
  }
  const Stream stream = in ? order_.h2d() : order_.d2h();
  driver_->copy_batch(stream, direction, scratch_.data(), scratch_.size());
  step_.stats.copies += static_cast<int64_t>(scratch_.size());
}

void Engine::poison(int64_t layer) {
  driver_->memset_async(order_.h2d(), arena_.page(layer, geometry_.resident), 0xFF,
                        static_cast<size_t>(geometry_.pooled * geometry_.page));
}

void Engine::before_write(int64_t layer) {
  check_layer(layer);
  if (graphs_.capturing()) return graphs_.capture().before_write(layer);
  submit_rest();
  step_.gates.write(layer);
  order_.before_write(layer, !step_.promotions.empty());
}

void Engine::before_attention(int64_t layer) {
  check_layer(layer);
  if (debug(PIE_DEBUG_SKIP_GATE) && layer == geometry_.layers / 2) return;
  if (graphs_.capturing()) return graphs_.capture().before_attention(layer);
  submit_rest();
  step_.gates.enter(layer);
  if (!step_.streams_in) return;
  order_.before_attention(layer);
  if (debug(PIE_DEBUG_LATE_SUBMIT)) submit_load(layer);
}

void Engine::after_attention(int64_t layer) {
  check_layer(layer);
  if (graphs_.capturing()) return graphs_.capture().after_attention(layer);
  submit_rest();
  step_.gates.leave(layer);
  order_.after_attention(layer);
  // Rule 28: drafts follow, without gates.
  if (layer + 1 == geometry_.layers) order_.drafts_wait();
  const int64_t next = layer + geometry_.slots;
  if (step_.streams_in && next < geometry_.layers && !debug(PIE_DEBUG_LATE_SUBMIT)) {
    submit_load(next);
  }
}

void Engine::check_layer(int64_t layer) const {
  if (!step_.open && !graphs_.capturing()) {
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

pie_stats Engine::end_step() {
  if (!step_.open) throw Error(PIE_ERR_STATE, "end_step without begin_step");
  try {
    if (!step_.in_graph) {
      // Rule 22: a write that passed no gate may have overtaken a copy of its page.
      const bool writes = !step_.stores.empty() || !step_.promotions.empty();
      step_.gates.check("step " + std::to_string(step_.number), geometry_.layers, writes);
    }
  } catch (const Error&) {
    abort_step();
    throw;
  }
  try {
    if (step_.in_graph) {
      order_.after_launch();
      graphs_.tables().empty(step_.compute);
    }
  } catch (const Error&) {
    step_.open = false;
    throw;
  }
  const pie_stats stats = close_step();
  order_.check_streams();
  graphs_.check(false);
  return stats;
}

pie_stats Engine::close_step() {
  step_.open = false;
  pie_stats& stats = step_.stats;
  const Counters in = driver_->counters(Direction::kHostToDevice);
  const Counters out = driver_->counters(Direction::kDeviceToHost);
  stats.bytes_finished = in.bytes - reported_in_.bytes;
  stats.load_seconds = in.seconds - reported_in_.seconds;
  stats.store_seconds = out.seconds - reported_out_.seconds;
  reported_in_ = in;
  reported_out_ = out;
  stats.gates = step_.in_graph ? geometry_.layers : step_.gates.passed();
  order_.stall().end();
  const StallClock::Result found = order_.stall().collect();
  stats.stall_step = found.step;
  stats.stall_seconds = found.seconds;
  return stats;
}

void Engine::skip_counters() {
  reported_in_ = driver_->counters(Direction::kHostToDevice);
  reported_out_ = driver_->counters(Direction::kDeviceToHost);
}

pie_stats Engine::run_idle(const pie_plan& plan, Stream compute) {
  open_step(plan, false, compute);
  or_abort([&] {
    order_.submit_barrier(step_.after_all, step_.stores_after_all, graphs_.emptied());
    if (moves_drafts()) order_.drafts_begin();
    for (int64_t l = 0; l < geometry_.layers; ++l) {
      if (!step_.stores.empty()) submit_store(l);
      if (!step_.promotions.empty() && l + 1 < geometry_.layers) submit_load(l);
    }
    submit_draft_stores();  // Ahead of the draft loads, which follow the last layer's.
    if (!step_.promotions.empty()) submit_load(geometry_.layers - 1);
  });
  try {
    order_.after_idle(!step_.stores.empty(), !step_.promotions.empty());
    order_.drafts_wait();
  } catch (const Error&) {
    step_.open = false;
    throw;
  }
  const pie_stats stats = close_step();
  order_.check_streams();
  return stats;
}

void Engine::abort_step() {
  order_.stall().drop();
  // Rule 18: a replay may be under way, or there may be none: its promotions are made again, after
  // it.
  if (step_.open && step_.in_graph) order_.wait_for_compute();
  std::exception_ptr lost;  // copies that cannot be made: said when all else is in order
  try {
    // Rule 21: no gate was passed, perhaps. Stores first: a promotion may fill a page they read.
    if (step_.open && !order_.fails(order_.d2h())) submit_first(geometry_.layers, 0);
    if (step_.open && !order_.fails(order_.h2d())) finish_promotions();
  } catch (const Error&) {
    lost = std::current_exception();
  }
  step_.open = false;
  order_.recover();
  graphs_.drop(order_.h2d());
  draft_pages_.forget();  // Some may not have been filled.
  if (lost != nullptr) std::rethrow_exception(lost);
}

void Engine::drain() {
  order_.drain();
  graphs_.check(true);
}

void Engine::finish() {
  driver_->synchronize();
  try {
    graphs_.check(true);
  } catch (const Error& error) {
    if (error.code() == PIE_ERR_GATE) throw;
  }  // Else the device is lost, of which others tell.
}

void Engine::use_gather(const void* image, size_t size, size_t threshold, int blocks) {
  if (step_.open) throw Error(PIE_ERR_STATE, "use_gather inside a step");
  order_.wait_for_copies();  // They read the table that goes.
  table_.use(image, size, threshold, blocks);
}

void Engine::use_graphs(const void* image, size_t size, int64_t pieces, int blocks) {
  if (step_.open) throw Error(PIE_ERR_STATE, "use_graphs inside a step");
  graphs_.prepare(image, size, pieces, blocks);
}

void Engine::begin_capture(Stream compute) {
  if (step_.open) throw Error(PIE_ERR_STATE, "begin_capture inside a step");
  graphs_.begin_capture(compute);
}

void Engine::end_capture() { graphs_.end_capture(); }

// Debug switches that change a step's order or work on the host have no place in a graph.
bool Engine::fits_graph() const {
  if (debug(PIE_DEBUG_SKIP_GATE | PIE_DEBUG_LATE_SUBMIT | PIE_DEBUG_POISON)) return false;
  if (!step_.promotions.empty() && (step_.promotions_first || !step_.stores.empty())) return false;
  return graphs_.hold(plans_.loads().size() + step_.promotions.size());
}

// Rules 15 and 16: the replay comes after the stores, which may go to rows that it reads, and after
// the head's loads. All else that it copies it orders itself, by the edges of its capture.
void Engine::enter_graph() {
  const std::string step = "step " + std::to_string(step_.number);
  if (!step_.open) throw Error(PIE_ERR_STATE, "enter_graph without begin_step");
  if (!step_.fits) throw Error(PIE_ERR_STATE, "enter_graph: " + step + " does not fit a graph");
  if (step_.in_graph || !step_.gates.none()) {
    throw Error(PIE_ERR_STATE, "enter_graph: " + step + " has begun to run otherwise");
  }
  submit_first(geometry_.layers, kHead);  // Rule 21: no gate does.
  submit_draft_loads();
  step_.in_graph = true;
  order_.stall().leave();
  order_.drafts_wait();
  order_.before_launch(step_.streams_in ? kHead - 1 : -1);
  TablePieces pieces;
  if (!debug(PIE_DEBUG_SKIP_LOADS)) pieces = graphs_.pieces(step_.promotions, plans_.loads());
  graphs_.tables().fill(step_.compute, step_.number, pieces);
  if (pieces.empty()) return;
  const int64_t layers = geometry_.layers - kHead;
  step_.stats.bytes_promoted += layers * step_.promoted_bytes;
  step_.stats.bytes_loaded += layers * (step_.promoted_bytes + step_.loaded_bytes);
  step_.stats.copies += layers * static_cast<int64_t>(pieces.size());
}

void Engine::self_test() {
  if (step_.open) throw Error(PIE_ERR_STATE, "self_test inside a step");
  const auto forget = [&] {
    abort_step();
    plans_.forget();
    order_.forget_steps();
  };
  try {
    pie::self_test(*this, forget);
  } catch (const Error&) {
    skip_counters();
    throw;
  }
  skip_counters();
}

void Engine::zero_ring() {
  if (step_.open) throw Error(PIE_ERR_STATE, "zero_ring inside a step");
  driver_->synchronize();  // Warm-up may still run, on a stream that is not ordered with this one.
  for (int64_t s = 0; s < geometry_.slots; ++s) {
    driver_->memset_async(order_.h2d(), arena_.page(s, geometry_.resident), 0,
                          static_cast<size_t>(geometry_.slot_bytes));
  }
  for (int64_t l = geometry_.layers; l < geometry_.row_pages; ++l) {
    driver_->memset_async(order_.h2d(), arena_.page(l, geometry_.resident), 0,
                          static_cast<size_t>(geometry_.slot_bytes));
  }
  draft_pages_.forget();
  driver_->stream_synchronize(order_.h2d());
}

void Engine::check_chunk(int64_t chunk) const {
  if (chunk < 0 || chunk >= geometry_.num_chunks) {
    throw Error(PIE_ERR_CONFIG, "no chunk " + std::to_string(chunk) + " of the pool; there are " +
                                    std::to_string(geometry_.num_chunks));
  }
}

void Engine::commit_chunk(int64_t chunk) {
  check_chunk(chunk);
  pool_.commit(chunk);
}

void Engine::release_chunk(int64_t chunk) {
  check_chunk(chunk);
  pool_.hide(chunk);
  order_.wait_for_copies();
  pool_.drop(chunk);
}

}  // namespace pie
