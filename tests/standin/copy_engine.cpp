// One copy engine a direction, shared by all streams: it stays with a stream while that has copies
// that are ready, whatever the streams' priorities.
#include <algorithm>

#include "state.h"

namespace standin {
namespace {

bool is_stream(int actor) {
  const auto& all = state().streams;
  return std::any_of(all.begin(), all.end(),
                     [&](const auto& each) { return each.second->actor.id == actor; });
}

}  // namespace

EngineUse::EngineUse(Lock& lock, int direction, int actor)
    : actor_(actor), taken_(setting("copy_engines") != 0) {
  if (!taken_) return;
  State& s = state();
  int& holder = s.lanes[direction].holder;
  s.changed.wait(lock,
                 [&] { return holder == kNobody || holder == actor || s.sticky != CUDA_SUCCESS; });
  holder = actor;
}

// A stream keeps it until it has nothing to copy at once; see leave_engines.
EngineUse::~EngineUse() {
  if (taken_ && !is_stream(actor_)) leave_engines(actor_);
}

void leave_engines(int actor) {
  for (Lane& lane : state().lanes) {
    if (lane.holder != actor) continue;
    lane.holder = kNobody;
    state().changed.notify_all();
  }
}

}  // namespace standin
