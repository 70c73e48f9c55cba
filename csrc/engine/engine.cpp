#include "engine/engine.h"

#include <exception>

#include "drivers/free_memory.h"

namespace pie {
namespace {

int64_t at_start(const Geometry& geometry, int64_t chunks) {
  if (chunks < 0 || chunks > geometry.num_chunks) return geometry.num_chunks;
  return chunks > 0 ? chunks : 1;
}

// Memory is taken page by page, without a look: what is not there ends in the kernel killing
// processes, and not in an error.
void check_free(const Geometry& geometry, const Driver& driver, int64_t chunks) {
  const int64_t device = driver.device_is_host() ? geometry.device_bytes : 0;
  const int64_t pool = geometry.bytes_of_chunks(chunks);
  const int64_t left = free_memory();
  if (left < 0 || (device <= left && pool <= left - device)) return;
  throw Error(PIE_ERR_TRANSFER,
              "geometry: " + std::to_string(device) +
                  " bytes of CPU memory for the device's KV and " + std::to_string(pool) +
                  " for the pool are wanted at start, but " + std::to_string(left) +
                  " are free on this machine or within its cgroup's limit; lower "
                  "--kv-cache-memory-bytes or --pie-pool-gib, or free memory");
}

Geometry fitting(const pie_geometry& given, const Driver& driver, int64_t chunks) {
  const Geometry geometry(given);
  const auto g = static_cast<int64_t>(driver.granularity());
  if (geometry.granularity % g != 0) {
    throw Error(PIE_ERR_CONFIG, "geometry: granularity " + std::to_string(geometry.granularity) +
                                    " is not a multiple of the driver's " + std::to_string(g));
  }
  check_free(geometry, driver, at_start(geometry, chunks));
  return geometry;
}

}  // namespace

LayerEvents::LayerEvents(Driver& driver, int64_t layers) : barrier(driver), replayed(driver) {
  for (int64_t l = 0; l < layers; ++l) {
    ready.emplace_back(driver);
    stored.emplace_back(driver);
    done.emplace_back(driver);
  }
}

Engine::Engine(const pie_geometry& geometry, const std::string& driver, double link_bytes_per_s,
               uint32_t debug, int64_t chunks)
    : debug_(debug),
      driver_(make_driver(driver, link_bytes_per_s)),
      geometry_(fitting(geometry, *driver_, chunks)),
      arena_(*driver_, geometry_),
      pool_(*driver_, geometry_, at_start(geometry_, chunks)),
      h2d_(*driver_),
      d2h_(*driver_),
      stall_(*driver_) {
  reset_events();
}

Engine::~Engine() { driver_->synchronize(); }

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

bool Engine::begin_step(const pie_plan& plan, Stream compute, bool graph) {
  open_step(plan, true, compute);
  step_.fits = graph && fits_graph();
  or_abort([&] {
    submit_barrier();
    submit_first(head_first_ ? kHead : geometry_.layers,
                 head_first_ || step_.fits ? kHead : geometry_.slots);
  });
  return step_.fits;
}

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

// Rule 21: what is not submitted yet of the first layers, stores first: a load means the newest
// record of its layer's store.
void Engine::submit_first(int64_t stores, int64_t loads) {
  if (!step_.stores.empty()) {
    while (step_.next_store < stores) submit_store(step_.next_store);
  }
  if (!step_.streams_in || debug(PIE_DEBUG_LATE_SUBMIT)) return;
  while (step_.next_load < loads) submit_load(step_.next_load);
}

// Rule 4: a layer's KV write comes after the store that reads the same pages, and after the copy
// that fills the page first: the last block of a request that comes back is written on.
void Engine::before_write(int64_t layer) {
  check_layer(layer);
  if (capturing()) return graphs_->capture.before_write(layer);
  submit_rest();
  step_.gates.write(layer);
  wait_for_stores(layer);
  if (!step_.promotions.empty()) wait_on_compute(events_->ready[static_cast<size_t>(layer)]);
}

void Engine::wait_for_stores(int64_t layer) {
  if (!store_pending_[static_cast<size_t>(layer)]) return;
  wait_on_compute(events_->stored[static_cast<size_t>(layer)]);
  store_pending_[static_cast<size_t>(layer)] = false;
}

// Rule 5: attention comes after the loads and promotions of its layer. The record that this wait
// means was submitted by begin_step or by after_attention(layer - B), earlier in program order.
void Engine::before_attention(int64_t layer) {
  check_layer(layer);
  if (debug(PIE_DEBUG_SKIP_GATE) && layer == geometry_.layers / 2) return;
  if (capturing()) return graphs_->capture.before_attention(layer);
  submit_rest();
  step_.gates.enter(layer);
  if (!step_.streams_in) return;
  wait_on_compute(events_->ready[static_cast<size_t>(layer)]);
  if (debug(PIE_DEBUG_LATE_SUBMIT)) submit_load(layer);
}

// Rule 6: the slot is free for layer + B only when this attention is over.
void Engine::after_attention(int64_t layer) {
  check_layer(layer);
  if (capturing()) return graphs_->capture.after_attention(layer);
  submit_rest();
  step_.gates.leave(layer);
  driver_->event_record(events_->done[static_cast<size_t>(layer)], step_.compute);
  const int64_t next = layer + geometry_.slots;
  if (step_.streams_in && next < geometry_.layers && !debug(PIE_DEBUG_LATE_SUBMIT)) {
    submit_load(next);
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
    if (step_.in_graph) leave_graph();
  } catch (const Error&) {
    step_.open = false;
    throw;
  }
  const pie_stats stats = close_step();
  check_streams();
  check_replays(false);
  return stats;
}

pie_stats Engine::run_idle(const pie_plan& plan, Stream compute) {
  open_step(plan, false, compute);
  or_abort([&] {
    submit_barrier();
    for (int64_t l = 0; l < geometry_.layers; ++l) {
      if (!step_.stores.empty()) submit_store(l);
      if (!step_.promotions.empty()) submit_load(l);
    }
  });
  // Rule 7: no gate follows, so the compute waits for all of it here.
  const auto last = static_cast<size_t>(geometry_.layers - 1);
  try {
    if (!step_.stores.empty()) wait_on_compute(events_->stored[last]);
    if (!step_.promotions.empty()) wait_on_compute(events_->ready[last]);
  } catch (const Error&) {
    step_.open = false;
    throw;
  }
  store_pending_.assign(store_pending_.size(), false);
  const pie_stats stats = close_step();
  check_streams();
  return stats;
}

void Engine::abort_step() {
  stall_.drop();
  // Rule 18: a replay may be under way, or there may be none: its promotions are made again, after
  // it.
  if (step_.open && step_.in_graph) wait_for_compute();
  std::exception_ptr lost;  // copies that cannot be made: said when all else is in order
  try {
    // Rule 21: no gate was passed, perhaps. Stores first: a promotion may fill a page they read.
    if (step_.open && driver_->stream_error(d2h_).empty()) submit_first(geometry_.layers, 0);
    if (step_.open && driver_->stream_error(h2d_).empty()) finish_promotions();
  } catch (const Error&) {
    lost = std::current_exception();
  }
  step_.open = false;
  for (const Stream stream : {Stream{d2h_}, Stream{h2d_}, last_compute_}) {
    try {
      driver_->stream_synchronize(stream);
    } catch (const Error& error) {
      if (error.code() != PIE_ERR_STATE) driver_->stream_recover(stream);
    }  // PIE_ERR_STATE: the compute stream is gone
  }
  reset_events();
  if (graphs_ != nullptr) {
    graphs_->tables.drop(h2d_);
    check_replays(true);
  }
  if (lost != nullptr) std::rethrow_exception(lost);
}

// Nothing is said of what failed there.
void Engine::wait_for_compute() {
  try {
    driver_->stream_synchronize(last_compute_);
  } catch (const Error&) {
  }
}

void Engine::drain() {
  driver_->stream_synchronize(d2h_);
  driver_->stream_synchronize(h2d_);
  check_replays(true);
}

void Engine::zero_ring() {
  if (step_.open) throw Error(PIE_ERR_STATE, "zero_ring inside a step");
  driver_->synchronize();  // Warm-up may still run, on a stream that is not ordered with this one.
  for (int64_t s = 0; s < geometry_.slots; ++s) {
    driver_->memset_async(h2d_, arena_.page(s, geometry_.resident), 0,
                          static_cast<size_t>(geometry_.slot_bytes));
  }
  driver_->stream_synchronize(h2d_);
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
  for (const Stream stream : {Stream{h2d_}, Stream{d2h_}}) {
    const OwnedEvent submitted(*driver_);
    driver_->event_record(submitted, stream);
    try {
      driver_->event_synchronize(submitted);
    } catch (const Error&) {
    }  // A copy failed; the engine's thread sees it. None is under way.
  }
  pool_.drop(chunk);
}

void Engine::finish_promotions() {
  step_.forward = false;
  if (step_.promotions.empty()) return;
  while (step_.next_load < geometry_.layers) submit_load(step_.next_load);
}

// Only when both copy streams are idle. New events drop the records that failed; what the compute
// does meanwhile is covered by the barrier of the next step (rule 3).
void Engine::reset_events() {
  events_ = std::make_unique<LayerEvents>(*driver_, geometry_.layers);
  slot_user_.assign(static_cast<size_t>(geometry_.slots), -1);
  store_pending_.assign(static_cast<size_t>(geometry_.layers), false);
  need_barrier_ = true;
}

}  // namespace pie
