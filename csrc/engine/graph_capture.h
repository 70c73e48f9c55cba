// The copies of one model pass, put into the capture of a CUDA graph.
#pragma once

#include <vector>

#include "drivers/owned.h"
#include "engine/gates.h"
#include "engine/graph_tables.h"
#include "engine/pieces.h"

namespace pie {

// A branch beside the compute: it leaves at the first gate and is joined by the last layer's wait.
// Its stream and events are of captures only: a captured event means nothing outside. What is
// captured here is read from the tables at each replay.
class GraphCapture {
 public:
  GraphCapture(Driver& driver, const GraphTables& tables, const Pieces& pieces, int64_t layers,
               int64_t slots);

  bool on() const { return on_; }
  // Throws PIE_ERR_STATE unless the stream is capturing.
  void begin(Stream compute);
  void before_write(int64_t layer);
  void before_attention(int64_t layer);
  void after_attention(int64_t layer);
  // Throws PIE_ERR_GATE unless each layer passed once and in order; ends in any case.
  void end();

 private:
  void fork();
  void load(int64_t layer);

  Driver& driver_;
  const GraphTables& tables_;
  const Pieces& pieces_;
  const int64_t layers_, slots_;
  const OwnedStream copies_;
  const OwnedEvent edge_;                 // where the branch leaves
  std::vector<OwnedEvent> ready_, done_;  // one a layer, as in Order
  Stream compute_ = 0;
  bool on_ = false, forked_ = false;
  int64_t loaded_ = 0;  // layers whose load is captured
  Gates gates_;
};

}  // namespace pie
