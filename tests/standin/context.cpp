// Devices, their primary contexts, and the names of errors.
#include <cstdio>
#include <cstring>

#include "state.h"

using namespace standin;

namespace {

constexpr uint64_t kFirstContext = 0xC0000;
constexpr uint64_t kContextStep = 16;
thread_local int bound = -1;

CUresult check_device(const Call& call, CUdevice device) {
  if (call.failed()) return call.code();
  const bool known = device >= 0 && device < setting("device_count");
  return known ? CUDA_SUCCESS : CUDA_ERROR_INVALID_DEVICE;
}

int device_of(CUcontext context) {
  return static_cast<int>((reinterpret_cast<uint64_t>(context) - kFirstContext) / kContextStep);
}

}  // namespace

int standin::current_device() { return bound; }

CUcontext standin::context_of(int device) {
  if (device < 0) return nullptr;
  return reinterpret_cast<CUcontext>(kFirstContext + kContextStep * static_cast<uint64_t>(device));
}

CUresult cuInit(unsigned flags) {
  Call call("cuInit", kNothing);
  if (call.failed()) return call.code();
  if (flags != 0) return CUDA_ERROR_INVALID_VALUE;
  if (setting("device_count") == 0) return CUDA_ERROR_NO_DEVICE;
  state().initialized = true;
  return CUDA_SUCCESS;
}

CUresult cuDriverGetVersion(int* version) {
  Call call("cuDriverGetVersion", kNothing);
  if (call.failed()) return call.code();
  *version = static_cast<int>(setting("driver_version"));
  return CUDA_SUCCESS;
}

CUresult cuDeviceGetCount(int* count) {
  Call call("cuDeviceGetCount", kInit);
  if (call.failed()) return call.code();
  *count = static_cast<int>(setting("device_count"));
  return CUDA_SUCCESS;
}

CUresult cuDeviceGet(CUdevice* device, int ordinal) {
  Call call("cuDeviceGet", kInit);
  if (const CUresult code = check_device(call, ordinal)) return code;
  *device = ordinal;
  return CUDA_SUCCESS;
}

CUresult cuDeviceGetName(char* name, int size, CUdevice device) {
  Call call("cuDeviceGetName", kInit);
  if (const CUresult code = check_device(call, device)) return code;
  std::snprintf(name, static_cast<size_t>(size), "Stand-in %d", device);
  return CUDA_SUCCESS;
}

CUresult cuDeviceTotalMem(size_t* bytes, CUdevice device) {
  Call call("cuDeviceTotalMem", kInit);
  if (const CUresult code = check_device(call, device)) return code;
  *bytes = static_cast<size_t>(setting("device_memory"));
  return CUDA_SUCCESS;
}

CUresult cuDeviceGetPCIBusId(char* id, int size, CUdevice device) {
  Call call("cuDeviceGetPCIBusId", kInit);
  if (const CUresult code = check_device(call, device)) return code;
  std::snprintf(id, static_cast<size_t>(size), "0000:%02x:00.0", static_cast<unsigned>(device) + 1);
  return CUDA_SUCCESS;
}

CUresult cuDeviceGetAttribute(int* value, CUdevice_attribute attribute, CUdevice device) {
  Call call("cuDeviceGetAttribute", kInit);
  if (const CUresult code = check_device(call, device)) return code;
  if (!value || attribute < 1 || attribute >= CU_DEVICE_ATTRIBUTE_MAX) {
    return CUDA_ERROR_INVALID_VALUE;
  }
  // Of a data-centre part; what is not listed is 0.
  static const std::map<int, int> fixed = {
      {CU_DEVICE_ATTRIBUTE_MAX_THREADS_PER_BLOCK, 1024},
      {CU_DEVICE_ATTRIBUTE_WARP_SIZE, 32},
      {CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT, 132},
      {CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK, 48 << 10},
      {CU_DEVICE_ATTRIBUTE_CAN_MAP_HOST_MEMORY, 1},
      {CU_DEVICE_ATTRIBUTE_CONCURRENT_KERNELS, 1},
      {CU_DEVICE_ATTRIBUTE_ASYNC_ENGINE_COUNT, 3},
      {CU_DEVICE_ATTRIBUTE_UNIFIED_ADDRESSING, 1},
      {CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, 9},
      {CU_DEVICE_ATTRIBUTE_STREAM_PRIORITIES_SUPPORTED, 1},
      {CU_DEVICE_ATTRIBUTE_HOST_REGISTER_SUPPORTED, 1},
  };
  const std::map<int, const char*> settable = {
      {CU_DEVICE_ATTRIBUTE_VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED, "vmm_supported"},
      {CU_DEVICE_ATTRIBUTE_CAN_USE_HOST_POINTER_FOR_REGISTERED_MEM, "can_use_host_pointer"},
      {CU_DEVICE_ATTRIBUTE_HOST_NUMA_ID, "host_numa_id"},
      {CU_DEVICE_ATTRIBUTE_INTEGRATED, "integrated"},
  };
  const auto known = fixed.find(attribute);
  const auto set = settable.find(attribute);
  *value = known != fixed.end() ? known->second : 0;
  if (set != settable.end()) *value = static_cast<int>(setting(set->second));
  if (attribute == CU_DEVICE_ATTRIBUTE_PCI_BUS_ID) *value = device + 1;
  return CUDA_SUCCESS;
}

CUresult cuDevicePrimaryCtxRetain(CUcontext* context, CUdevice device) {
  Call call("cuDevicePrimaryCtxRetain", kInit);
  if (const CUresult code = check_device(call, device)) return code;
  ++state().retained[device];
  *context = context_of(device);
  return CUDA_SUCCESS;
}

CUresult cuDevicePrimaryCtxGetState(CUdevice device, unsigned* flags, int* active) {
  Call call("cuDevicePrimaryCtxGetState", kInit | kRelease);
  if (const CUresult code = check_device(call, device)) return code;
  *flags = 0;
  *active = state().retained[device] > 0;
  return CUDA_SUCCESS;
}

CUresult cuDevicePrimaryCtxRelease(CUdevice device) {
  Call call("cuDevicePrimaryCtxRelease", kInit | kRelease);
  if (const CUresult code = check_device(call, device)) return code;
  State& s = state();
  int& references = s.retained[device];
  if (references == 0) return call.wrong(CUDA_ERROR_INVALID_CONTEXT, "released too often");
  if (--references == 0) {
    size_t live = s.memory.registrations.size();
    for (const auto& [id, stream] : s.streams) live += stream->device == device;
    for (const auto& [id, event] : s.events) live += event.device == device;
    for (const auto& [address, reservation] : s.memory.reservations) live += reservation.alloc;
    s.modules.clear();  // They end with it, and none needs to be unloaded.
    if (live > 0) call.wrong(CUDA_SUCCESS, "the context ends while used by:\n" + live_text());
  }
  return call.done();
}

CUresult cuCtxGetCurrent(CUcontext* context) {
  Call call("cuCtxGetCurrent", kInit);
  if (call.failed()) return call.code();
  *context = context_of(bound);
  return CUDA_SUCCESS;
}

CUresult cuCtxSetCurrent(CUcontext context) {
  Call call("cuCtxSetCurrent", kInit);
  if (call.failed()) return call.code();
  const int device = context ? device_of(context) : -1;
  if (context && (context != context_of(device) || device >= setting("device_count"))) {
    return CUDA_ERROR_INVALID_CONTEXT;
  }
  bound = device;
  return CUDA_SUCCESS;
}

CUresult cuCtxGetDevice(CUdevice* device) {
  Call call("cuCtxGetDevice", kContext);
  if (call.failed()) return call.code();
  *device = call.device();
  return CUDA_SUCCESS;
}

CUresult cuCtxGetStreamPriorityRange(int* least, int* greatest) {
  Call call("cuCtxGetStreamPriorityRange", kContext);
  if (call.failed()) return call.code();
  if (least) *least = 0;
  if (greatest) *greatest = -5;
  return CUDA_SUCCESS;
}

namespace {

struct ErrorName {
  CUresult code;
  const char* name;
  const char* text;
};
const ErrorName kErrors[] = {
    {CUDA_SUCCESS, "CUDA_SUCCESS", "no error"},
    {CUDA_ERROR_INVALID_VALUE, "CUDA_ERROR_INVALID_VALUE", "invalid argument"},
    {CUDA_ERROR_OUT_OF_MEMORY, "CUDA_ERROR_OUT_OF_MEMORY", "out of memory"},
    {CUDA_ERROR_NOT_INITIALIZED, "CUDA_ERROR_NOT_INITIALIZED", "initialization error"},
    {CUDA_ERROR_NO_DEVICE, "CUDA_ERROR_NO_DEVICE", "no CUDA-capable device is detected"},
    {CUDA_ERROR_INVALID_DEVICE, "CUDA_ERROR_INVALID_DEVICE", "invalid device ordinal"},
    {CUDA_ERROR_INVALID_CONTEXT, "CUDA_ERROR_INVALID_CONTEXT", "invalid device context"},
    {CUDA_ERROR_NO_BINARY_FOR_GPU, "CUDA_ERROR_NO_BINARY_FOR_GPU", "no kernel image for device"},
    {CUDA_ERROR_UNSUPPORTED_PTX_VERSION, "CUDA_ERROR_UNSUPPORTED_PTX_VERSION", "unsupported PTX"},
    {CUDA_ERROR_INVALID_HANDLE, "CUDA_ERROR_INVALID_HANDLE", "invalid resource handle"},
    {CUDA_ERROR_NOT_FOUND, "CUDA_ERROR_NOT_FOUND", "named symbol not found"},
    {CUDA_ERROR_NOT_READY, "CUDA_ERROR_NOT_READY", "device not ready"},
    {CUDA_ERROR_ILLEGAL_ADDRESS, "CUDA_ERROR_ILLEGAL_ADDRESS", "an illegal memory access"},
    {CUDA_ERROR_CONTEXT_IS_DESTROYED, "CUDA_ERROR_CONTEXT_IS_DESTROYED", "context is destroyed"},
    {CUDA_ERROR_HOST_MEMORY_ALREADY_REGISTERED, "CUDA_ERROR_HOST_MEMORY_ALREADY_REGISTERED",
     "part or all of the requested memory range is already mapped"},
    {CUDA_ERROR_HOST_MEMORY_NOT_REGISTERED, "CUDA_ERROR_HOST_MEMORY_NOT_REGISTERED",
     "pointer does not correspond to a registered memory region"},
    {CUDA_ERROR_LAUNCH_FAILED, "CUDA_ERROR_LAUNCH_FAILED", "unspecified launch failure"},
    {CUDA_ERROR_NOT_PERMITTED, "CUDA_ERROR_NOT_PERMITTED", "operation not permitted"},
    {CUDA_ERROR_NOT_SUPPORTED, "CUDA_ERROR_NOT_SUPPORTED", "operation not supported"},
    {CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED, "CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED",
     "operation not permitted when stream is capturing"},
    {CUDA_ERROR_STREAM_CAPTURE_INVALIDATED, "CUDA_ERROR_STREAM_CAPTURE_INVALIDATED",
     "operation failed due to a previous error during capture"},
    {CUDA_ERROR_STREAM_CAPTURE_UNJOINED, "CUDA_ERROR_STREAM_CAPTURE_UNJOINED",
     "capturing stream has unjoined work"},
    {CUDA_ERROR_STREAM_CAPTURE_ISOLATION, "CUDA_ERROR_STREAM_CAPTURE_ISOLATION",
     "dependency created on uncaptured work in another stream"},
    {CUDA_ERROR_UNKNOWN, "CUDA_ERROR_UNKNOWN", "unknown error"},
};

CUresult error_text(CUresult code, const char** text, const char* ErrorName::* field) {
  *text = nullptr;
  for (const ErrorName& error : kErrors) {
    if (error.code == code) *text = error.*field;
  }
  return *text ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
}

}  // namespace

CUresult cuGetErrorName(CUresult code, const char** text) {
  Call call("cuGetErrorName", kNothing);
  return call.failed() ? call.code() : error_text(code, text, &ErrorName::name);
}

CUresult cuGetErrorString(CUresult code, const char** text) {
  Call call("cuGetErrorString", kNothing);
  return call.failed() ? call.code() : error_text(code, text, &ErrorName::text);
}
