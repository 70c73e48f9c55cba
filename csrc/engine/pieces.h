// Runs as the gather kernel has them.
#pragma once

#include <limits>
#include <string>

#include "engine/plan.h"
#include "memory/arena.h"
#include "memory/pool.h"

namespace pie {

class Pieces {
 public:
  Pieces(const Driver& driver, const Geometry& geometry, const Arena& arena, const Pool& pool)
      : driver_(driver), geometry_(geometry), arena_(arena), pool_(pool) {}

  // A run's piece, the same for all layers. Throws PIE_ERR_PLAN for a row that is not held.
  void append(TablePieces& to, const pie_run& run) const {
    const int64_t chunk = run.row / geometry_.chunk_rows;
    const int64_t row = run.row - chunk * geometry_.chunk_rows;
    to.push_back({driver_.reach(pool_.chunk_of(run.row)), number(geometry_.rows_of_chunk(chunk)),
                  number(row), number(run.block), number(run.count)});
  }
  // What a launch says of a layer; the table is the caller's.
  GatherLaunch in_layer(int64_t layer) const {
    GatherLaunch launch{};
    launch.base = arena_.page(layer, 0);
    launch.page = static_cast<uint64_t>(geometry_.page);
    launch.layer = static_cast<uint64_t>(layer);
    return launch;
  }

 private:
  // The kernel's numbers have 32 bits: 16 TiB of a device's layer in pages of 4 KiB.
  static uint32_t number(int64_t value) {
    if (value <= std::numeric_limits<uint32_t>::max()) return static_cast<uint32_t>(value);
    throw Error(PIE_ERR_PLAN, "the gather kernel knows no block or row " + std::to_string(value));
  }

  const Driver& driver_;
  const Geometry& geometry_;
  const Arena& arena_;
  const Pool& pool_;
};

}  // namespace pie
