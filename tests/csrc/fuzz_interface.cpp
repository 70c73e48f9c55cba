// Random calls of the C interface, in random order, with random and extreme arguments.
//
//   fuzz_interface FIRST_SEED COUNT [DRIVER]
//
// Nothing may crash, hang, or take memory that is not there: every call returns a code, and an
// error has a text. What a C caller alone can know is kept: arrays are as long as their counts say,
// as far as these are possible, and memory that is copied is there. Each seed is printed before it
// runs, so that the last line names the one that ended the process. The driver "cuda" runs over the
// tests' stand-in for libcuda, found by LD_LIBRARY_PATH, of which nothing may be left.
#include <dlfcn.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "testing.h"

namespace {

using Wide = __int128;

constexpr int kCalls = 150;
constexpr int64_t kRuns = 64;
constexpr unsigned kMostSeconds = 120;  // of a seed
// Sizes between the two are left out: memory of that size may be there, and would be taken.
constexpr Wide kSmall = Wide{32} << 20, kExtreme = Wide{1} << 50;

std::string driver_name = "host";

void ignore(void*) {}

Wide rounded_up(Wide value, Wide multiple) { return (value + multiple - 1) / multiple * multiple; }

// The sizes of a geometry, without overflow.
struct Sizes {
  explicit Sizes(const pie_geometry& g, int64_t chunks)
      : own(rounded_up(Wide{g.resident_blocks} * g.page_bytes, g.granularity)),
        slot(rounded_up(Wide{g.pooled_blocks} * g.page_bytes, g.granularity)),
        all(g.num_regions * (own + slot)),
        device(g.num_regions * own + (Wide{g.ring_slots} + g.draft_layers) * slot),
        row((Wide{g.num_layers} + g.draft_layers) * g.page_bytes),
        host(row * g.rows),
        chunk(row * g.chunk_rows) {
    const Wide number = (Wide{g.rows} + g.chunk_rows - 1) / g.chunk_rows;
    const Wide there = chunks < 0 ? number : std::min<Wide>(number, std::max<int64_t>(chunks, 1));
    pool = std::min(there * g.chunk_rows, Wide{g.rows}) * row;
  }
  // rows * (L * p) is below 2^126; the others' products of three are cut to what still fits.
  bool fits() const {
    for (const Wide size : {own, slot, all, row, host, chunk}) {
      if (size > std::numeric_limits<int64_t>::max()) return false;
    }
    return true;
  }
  Wide own, slot, all, device, row, host, chunk, pool = 0;
};

struct Open {
  pie_engine* engine;
  pie_geometry sizes;
  uint64_t arena;
  int64_t virtual_bytes;
};

class Fuzz {
 public:
  explicit Fuzz(uint64_t seed)
      : random_(seed), stores_(kRuns), promotions_(kRuns), loads_(kRuns), buffer_(1 << 16) {}

  // False when something was wrong, which is printed.
  bool run() {
    open();
    for (int i = 0; i < kCalls && good_; ++i) call(pick(100));
    while (!open_.empty()) close();
    return good_;
  }
  int64_t calls() const { return calls_; }

 private:
  int64_t pick(int64_t n) { return static_cast<int64_t>(random_() % static_cast<uint64_t>(n)); }
  bool chance(int percent) { return pick(100) < percent; }

  int64_t extreme() {
    constexpr int64_t most = std::numeric_limits<int64_t>::max();
    const int64_t some[] = {0,         -1,        most,      most - 1,       -most - 1,
                            most / 2,  most / 3,  -most / 2, 1LL << 31,      1LL << 32,
                            1LL << 40, 1LL << 52, 1LL << 62, (1LL << 62) + 1};
    return chance(20) ? static_cast<int64_t>(random_()) : some[pick(std::size(some))];
  }
  int64_t number(int64_t usual) { return chance(92) ? pick(usual) : extreme(); }
  double real() {
    const double some[] = {0, 0.1, 0.3, -1, NAN, INFINITY, -INFINITY, 1e300, 1e-300};
    return some[pick(std::size(some))];
  }
  template <typename T>
  T* maybe(T& target) {
    return chance(95) ? &target : nullptr;
  }

  void must(int code) {
    ++calls_;
    if (code == PIE_OK) return;
    if (code < 0 || code > PIE_ERR_UNSUPPORTED || *pie_last_error() == 0) bad("no such error");
  }
  // The interface for tests takes open engines only.
  template <typename Function, typename... Arguments>
  void must_test(Function function, pie_engine* one, Arguments... arguments) {
    if (current_ == nullptr) return;
    ++calls_;
    const int code = function(one, arguments...);
    if (code == PIE_OK) return;
    if (code < 0 || code > PIE_ERR_UNSUPPORTED || *pie_test_last_error() == 0) bad("no such error");
  }
  void bad(const std::string& what) {
    std::printf("wrong: %s (%s)\n", what.c_str(), pie_last_error());
    good_ = false;
  }

  // Mostly one that is open; also none, one that was closed, and one that never was.
  pie_engine* engine() {
    current_ = open_.empty() ? nullptr : &open_[static_cast<size_t>(pick(open_.size()))];
    if (chance(94) && current_ != nullptr) return current_->engine;
    current_ = nullptr;
    if (chance(40)) return nullptr;
    if (closed_ != nullptr && chance(60)) {
      for (const Open& one : open_) {
        if (one.engine == closed_) current_ = &one;  // an engine is there again
      }
      return closed_;
    }
    return reinterpret_cast<pie_engine*>(static_cast<uintptr_t>(extreme()));
  }

  pie_geometry geometry() {
    const int64_t layers = 1 + pick(5), rows = 1 + pick(20), page = sysconf(_SC_PAGESIZE);
    const int64_t drafts = chance(50) ? 0 : pick(3);
    pie_geometry g{layers,         1 + pick(3000),       1 + pick(9),
                   1 + pick(9),    1 + pick(layers),     rows,
                   1 + pick(rows), page * (1 + pick(2)), layers + drafts + pick(3),
                   drafts};
    int64_t* const fields[] = {&g.num_layers,  &g.page_bytes,  &g.resident_blocks, &g.pooled_blocks,
                               &g.ring_slots,  &g.rows,        &g.chunk_rows,      &g.granularity,
                               &g.num_regions, &g.draft_layers};
    if (chance(40)) {
      for (int64_t i = 1 + pick(3); i > 0; --i) *fields[pick(std::size(fields))] = extreme();
    }
    return g;
  }

  void open() {
    const pie_geometry g = geometry();
    const int64_t chunks = chance(50) ? -1 : number(4);
    bool whole = g.ring_slots <= g.num_layers && g.num_layers <= g.num_regions &&
                 g.draft_layers >= 0 && g.draft_layers <= g.num_regions - g.num_layers;
    for (const int64_t field : {g.num_layers, g.page_bytes, g.resident_blocks, g.pooled_blocks,
                                g.ring_slots, g.rows, g.chunk_rows, g.granularity}) {
      whole = whole && field > 0;
    }
    // Products of three may leave even 127 bits; such sizes are beyond all limits.
    const auto bits = [](int64_t value) { return std::log2(static_cast<double>(value)); };
    const bool huge = whole && bits(g.num_regions) + bits(g.page_bytes) +
                                       std::max({bits(g.resident_blocks), bits(g.pooled_blocks),
                                                 bits(g.rows), bits(g.chunk_rows)}) >
                                   120;
    bool fits = false;
    Wide all = 0, device = 0;
    if (whole && !huge) {
      const Sizes sizes(g, chunks);
      const Wide taken = sizes.device + sizes.pool;
      if (taken > kSmall && taken < kExtreme) return;
      fits = sizes.fits(), all = sizes.all, device = sizes.device;
    }
    if (huge && bits(g.granularity) > 60) return;
    const double speeds[] = {0, -1, 1e12, 5e8, NAN, INFINITY, 1e-300};
    const double speed = chance(80) ? 0 : speeds[pick(std::size(speeds))];
    const auto debug = static_cast<uint32_t>(chance(80) ? 0 : random_());
    pie_engine* made = nullptr;
    const char* name = chance(96) ? driver_name.c_str() : chance(50) ? nullptr : "cuda:99999999999";
    const int code = pie_open(chance(98) ? &g : nullptr, name, speed, debug, chunks,
                              chance(98) ? &made : nullptr);
    must(code);
    if (code != PIE_OK) return;
    Open opened{made, g, 0, 0};
    int64_t virtual_bytes = 0, host_bytes = 0, device_bytes = 0;
    must(pie_arena(made, &opened.arena, &virtual_bytes));
    must(pie_bytes(made, &host_bytes, &device_bytes));
    opened.virtual_bytes = virtual_bytes;
    open_.push_back(opened);
    if (!whole || !fits) bad("sizes that cannot be were taken");
    if (Wide{virtual_bytes} != all || Wide{device_bytes} != device) bad("sizes that overflowed");
  }

  void close() {
    closed_ = open_.back().engine;
    must(pie_close(closed_));
    open_.pop_back();
    streams_.clear(), events_.clear();
  }

  uint64_t stream() {
    if (chance(40)) return 0;
    if (!streams_.empty() && chance(70))
      return streams_[static_cast<size_t>(pick(streams_.size()))];
    return foreign();
  }
  uint64_t event() {
    if (!events_.empty() && chance(70)) return events_[static_cast<size_t>(pick(events_.size()))];
    return foreign();
  }
  // Handles of CUDA are addresses, which CUDA does not check either.
  uint64_t foreign() {
    if (driver_name != "host") return 0;
    return static_cast<uint64_t>(chance(60) ? pick(12) : extreme());
  }

  int64_t count() {
    if (chance(90)) return pick(4);
    // Only where no such number of runs can be.
    const bool small = current_ != nullptr &&
                       std::max(current_->sizes.rows, current_->sizes.resident_blocks +
                                                          current_->sizes.pooled_blocks) <= kRuns;
    return small ? extreme() : pick(kRuns);
  }

  // Runs that the engine's sizes mostly allow.
  const pie_run* draw(std::vector<pie_run>& runs, bool pooled) {
    int64_t first = 0, blocks = 9, rows = 20;
    if (current_ != nullptr) {
      const pie_geometry& g = current_->sizes;
      first = pooled ? g.resident_blocks : 0, rows = g.rows;
      blocks = pooled ? g.pooled_blocks : g.resident_blocks;
    }
    for (pie_run& run : runs) {
      run = {first + pick(blocks), pick(rows), 1};
      if (chance(3)) run = {number(14), number(14), number(4)};
    }
    return chance(97) ? runs.data() : nullptr;
  }

  const pie_plan* plan() {
    if (chance(80)) ++step_;
    plan_ = {chance(97) ? step_ : extreme(), draw(stores_, false),
             chance(50) ? 0 : count(),       draw(promotions_, false),
             chance(60) ? 0 : count(),       draw(loads_, true),
             chance(20) ? -1 : count(),      chance(95) ? pick(4) : extreme()};
    return chance(97) ? &plan_ : nullptr;
  }

  void gates() { gates_of(engine()); }
  void gates_of(pie_engine* one) {
    const int64_t layers = current_ == nullptr ? 1 : current_->sizes.num_layers;
    for (int64_t l = 0; l < std::min<int64_t>(layers, 8); ++l) {
      if (chance(97)) must(pie_before_write(one, l));
      if (chance(97)) must(pie_before_attention(one, l));
      if (chance(97)) must(pie_after_attention(one, l));
    }
    pie_stats stats;
    must(pie_end_step(one, &stats));
  }

  void copy() {
    pie_engine* const one = engine();
    const int64_t all = current_ == nullptr ? 1 : current_->virtual_bytes;
    const int64_t bytes = pick(std::min<int64_t>(all, buffer_.size()) + 1);
    uint64_t device = current_ == nullptr ? 1 : current_->arena;
    device += static_cast<uint64_t>(pick(all - std::min(all - 1, bytes)));
    if (bytes == all) device = current_ == nullptr ? 1 : current_->arena;
    auto host = reinterpret_cast<uint64_t>(buffer_.data());
    const int64_t never[] = {-1, std::numeric_limits<int64_t>::min(), 1LL << 53,
                             std::numeric_limits<int64_t>::max()};
    int64_t wanted = bytes;
    if (chance(10)) wanted = never[pick(std::size(never))];
    if (chance(5)) (chance(50) ? host : device) = 0;
    const bool out = chance(50);
    must(pie_copy(one, stream(), out, out ? host : device, out ? device : host, wanted));
  }

  void call(int64_t which) {
    pie_stats stats;
    pie_counters counters;
    uint64_t word = 0;
    int64_t a = 0, b = 0;
    int flag = 0;
    double seconds = 0;
    char text[16];
    if (open_.empty() && chance(70)) return open();
    if (which < 8) return open_.size() < 2 ? open() : close();
    if (which < 20) return gates();
    if (which < 26) return copy();
    pie_engine* const one = engine();
    if (which < 40) {
      must(pie_begin_step(one, plan(), stream()));
      if (chance(60)) gates_of(one);
      return;
    }
    switch (which) {
      case 40:
        return must(pie_begin_graph_step(one, plan(), stream(), maybe(flag)));
      case 41:
        return must(pie_enter_graph(one));
      case 42:
      case 43:
        return must(pie_before_write(one, number(6)));
      case 44:
      case 45:
        return must(pie_before_attention(one, number(6)));
      case 46:
      case 47:
        return must(pie_after_attention(one, number(6)));
      case 48:
      case 49:
        return must(pie_end_step(one, maybe(stats)));
      case 50:
      case 51:
      case 52:
        return must(pie_run_idle(one, plan(), stream(), maybe(stats)));
      case 53:
      case 54:
      case 55:
        return must(pie_abort_step(one));
      case 56:
        return must(pie_drain(one));
      case 57:
        return must(pie_self_test(one));
      case 58:
        return must(pie_zero_ring(one));
      case 59:
        return must(pie_arena(one, maybe(word), maybe(a)));
      case 60:
        return must(pie_bytes(one, maybe(a), maybe(b)));
      case 61:
      case 62:
        return must(pie_commit_chunk(one, number(6)));
      case 63:
      case 64:
        return must(pie_release_chunk(one, number(6)));
      case 65:
      case 66:
        return must(pie_row_page(one, number(20), number(6), maybe(word)));
      case 67:
        return must(pie_device_arch(one, maybe(text[0]), number(sizeof text)));
      case 68:
        return must(pie_use_gather(one, maybe(buffer_[0]), chance(50) ? 16 : -1, number(9), 1));
      case 69:
        return must(pie_use_graphs(one, maybe(buffer_[0]), 16, number(9), 1));
      case 70:
        return must(pie_begin_capture(one, stream()));
      case 71:
        return must(pie_end_capture(one));
      case 72:
        return must(pie_counters_of(one, static_cast<int>(number(3)), maybe(counters)));
      case 73:
      case 74:
      case 75:
        return must_test(pie_test_inject, one, static_cast<int>(number(5)),
                         static_cast<int>(number(4)), real(), real(), random_());
      case 76:
      case 77:
        must(flag = pie_stream_create(one, maybe(word)));
        if (flag == PIE_OK) streams_.push_back(word);
        return;
      case 78:
        return must(pie_stream_destroy(one, gone(streams_)));
      case 79:
      case 80:
        return must(pie_stream_synchronize(one, stream()));
      case 81:
      case 82:
        return must_test(pie_test_stream_wait, one, stream(), event());
      case 83:
      case 84:
        return must_test(pie_test_launch_host, one, stream(), &ignore, nullptr);
      case 85:
      case 86:
        must(flag = pie_event_create(one, maybe(word)));
        if (flag == PIE_OK) events_.push_back(word);
        return;
      case 87:
        return must(pie_event_destroy(one, gone(events_)));
      case 88:
      case 89:
      case 90:
        return must(pie_event_record(one, event(), stream()));
      case 91:
        return must_test(pie_test_event_query, one, event(), &flag);
      case 92:
      case 93:
        return must_test(pie_test_event_synchronize, one, event());
      case 94:
        return must(pie_event_elapsed(one, event(), event(), maybe(seconds)));
      case 95:
        return must(pie_granularity(chance(80) ? driver_name.c_str() : nullptr, maybe(a)));
      case 96:
        return must(pie_close(nullptr));
      case 97:
        return closed_ == nullptr || is_open(closed_) ? void() : must(pie_close(closed_));
      default:
        return gates();
    }
  }

  bool is_open(const pie_engine* engine) const {
    return std::any_of(open_.begin(), open_.end(),
                       [&](const Open& one) { return one.engine == engine; });
  }

  uint64_t gone(std::vector<uint64_t>& handles) {
    if (handles.empty()) return foreign();
    const uint64_t last = handles.back();
    handles.pop_back();
    return last;
  }

  std::mt19937_64 random_;
  std::vector<Open> open_;
  const Open* current_ = nullptr;  // whose sizes the arguments follow; null: none
  pie_engine* closed_ = nullptr;
  std::vector<uint64_t> streams_, events_;
  std::vector<pie_run> stores_, promotions_, loads_;
  std::vector<char> buffer_;
  pie_plan plan_{};
  int64_t step_ = 0, calls_ = 0;
  bool good_ = true;
};

// Whether the stand-in has something that an engine made and did not end.
bool is_left() {
  if (driver_name == "host") return false;
  using Live = size_t (*)(char*, size_t);
  void* const library = dlopen("libcuda.so.1", RTLD_NOW | RTLD_NOLOAD);
  if (library == nullptr) return false;  // no engine was opened yet
  const auto live = reinterpret_cast<Live>(dlsym(library, "standin_live"));
  std::string text(1 << 12, 0);
  if (live(&text[0], text.size()) == 0) return false;
  std::printf("left: %s\n", text.c_str());
  return true;
}

}  // namespace

int main(int count, char** arguments) {
  const auto first = static_cast<uint64_t>(count > 1 ? std::atoll(arguments[1]) : 1);
  const auto seeds = static_cast<uint64_t>(count > 2 ? std::atoll(arguments[2]) : 20);
  if (count > 3) driver_name = arguments[3];
  int64_t calls = 0;
  for (uint64_t seed = first; seed < first + seeds; ++seed) {
    std::printf("seed %lu\n", static_cast<unsigned long>(seed));
    std::fflush(stdout);
    alarm(kMostSeconds);
    Fuzz fuzz(seed);
    if (!fuzz.run() || is_left()) return 1;
    calls += fuzz.calls();
  }
  int64_t granularity = 0;
  pie_granularity(driver_name.c_str(), &granularity);
  std::printf("%lu seeds, %ld calls, no crash; granularity %ld\n",
              static_cast<unsigned long>(seeds), static_cast<long>(calls),
              static_cast<long>(granularity));
  return 0;
}
