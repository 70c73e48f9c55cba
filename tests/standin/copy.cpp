#include "copy.h"

#include <algorithm>
#include <cmath>
#include <cstring>

namespace standin {
namespace {

struct Work {
  const char* what;
  int actor;
  std::vector<Copy> copies;
  std::vector<AreaPtr> areas;
};

void move_bytes(const Copy& copy, size_t from, size_t to) {
  const char* src = copy.snapshot.empty() ? copy.src : copy.snapshot.data();
  std::memcpy(copy.dst + from, src + from, to - from);
}

// The link is shared by all streams: when these bytes are over, lane by lane.
Time::time_point take_link(const std::vector<Copy>& copies) {
  State& s = state();
  auto end = Time::now();
  const auto descriptor = static_cast<double>(setting("descriptor_ns")) * 1e-6;
  const auto pageable = static_cast<double>(setting("pageable"));
  if (s.link <= 0 && descriptor <= 0 && pageable <= 0) return end;
  const auto start = end;
  for (int i = 0; i < kDirections; ++i) {
    double ms = 0;
    for (const Copy& copy : copies) {
      if (copy.direction != i) continue;
      const double speed = copy.pageable ? pageable : s.link;
      ms += descriptor + (speed > 0 ? static_cast<double>(copy.bytes) / speed * 1e3 : 0);
    }
    if (ms <= 0) continue;
    Lane& lane = s.lanes[i];
    const auto time = milliseconds(ms);
    lane.free_at = std::max(start, lane.free_at) + time;
    end = std::max(end, lane.free_at);
  }
  return end;
}

// One half of a torn batch, or all of it.
bool move_part(Lock& lock, const Work& work, size_t good, int half, int halves) {
  if (state().sticky != CUDA_SUCCESS || !pin(work.areas, work.what)) return false;
  lock.unlock();
  for (size_t i = 0; i < good; ++i) {
    const Copy& copy = work.copies[i];
    const size_t middle = halves == 2 ? copy.bytes / 2 : copy.bytes;
    move_bytes(copy, half == 0 ? 0 : middle, half == 0 ? middle : copy.bytes);
  }
  lock.lock();
  unpin(work.areas);
  return true;
}

void run(Lock& lock, const Work& work) {
  State& s = state();
  Lane& lane = s.lanes[work.copies.front().direction];
  if (lane.delay_max > 0) {
    const double ms = std::uniform_real_distribution<>(lane.delay_min, lane.delay_max)(lane.random);
    sleep_until(lock, Time::now() + milliseconds(ms));
  }
  const EngineUse engine(lock, work.copies.front().direction, work.actor);
  const auto failing = std::find_if(work.copies.begin(), work.copies.end(),
                                    [](const Copy& copy) { return copy.fails; });
  const auto good = static_cast<size_t>(failing - work.copies.begin());
  // Bytes move at the end of their time: what does not wait for them then sees the old ones.
  sleep_until(lock, take_link(work.copies));
  const int halves = lane.tear > 0 ? 2 : 1;
  for (int half = 0; half < halves; ++half) {
    if (half == 1) sleep_until(lock, Time::now() + milliseconds(lane.tear));
    if (!move_part(lock, work, good, half, halves)) return;
  }
  for (size_t i = 0; i < good; ++i) {
    Lane& counted = s.lanes[work.copies[i].direction];
    ++counted.copies;
    counted.bytes += static_cast<int64_t>(work.copies[i].bytes);
  }
  if (good < work.copies.size()) fail_context(static_cast<CUresult>(setting("copy_error")));
}

}  // namespace

void add_areas(std::vector<AreaPtr>& areas, const Range& range) {
  for (const Span& span : range.spans) {
    if (span.area == nullptr) continue;  // of memory that is not registered
    if (areas.empty() || areas.back() != span.area) areas.push_back(span.area);
  }
}

bool pin(const std::vector<AreaPtr>& areas, const char* what) {
  for (const AreaPtr& area : areas) {
    if (area->alive && area->access) continue;
    violate(std::string(what) + ": " + range_text(area->address, area->bytes) +
            " was unmapped or unregistered before the work ran");
    fail_context(CUDA_ERROR_ILLEGAL_ADDRESS);
    return false;
  }
  for (const AreaPtr& area : areas) ++area->pins;
  return true;
}

void unpin(const std::vector<AreaPtr>& areas) {
  for (const AreaPtr& area : areas) --area->pins;
  state().changed.notify_all();
}

Batch::Batch(Stream* stream, const char* what, bool foreseen)
    : stream_(stream), what_(what), foreseen_(foreseen) {}

bool Batch::add(uint64_t dst, uint64_t src, size_t bytes, int expected, Accesses::When when,
                std::string& why) {
  Checked c{{}, {}, dst, src, when, 0, bytes, foreseen_};
  std::string reason;
  if (!resolve(dst, bytes, true, c.dst, reason)) {
    why = "destination " + range_text(dst, bytes) + " " + reason;
    return false;
  }
  if (!resolve(src, bytes, false, c.src, reason)) {
    why = "source " + range_text(src, bytes) + " " + reason;
    return false;
  }
  const bool to_device = c.dst.side == Side::kDevice, from_device = c.src.side == Side::kDevice;
  c.direction = to_device ? (from_device ? 2 : 0) : (from_device ? 1 : 3);
  if (expected >= 0 && c.direction != expected) {
    why = "wrong direction: " + range_text(src, bytes) + " to " + range_text(dst, bytes);
    return false;
  }
  pageable_ = pageable_ || c.dst.pageable || c.src.pageable;
  checked_.push_back(std::move(c));
  return true;
}

// As work of an actor, at the launch of a graph or at once.
Run Batch::prepare(const Actor& actor, const std::vector<Checked>& checked, const char* what) {
  State& s = state();
  auto work = std::make_shared<Work>();
  work->what = what;
  work->actor = actor.id;
  {
    Accesses accesses(actor, what);
    for (const Checked& c : checked) {
      accesses.add(c.src, c.src_address, false, c.when);
      accesses.add(c.dst, c.dst_address, true);
    }
  }
  for (const Checked& c : checked) {
    Copy copy{c.direction, c.dst.pointer, c.src.pointer, c.bytes};
    copy.pageable = c.dst.pageable || c.src.pageable;
    if (c.when != Accesses::kInOrder) copy.snapshot.assign(copy.src, copy.src + c.bytes);
    if (c.foreseen && c.direction == 0) foresee(c.dst, copy.src);
    int64_t& fail_in = s.lanes[c.direction].fail_in;
    copy.fails = fail_in > 0 && --fail_in == 0;
    work->copies.push_back(std::move(copy));
    add_areas(work->areas, c.src);
    add_areas(work->areas, c.dst);
  }
  std::sort(work->areas.begin(), work->areas.end());
  work->areas.erase(std::unique(work->areas.begin(), work->areas.end()), work->areas.end());
  std::shuffle(work->copies.begin(), work->copies.end(), s.shuffle);
  return [work](Lock& lock) { run(lock, *work); };
}

// A copy of memory that is not registered is staged: the call returns when it is over.
CUresult Batch::submit(Call& call) {
  if (checked_.empty()) return CUDA_SUCCESS;
  const bool captured = stream_ != nullptr && stream_->capture != nullptr;
  const CUresult code =
      enqueue(call, stream_, [checked = checked_, what = what_](const Actor& actor) {
        return prepare(actor, checked, what);
      });
  if (!pageable_ || code != CUDA_SUCCESS || captured) return code;
  State& s = state();
  ++s.settings["pageable_batches"];
  if (stream_ == nullptr) return code;
  const uint64_t target = stream_->submitted;
  s.changed.wait(call.lock,
                 [&] { return stream_->completed >= target || s.sticky != CUDA_SUCCESS; });
  return call.done();
}

}  // namespace standin
