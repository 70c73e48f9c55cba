// Steps that run in a CUDA graph, and the captures that make such graphs.
#pragma once

#include <memory>
#include <optional>

#include "engine/graph_capture.h"
#include "engine/graph_tables.h"
#include "engine/plan.h"
#include "memory/arena.h"
#include "memory/pool.h"

namespace pie {

// The tables that replays read and the capture that is under way; neither is there before
// prepare().
class GraphSteps {
 public:
  GraphSteps(Driver& driver, const Geometry& geometry, const Arena& arena, const Pool& pool)
      : driver_(driver), geometry_(geometry), arena_(arena), pool_(pool) {}

  // Tables and kernel, once. An error changes nothing.
  void prepare(const void* image, size_t size, int64_t pieces, int blocks);
  void begin_capture(Stream compute);
  void end_capture();
  bool capturing() const { return parts_ != nullptr && parts_->capture.on(); }
  GraphCapture& capture() { return parts_->capture; }

  // Whether tables hold so many pieces a layer.
  bool hold(size_t pieces) const {
    return parts_ != nullptr && static_cast<int64_t>(pieces) <= parts_->tables.room();
  }
  LayerPieces pieces(const Runs& promotions, const Runs& loads) const;
  GraphTables& tables() { return parts_->tables; }

  // Recorded when the tables are empty; none where there are no tables.
  std::optional<Event> emptied() const;
  // The compute is idle: later replays copy nothing, and all earlier ones are checked.
  void drop(Stream idle);
  // Throws PIE_ERR_GATE as GraphTables::check() does.
  void check(bool wait);

 private:
  struct Parts {
    Parts(Driver& driver, const Geometry& geometry, int64_t pieces)
        : tables(driver, geometry.layers, pieces),
          capture(driver, tables, geometry.layers, geometry.slots) {}
    GraphTables tables;
    GraphCapture capture;
  };

  Driver& driver_;
  const Geometry& geometry_;
  const Arena& arena_;
  const Pool& pool_;
  std::unique_ptr<Parts> parts_;
};

}  // namespace pie
