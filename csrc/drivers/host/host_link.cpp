#include "drivers/host/host_link.h"

#include <time.h>

#include <algorithm>
#include <cerrno>
#include <cmath>
#include <cstring>

namespace pie {
namespace {

constexpr double kLeastSpeed = 1e3, kMostMilliseconds = 6e4;

void check_fault(int fault, double a, double b) {
  if (fault < PIE_FAULT_NONE || fault > PIE_FAULT_TORN) {
    throw Error(PIE_ERR_CONFIG, "unknown fault " + std::to_string(fault));
  }
  if (fault == PIE_FAULT_FAIL && !(a >= 0 && a <= 1e18)) {
    throw Error(PIE_ERR_CONFIG, "no copy number " + std::to_string(a) + " can fail; 1 is the next");
  }
  if (fault != PIE_FAULT_LATE && fault != PIE_FAULT_TORN) return;
  for (const double ms : {a, fault == PIE_FAULT_LATE ? b : 0.0}) {
    if (!(ms >= 0 && ms <= kMostMilliseconds)) {
      throw Error(PIE_ERR_CONFIG, "a fault of " + std::to_string(ms) + " ms; 0 to 60000 can be");
    }
  }
}

std::chrono::nanoseconds milliseconds(double ms) {
  return std::chrono::nanoseconds(static_cast<int64_t>(ms * 1e6));
}

void move_bytes(const CopyOp& op, size_t from, size_t to) {
  std::memcpy(reinterpret_cast<char*>(op.dst) + from, reinterpret_cast<const char*>(op.src) + from,
              to - from);
}

}  // namespace

void sleep_until(Clock::time_point when) {
  const int64_t ns =
      std::chrono::duration_cast<std::chrono::nanoseconds>(when.time_since_epoch()).count();
  timespec at{static_cast<time_t>(ns / 1000000000), static_cast<long>(ns % 1000000000)};
  while (Clock::now() < when &&
         clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, &at, nullptr) == EINTR) {
  }
}

HostLink::HostLink(double bytes_per_s) : bytes_per_s_(bytes_per_s) {
  if (bytes_per_s <= 0 || (bytes_per_s >= kLeastSpeed && std::isfinite(bytes_per_s))) return;
  throw Error(PIE_ERR_CONFIG, "an emulated link of " + std::to_string(bytes_per_s) +
                                  " bytes/s; use 1000 or more, or 0 for the machine's own speed");
}

HostLink::Orders HostLink::take_orders(Lane& lane, size_t count) {
  Orders orders;
  if (lane.fail_in > 0) {
    if (lane.fail_in <= static_cast<int64_t>(count)) {
      orders.fail_index = lane.fail_in - 1;
      lane.fail_in = 0;
    } else {
      lane.fail_in -= static_cast<int64_t>(count);
    }
  }
  orders.torn = lane.torn;
  if (lane.late_max > 0) {
    orders.late = std::uniform_real_distribution<double>(lane.late_min, lane.late_max)(lane.random);
  }
  return orders;
}

void HostLink::copy(Direction direction, const CopyOp* ops, size_t count) {
  if (count == 0) return;
  Lane& lane = lanes_[static_cast<int>(direction)];
  Orders orders;
  {
    std::lock_guard<std::mutex> lock(mutex_);
    orders = take_orders(lane, count);
  }
  if (orders.late > 0) sleep_until(Clock::now() + milliseconds(orders.late));
  const size_t good = orders.fail_index < 0 ? count : static_cast<size_t>(orders.fail_index);
  int64_t bytes = 0;
  for (size_t i = 0; i < good; ++i) bytes += static_cast<int64_t>(ops[i].bytes);
  const auto start = Clock::now();
  auto end = start;
  if (bytes_per_s_ > 0) {
    std::lock_guard<std::mutex> lock(mutex_);
    const double ns = std::ceil(static_cast<double>(bytes) / bytes_per_s_ * 1e9);
    end = std::max(start, lane.free_at) + std::chrono::nanoseconds(static_cast<int64_t>(ns));
    lane.free_at = end;
  }
  if (orders.torn > 0) {
    for (size_t i = 0; i < good; ++i) move_bytes(ops[i], 0, ops[i].bytes / 2);
    sleep_until(Clock::now() + milliseconds(orders.torn));
    for (size_t i = 0; i < good; ++i) move_bytes(ops[i], ops[i].bytes / 2, ops[i].bytes);
  } else {
    for (size_t i = 0; i < good; ++i) move_bytes(ops[i], 0, ops[i].bytes);
  }
  if (bytes_per_s_ > 0) sleep_until(end);
  {
    std::lock_guard<std::mutex> lock(mutex_);
    lane.done.bytes += bytes;
    lane.done.copies += static_cast<int64_t>(good);
    lane.done.seconds += std::chrono::duration<double>(Clock::now() - start).count();
  }
  if (good < count) {
    throw Error(PIE_ERR_TRANSFER,
                std::string("injected fault: a copy ") +
                    (direction == Direction::kHostToDevice ? "host to device" : "device to host") +
                    " of " + std::to_string(ops[good].bytes) + " bytes failed");
  }
}

Counters HostLink::counters(Direction direction) const {
  std::lock_guard<std::mutex> lock(mutex_);
  return lanes_[static_cast<int>(direction)].done;
}

void HostLink::inject(int fault, int directions, double a, double b, uint64_t seed) {
  check_fault(fault, a, b);
  std::lock_guard<std::mutex> lock(mutex_);
  for (int i = 0; i < 2; ++i) {
    if (!(directions >> i & 1)) continue;
    Lane& lane = lanes_[i];
    switch (fault) {
      case PIE_FAULT_NONE:
        lane.fail_in = 0;
        lane.late_min = lane.late_max = lane.torn = 0;
        break;
      case PIE_FAULT_FAIL:
        lane.fail_in = static_cast<int64_t>(a);
        break;
      case PIE_FAULT_LATE:
        lane.late_min = a;
        lane.late_max = std::max(a, b);
        lane.random.seed(seed);
        break;
      case PIE_FAULT_TORN:
        lane.torn = a;
        break;
      default:
        break;
    }
  }
}

}  // namespace pie
