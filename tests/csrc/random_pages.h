// What the pages of random_plans and random_groups hold, who writes and checks them, and the
// stand-in's faults.
#pragma once

#include <dlfcn.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstdio>
#include <string>
#include <vector>

namespace {

using Id = int64_t;  // what a block holds; 0: nothing known

struct PageWork {
  int64_t block;
  Id id;
};

// Where the arena's pages lie.
struct Layout {
  uint64_t arena;
  int64_t shift, stride, page;
  uint64_t address(int64_t region, int64_t block) const {
    return arena + static_cast<uint64_t>(region * stride + shift + block * page);
  }
};

struct Task {
  const Layout* layout;
  std::atomic<int>* wrong;
  int64_t step, layer;
  std::vector<PageWork> pages;
  bool write;
};

uint8_t expected(Id id, int64_t layer, int64_t i) {
  return static_cast<uint8_t>(id * 131 + layer * 29 + (i >> 3) * 7 + i);
}

bool holds(const uint8_t* page, Id id, int64_t layer, int64_t bytes) {
  for (int64_t i = 0; i < bytes; ++i) {
    if (page[i] != expected(id, layer, i)) return false;
  }
  return true;
}

void run_task(void* argument) {
  const Task& task = *static_cast<const Task*>(argument);
  const int64_t bytes = task.layout->page;
  for (const PageWork& work : task.pages) {
    auto* page = reinterpret_cast<uint8_t*>(task.layout->address(task.layer, work.block));
    if (task.write) {
      for (int64_t i = 0; i < bytes; ++i) page[i] = expected(work.id, task.layer, i);
    } else if (!holds(page, work.id, task.layer, bytes) && (*task.wrong)++ == 0) {
      std::printf("step %ld layer %ld block %ld does not hold %ld\n", task.step, task.layer,
                  work.block, work.id);
    }
  }
}

// Faults and findings of the stand-in.
struct Standin {
  void* library = dlopen("libcuda.so.1", RTLD_NOW | RTLD_NOLOAD);
  template <typename Function>
  Function find(const char* name) const {
    return reinterpret_cast<Function>(dlsym(library, name));
  }
  void clear() const { find<void (*)()>("standin_clear")(); }
  void delay(int directions, double from, double to, uint64_t seed) const {
    find<void (*)(int, double, double, uint64_t)>("standin_delay")(directions, from, to, seed);
  }
  void tear(int directions, double ms) const {
    find<void (*)(int, double)>("standin_tear")(directions, ms);
  }
  // What compute on a stream does, for the race check.
  void access(uint64_t stream, uint64_t address, int64_t bytes, bool write) const {
    find<int (*)(uint64_t, uint64_t, size_t, int)>("standin_access")(
        stream, address, static_cast<size_t>(bytes), write);
  }
  std::string found(const char* name) const {
    std::string text(1 << 16, 0);
    text.resize(
        std::min(text.size(), find<size_t (*)(char*, size_t)>(name)(&text[0], text.size())));
    return text;
  }
};

}  // namespace
