// Events: a record is an object of its own, so a wait means the newest one at the time of the call.
#include "capture.h"

using namespace standin;

namespace {

Event* find_event(Call& call, CUevent handle) {
  auto& events = state().events;
  const auto found = events.find(reinterpret_cast<uint64_t>(handle));
  if (found == events.end()) {
    call.wrong(CUDA_ERROR_INVALID_HANDLE,
               "no such event: " + hex(reinterpret_cast<uint64_t>(handle)));
    return nullptr;
  }
  return &found->second;
}

// An event of the same capture is an edge; one of a capture under way draws the stream in.
CUresult wait_in_capture(Stream* stream, const Event& event) {
  if (const CUresult code = check_capture(stream)) return code;
  const auto& from = event.captured;
  if (stream && stream->capture) {
    Capture& capture = *stream->capture;
    if (!from || from->over) {
      invalidate(capture);
      return CUDA_ERROR_STREAM_CAPTURE_ISOLATION;
    }
    if (from != stream->capture) {
      invalidate(capture);
      invalidate(*from);
      return CUDA_ERROR_STREAM_CAPTURE_MERGE;
    }
  } else if (from->over) {
    return CUDA_ERROR_CAPTURED_EVENT;
  } else if (!from->valid) {
    return CUDA_ERROR_STREAM_CAPTURE_INVALIDATED;
  } else if (!stream) {
    invalidate(*from);
    return CUDA_ERROR_STREAM_CAPTURE_IMPLICIT;
  }
  draw_in(stream, from, event.at);
  return CUDA_SUCCESS;
}

void wait_for_record(Lock& lock, const RecordPtr& record) {
  State& s = state();
  s.changed.wait(lock,
                 [&] { return record->state != Record::kPending || s.sticky != CUDA_SUCCESS; });
}

CUresult elapsed(Call& call, float* out, CUevent start, CUevent end) {
  if (call.failed()) return call.code();
  const Event* first = find_event(call, start);
  const Event* second = find_event(call, end);
  if (!first || !second) return CUDA_ERROR_INVALID_HANDLE;
  if (first->captured || second->captured) return CUDA_ERROR_CAPTURED_EVENT;
  if ((first->flags | second->flags) & CU_EVENT_DISABLE_TIMING) return CUDA_ERROR_INVALID_HANDLE;
  if (!first->newest || !second->newest) return CUDA_ERROR_INVALID_HANDLE;
  if (first->newest->state != Record::kDone || second->newest->state != Record::kDone) {
    return CUDA_ERROR_NOT_READY;
  }
  if (out == nullptr) return CUDA_ERROR_INVALID_VALUE;
  *out =
      std::chrono::duration<float, std::milli>(second->newest->when - first->newest->when).count();
  return CUDA_SUCCESS;
}

}  // namespace

CUresult cuEventCreate(CUevent* out, unsigned flags) {
  Call call("cuEventCreate", kUse);
  if (call.failed()) return call.code();
  constexpr unsigned kKnown =
      CU_EVENT_BLOCKING_SYNC | CU_EVENT_DISABLE_TIMING | CU_EVENT_INTERPROCESS;
  if (out == nullptr || (flags & ~kKnown)) return CUDA_ERROR_INVALID_VALUE;
  const uint64_t id = state().next_id++;
  state().events.emplace(id, Event{flags, call.device(), nullptr});
  *out = reinterpret_cast<CUevent>(id);
  return CUDA_SUCCESS;
}

CUresult cuEventDestroy(CUevent handle) {
  Call call("cuEventDestroy", kEnd);
  if (call.failed()) return call.code();
  if (!find_event(call, handle)) return CUDA_ERROR_INVALID_HANDLE;
  state().events.erase(reinterpret_cast<uint64_t>(handle));  // pending waits hold the record
  return call.done();
}

CUresult cuEventRecord(CUevent handle, CUstream stream_handle) {
  Call call("cuEventRecord", kUse);
  if (call.failed()) return call.code();
  Event* event = find_event(call, handle);
  Stream* stream;
  if (!find_stream(stream_handle, stream) || !event) return CUDA_ERROR_INVALID_HANDLE;
  if (stream && stream->device != event->device) return CUDA_ERROR_INVALID_HANDLE;
  if (const CUresult code = check_capture(stream)) return code;
  event->captured.reset();
  if (stream && stream->capture) {
    event->captured = stream->capture;
    event->at = stream->capture->branches[stream].tail;
    event->newest.reset();
    return CUDA_SUCCESS;
  }
  auto record = std::make_shared<Record>();
  begin_work(stream).precedes(record->clock);
  event->newest = record;
  const auto finish = [record](Lock&) {
    record->when = Time::now();
    record->state = state().sticky == CUDA_SUCCESS ? Record::kDone : Record::kFailed;
  };
  submit(call.lock, stream, Command{finish, true});
  return call.done();
}

CUresult cuStreamWaitEvent(CUstream stream_handle, CUevent handle, unsigned flags) {
  Call call("cuStreamWaitEvent", kUse);
  if (call.failed()) return call.code();
  Event* event = find_event(call, handle);
  Stream* stream;
  if (!find_stream(stream_handle, stream) || !event) return CUDA_ERROR_INVALID_HANDLE;
  if (flags > CU_EVENT_WAIT_EXTERNAL) return CUDA_ERROR_INVALID_VALUE;
  if (event->captured || (stream && stream->capture)) return wait_in_capture(stream, *event);
  const RecordPtr record = event->newest;
  Actor& actor = begin_work(stream);
  if (!record) return CUDA_SUCCESS;
  join(actor.clock, record->clock);
  const auto wait = [record, id = actor.id](Lock& lock) {
    if (record->state == Record::kPending) leave_engines(id);
    wait_for_record(lock, record);
  };
  submit(call.lock, stream, Command{wait});
  return call.done();
}

CUresult cuEventQuery(CUevent handle) {
  Call call("cuEventQuery", kUse | kUnsafe);
  if (call.failed()) return call.code();
  const Event* event = find_event(call, handle);
  if (!event) return CUDA_ERROR_INVALID_HANDLE;
  if (event->captured) return CUDA_ERROR_CAPTURED_EVENT;
  if (!event->newest) return CUDA_SUCCESS;
  if (event->newest->state == Record::kPending) return CUDA_ERROR_NOT_READY;
  join(this_thread().host.clock, event->newest->clock);
  return CUDA_SUCCESS;
}

CUresult cuEventSynchronize(CUevent handle) {
  Call call("cuEventSynchronize", kUse | kUnsafe);
  if (call.failed()) return call.code();
  const Event* event = find_event(call, handle);
  if (!event) return CUDA_ERROR_INVALID_HANDLE;
  if (event->captured) return CUDA_ERROR_CAPTURED_EVENT;
  const RecordPtr record = event->newest;
  if (!record) return CUDA_SUCCESS;
  wait_for_record(call.lock, record);
  if (state().sticky != CUDA_SUCCESS) return state().sticky;
  join(this_thread().host.clock, record->clock);
  return CUDA_SUCCESS;
}

CUresult cuEventElapsedTime(float* out, CUevent start, CUevent end) {
  Call call("cuEventElapsedTime", kUse);
  return elapsed(call, out, start, end);
}

// The name before CUDA 12.8; the header's macro leads to the one above.
#undef cuEventElapsedTime
extern "C"
    __attribute__((visibility("default"))) CUresult cuEventElapsedTime(float* out, CUevent start,
                                                                       CUevent end) {
  Call call("cuEventElapsedTime", kUse);
  return elapsed(call, out, start, end);
}
