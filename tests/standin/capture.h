// Stream capture: work that goes into a graph instead of running.
#pragma once

#include "state.h"

namespace standin {

// A node runs after those it depends on; nodes of one lane came from one stream.
struct Node {
  std::vector<size_t> needs;
  size_t lane;
  Op op;
};

struct Graph {
  std::vector<Node> nodes;
  size_t lanes = 0;
};

// Between cuStreamBeginCapture and cuStreamEndCapture.
struct Capture {
  struct Branch {
    size_t lane;
    std::vector<size_t> tail;  // what the stream's next node depends on
  };
  Stream* origin;
  CUstreamCaptureMode mode;
  std::thread::id thread;
  bool valid = true;
  bool over = false;
  Graph graph{};
  std::map<Stream*, Branch> branches{};
};

// A graph that can be launched; its launches never overlap.
struct Executable {
  Graph graph;
  std::vector<Actor> lanes;
  RecordPtr newest;  // its last launch
};

// The code of a call on the stream: of a capture that was invalidated, else success.
CUresult check_capture(Stream* stream);
void invalidate(Capture& capture);
// What a call that CUDA forbids during capture does: whether it must fail. It invalidates.
bool forbidden_by_capture();
// Draws a stream into a capture at these nodes, or adds them to what it depends on.
void draw_in(Stream* stream, const std::shared_ptr<Capture>& capture,
             const std::vector<size_t>& nodes);

}  // namespace standin
