// The control interface, and settings from the environment (PIE_STANDIN).
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "capture.h"

using namespace standin;

namespace {

constexpr const char* kEnvironment = "PIE_STANDIN";

size_t give(const std::string& from, char* text, size_t size) {
  if (text && size > 0) {
    const size_t length = std::min(from.size(), size - 1);
    std::memcpy(text, from.data(), length);
    text[length] = 0;
  }
  return from.size();
}

std::string violations_text() {
  const State& s = state();
  std::string text;
  for (const std::string& violation : s.violations) text += violation + "\n";
  if (s.more_violations) text += "and " + std::to_string(s.more_violations) + " more\n";
  return text;
}

void clear_faults() {
  State& s = state();
  s.faults.clear();
  s.link = 0;
  for (Lane& lane : s.lanes) {
    lane.delay_min = lane.delay_max = lane.tear = 0;
    lane.fail_in = 0;
  }
}

// "key=value,...": a setting, link, delay or tear (milliseconds, all directions), report (a file).
void read_environment() {
  const char* all = std::getenv(kEnvironment);
  std::string rest = all ? all : "";
  while (!rest.empty()) {
    const size_t comma = std::min(rest.find(','), rest.size());
    const std::string item = rest.substr(0, comma);
    rest.erase(0, comma + 1);
    const size_t equals = std::min(item.find('='), item.size() - 1);
    const std::string key = item.substr(0, equals);
    const char* value = item.c_str() + equals + 1;
    const double number = std::strtod(value, nullptr);
    if (key == "link") {
      standin_link(number);
    } else if (key == "delay") {
      standin_delay(15, 0, number, 0);
    } else if (key == "tear") {
      standin_tear(15, number);
    } else if (key != "report" && standin_set(key.c_str(), static_cast<int64_t>(number)) != 0) {
      std::fprintf(stderr, "%s: unknown key %s\n", kEnvironment, key.c_str());
      std::abort();
    }
  }
}

// For a subprocess: what a test would have asked for, appended to a file when the process ends.
void report() {
  const char* all = std::getenv(kEnvironment);
  const char* path = all ? std::strstr(all, "report=") : nullptr;
  if (!path) return;
  const std::string name = std::string(path + 7).substr(0, std::strcspn(path + 7, ","));
  std::FILE* file = std::fopen(name.c_str(), "a");
  if (!file) return;
  Lock lock(state().mutex);
  std::fprintf(file, "process %d\n%slive:\n%s", static_cast<int>(getpid()),
               violations_text().c_str(), live_text().c_str());
  std::fclose(file);
}

const bool loaded = [] {
  read_environment();
  std::atexit(report);
  return true;
}();

}  // namespace

std::string standin::live_text() {
  const State& s = state();
  std::string text;
  for (const auto& [address, reservation] : s.memory.reservations) {
    text += (reservation.alloc ? "allocation " : "reservation ") +
            range_text(address, reservation.bytes) + "\n";
    for (const auto& [at, area] : reservation.mappings) {
      if (!reservation.alloc) text += "mapping " + range_text(at, area->bytes) + "\n";
    }
  }
  for (const auto& [id, handle] : s.memory.handles) {
    text += "handle " + hex(id) + " of " + std::to_string(handle->bytes) + " bytes\n";
  }
  for (const auto& [address, area] : s.memory.registrations) {
    text += "registration " + range_text(address, area->bytes) + "\n";
  }
  for (const auto& [id, stream] : s.streams) text += "stream " + hex(id) + "\n";
  for (const auto& [id, event] : s.events) text += "event " + hex(id) + "\n";
  for (const auto& [id, module] : s.modules) text += "module " + hex(id) + "\n";
  for (const auto& [id, graph] : s.graphs) text += "graph " + hex(id) + "\n";
  for (const auto& [id, graph] : s.executables) text += "executable graph " + hex(id) + "\n";
  for (const auto& [device, references] : s.retained) {
    if (references == 0) continue;
    text += "context of device " + std::to_string(device) + ", retained " +
            std::to_string(references) + " times\n";
  }
  return text;
}

extern "C" {

int standin_set(const char* key, int64_t value) {
  Lock lock(state().mutex);
  const auto found = state().settings.find(key);
  if (found == state().settings.end()) return -1;
  found->second = value;
  if (found->first == "shuffle_seed") state().shuffle.seed(static_cast<uint64_t>(value));
  return 0;
}

int64_t standin_get(const char* key) {
  Lock lock(state().mutex);
  const auto found = state().settings.find(key);
  return found == state().settings.end() ? -1 : found->second;
}

void standin_fail(const char* function, int64_t nth, int result) {
  Lock lock(state().mutex);
  state().faults.emplace(function, Fault{nth, static_cast<CUresult>(result)});
}

void standin_fail_copy(int direction, int64_t nth) {
  Lock lock(state().mutex);
  state().lanes[direction].fail_in = nth;
}

void standin_delay(int directions, double min_ms, double max_ms, uint64_t seed) {
  Lock lock(state().mutex);
  for (int i = 0; i < kDirections; ++i) {
    if (!(directions >> i & 1)) continue;
    Lane& lane = state().lanes[i];
    lane.delay_min = min_ms;
    lane.delay_max = std::max(min_ms, max_ms);
    lane.random.seed(seed);
  }
}

void standin_tear(int directions, double ms) {
  Lock lock(state().mutex);
  for (int i = 0; i < kDirections; ++i) {
    if (directions >> i & 1) state().lanes[i].tear = ms;
  }
}

void standin_link(double bytes_per_s) {
  Lock lock(state().mutex);
  state().link = bytes_per_s;
}

void standin_clear(void) {
  Lock lock(state().mutex);
  clear_faults();
}

int standin_access(uint64_t handle, uint64_t address, size_t bytes, int write) {
  Call call("standin_access", kSticky);
  if (call.failed()) return call.code();
  if (bytes == 0) return CUDA_SUCCESS;
  Stream* stream = nullptr;
  if (handle != STANDIN_HOST && !find_stream(reinterpret_cast<CUstream>(handle), stream)) {
    return CUDA_ERROR_INVALID_HANDLE;
  }
  Range range;
  std::string why;
  if (!resolve(address, bytes, write != 0, range, why)) {
    if (range.side == Side::kDevice) {
      return call.wrong(CUDA_ERROR_INVALID_VALUE, range_text(address, bytes) + " " + why);
    }
    range.spans = {{nullptr, address & ~kAliasBit, bytes}};  // compute may use any host memory
  }
  const Op op = [range, address, write](const Actor& actor) {
    Accesses(actor, "compute").add(range, address, write != 0);
    return Run();
  };
  if (handle != STANDIN_HOST) return enqueue(call, stream, op);
  op(this_thread().host);
  return CUDA_SUCCESS;
}

void standin_host_fence(void) {
  Lock lock(state().mutex);
  Actor& host = this_thread().host;
  join(host.clock, state().fence);
  host.precedes(state().fence);
}

int64_t standin_calls(const char* function) {
  Lock lock(state().mutex);
  return state().calls[function];
}

void standin_copied(int direction, int64_t* copies, int64_t* bytes) {
  Lock lock(state().mutex);
  *copies = state().lanes[direction].copies;
  *bytes = state().lanes[direction].bytes;
}

size_t standin_violations(char* text, size_t size) {
  Lock lock(state().mutex);
  return give(violations_text(), text, size);
}

size_t standin_live(char* text, size_t size) {
  Lock lock(state().mutex);
  return give(live_text(), text, size);
}

size_t standin_reset(char* text, size_t size) {
  State& s = state();
  {
    Lock lock(s.mutex);
    reap(lock, true);
    const std::string live = live_text();
    if (!live.empty()) return give(live, text, size);
    clear_faults();
    for (Lane& lane : s.lanes) lane = Lane{};
    s.settings = default_settings();
    s.shuffle.seed(0);
    s.calls.clear();
    s.violations.clear();
    s.more_violations = 0;
    s.sticky = CUDA_SUCCESS;
    s.races.clear();
    s.fence.clear();
    s.ended.clear();
    s.actor_names.clear();
    s.threads.clear();
    ++s.generation;
  }
  read_environment();
  return give("", text, size);
}

}  // extern "C"
