// Random copies by two threads on four streams through two aliases, for the sanitizers.
#include <cuda.h>
#include <dlfcn.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <thread>
#include <vector>

#include "standin.h"

namespace {

constexpr size_t kUnit = size_t{2} << 20;
constexpr size_t kPage = 1000;
constexpr int kPages = 16, kThreads = 2, kRounds = 60;

void* library;

template <typename F>
F* find(const char* name) {
  void* found = dlsym(library, name);  // by decltype: the linker must not want it
  if (!found) std::abort();
  return reinterpret_cast<F*>(found);
}
#define TEXT(name) #name
#define NAME(name) TEXT(name)
#define CU(name, ...) check(find<decltype(name)>(NAME(name))(__VA_ARGS__), NAME(name))

void check(int code, const char* what) {
  if (code == 0) return;
  std::printf("%s: %d\n", what, code);
  std::exit(1);
}

// Loads pages by one stream and stores them again by another, in rows of this thread alone.
void work(int thread, CUdeviceptr load_view, CUdeviceptr store_view, char* rows) {
  CUcontext context;
  CU(cuDevicePrimaryCtxRetain, &context, 0);
  CU(cuCtxSetCurrent, context);
  CUstream load, store;
  CUevent loaded, stored;
  CU(cuStreamCreateWithPriority, &load, CU_STREAM_NON_BLOCKING, 0);
  CU(cuStreamCreateWithPriority, &store, CU_STREAM_NON_BLOCKING, 0);
  CU(cuEventCreate, &loaded, CU_EVENT_DISABLE_TIMING);
  CU(cuEventCreate, &stored, CU_EVENT_DISABLE_TIMING);
  std::mt19937 random(static_cast<unsigned>(thread));
  const size_t half = kPage * kPages;
  for (int round = 0; round < kRounds; ++round) {
    std::vector<CUdeviceptr> pages, from, back, aliases;
    std::vector<size_t> sizes;
    for (int i = 0; i < kPages; ++i) {
      const size_t at = static_cast<size_t>(thread) * half + static_cast<size_t>(i) * kPage;
      if (random() % 3 == 0) continue;
      pages.push_back(load_view + at);
      aliases.push_back(store_view + at);
      from.push_back(reinterpret_cast<CUdeviceptr>(rows) + static_cast<size_t>(i) * kPage);
      back.push_back(from.back() + half);
      sizes.push_back(kPage);
    }
    if (sizes.empty()) continue;
    CUmemcpyAttributes attributes{};
    attributes.srcAccessOrder = CU_MEMCPY_SRC_ACCESS_ORDER_STREAM;
    size_t start = 0;
    CU(cuStreamWaitEvent, load, stored, 0);
    CU(cuMemcpyBatchAsync, pages.data(), from.data(), sizes.data(), sizes.size(), &attributes,
       &start, 1, load);
    CU(cuEventRecord, loaded, load);
    CU(cuStreamWaitEvent, store, loaded, 0);
    CU(cuMemcpyBatchAsync, back.data(), aliases.data(), sizes.data(), sizes.size(), &attributes,
       &start, 1, store);
    CU(cuEventRecord, stored, store);
    if (random() % 4 == 0) CU(cuEventSynchronize, stored);
  }
  CU(cuStreamSynchronize, store);
  for (size_t i = 0; i < half; ++i) {
    if (rows[half + i] != 0 && rows[half + i] != rows[i]) check(1, "wrong byte");
  }
  CU(cuEventDestroy, loaded);
  CU(cuEventDestroy, stored);
  CU(cuStreamDestroy, load);
  CU(cuStreamDestroy, store);
  CU(cuDevicePrimaryCtxRelease, 0);
}

}  // namespace

int main(int, char** arguments) {
  library = dlopen(arguments[1], RTLD_NOW | RTLD_GLOBAL);
  if (!library) {
    std::printf("%s\n", dlerror());
    return 1;
  }
  CU(cuInit, 0);
  CUcontext context;
  CU(cuDevicePrimaryCtxRetain, &context, 0);
  CU(cuCtxSetCurrent, context);
  CUmemAllocationProp prop{};
  prop.type = CU_MEM_ALLOCATION_TYPE_PINNED;
  prop.location = {CU_MEM_LOCATION_TYPE_DEVICE, {0}};
  CUdeviceptr base;
  CUmemGenericAllocationHandle handle;
  CU(cuMemAddressReserve, &base, 2 * kUnit, 0, 0, 0);
  CU(cuMemCreate, &handle, kUnit, &prop, 0);
  for (size_t i = 0; i < 2; ++i) CU(cuMemMap, base + i * kUnit, kUnit, 0, handle, 0);
  CU(cuMemRelease, handle);
  CUmemAccessDesc desc{prop.location, CU_MEM_ACCESS_FLAGS_PROT_READWRITE};
  CU(cuMemSetAccess, base, 2 * kUnit, &desc, 1);
  const size_t share = 2 * kPage * kPages;
  std::vector<char> rows(kThreads * share, 0);
  for (int t = 0; t < kThreads; ++t) {
    for (size_t i = 0; i < share / 2; ++i) {
      rows[static_cast<size_t>(t) * share + i] = static_cast<char>(1 + i % 100);
    }
  }
  CU(cuMemHostRegister, rows.data(), rows.size(), 0);
  find<decltype(standin_delay)>("standin_delay")(3, 0, 0.5, 1);
  find<decltype(standin_tear)>("standin_tear")(3, 0.05);
  std::vector<std::thread> threads;
  for (int t = 0; t < kThreads; ++t) {
    char* mine = rows.data() + static_cast<size_t>(t) * share;
    threads.emplace_back([=] { work(t, base, base + kUnit, mine); });
  }
  for (std::thread& thread : threads) thread.join();
  CU(cuCtxSynchronize, );
  CU(cuMemHostUnregister, rows.data());
  CU(cuMemUnmap, base, 2 * kUnit);
  CU(cuMemAddressFree, base, 2 * kUnit);
  CU(cuDevicePrimaryCtxRelease, 0);
  char text[4096];
  if (find<decltype(standin_violations)>("standin_violations")(text, sizeof text) > 0 ||
      find<decltype(standin_live)>("standin_live")(text, sizeof text) > 0) {
    std::printf("%s", text);
    return 1;
  }
  find<decltype(standin_reset)>("standin_reset")(text, sizeof text);
  std::printf("no wrong byte, no violation\n");
}
