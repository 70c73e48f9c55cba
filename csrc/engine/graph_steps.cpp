#include "engine/graph_steps.h"

#include <utility>

namespace pie {

void GraphSteps::prepare(const void* image, size_t size, int64_t pieces, int blocks) {
  if (parts_ != nullptr) throw Error(PIE_ERR_STATE, "use_graphs again: graphs hold its tables");
  if (driver_.arch().empty()) {
    throw Error(PIE_ERR_UNSUPPORTED, "this driver runs no kernels, so no CUDA graph can copy");
  }
  auto parts = std::make_unique<Parts>(driver_, geometry_, pieces_, head_, pieces);
  driver_.load_gather(GatherUse::kGraphs, image, size, blocks);
  parts_ = std::move(parts);
}

void GraphSteps::begin_capture(Stream compute) {
  if (parts_ == nullptr) throw Error(PIE_ERR_STATE, "begin_capture without use_graphs");
  parts_->capture.begin(compute);
}

void GraphSteps::end_capture() {
  if (parts_ == nullptr) throw Error(PIE_ERR_STATE, "end_capture without begin_capture");
  parts_->capture.end();
}

TablePieces GraphSteps::pieces(const Runs& promotions, const Runs& loads) const {
  TablePieces pieces;
  pieces.reserve(loads.size() + promotions.size());
  for (const pie_run& run : promotions) pieces_.append(pieces, run);
  for (const pie_run& run : loads) pieces_.append(pieces, run);
  return pieces;
}

std::optional<Event> GraphSteps::emptied() const {
  if (parts_ == nullptr) return std::nullopt;
  return parts_->tables.emptied();
}

void GraphSteps::drop(Stream idle) {
  if (parts_ == nullptr) return;
  parts_->tables.drop(idle);
  parts_->tables.check(true);
}

void GraphSteps::check(bool wait) {
  if (parts_ != nullptr) parts_->tables.check(wait);
}

}  // namespace pie
