// The functions of the CUDA driver, found at run time: one build serves machines with and without.
//
// The library is never linked. Types and constants come from cuda.h (12.8 or newer), which needs no
// toolkit: the package nvidia-cuda-runtime brings it. What a machine's driver lacks is an error
// when the driver is opened, but for the batched copy, which has a substitute.
#pragma once

#include <cuda.h>

#include <string>

#include "error.h"

namespace pie::cuda {

// name, the version of CUDA in which its signature came (cuGetProcAddress gives that one).
#define PIE_CUDA_FUNCTIONS(X)             \
  X(cuCtxGetCurrent, 4000)                \
  X(cuCtxGetDevice, 2000)                 \
  X(cuCtxGetStreamPriorityRange, 5050)    \
  X(cuCtxSetCurrent, 4000)                \
  X(cuDeviceGet, 2000)                    \
  X(cuDeviceGetAttribute, 2000)           \
  X(cuDeviceGetCount, 2000)               \
  X(cuDeviceGetPCIBusId, 4010)            \
  X(cuDevicePrimaryCtxGetState, 7000)     \
  X(cuDevicePrimaryCtxRelease, 11000)     \
  X(cuDevicePrimaryCtxRetain, 7000)       \
  X(cuDriverGetVersion, 2020)             \
  X(cuEventCreate, 2000)                  \
  X(cuEventDestroy, 4000)                 \
  X(cuEventElapsedTime, 2000)             \
  X(cuEventQuery, 2000)                   \
  X(cuEventRecord, 2000)                  \
  X(cuEventSynchronize, 2000)             \
  X(cuGetErrorName, 6000)                 \
  X(cuGetErrorString, 6000)               \
  X(cuInit, 2000)                         \
  X(cuLaunchHostFunc, 10000)              \
  X(cuLaunchKernel, 4000)                 \
  X(cuMemAddressFree, 10020)              \
  X(cuMemAddressReserve, 10020)           \
  X(cuMemCreate, 10020)                   \
  X(cuMemGetAllocationGranularity, 10020) \
  X(cuMemHostGetDevicePointer, 3020)      \
  X(cuMemHostRegister, 6050)              \
  X(cuMemHostUnregister, 4000)            \
  X(cuMemMap, 10020)                      \
  X(cuMemRelease, 10020)                  \
  X(cuMemSetAccess, 10020)                \
  X(cuMemUnmap, 10020)                    \
  X(cuMemcpy2DAsync, 3020)                \
  X(cuMemcpyDtoHAsync, 3020)              \
  X(cuMemcpyHtoDAsync, 3020)              \
  X(cuMemsetD8Async, 3020)                \
  X(cuModuleGetFunction, 2000)            \
  X(cuModuleLoadData, 2000)               \
  X(cuModuleUnload, 2000)                 \
  X(cuStreamCreateWithPriority, 5050)     \
  X(cuStreamDestroy, 4000)                \
  X(cuStreamIsCapturing, 10000)           \
  X(cuStreamQuery, 2000)                  \
  X(cuStreamSynchronize, 2000)            \
  X(cuStreamWaitEvent, 3020)

// cuMemcpyBatchAsync: CUDA 12.8 reports the index of a failed copy, CUDA 13 does not.
using Batch12 = CUresult (*)(CUdeviceptr*, CUdeviceptr*, size_t*, size_t, CUmemcpyAttributes*,
                             size_t*, size_t, size_t*, CUstream);
using Batch13 = CUresult (*)(CUdeviceptr*, CUdeviceptr*, size_t*, size_t, CUmemcpyAttributes*,
                             size_t*, size_t, CUstream);

struct Api {
#define PIE_CUDA_MEMBER(name, version) decltype(&::name) name = nullptr;
  PIE_CUDA_FUNCTIONS(PIE_CUDA_MEMBER)
#undef PIE_CUDA_MEMBER
  CUresult (*cuCtxSynchronize)() = nullptr;  // cuda.h declares another one from CUDA 13 on
  Batch12 batch12 = nullptr;                 // at most one of the two, none before 12.8
  Batch13 batch13 = nullptr;
  int version = 0;  // of CUDA that the driver knows, such as 12080
};

// Loads the driver once and initialises it. Throws PIE_ERR_UNSUPPORTED: no driver, no device, or a
// driver older than CUDA 12.
const Api& api();

// Throws an Error that names the call, the error and its likely cause, unless all is well.
// PIE_ERR_UNSUPPORTED where the machine cannot do it at all, else PIE_ERR_TRANSFER.
void check(CUresult result, const char* call, const std::string& detail = {});

// "CUDA_ERROR_X (what it says)" and, where one is known, "; the likely cause".
std::string text_of(CUresult result, const char* call);

// Whether the context is lost: no later call can succeed.
bool is_fatal(CUresult result);

}  // namespace pie::cuda
