// Steps that run in a CUDA graph, and the captures that make such graphs.
#pragma once

#include <memory>
#include <optional>

#include "engine/graph_capture.h"
#include "engine/graph_tables.h"
#include "engine/pieces.h"

namespace pie {

// The table that replays read and the capture that is under way; neither is there before
// prepare().
class GraphSteps {
 public:
  // The head: layers that no graph copies.
  GraphSteps(Driver& driver, const Geometry& geometry, const Pieces& pieces, int64_t head)
      : driver_(driver), geometry_(geometry), pieces_(pieces), head_(head) {}

  // Table and kernel, once. An error changes nothing.
  void prepare(const void* image, size_t size, int64_t pieces, int blocks);
  void begin_capture(Stream compute);
  void end_capture();
  bool capturing() const { return parts_ != nullptr && parts_->capture.on(); }
  GraphCapture& capture() { return parts_->capture; }

  // Whether the table holds so many pieces.
  bool hold(size_t pieces) const {
    return parts_ != nullptr && static_cast<int64_t>(pieces) <= parts_->tables.room();
  }
  TablePieces pieces(const Runs& promotions, const Runs& loads) const;
  GraphTables& tables() { return parts_->tables; }

  // Recorded when the tables are empty; none where there are no tables.
  std::optional<Event> emptied() const;
  // The compute is idle: later replays copy nothing, and all earlier ones are checked.
  void drop(Stream idle);
  // Throws PIE_ERR_GATE as GraphTables::check() does.
  void check(bool wait);

 private:
  struct Parts {
    Parts(Driver& driver, const Geometry& geometry, const Pieces& pieces, int64_t head,
          int64_t room)
        : tables(driver, geometry.layers, head, room),
          capture(driver, tables, pieces, geometry.layers, geometry.slots) {}
    GraphTables tables;
    GraphCapture capture;
  };

  Driver& driver_;
  const Geometry& geometry_;
  const Pieces& pieces_;
  const int64_t head_;
  std::unique_ptr<Parts> parts_;
};

}  // namespace pie
