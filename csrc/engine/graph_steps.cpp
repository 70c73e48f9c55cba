#include "engine/graph_steps.h"

#include <utility>

namespace pie {

void GraphSteps::prepare(const void* image, size_t size, int64_t pieces, int blocks) {
  if (parts_ != nullptr) throw Error(PIE_ERR_STATE, "use_graphs again: graphs hold its tables");
  if (driver_.arch().empty()) {
    throw Error(PIE_ERR_UNSUPPORTED, "this driver runs no kernels, so no CUDA graph can copy");
  }
  auto parts = std::make_unique<Parts>(driver_, geometry_, pieces);
  driver_.load_gather(image, size, blocks);
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

LayerPieces GraphSteps::pieces(const Runs& promotions, const Runs& loads) const {
  LayerPieces pieces;
  pieces.reserve(loads.size() + promotions.size());
  for (const Runs* runs : {&promotions, &loads}) {
    for (const pie_run& run : *runs) {
      const int64_t rows = geometry_.rows_of_chunk(run.row / geometry_.chunk_rows);
      pieces.push_back({arena_.page(0, run.block), driver_.reach(pool_.page(run.row, 0)),
                        static_cast<uint64_t>(run.count * geometry_.page),
                        static_cast<uint64_t>(geometry_.layer_stride),
                        static_cast<uint64_t>(rows * geometry_.page)});
    }
  }
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
