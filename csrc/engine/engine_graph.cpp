// Steps that run in a CUDA graph, and the captures that make such graphs.
#include <algorithm>
#include <string>
#include <utility>

#include "engine/engine.h"

namespace pie {

void Engine::use_graphs(const void* image, size_t size, int64_t pieces, int blocks) {
  if (step_.open) throw Error(PIE_ERR_STATE, "use_graphs inside a step");
  if (graphs_ != nullptr) throw Error(PIE_ERR_STATE, "use_graphs again: graphs hold its tables");
  if (driver_->arch().empty()) {
    throw Error(PIE_ERR_UNSUPPORTED, "this driver runs no kernels, so no CUDA graph can copy");
  }
  auto graphs = std::make_unique<Graphs>(*driver_, geometry_, pieces);
  driver_->load_gather(image, size, blocks);
  graphs_ = std::move(graphs);
}

void Engine::begin_capture(Stream compute) {
  if (graphs_ == nullptr) throw Error(PIE_ERR_STATE, "begin_capture without use_graphs");
  if (step_.open) throw Error(PIE_ERR_STATE, "begin_capture inside a step");
  graphs_->capture.begin(compute);
}

void Engine::end_capture() {
  if (graphs_ == nullptr) throw Error(PIE_ERR_STATE, "end_capture without begin_capture");
  graphs_->capture.end();
}

// Debug switches that change a step's order or work on the host have no place in a graph.
bool Engine::fits_graph() const {
  if (graphs_ == nullptr) return false;
  if (debug(PIE_DEBUG_SKIP_GATE | PIE_DEBUG_LATE_SUBMIT | PIE_DEBUG_POISON)) return false;
  if (!step_.stores.empty() && !step_.promotions.empty()) return false;
  return static_cast<int64_t>(loads_.size() + step_.promotions.size()) <= graphs_->tables.room();
}

LayerPieces Engine::graph_pieces() const {
  LayerPieces pieces;
  if (debug(PIE_DEBUG_SKIP_LOADS)) return pieces;
  pieces.reserve(loads_.size() + step_.promotions.size());
  for (const Runs* runs : {&step_.promotions, &loads_}) {
    for (const pie_run& run : *runs) {
      const int64_t rows = geometry_.rows_of_chunk(run.row / geometry_.chunk_rows);
      pieces.push_back({arena_.page(0, run.block), driver_->reach(pool_.page(run.row, 0)),
                        static_cast<uint64_t>(run.count * geometry_.page),
                        static_cast<uint64_t>(geometry_.layer_stride),
                        static_cast<uint64_t>(rows * geometry_.page)});
    }
  }
  return pieces;
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
  step_.in_graph = true;
  stall_.leave();
  const Stream compute = step_.compute;
  if (step_.streams_in) {
    driver_->stream_wait(compute, events_->ready[static_cast<size_t>(kHead - 1)]);
  }
  if (std::find(store_pending_.begin(), store_pending_.end(), true) != store_pending_.end()) {
    driver_->stream_wait(compute, events_->stored[static_cast<size_t>(geometry_.layers - 1)]);
    store_pending_.assign(store_pending_.size(), false);
  }
  const LayerPieces pieces = graph_pieces();
  graphs_->tables.fill(compute, step_.number, pieces, kHead);
  if (pieces.empty()) return;
  const int64_t bytes = (geometry_.layers - kHead) * geometry_.page;
  const int64_t promoted = blocks_of(step_.promotions) * bytes;
  step_.stats.bytes_promoted += promoted;
  step_.stats.bytes_loaded += promoted + blocks_of(loads_) * bytes;
  step_.stats.copies += static_cast<int64_t>(pieces.size()) * (geometry_.layers - kHead);
}

// Rule 17: what the copy streams do from now on comes after the replay, which reads rows, and reads
// and writes pages, of all layers. Said now and not by a later step's barrier: that would come
// after what the compute does between two steps.
void Engine::leave_graph() {
  driver_->event_record(events_->replayed, step_.compute);
  for (const Stream stream : {Stream{h2d_}, Stream{d2h_}}) {
    driver_->stream_wait(stream, events_->replayed);
  }
  graphs_->tables.empty(step_.compute);
}

void Engine::check_replays(bool wait) {
  if (graphs_ != nullptr) graphs_->tables.check(wait);
}

void Engine::finish() {
  driver_->synchronize();
  try {
    check_replays(true);
  } catch (const Error& error) {
    if (error.code() == PIE_ERR_GATE) throw;
  }  // Else the device is lost, of which others tell.
}

}  // namespace pie
