// Streams: one thread and one queue each.
#include <sys/prctl.h>

#include <algorithm>

#include "capture.h"

namespace standin {
namespace {

void run(Stream& stream) {
  prctl(PR_SET_NAME, "standin-stream");
  prctl(PR_SET_TIMERSLACK, 1);  // the link emulation sleeps for tens of microseconds
  State& s = state();
  Lock lock(s.mutex);
  for (;;) {
    if (stream.queue.empty()) leave_engines(stream.actor.id);
    stream.filled.wait(lock, [&] { return !stream.queue.empty() || stream.stop; });
    if (stream.queue.empty()) break;
    {
      Command command = std::move(stream.queue.front());
      stream.queue.pop_front();
      if (s.sticky == CUDA_SUCCESS || command.always) command.run(lock);
    }
    ++stream.completed;
    s.changed.notify_all();
  }
  stream.ended = true;
  s.changed.notify_all();
}

uint64_t id_of(CUstream handle) { return reinterpret_cast<uint64_t>(handle); }

// A stream that captures has nothing to wait for, and the question breaks the capture.
CUresult no_capture(Stream* stream) {
  if (!stream || !stream->capture) return CUDA_SUCCESS;
  invalidate(*stream->capture);
  return CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED;
}

// Waits for what is submitted by now; its effects are then known to the calling thread.
CUresult wait_for(Call& call, Stream* stream) {
  State& s = state();
  actor_of(stream);  // of this thread: made before the clock is taken
  VectorClock clock;
  actor_of(stream).precedes(clock);
  if (stream != nullptr) {
    const uint64_t target = stream->submitted;
    s.changed.wait(call.lock,
                   [&] { return stream->completed >= target || s.sticky != CUDA_SUCCESS; });
  }
  if (s.sticky != CUDA_SUCCESS) return s.sticky;
  join(this_thread().host.clock, clock);
  return CUDA_SUCCESS;
}

}  // namespace

bool find_stream(CUstream handle, Stream*& stream) {
  stream = nullptr;
  if (handle == nullptr || handle == CU_STREAM_LEGACY || handle == CU_STREAM_PER_THREAD) {
    return true;
  }
  const auto found = state().streams.find(id_of(handle));
  if (found == state().streams.end()) {
    violate("no such stream: " + hex(id_of(handle)));
    return false;
  }
  stream = found->second.get();
  return true;
}

void submit(Lock& lock, Stream* stream, Command command) {
  if (stream == nullptr) {
    if (state().sticky == CUDA_SUCCESS || command.always) command.run(lock);
    return;
  }
  ++stream->submitted;
  stream->queue.push_back(std::move(command));
  stream->filled.notify_one();
}

void reap(Lock& lock, bool wait) {
  State& s = state();
  if (wait) {
    s.changed.wait(lock, [&] {
      return std::all_of(s.ending.begin(), s.ending.end(), [](auto& e) { return e->ended; });
    });
  }
  std::vector<std::unique_ptr<Stream>> over;
  for (auto& stream : s.ending) {
    if (stream->ended) over.push_back(std::move(stream));
  }
  s.ending.erase(std::remove(s.ending.begin(), s.ending.end(), nullptr), s.ending.end());
  lock.unlock();
  for (auto& stream : over) stream->thread.join();
  lock.lock();
}

}  // namespace standin

using namespace standin;

CUresult cuStreamCreateWithPriority(CUstream* out, unsigned flags, int priority) {
  Call call("cuStreamCreateWithPriority", kUse);
  if (call.failed()) return call.code();
  if (out == nullptr || flags > CU_STREAM_NON_BLOCKING) return CUDA_ERROR_INVALID_VALUE;
  State& s = state();
  const uint64_t id = s.next_id++;
  auto stream = std::unique_ptr<Stream>(
      new Stream{call.device(), flags, priority, new_actor("stream " + hex(id))});
  Stream* made = stream.get();
  s.streams.emplace(id, std::move(stream));
  made->thread = std::thread([made] { run(*made); });
  *out = reinterpret_cast<CUstream>(id);
  return CUDA_SUCCESS;
}

CUresult cuStreamDestroy(CUstream handle) {
  Call call("cuStreamDestroy", kEnd);
  if (call.failed()) return call.code();
  State& s = state();
  const auto found = s.streams.find(id_of(handle));
  if (found == s.streams.end()) {
    return call.wrong(CUDA_ERROR_INVALID_HANDLE, "no such stream: " + hex(id_of(handle)));
  }
  Stream& stream = *found->second;
  if (stream.capture) {
    invalidate(*stream.capture);
    return call.wrong(CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED, "the stream is capturing");
  }
  const bool idle = stream.completed == stream.submitted;
  stream.stop = true;
  stream.filled.notify_one();
  std::unique_ptr<Stream> mine = std::move(found->second);
  s.streams.erase(found);
  mine->actor.precedes(s.ended);
  // CUDA does not wait for the work; an idle stream ends at once, so that no thread is left over.
  if (idle) {
    call.lock.unlock();
    mine->thread.join();
    call.lock.lock();
  } else {
    s.ending.push_back(std::move(mine));
  }
  reap(call.lock, false);
  return call.done();
}

CUresult cuStreamSynchronize(CUstream handle) {
  Call call("cuStreamSynchronize", kUse | kUnsafe);
  if (call.failed()) return call.code();
  Stream* stream;
  if (!find_stream(handle, stream)) return CUDA_ERROR_INVALID_HANDLE;
  if (const CUresult code = no_capture(stream)) return code;
  return wait_for(call, stream);
}

CUresult cuStreamQuery(CUstream handle) {
  Call call("cuStreamQuery", kUse | kUnsafe);
  if (call.failed()) return call.code();
  Stream* stream;
  if (!find_stream(handle, stream)) return CUDA_ERROR_INVALID_HANDLE;
  if (const CUresult code = no_capture(stream)) return code;
  if (stream && stream->completed < stream->submitted) return CUDA_ERROR_NOT_READY;
  return wait_for(call, stream);
}

CUresult cuCtxSynchronize(void) {
  Call call("cuCtxSynchronize", kUse | kUnsafe);
  if (call.failed()) return call.code();
  State& s = state();
  std::vector<std::pair<uint64_t, uint64_t>> targets;
  VectorClock clock;
  for (auto& [id, stream] : s.streams) {
    if (stream->device != call.device()) continue;
    targets.emplace_back(id, stream->submitted);
    stream->actor.precedes(clock);
  }
  join(clock, s.ended);
  for (auto& thread : s.threads) thread->null_stream.precedes(clock);
  s.changed.wait(call.lock, [&] {
    const auto over = [](const auto& stream) { return stream->ended; };
    if (!std::all_of(s.ending.begin(), s.ending.end(), over)) return s.sticky != CUDA_SUCCESS;
    return s.sticky != CUDA_SUCCESS ||
           std::all_of(targets.begin(), targets.end(), [&](const auto& target) {
             const auto found = s.streams.find(target.first);
             return found == s.streams.end() || found->second->completed >= target.second;
           });
  });
  if (s.sticky != CUDA_SUCCESS) return s.sticky;
  join(this_thread().host.clock, clock);
  return CUDA_SUCCESS;
}

CUresult cuLaunchHostFunc(CUstream handle, CUhostFn fn, void* data) {
  Call call("cuLaunchHostFunc", kUse);
  if (call.failed()) return call.code();
  if (fn == nullptr) return CUDA_ERROR_INVALID_VALUE;
  Stream* stream;
  if (!find_stream(handle, stream)) return CUDA_ERROR_INVALID_HANDLE;
  return enqueue(call, stream, [fn, data](const Actor& actor) -> Run {
    return [fn, data, id = actor.id](Lock& lock) {
      leave_engines(id);
      lock.unlock();
      {
        InCallback guard;
        fn(data);
      }
      lock.lock();
    };
  });
}
