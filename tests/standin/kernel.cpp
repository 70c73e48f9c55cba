// Kernels by name: a module holds whatever is registered.
#include <cstring>

#include "copy.h"

using namespace standin;

namespace {

struct Kernel {
  standin_kernel run;
  standin_kernel declare;
  std::vector<size_t> sizes;
};

std::map<std::string, Kernel>& kernels() {
  static auto* const all = new std::map<std::string, Kernel>;
  return *all;
}

// What the launch in progress says it will access.
struct Touch {
  uint64_t address;
  size_t bytes;
  bool write;
};
thread_local std::vector<Touch>* touches = nullptr;

struct Launch {
  Kernel kernel;
  std::vector<std::vector<char>> values;
  unsigned grid[3], block[3];
  std::vector<AreaPtr> areas;

  void call(standin_kernel function) {
    std::vector<void*> pointers;
    for (auto& value : values) pointers.push_back(value.data());
    function(pointers.data(), grid, block);
  }
};

// Of a graph: each launch is one of its own, and declares what it will access then.
Run prepare(const Launch& captured, const Actor& actor) {
  auto launch = std::make_shared<Launch>(captured);
  std::vector<Touch> touched;
  if (launch->kernel.declare) {
    touches = &touched;
    launch->call(launch->kernel.declare);
    touches = nullptr;
  }
  Accesses accesses(actor, "cuLaunchKernel");
  for (const Touch& touch : touched) {
    Range range;
    std::string why;
    if (!resolve(touch.address, touch.bytes, touch.write, range, why)) {
      // CUDA finds out when the kernel runs.
      violate("cuLaunchKernel: " + range_text(touch.address, touch.bytes) + " " + why);
      fail_context(CUDA_ERROR_ILLEGAL_ADDRESS);
      return nullptr;
    }
    if (range.pageable) {
      violate("cuLaunchKernel: " + range_text(touch.address, touch.bytes) + " is not registered");
      fail_context(CUDA_ERROR_ILLEGAL_ADDRESS);
      return nullptr;
    }
    accesses.add(range, touch.address, touch.write);
    add_areas(launch->areas, range);
  }
  return [launch, id = actor.id](Lock& lock) {
    leave_engines(id);
    if (!pin(launch->areas, "cuLaunchKernel")) return;
    lock.unlock();
    launch->call(launch->kernel.run);
    lock.lock();
    unpin(launch->areas);
  };
}

}  // namespace

extern "C" void standin_register_kernel(const char* name, standin_kernel run,
                                        standin_kernel declare, const size_t* sizes, size_t count) {
  Lock lock(state().mutex);
  kernels()[name] = Kernel{run, declare, std::vector<size_t>(sizes, sizes + count)};
}

extern "C" void standin_touch(uint64_t address, size_t bytes, int write) {
  if (touches && bytes > 0) touches->push_back({address, bytes, write != 0});
}

extern "C" void* standin_pointer(uint64_t address) {
  return reinterpret_cast<void*>(address & ~kAliasBit);
}

CUresult cuModuleLoadData(CUmodule* module, const void* image) {
  Call call("cuModuleLoadData", kUse | kUnsafe);
  if (call.failed()) return call.code();
  if (!module || !image) return CUDA_ERROR_INVALID_VALUE;
  const uint64_t id = state().next_id++;
  state().modules[id] = true;
  *module = reinterpret_cast<CUmodule>(id);
  return CUDA_SUCCESS;
}

CUresult cuModuleUnload(CUmodule module) {
  Call call("cuModuleUnload", kEnd | kUnsafe);
  if (call.failed()) return call.code();
  if (!state().executables.empty()) {
    call.wrong(CUDA_SUCCESS, "a graph that can be launched may hold one of its kernels");
  }
  if (state().modules.erase(reinterpret_cast<uint64_t>(module)) == 0) {
    return call.wrong(CUDA_ERROR_INVALID_HANDLE, "no such module");
  }
  return call.done();
}

CUresult cuModuleGetFunction(CUfunction* function, CUmodule module, const char* name) {
  Call call("cuModuleGetFunction", kUse);
  if (call.failed()) return call.code();
  if (!function || !name) return CUDA_ERROR_INVALID_VALUE;
  if (!state().modules.count(reinterpret_cast<uint64_t>(module))) return CUDA_ERROR_INVALID_HANDLE;
  const auto found = kernels().find(name);
  if (found == kernels().end()) return CUDA_ERROR_NOT_FOUND;
  *function = reinterpret_cast<CUfunction>(&found->second);
  return CUDA_SUCCESS;
}

CUresult cuLaunchKernel(CUfunction function, unsigned gx, unsigned gy, unsigned gz, unsigned bx,
                        unsigned by, unsigned bz, unsigned, CUstream handle, void** params,
                        void** extra) {
  Call call("cuLaunchKernel", kUse);
  if (call.failed()) return call.code();
  Stream* stream;
  if (!find_stream(handle, stream)) return CUDA_ERROR_INVALID_HANDLE;
  const auto* kernel = reinterpret_cast<const Kernel*>(function);
  if (!kernel || extra || !gx || !gy || !gz || !bx || !by || !bz) return CUDA_ERROR_INVALID_VALUE;
  if (uint64_t{bx} * by * bz > 1024 || (!params && !kernel->sizes.empty())) {
    return CUDA_ERROR_INVALID_VALUE;
  }
  Launch captured{*kernel, {}, {gx, gy, gz}, {bx, by, bz}, {}};
  for (size_t i = 0; i < kernel->sizes.size(); ++i) {  // the caller's may be gone by then
    const char* value = static_cast<const char*>(params[i]);
    captured.values.emplace_back(value, value + kernel->sizes[i]);
  }
  return enqueue(call, stream, [captured](const Actor& actor) { return prepare(captured, actor); });
}
