// The gather kernel for the stand-in: its host build, which says at launch what it will access.
//
// A table must still be at its run what it was at its launch: the only one who writes it is the
// CPU, which no race check sees. And on a device with addresses of its own for CPU memory it must
// be given those, which the stand-in leaves to kernels.
#include <atomic>
#include <chrono>
#include <map>
#include <mutex>
#include <thread>
#include <vector>

#include "gather_host.h"
#include "standin.h"

namespace {

using pie_gather_detail::Entry;
using pie_gather_detail::Layer;
using Entries = std::vector<Entry>;
struct Launched {
  Entries entries;
  bool on_device;  // the table
};

std::mutex mutex;
std::map<const void*, Launched> launched;  // by the launch's parameters
std::atomic<int64_t> changed{0}, pieces_done{0}, wait_us{0}, breaks{0}, uncounted{0}, grid_seen{0},
    astray{0};

constexpr unsigned kGrids = 16;
std::atomic<int64_t> wait_by[kGrids];  // microseconds, by the blocks of a launch

uint64_t value(void* param) { return *static_cast<const uint64_t*>(param); }

Entries table(void** params) {
  const auto* entries = static_cast<const Entry*>(standin_pointer(value(params[0])));
  const auto* count = static_cast<const uint64_t*>(standin_pointer(value(params[1])));
  return {entries, entries + *count};
}

Layer layer(void** params) { return {value(params[3]), value(params[4]), value(params[5])}; }

bool same(const Entries& a, const Entries& b) {
  return a.size() == b.size() &&
         (a.empty() || std::memcmp(a.data(), b.data(), a.size() * sizeof(Entry)) == 0);
}

}  // namespace

extern "C" {
#pragma GCC visibility push(default)

void gather_declare(void** params, const unsigned*, const unsigned*) {
  uint64_t count = 0;
  const bool on_device = standin_peek(value(params[1]), sizeof count, &count) != 0;
  Entries entries(count);
  standin_peek(value(params[0]), count * sizeof(Entry), entries.data());
  standin_touch(value(params[1]), sizeof(uint64_t), 0);
  standin_touch(value(params[0]), entries.size() * sizeof(Entry), 0);
  for (const Entry& entry : entries) {
    const pie_gather_detail::Piece piece = piece_of(entry, layer(params));
    standin_touch(piece.src, piece.bytes, 0);
    standin_touch(piece.dst, piece.bytes, 1);
  }
  if (value(params[2]) != 0) standin_touch(value(params[2]), sizeof(uint64_t), 1);
  std::lock_guard<std::mutex> lock(mutex);
  launched[params[0]] = {std::move(entries), on_device};
}

void gather_run(void** params, const unsigned* grid, const unsigned* block) {
  std::this_thread::sleep_for(std::chrono::microseconds(wait_us + wait_by[*grid % kGrids]));
  Entries entries = table(params);
  bool on_device = false;
  {
    std::lock_guard<std::mutex> lock(mutex);
    const auto found = launched.find(params[0]);
    if (found == launched.end() || !same(found->second.entries, entries)) {
      ++changed;
    } else {
      on_device = found->second.on_device;
    }
    launched.erase(params[0]);
  }
  if (standin_get("can_use_host_pointer") == 0) {
    const auto own = [](uint64_t address) {
      return reinterpret_cast<uint64_t>(standin_pointer(address)) != address;
    };
    for (const Entry& entry : entries) astray += own(entry.chunk) ? 0 : 1;
    if (!on_device) astray += own(value(params[0])) && own(value(params[1])) ? 0 : 1;
  }
  for (Entry& entry : entries) {
    entry.chunk = reinterpret_cast<uint64_t>(standin_pointer(entry.chunk));
  }
  Layer at = layer(params);
  at.base = reinterpret_cast<uint64_t>(standin_pointer(at.base));
  const unsigned long long count = entries.size();
  auto* const copied = static_cast<unsigned long long*>(standin_pointer(value(params[2])));
  pie_gather_host(entries.data(), &count, uncounted != 0 ? nullptr : copied, at, grid[0], block[0]);
  if (breaks != 0 && count > 0) {
    ++*reinterpret_cast<unsigned char*>(piece_of(entries.back(), at).dst);
  }
  pieces_done += static_cast<int64_t>(count);
  grid_seen = grid[0];
}

// Tables that were not the same at launch and run, addresses that only the CPU has, pieces copied,
// blocks of the newest grid.
int64_t gather_changed() { return changed; }
int64_t gather_astray() { return astray; }
int64_t gather_pieces() { return pieces_done; }
int64_t gather_grid() { return grid_seen; }
// Each launch from now on waits first, leaves a wrong byte, or is not counted.
void gather_wait(int64_t microseconds) { wait_us = microseconds; }
void gather_wait_by(int64_t grid, int64_t us) { wait_by[grid] = us; }
void gather_break(int64_t on) { breaks = on; }
void gather_uncounted(int64_t on) { uncounted = on; }
void gather_reset() {
  for (auto& wait : wait_by) wait = 0;
  std::lock_guard<std::mutex> lock(mutex);
  launched.clear();
  changed = pieces_done = wait_us = breaks = uncounted = grid_seen = astray = 0;
}

#pragma GCC visibility pop
}
