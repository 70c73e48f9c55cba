#include <time.h>

#include <cerrno>
#include <cstdio>

#include "capture.h"

namespace standin {
namespace {

thread_local bool in_callback = false;
constexpr size_t kKeptViolations = 100;

}  // namespace

State& state() {
  static State* const all = [] {  // never destroyed: threads may outlive main
    auto* made = new State;
    made->settings = default_settings();
    return made;
  }();
  return *all;
}

std::map<std::string, int64_t> default_settings() {
  return {
      {"driver_version", 13000},
      {"device_count", 1},
      {"granularity", 2 << 20},
      {"vmm_supported", 1},
      {"device_memory", int64_t{8} << 30},  // bytes of each device
      {"host_numa_id", 0},
      {"integrated", 0},
      {"can_use_host_pointer", 1},
      {"register_limit", 0},    // bytes in all; 0: none
      {"register_most", 0},     // bytes in one piece that are too many; 0: none are
      {"page_table_share", 0},  // bytes registered that take one of the device; 0: none do
      {"copy_engines", 0},      // 1: one a direction, shared by all streams
      {"descriptor_ns", 0},     // time of the link for each copy, beside that of its bytes
      {"submit_ns", 0},         // time of the caller's processor for each copy of a batch
      {"pageable", 0},          // bytes a second of memory that is not registered; 0: refused
      {"pageable_batches", 0},  // written: submissions that copied such memory
      {"batch_flags", -1},      // written: those of the newest cuMemcpyBatchAsync
      {"batch_supported", 1},   // 0: cuMemcpyBatchAsync returns CUDA_ERROR_NOT_SUPPORTED
      {"copy_error", CUDA_ERROR_ILLEGAL_ADDRESS},  // what a copy that fails leaves
      {"shuffle_seed", 0},
      {"race_check", 1},
  };
}

int64_t setting(const char* key) { return state().settings.at(key); }

void violate(const std::string& text) {
  State& s = state();
  if (s.violations.size() < kKeptViolations) {
    s.violations.push_back(text);
  } else {
    ++s.more_violations;
  }
}

void fail_context(CUresult code) {
  State& s = state();
  if (s.sticky == CUDA_SUCCESS) s.sticky = code;
  s.changed.notify_all();
}

std::string hex(uint64_t value) {
  char text[32];
  std::snprintf(text, sizeof text, "0x%llx", static_cast<unsigned long long>(value));
  return text;
}

std::string range_text(uint64_t address, size_t bytes) {
  return "[" + hex(address) + ", +" + std::to_string(bytes) + ")";
}

std::chrono::nanoseconds milliseconds(double ms) {
  return std::chrono::nanoseconds(static_cast<int64_t>(ms * 1e6));
}

void sleep_until(Lock& lock, Time::time_point when) {
  if (Time::now() >= when) return;
  const int64_t ns =
      std::chrono::duration_cast<std::chrono::nanoseconds>(when.time_since_epoch()).count();
  timespec at{static_cast<time_t>(ns / 1000000000), static_cast<long>(ns % 1000000000)};
  lock.unlock();
  while (clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, &at, nullptr) == EINTR) {
  }
  lock.lock();
}

InCallback::InCallback() { in_callback = true; }
InCallback::~InCallback() { in_callback = false; }

Call::Call(const char* name, int needs) : name_(name), needs_(needs), lock(state().mutex) {
  State& s = state();
  ++s.calls[name];
  if (in_callback && needs != kNothing) {
    wrong(code_ = CUDA_ERROR_NOT_PERMITTED, "called inside a host function");
    return;
  }
  const auto faults = s.faults.equal_range(name);
  for (auto fault = faults.first; fault != faults.second;) {
    const auto here = fault++;
    if (--here->second.left > 0) continue;
    code_ = here->second.result;
    s.faults.erase(here);
  }
  if (failed()) return;
  if ((needs & kInit) && !s.initialized) {
    code_ = CUDA_ERROR_NOT_INITIALIZED;
    return;
  }
  device_ = current_device();
  if ((needs & kContext) == kContext) {
    if (device_ < 0) {
      code_ = CUDA_ERROR_INVALID_CONTEXT;
    } else if (s.retained[device_] == 0) {
      code_ = CUDA_ERROR_CONTEXT_IS_DESTROYED;
    }
    if (failed()) return;
  }
  if (needs & kSticky) code_ = s.sticky;
  if (!failed() && (needs & kUnsafe) && forbidden_by_capture()) {
    code_ = CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED;
  }
}

CUresult Call::done(CUresult code) const {
  const CUresult sticky = state().sticky;
  return (needs_ & (kSticky | kRelease)) && sticky != CUDA_SUCCESS ? sticky : code;
}

CUresult Call::wrong(CUresult code, const std::string& text) {
  violate(std::string(name_) + ": " + text);
  return code;
}

}  // namespace standin
