// Who did what before whom: threads, their NULL streams, streams.
#include "state.h"

namespace standin {
namespace {

thread_local HostThread* mine = nullptr;
thread_local uint64_t mine_of = 0;  // the generation it belongs to

std::string describe(const Access& access) {
  return std::string(access.what) + (access.write ? " writes " : " reads ") +
         range_text(access.address, access.bytes) + " on " +
         state().actor_names[static_cast<size_t>(access.actor)];
}

bool covers(const VectorClock& seen, int actor, uint64_t tick) {
  return static_cast<size_t>(actor) < seen.size() && seen[static_cast<size_t>(actor)] >= tick;
}

}  // namespace

Actor new_actor(const std::string& name) {
  State& s = state();
  const int id = static_cast<int>(s.actor_names.size());
  s.actor_names.push_back(name);
  Actor actor{id, VectorClock(static_cast<size_t>(id) + 1, 0)};
  actor.clock.back() = 1;
  return actor;
}

HostThread& this_thread() {
  State& s = state();
  if (mine_of != s.generation) {
    const std::string number = std::to_string(s.threads.size() + 1);
    Actor host = new_actor("thread " + number);
    Actor null_stream = new_actor("the NULL stream of thread " + number);
    s.threads.push_back(
        std::make_unique<HostThread>(HostThread{std::move(host), std::move(null_stream)}));
    mine = s.threads.back().get();
    mine_of = s.generation;
  }
  return *mine;
}

Actor& actor_of(Stream* stream) { return stream ? stream->actor : this_thread().null_stream; }

Actor& begin_work(Stream* stream) {
  Actor& actor = actor_of(stream);
  this_thread().host.precedes(actor.clock);
  return actor;
}

Accesses::Accesses(const Actor& actor, const char* what)
    : actor_(actor),
      what_(what),
      check_(state().sticky == CUDA_SUCCESS && setting("race_check") != 0),
      submission_(state().next_submission++) {}

void Accesses::add(const Range& range, uint64_t address, bool write, When when) {
  State& s = state();
  const Actor& host = this_thread().host;
  // An early read knows only what the submitting thread knows to be over.
  const VectorClock& seen = when == kInOrder ? actor_.clock : host.clock;
  const Actor& does = when == kDuringCall ? host : actor_;
  Access access{does.id, does.now(), submission_, address, 0, write, what_};
  for (const Span& span : range.spans) {
    access.bytes = span.bytes;
    if (span.area && access.actor != host.id) span.area->uses[access.actor] = access.tick;
    if (check_) {
      s.races.check(span.area ? span.area->key() : kHostKey, span.offset, span.bytes, access, seen,
                    conflicts_);
    }
    access.address += span.bytes;
  }
}

Accesses::~Accesses() {
  for (const Conflict& conflict : conflicts_) {
    violate("unordered alias access: " + describe(conflict.first) + "; unordered with it, " +
            describe(conflict.second));
  }
}

void check_unused(Area& area, const char* call) {
  State& s = state();
  if (s.sticky != CUDA_SUCCESS) return;  // nothing can be waited for any more
  const Actor& host = this_thread().host;
  for (const auto& [actor, tick] : area.uses) {
    if (actor == host.id || covers(host.clock, actor, tick)) continue;
    violate(std::string(call) + ": " + range_text(area.address, area.bytes) +
            " may still be used by work on " + s.actor_names[static_cast<size_t>(actor)]);
  }
}

void wait_for_pins(Lock& lock, Area& area) {
  state().changed.wait(lock, [&] { return area.pins == 0; });
}

}  // namespace standin
