// A libcuda that does nothing and takes a stated time: what is left is the time of its caller.
//
// IDLE_CUDA_DESCRIPTOR_NS: of the calling thread for each copy, in a batch or alone.
// IDLE_CUDA_CALL_NS: for each record, wait, launch, memset and batch.
//
// Only the trial of the gather kernel, on the default stream, copies: by its host build.
#include <cuda.h>
#include <sys/mman.h>

#include <chrono>
#include <cstdlib>
#include <cstring>
#include <map>
#include <string>

#include "gather_host.h"

namespace {

using Clock = std::chrono::steady_clock;

long from_environment(const char* name) {
  const char* text = std::getenv(name);
  return text == nullptr ? 0 : std::atol(text);
}
const long descriptor_ns = from_environment("IDLE_CUDA_DESCRIPTOR_NS");
const long call_ns = from_environment("IDLE_CUDA_CALL_NS");
long long copies = 0, launches = 0, calls = 0;

uint64_t next_id = 0x1000;

template <typename Handle>
CUresult made(Handle* handle) {
  *handle = (Handle)next_id++;
  return CUDA_SUCCESS;
}

CUresult take(long ns, long long entries = 0) {
  ++calls;
  copies += entries;
  if (ns <= 0) return CUDA_SUCCESS;
  const auto over = Clock::now() + std::chrono::nanoseconds(ns);
  while (Clock::now() < over) {
  }
  return CUDA_SUCCESS;
}

CUresult nothing() { return CUDA_SUCCESS; }
CUresult take_call() { return take(call_ns); }
CUresult take_copy() { return take(descriptor_ns, 1); }
CUresult take_batch(CUdeviceptr*, CUdeviceptr*, size_t*, size_t count) {
  return take(call_ns + descriptor_ns * static_cast<long>(count), static_cast<long long>(count));
}
CUresult launch(CUfunction, unsigned grid, unsigned, unsigned, unsigned block, unsigned, unsigned,
                unsigned, CUstream stream, void** parameters, void**) {
  if (stream == nullptr) {
    uint64_t value[6];
    for (int i = 0; i < 6; ++i) value[i] = *static_cast<uint64_t*>(parameters[i]);
    using namespace pie_gather_detail;
    pie_gather_host(reinterpret_cast<const Entry*>(value[0]),
                    reinterpret_cast<const unsigned long long*>(value[1]),
                    reinterpret_cast<unsigned long long*>(value[2]), {value[3], value[4], value[5]},
                    grid, block);
  }
  ++launches;
  return take(call_ns);
}

CUresult current(CUcontext* context) {
  *context = reinterpret_cast<CUcontext>(0x77);
  return CUDA_SUCCESS;
}
CUresult retain(CUcontext* context, CUdevice) { return current(context); }
CUresult attribute(int* value, CUdevice_attribute which, CUdevice) {
  const bool no =
      which == CU_DEVICE_ATTRIBUTE_INTEGRATED || which == CU_DEVICE_ATTRIBUTE_HOST_NUMA_ID;
  *value = which == CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR ? 9 : no ? 0 : 1;
  return CUDA_SUCCESS;
}
CUresult one(int* value) {
  *value = 1;
  return CUDA_SUCCESS;
}
CUresult device(CUdevice* value) {
  *value = 0;
  return CUDA_SUCCESS;
}
CUresult version(int* value) {
  *value = 13000;
  return CUDA_SUCCESS;
}
CUresult priorities(int* least, int* greatest) {
  *least = *greatest = 0;
  return CUDA_SUCCESS;
}
CUresult elapsed(float* milliseconds, CUevent, CUevent) {
  *milliseconds = 1;
  return CUDA_SUCCESS;
}
CUresult granularity(size_t* bytes) {
  *bytes = 2 << 20;
  return CUDA_SUCCESS;
}
CUresult reserve(CUdeviceptr* address, size_t bytes, size_t, CUdeviceptr, unsigned long long) {
  void* const at =
      mmap(nullptr, bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  *address = reinterpret_cast<CUdeviceptr>(at);
  return at == MAP_FAILED ? CUDA_ERROR_OUT_OF_MEMORY : CUDA_SUCCESS;
}
CUresult unreserve(CUdeviceptr address, size_t bytes) {
  munmap(reinterpret_cast<void*>(address), bytes);
  return CUDA_SUCCESS;
}
CUresult text(CUresult, const char** name) {
  *name = "an error of no meaning";
  return CUDA_SUCCESS;
}

// All others do nothing, which takes no arguments.
const std::map<std::string, void*>& functions() {
#define IDLE(name, function)                 \
  {                                          \
    #name, reinterpret_cast<void*>(function) \
  }
  static const std::map<std::string, void*> all{
      IDLE(cuCtxGetCurrent, current),
      IDLE(cuCtxGetDevice, device),
      IDLE(cuCtxGetStreamPriorityRange, priorities),
      IDLE(cuDeviceGet, device),
      IDLE(cuDeviceGetAttribute, attribute),
      IDLE(cuDeviceGetCount, one),
      IDLE(cuDevicePrimaryCtxRetain, retain),
      IDLE(cuDriverGetVersion, version),
      IDLE(cuEventCreate, made<CUevent>),
      IDLE(cuEventElapsedTime, elapsed),
      IDLE(cuEventQuery, take_call),
      IDLE(cuEventRecord, take_call),
      IDLE(cuGetErrorName, text),
      IDLE(cuGetErrorString, text),
      IDLE(cuLaunchKernel, launch),
      IDLE(cuMemAddressFree, unreserve),
      IDLE(cuMemAddressReserve, reserve),
      IDLE(cuMemCreate, made<CUmemGenericAllocationHandle>),
      IDLE(cuMemGetAllocationGranularity, granularity),
      IDLE(cuMemcpy2DAsync, take_copy),
      IDLE(cuMemcpyBatchAsync, take_batch),
      IDLE(cuMemcpyDtoHAsync, take_copy),
      IDLE(cuMemcpyHtoDAsync, take_copy),
      IDLE(cuMemsetD8Async, take_call),
      IDLE(cuModuleGetFunction, made<CUfunction>),
      IDLE(cuModuleLoadData, made<CUmodule>),
      IDLE(cuStreamCreateWithPriority, made<CUstream>),
      IDLE(cuStreamQuery, take_call),
      IDLE(cuStreamWaitEvent, take_call),
  };
#undef IDLE
  return all;
}

}  // namespace

extern "C" {

#undef cuGetProcAddress
__attribute__((visibility("default"))) CUresult cuGetProcAddress_v2(
    const char* name, void** function, int, cuuint64_t, CUdriverProcAddressQueryResult* found) {
  const auto known = functions().find(name);
  *function = known == functions().end() ? reinterpret_cast<void*>(nothing) : known->second;
  if (found != nullptr) *found = CU_GET_PROC_ADDRESS_SUCCESS;
  return CUDA_SUCCESS;
}

// Copies, launches and calls that took time, so far.
__attribute__((visibility("default"))) void idle_cuda_counts(long long* counts) {
  counts[0] = copies;
  counts[1] = launches;
  counts[2] = calls;
}

}  // extern "C"
