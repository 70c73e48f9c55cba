#include "drivers/cuda/cuda_api.h"

#include <dlfcn.h>

#include <cstring>
#include <mutex>

namespace pie::cuda {
namespace {

constexpr int kOldest = 12000;  // cuGetProcAddress_v2
constexpr const char* kLibrary = "libcuda.so.1";

using Lookup = CUresult (*)(const char*, void**, int, cuuint64_t, CUdriverProcAddressQueryResult*);

[[noreturn]] void unsupported(const std::string& text) { throw Error(PIE_ERR_UNSUPPORTED, text); }

std::string version_text(int version) {
  return std::to_string(version / 1000) + "." + std::to_string(version % 1000 / 10);
}

void* find(Lookup lookup, const char* name, int version) {
  void* function = nullptr;
  CUdriverProcAddressQueryResult found = CU_GET_PROC_ADDRESS_SYMBOL_NOT_FOUND;
  const CUresult result = lookup(name, &function, version, CU_GET_PROC_ADDRESS_DEFAULT, &found);
  return result == CUDA_SUCCESS && found == CU_GET_PROC_ADDRESS_SUCCESS ? function : nullptr;
}

template <typename Function>
void need(Lookup lookup, const char* name, int version, Function& function) {
  function = reinterpret_cast<Function>(find(lookup, name, version));
  if (function != nullptr) return;
  unsupported(std::string("the NVIDIA driver has no ") + name + " (CUDA " + version_text(version) +
              "); update it to one for CUDA " + version_text(kOldest) + " or newer");
}

Lookup open_library() {
  void* library = dlopen(kLibrary, RTLD_NOW | RTLD_LOCAL);
  if (library == nullptr) {
    unsupported(std::string("no NVIDIA driver on this machine (") + dlerror() +
                "); install it, or give the container access to the GPU");
  }
  // It stays loaded: other users in the process hold on to it as well.
  void* lookup = dlsym(library, "cuGetProcAddress_v2");
  if (lookup == nullptr) {
    unsupported("the NVIDIA driver is too old: it is for a CUDA before 12.0; update it");
  }
  return reinterpret_cast<Lookup>(lookup);
}

Api load() {
  const Lookup lookup = open_library();
  Api api;
#define PIE_CUDA_LOAD(name, version) need(lookup, #name, version, api.name);
  PIE_CUDA_FUNCTIONS(PIE_CUDA_LOAD)
#undef PIE_CUDA_LOAD
  need(lookup, "cuCtxSynchronize", 2000, api.cuCtxSynchronize);
  api.cuDriverGetVersion(&api.version);
  if (api.version < kOldest) {
    unsupported("the NVIDIA driver is for CUDA " + version_text(api.version) + "; update it to " +
                "one for CUDA " + version_text(kOldest) + " or newer");
  }
  if (void* batch = find(lookup, "cuMemcpyBatchAsync", 13000); batch && api.version >= 13000) {
    api.batch13 = reinterpret_cast<Batch13>(batch);
  } else if (void* before = find(lookup, "cuMemcpyBatchAsync", 12080)) {
    api.batch12 = reinterpret_cast<Batch12>(before);
  }
  return api;
}

Api& table() {
  static Api loaded = load();  // a failed try is repeated by the next caller
  return loaded;
}

bool is(const char* call, const char* name) { return std::strcmp(call, name) == 0; }

const char* cause_of(CUresult result, const char* call) {
  switch (result) {
    case CUDA_ERROR_NO_DEVICE:
    case CUDA_ERROR_INVALID_DEVICE:
      return "no such CUDA device is visible; look at nvidia-smi and CUDA_VISIBLE_DEVICES";
    case CUDA_ERROR_SYSTEM_DRIVER_MISMATCH:
    case CUDA_ERROR_COMPAT_NOT_SUPPORTED_ON_DEVICE:
      return "kernel module and library of the NVIDIA driver differ; restart the machine, or "
             "update the container's driver";
    case CUDA_ERROR_OUT_OF_MEMORY:
      if (is(call, "cuMemHostRegister")) {
        return "the CPU memory cannot be pinned; lower --pie-pool-gib, or raise the memory limit "
               "of the container";
      }
      return "too little free GPU memory; lower --gpu-memory-utilization or "
             "--kv-cache-memory-bytes";
    case CUDA_ERROR_NOT_PERMITTED:
    case CUDA_ERROR_OPERATING_SYSTEM:
      if (is(call, "cuMemHostRegister")) {
        return "the system does not allow to pin memory; raise the memory limit of the container "
               "or 'ulimit -l'";
      }
      return nullptr;
    case CUDA_ERROR_NOT_SUPPORTED:
      if (is(call, "cuMemCreate") || is(call, "cuMemAddressReserve")) {
        return "this GPU or its virtualisation has no virtual memory management";
      }
      return nullptr;
    case CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED:
    case CUDA_ERROR_STREAM_CAPTURE_INVALIDATED:
    case CUDA_ERROR_STREAM_CAPTURE_ISOLATION:
    case CUDA_ERROR_STREAM_CAPTURE_IMPLICIT:
      return "a CUDA graph is being captured, and this does not belong into it";
    case CUDA_ERROR_INVALID_IMAGE:
    case CUDA_ERROR_NO_BINARY_FOR_GPU:
    case CUDA_ERROR_INVALID_PTX:
    case CUDA_ERROR_UNSUPPORTED_PTX_VERSION:
    case CUDA_ERROR_JIT_COMPILER_NOT_FOUND:
      return "the code is for other GPUs or a newer driver than these";
    default:
      return is_fatal(result) ? "the GPU's context is lost; restart the server" : nullptr;
  }
}

bool is_unsupported(CUresult result) {
  switch (result) {
    case CUDA_ERROR_NO_DEVICE:
    case CUDA_ERROR_INVALID_DEVICE:
    case CUDA_ERROR_NOT_SUPPORTED:
    case CUDA_ERROR_SYSTEM_DRIVER_MISMATCH:
    case CUDA_ERROR_COMPAT_NOT_SUPPORTED_ON_DEVICE:
    case CUDA_ERROR_STUB_LIBRARY:
    case CUDA_ERROR_INVALID_IMAGE:
    case CUDA_ERROR_NO_BINARY_FOR_GPU:
    case CUDA_ERROR_INVALID_PTX:
    case CUDA_ERROR_UNSUPPORTED_PTX_VERSION:
    case CUDA_ERROR_JIT_COMPILER_NOT_FOUND:
      return true;
    default:
      return false;
  }
}

}  // namespace

const Api& api() {
  Api& loaded = table();
  static std::mutex mutex;
  static bool ready = false;
  std::lock_guard<std::mutex> lock(mutex);
  if (!ready) check(loaded.cuInit(0), "cuInit");
  ready = true;
  return loaded;
}

bool is_fatal(CUresult result) {
  switch (result) {
    case CUDA_ERROR_ILLEGAL_ADDRESS:
    case CUDA_ERROR_LAUNCH_FAILED:
    case CUDA_ERROR_LAUNCH_TIMEOUT:
    case CUDA_ERROR_HARDWARE_STACK_ERROR:
    case CUDA_ERROR_ILLEGAL_INSTRUCTION:
    case CUDA_ERROR_MISALIGNED_ADDRESS:
    case CUDA_ERROR_INVALID_ADDRESS_SPACE:
    case CUDA_ERROR_INVALID_PC:
    case CUDA_ERROR_ASSERT:
    case CUDA_ERROR_ECC_UNCORRECTABLE:
    case CUDA_ERROR_NVLINK_UNCORRECTABLE:
    case CUDA_ERROR_EXTERNAL_DEVICE:
    case CUDA_ERROR_CONTEXT_IS_DESTROYED:
    case CUDA_ERROR_DEINITIALIZED:
    case CUDA_ERROR_UNKNOWN:
      return true;
    default:
      return false;
  }
}

std::string text_of(CUresult result, const char* call) {
  const char *name = nullptr, *meaning = nullptr;
  table().cuGetErrorName(result, &name);
  table().cuGetErrorString(result, &meaning);
  std::string text = name != nullptr ? name : "CUDA error " + std::to_string(result);
  if (meaning != nullptr) text += std::string(" (") + meaning + ")";
  if (const char* cause = cause_of(result, call)) text += std::string("; ") + cause;
  return text;
}

void check(CUresult result, const char* call, const std::string& detail) {
  if (result == CUDA_SUCCESS) return;
  const std::string where = detail.empty() ? call : std::string(call) + " of " + detail;
  throw Error(is_unsupported(result) ? PIE_ERR_UNSUPPORTED : PIE_ERR_TRANSFER,
              where + ": " + text_of(result, call));
}

}  // namespace pie::cuda
