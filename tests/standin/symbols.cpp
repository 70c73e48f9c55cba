// cuGetProcAddress: which exported function a name means for a version of CUDA.
#include <cstring>

#include "state.h"

using namespace standin;

#undef cuMemcpyBatchAsync
#undef cuEventElapsedTime
extern "C" {
CUresult cuMemcpyBatchAsync(CUdeviceptr*, CUdeviceptr*, size_t*, size_t, CUmemcpyAttributes*,
                            size_t*, size_t, size_t*, CUstream);
CUresult cuMemcpyBatchAsync_v2(CUdeviceptr*, CUdeviceptr*, size_t*, size_t, CUmemcpyAttributes*,
                               size_t*, size_t, CUstream);
CUresult cuEventElapsedTime(float*, CUevent, CUevent);
CUresult cuEventElapsedTime_v2(float*, CUevent, CUevent);
}

namespace {

struct Symbol {
  const char* name;
  int since;  // the CUDA version that brought this variant
  void* function;
};

#define ENTRY(name, since) {#name, since, reinterpret_cast<void*>(&name)}
#define VARIANT(name, since, function) {name, since, reinterpret_cast<void*>(&function)}

// The header's macros turn a name into its newest variant. Of one name: older variants first.
const Symbol kSymbols[] = {
    ENTRY(cuInit, 2000),
    ENTRY(cuDriverGetVersion, 2020),
    ENTRY(cuDeviceGetCount, 2000),
    ENTRY(cuDeviceGet, 2000),
    ENTRY(cuDeviceGetName, 2000),
    ENTRY(cuDeviceGetAttribute, 2000),
    ENTRY(cuDeviceGetPCIBusId, 4010),
    VARIANT("cuDeviceTotalMem", 3020, cuDeviceTotalMem),
    VARIANT("cuMemGetInfo", 3020, cuMemGetInfo),
    ENTRY(cuDevicePrimaryCtxRetain, 7000),
    ENTRY(cuDevicePrimaryCtxGetState, 7000),
    VARIANT("cuDevicePrimaryCtxRelease", 11000, cuDevicePrimaryCtxRelease),
    ENTRY(cuCtxGetCurrent, 4000),
    ENTRY(cuCtxSetCurrent, 4000),
    ENTRY(cuCtxGetDevice, 2000),
    ENTRY(cuCtxSynchronize, 2000),
    ENTRY(cuCtxGetStreamPriorityRange, 5050),
    ENTRY(cuGetErrorName, 6000),
    ENTRY(cuGetErrorString, 6000),
    ENTRY(cuMemGetAllocationGranularity, 10020),
    ENTRY(cuMemAddressReserve, 10020),
    ENTRY(cuMemAddressFree, 10020),
    ENTRY(cuMemCreate, 10020),
    ENTRY(cuMemRelease, 10020),
    ENTRY(cuMemMap, 10020),
    ENTRY(cuMemUnmap, 10020),
    ENTRY(cuMemSetAccess, 10020),
    VARIANT("cuMemHostRegister", 6050, cuMemHostRegister),
    ENTRY(cuMemHostUnregister, 4000),
    VARIANT("cuMemHostGetDevicePointer", 3020, cuMemHostGetDevicePointer),
    VARIANT("cuMemAlloc", 3020, cuMemAlloc),
    VARIANT("cuMemFree", 3020, cuMemFree),
    ENTRY(cuStreamCreateWithPriority, 5050),
    VARIANT("cuStreamDestroy", 4000, cuStreamDestroy),
    ENTRY(cuStreamSynchronize, 2000),
    ENTRY(cuStreamQuery, 2000),
    ENTRY(cuStreamWaitEvent, 3020),
    VARIANT("cuStreamBeginCapture", 10010, cuStreamBeginCapture),
    ENTRY(cuStreamIsCapturing, 10000),
    ENTRY(cuStreamEndCapture, 10000),
    VARIANT("cuGraphInstantiate", 11040, cuGraphInstantiate),
    ENTRY(cuGraphLaunch, 10000),
    ENTRY(cuGraphDestroy, 10000),
    ENTRY(cuGraphExecDestroy, 10000),
    ENTRY(cuEventCreate, 2000),
    VARIANT("cuEventDestroy", 4000, cuEventDestroy),
    ENTRY(cuEventRecord, 2000),
    ENTRY(cuEventQuery, 2000),
    ENTRY(cuEventSynchronize, 2000),
    VARIANT("cuEventElapsedTime", 2000, cuEventElapsedTime),
    VARIANT("cuEventElapsedTime", 12080, cuEventElapsedTime_v2),
    VARIANT("cuMemcpyBatchAsync", 12080, cuMemcpyBatchAsync),
    VARIANT("cuMemcpyBatchAsync", 13000, cuMemcpyBatchAsync_v2),
    ENTRY(cuMemcpyAsync, 4000),
    VARIANT("cuMemcpyHtoDAsync", 3020, cuMemcpyHtoDAsync),
    VARIANT("cuMemcpyDtoHAsync", 3020, cuMemcpyDtoHAsync),
    VARIANT("cuMemcpy2DAsync", 3020, cuMemcpy2DAsync),
    VARIANT("cuMemsetD8", 3020, cuMemsetD8),
    ENTRY(cuMemsetD8Async, 3020),
    ENTRY(cuLaunchHostFunc, 10000),
    ENTRY(cuModuleLoadData, 2000),
    ENTRY(cuModuleUnload, 2000),
    ENTRY(cuModuleGetFunction, 2000),
    ENTRY(cuLaunchKernel, 4000),
    VARIANT("cuGetProcAddress", 12000, cuGetProcAddress),
};

}  // namespace

CUresult cuGetProcAddress(const char* symbol, void** function, int version, cuuint64_t flags,
                          CUdriverProcAddressQueryResult* status) {
  Call call("cuGetProcAddress", kNothing);
  if (call.failed()) return call.code();
  if (!symbol || !function || flags > CU_GET_PROC_ADDRESS_PER_THREAD_DEFAULT_STREAM) {
    return CUDA_ERROR_INVALID_VALUE;
  }
  const int64_t driver = setting("driver_version");
  if (version > driver) return CUDA_ERROR_INVALID_VALUE;
  *function = nullptr;
  auto found = CU_GET_PROC_ADDRESS_SYMBOL_NOT_FOUND;
  for (const Symbol& s : kSymbols) {
    if (std::strcmp(s.name, symbol) != 0 || s.since > driver) continue;
    if (s.since <= version) {
      *function = s.function;
      found = CU_GET_PROC_ADDRESS_SUCCESS;
    } else if (!*function) {
      found = CU_GET_PROC_ADDRESS_VERSION_NOT_SUFFICIENT;
    }
  }
  if (status) *status = found;
  return CUDA_SUCCESS;
}
