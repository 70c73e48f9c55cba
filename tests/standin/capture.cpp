#include "capture.h"

#include <algorithm>

namespace standin {
namespace {

void add(std::vector<size_t>& to, const std::vector<size_t>& nodes) {
  for (const size_t node : nodes) {
    if (std::find(to.begin(), to.end(), node) == to.end()) to.push_back(node);
  }
}

// Whether all nodes lead to what the origin does next.
bool joined(const Capture& capture) {
  std::vector<bool> reached(capture.graph.nodes.size(), false);
  std::vector<size_t> left = capture.branches.at(capture.origin).tail;
  while (!left.empty()) {
    const size_t node = left.back();
    left.pop_back();
    if (reached[node]) continue;
    reached[node] = true;
    for (const size_t need : capture.graph.nodes[node].needs) left.push_back(need);
  }
  return std::all_of(reached.begin(), reached.end(), [](bool r) { return r; });
}

void end(Capture& capture) {
  capture.over = true;
  for (auto& [stream, branch] : capture.branches) stream->capture.reset();
  auto& all = state().captures;
  const auto same = [&](const auto& other) { return other.get() == &capture; };
  all.erase(std::remove_if(all.begin(), all.end(), same), all.end());
}

}  // namespace

CUresult check_capture(Stream* stream) {
  const bool invalid = stream && stream->capture && !stream->capture->valid;
  return invalid ? CUDA_ERROR_STREAM_CAPTURE_INVALIDATED : CUDA_SUCCESS;
}

void invalidate(Capture& capture) { capture.valid = false; }

bool forbidden_by_capture() {
  bool forbidden = false;
  for (const auto& capture : state().captures) {
    const bool here = capture->thread == std::this_thread::get_id();
    if (capture->mode == CU_STREAM_CAPTURE_MODE_GLOBAL ||
        (here && capture->mode == CU_STREAM_CAPTURE_MODE_THREAD_LOCAL)) {
      invalidate(*capture);
      forbidden = true;
    }
  }
  return forbidden;
}

void draw_in(Stream* stream, const std::shared_ptr<Capture>& capture,
             const std::vector<size_t>& nodes) {
  if (!stream->capture) {
    stream->capture = capture;
    capture->branches[stream] = {capture->graph.lanes++, {}};
  }
  add(capture->branches[stream].tail, nodes);
}

CUresult enqueue(Call& call, Stream* stream, Op op) {
  if (const CUresult code = check_capture(stream)) return code;
  if (stream && stream->capture) {
    Capture& capture = *stream->capture;
    Capture::Branch& branch = capture.branches[stream];
    capture.graph.nodes.push_back({branch.tail, branch.lane, std::move(op)});
    branch.tail = {capture.graph.nodes.size() - 1};
    return CUDA_SUCCESS;
  }
  Run run = op(begin_work(stream));
  if (run) submit(call.lock, stream, Command{std::move(run)});
  return call.done();
}

}  // namespace standin

using namespace standin;

CUresult cuStreamBeginCapture(CUstream handle, CUstreamCaptureMode mode) {
  Call call("cuStreamBeginCapture", kUse);
  if (call.failed()) return call.code();
  Stream* stream;
  if (!find_stream(handle, stream)) return CUDA_ERROR_INVALID_HANDLE;
  if (!stream) return CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED;
  if (mode < CU_STREAM_CAPTURE_MODE_GLOBAL || mode > CU_STREAM_CAPTURE_MODE_RELAXED) {
    return CUDA_ERROR_INVALID_VALUE;
  }
  if (stream->capture) return CUDA_ERROR_ILLEGAL_STATE;
  auto capture = std::make_shared<Capture>(Capture{stream, mode, std::this_thread::get_id()});
  draw_in(stream, capture, {});
  state().captures.push_back(std::move(capture));
  return CUDA_SUCCESS;
}

CUresult cuStreamIsCapturing(CUstream handle, CUstreamCaptureStatus* status) {
  Call call("cuStreamIsCapturing", kUse);
  if (call.failed()) return call.code();
  Stream* stream;
  if (!find_stream(handle, stream)) return CUDA_ERROR_INVALID_HANDLE;
  if (!status) return CUDA_ERROR_INVALID_VALUE;
  *status = CU_STREAM_CAPTURE_STATUS_NONE;
  if (stream && stream->capture) {
    *status = stream->capture->valid ? CU_STREAM_CAPTURE_STATUS_ACTIVE
                                     : CU_STREAM_CAPTURE_STATUS_INVALIDATED;
  }
  if (stream) return CUDA_SUCCESS;
  for (const auto& capture : state().captures) {
    const bool blocking = (capture->origin->flags & CU_STREAM_NON_BLOCKING) == 0;
    if (blocking) return CUDA_ERROR_STREAM_CAPTURE_IMPLICIT;
  }
  return CUDA_SUCCESS;
}

CUresult cuStreamEndCapture(CUstream handle, CUgraph* out) {
  Call call("cuStreamEndCapture", kUse);
  if (call.failed()) return call.code();
  Stream* stream;
  if (!find_stream(handle, stream)) return CUDA_ERROR_INVALID_HANDLE;
  if (!out) return CUDA_ERROR_INVALID_VALUE;
  *out = nullptr;
  if (!stream || !stream->capture) return CUDA_ERROR_ILLEGAL_STATE;
  const std::shared_ptr<Capture> capture = stream->capture;
  if (capture->origin != stream) return CUDA_ERROR_STREAM_CAPTURE_UNMATCHED;
  if (capture->mode != CU_STREAM_CAPTURE_MODE_RELAXED &&
      capture->thread != std::this_thread::get_id()) {
    return CUDA_ERROR_STREAM_CAPTURE_WRONG_THREAD;
  }
  const bool whole = joined(*capture);
  end(*capture);
  if (!capture->valid) return CUDA_ERROR_STREAM_CAPTURE_INVALIDATED;
  if (!whole) return CUDA_ERROR_STREAM_CAPTURE_UNJOINED;
  const uint64_t id = state().next_id++;
  state().graphs.emplace(id, std::make_shared<Graph>(std::move(capture->graph)));
  *out = reinterpret_cast<CUgraph>(id);
  return CUDA_SUCCESS;
}
