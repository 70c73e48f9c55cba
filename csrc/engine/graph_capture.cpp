#include "engine/graph_capture.h"

#include <algorithm>

namespace pie {

GraphCapture::GraphCapture(Driver& driver, const GraphTables& tables, const Pieces& pieces,
                           int64_t layers, int64_t slots)
    : driver_(driver),
      tables_(tables),
      pieces_(pieces),
      layers_(layers),
      slots_(slots),
      copies_(driver),
      edge_(driver) {
  for (int64_t l = 0; l < layers; ++l) {
    ready_.emplace_back(driver);
    done_.emplace_back(driver);
  }
}

void GraphCapture::begin(Stream compute) {
  if (on_) throw Error(PIE_ERR_STATE, "begin_capture inside a capture");
  if (!driver_.stream_is_capturing(compute)) {
    throw Error(PIE_ERR_STATE, "begin_capture: the stream is not capturing a graph");
  }
  compute_ = compute;
  forked_ = false;
  loaded_ = 0;
  gates_ = {};
  on_ = true;
}

// Rule 13: a replay's loads come after all compute before it, and so after all uses of the ring.
void GraphCapture::fork() {
  if (forked_) return;
  driver_.event_record(edge_, compute_);
  driver_.stream_wait(copies_, edge_);
  forked_ = true;
  for (int64_t l = 0; l < slots_; ++l) load(l);
}

void GraphCapture::load(int64_t layer) {
  GatherLaunch launch = pieces_.in_layer(layer);
  launch.table = tables_.table();
  launch.count = tables_.count(layer);
  launch.copied = tables_.copied();
  driver_.launch_gather(GatherUse::kGraphs, copies_, launch);
  driver_.event_record(ready_[static_cast<size_t>(layer)], copies_);
  loaded_ = layer + 1;
}

// Rule 4: a replay may promote into a page that its layer writes. A layer out of order may have no
// load to wait for; end() refuses such a capture.
void GraphCapture::before_write(int64_t layer) {
  fork();
  gates_.write(layer);
  if (layer < loaded_) driver_.stream_wait(compute_, ready_[static_cast<size_t>(layer)]);
}

void GraphCapture::before_attention(int64_t layer) {
  fork();
  gates_.enter(layer);
  if (layer < loaded_) driver_.stream_wait(compute_, ready_[static_cast<size_t>(layer)]);
}

// Rule 14: the ring is an edge, from this attention to the load of the layer that takes its slot.
void GraphCapture::after_attention(int64_t layer) {
  gates_.leave(layer);
  const int64_t next = layer + slots_;
  if (next != loaded_ || next >= layers_) return;
  driver_.event_record(done_[static_cast<size_t>(layer)], compute_);
  driver_.stream_wait(copies_, done_[static_cast<size_t>(layer)]);
  load(next);
}

void GraphCapture::end() {
  if (!on_) throw Error(PIE_ERR_STATE, "end_capture without begin_capture");
  on_ = false;
  try {
    gates_.check("the capture of a graph", layers_, true);
  } catch (const Error&) {
    // Joined all the same: the end of the stream's capture would complain of that instead.
    if (forked_) {
      driver_.event_record(edge_, copies_);
      driver_.stream_wait(compute_, edge_);
    }
    throw;
  }
}

}  // namespace pie
