// Graphs that run: each node after those it depends on, a thread a lane.
#include <algorithm>

#include "capture.h"

using namespace standin;

namespace {

struct Replay {
  std::vector<Node> nodes;  // ops are spent
  std::vector<Run> runs;
  std::vector<bool> done;
  RecordPtr before, mine;  // launches of the same graph
};

void run_lane(Lock& lock, Replay& launch, size_t lane) {
  State& s = state();
  for (size_t i = 0; i < launch.nodes.size(); ++i) {
    const Node& node = launch.nodes[i];
    if (node.lane != lane) continue;
    s.changed.wait(lock, [&] {
      const auto over = [&](size_t need) { return launch.done[need]; };
      return std::all_of(node.needs.begin(), node.needs.end(), over);
    });
    if (s.sticky == CUDA_SUCCESS && launch.runs[i]) launch.runs[i](lock);
    launch.done[i] = true;
    s.changed.notify_all();
  }
}

void run(Lock& lock, Replay& launch, size_t lanes) {
  State& s = state();
  s.changed.wait(lock, [&] {
    return !launch.before || launch.before->state != Record::kPending || s.sticky != CUDA_SUCCESS;
  });
  std::vector<std::thread> threads;
  for (size_t lane = 1; lane < lanes; ++lane) {
    threads.emplace_back([&launch, lane] {
      Lock mine(state().mutex);
      run_lane(mine, launch, lane);
    });
  }
  run_lane(lock, launch, 0);
  lock.unlock();
  for (std::thread& thread : threads) thread.join();
  lock.lock();
  launch.mine->state = s.sticky == CUDA_SUCCESS ? Record::kDone : Record::kFailed;
  s.changed.notify_all();
}

}  // namespace

CUresult cuGraphInstantiate(CUgraphExec* out, CUgraph handle, unsigned long long flags) {
  Call call("cuGraphInstantiateWithFlags", kUse);
  if (call.failed()) return call.code();
  const auto found = state().graphs.find(reinterpret_cast<uint64_t>(handle));
  if (found == state().graphs.end()) return CUDA_ERROR_INVALID_HANDLE;
  if (!out || flags != 0) return CUDA_ERROR_INVALID_VALUE;
  const uint64_t id = state().next_id++;
  auto made = std::make_shared<Executable>(Executable{*found->second, {}, nullptr});
  for (size_t lane = 0; lane < made->graph.lanes; ++lane) {
    made->lanes.push_back(new_actor("branch " + std::to_string(lane) + " of graph " + hex(id)));
  }
  state().executables.emplace(id, std::move(made));
  *out = reinterpret_cast<CUgraphExec>(id);
  return CUDA_SUCCESS;
}

CUresult cuGraphLaunch(CUgraphExec handle, CUstream stream_handle) {
  Call call("cuGraphLaunch", kUse);
  if (call.failed()) return call.code();
  const auto found = state().executables.find(reinterpret_cast<uint64_t>(handle));
  Stream* stream;
  if (found == state().executables.end() || !find_stream(stream_handle, stream)) {
    return CUDA_ERROR_INVALID_HANDLE;
  }
  if (stream && stream->capture) return CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED;  // not here
  Executable& graph = *found->second;
  Actor& actor = begin_work(stream);
  VectorClock start;
  actor.precedes(start);
  if (graph.newest) join(start, graph.newest->clock);
  auto launch = std::make_shared<Replay>();
  launch->nodes = graph.graph.nodes;
  launch->done.assign(launch->nodes.size(), false);
  launch->before = graph.newest;
  launch->mine = graph.newest = std::make_shared<Record>();
  join(launch->mine->clock, start);
  // Who comes before whom is what the edges say, and nothing else.
  std::vector<VectorClock> after(launch->nodes.size());
  for (size_t i = 0; i < launch->nodes.size(); ++i) {
    const Node& node = launch->nodes[i];
    Actor& lane = graph.lanes[node.lane];
    const uint64_t tick = lane.now();
    lane.clock.assign(lane.clock.size(), 0);
    lane.clock[static_cast<size_t>(lane.id)] = tick;
    join(lane.clock, start);
    for (const size_t need : node.needs) join(lane.clock, after[need]);
    launch->runs.push_back(node.op(lane));
    lane.precedes(after[i]);
    join(launch->mine->clock, after[i]);
  }
  join(actor.clock, launch->mine->clock);
  const size_t lanes = graph.graph.lanes;
  submit(call.lock, stream,
         Command{[launch, lanes](Lock& lock) { run(lock, *launch, lanes); }, true});
  return call.done();
}

CUresult cuGraphDestroy(CUgraph graph) {
  Call call("cuGraphDestroy", kEnd);
  if (call.failed()) return call.code();
  if (state().graphs.erase(reinterpret_cast<uint64_t>(graph)) == 0) {
    return call.wrong(CUDA_ERROR_INVALID_HANDLE, "no such graph");
  }
  return call.done();
}

CUresult cuGraphExecDestroy(CUgraphExec graph) {
  Call call("cuGraphExecDestroy", kEnd);
  if (call.failed()) return call.code();
  if (state().executables.erase(reinterpret_cast<uint64_t>(graph)) == 0) {
    return call.wrong(CUDA_ERROR_INVALID_HANDLE, "no such executable graph");
  }
  return call.done();
}
