#include "drivers/cuda/cuda_device.h"

#include <algorithm>
#include <cctype>
#include <fstream>
#include <iterator>
#include <thread>
#include <utility>

#include "drivers/pages.h"

namespace pie::cuda {
namespace {

// More gain nothing: 0.1 s a GiB from four on, cudf issue 23457 (16 GiB, g6.4xlarge).
constexpr unsigned kPopulateThreads = 8;

std::string size_text(size_t bytes) { return std::to_string(bytes) + " bytes"; }

CUdevice choose(const Api& api, int index) {
  CUdevice device = 0;
  CUcontext current = nullptr;
  if (index < 0 && api.cuCtxGetCurrent(&current) == CUDA_SUCCESS && current != nullptr) {
    check(api.cuCtxGetDevice(&device), "cuCtxGetDevice");
    return device;
  }
  int count = 0;
  check(api.cuDeviceGetCount(&count), "cuDeviceGetCount");
  check(count > 0 ? CUDA_SUCCESS : CUDA_ERROR_NO_DEVICE, "cuDeviceGetCount");
  const int wanted = std::max(index, 0);
  check(api.cuDeviceGet(&device, wanted), "cuDeviceGet", "device " + std::to_string(wanted));
  return device;
}

}  // namespace

Device::Device(int index) : api_(api()), device_(choose(api_, index)) {
  if (attribute(CU_DEVICE_ATTRIBUTE_VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED) == 0) {
    throw Error(PIE_ERR_UNSUPPORTED,
                "this GPU cannot map memory at chosen addresses (no virtual memory management); "
                "it needs compute capability 7.0 or newer, and no virtualisation that hides it");
  }
  if (attribute(CU_DEVICE_ATTRIBUTE_INTEGRATED) != 0) {
    throw Error(PIE_ERR_UNSUPPORTED,
                "this GPU shares the CPU's memory (an integrated device, such as the GB10 of DGX "
                "Spark, or Jetson): the CPU has no memory beside it to pool. Use --block-manager "
                "default, and give the GPU more with --gpu-memory-utilization");
  }
  const CUmemAllocationProp wanted = properties();
  check(
      api_.cuMemGetAllocationGranularity(&granularity_, &wanted, CU_MEM_ALLOC_GRANULARITY_MINIMUM),
      "cuMemGetAllocationGranularity");
  numa_node_ = find_numa_node();
  same_addresses_ = attribute(CU_DEVICE_ATTRIBUTE_CAN_USE_HOST_POINTER_FOR_REGISTERED_MEM) != 0;
  check(api_.cuDevicePrimaryCtxRetain(&context_, device_), "cuDevicePrimaryCtxRetain");
  try {
    use();
  } catch (const Error&) {
    api_.cuDevicePrimaryCtxRelease(device_);
    throw;
  }
}

Device::~Device() {
  api_.cuDevicePrimaryCtxRelease(device_);
  // The thread keeps a context that others hold, and is not left with one that ended here.
  unsigned flags = 0;
  int active = 0;
  CUcontext current = nullptr;
  if (api_.cuDevicePrimaryCtxGetState(device_, &flags, &active) == CUDA_SUCCESS && active == 0 &&
      api_.cuCtxGetCurrent(&current) == CUDA_SUCCESS && current == context_) {
    api_.cuCtxSetCurrent(nullptr);
  }
}

void Device::use() const {
  CUcontext current = nullptr;
  if (api_.cuCtxGetCurrent(&current) == CUDA_SUCCESS && current == context_) return;
  check(api_.cuCtxSetCurrent(context_), "cuCtxSetCurrent");
}

CUresult Device::synchronize() const { return api_.cuCtxSynchronize(); }

int Device::attribute(CUdevice_attribute which) const {
  int value = 0;
  return api_.cuDeviceGetAttribute(&value, which, device_) == CUDA_SUCCESS ? value : 0;
}

// The answer of the driver, else of the PCI bus; -1 where neither knows.
int Device::find_numa_node() const {
  int node = -1;
  if (api_.cuDeviceGetAttribute(&node, CU_DEVICE_ATTRIBUTE_HOST_NUMA_ID, device_) == CUDA_SUCCESS &&
      node >= 0) {
    return node;
  }
  char bus[32] = {};
  if (api_.cuDeviceGetPCIBusId(bus, sizeof(bus), device_) != CUDA_SUCCESS) return -1;
  std::string name = bus;
  for (char& c : name) c = static_cast<char>(std::tolower(static_cast<unsigned char>(c)));
  std::ifstream text("/sys/bus/pci/devices/" + name + "/numa_node");
  return text >> node ? node : -1;
}

CUmemAllocationProp Device::properties() const {
  CUmemAllocationProp wanted{};
  wanted.type = CU_MEM_ALLOCATION_TYPE_PINNED;
  wanted.location = {CU_MEM_LOCATION_TYPE_DEVICE, {device_}};
  return wanted;
}

Address Device::reserve(size_t bytes, size_t alignment) const {
  CUdeviceptr address = 0;
  check(api_.cuMemAddressReserve(&address, bytes, alignment, 0, 0), "cuMemAddressReserve",
        size_text(bytes));
  return address;
}

void Device::unreserve(Address address, size_t bytes) const noexcept {
  api_.cuMemAddressFree(address, bytes);
}

Handle Device::create(size_t bytes) const {
  CUmemGenericAllocationHandle handle = 0;
  const CUmemAllocationProp wanted = properties();
  check(api_.cuMemCreate(&handle, bytes, &wanted, 0), "cuMemCreate", size_text(bytes));
  return handle;
}

void Device::release(Handle handle) const noexcept { api_.cuMemRelease(handle); }

void Device::map(Address address, size_t bytes, Handle handle) const {
  check(api_.cuMemMap(address, bytes, 0, handle, 0), "cuMemMap", size_text(bytes));
}

void Device::set_access(Address address, size_t bytes) const {
  CUmemAccessDesc access{};
  access.location = {CU_MEM_LOCATION_TYPE_DEVICE, {device_}};
  access.flags = CU_MEM_ACCESS_FLAGS_PROT_READWRITE;
  check(api_.cuMemSetAccess(address, bytes, &access, 1), "cuMemSetAccess", size_text(bytes));
}

// The driver does not promise zeros, and kernels may load pages that they mask later.
void Device::zero(Address address, size_t bytes) const {
  use();
  check(api_.cuMemsetD8Async(address, 0, bytes, nullptr), "cuMemsetD8Async", size_text(bytes));
  const CUresult over = api_.cuStreamSynchronize(nullptr);
  if (over != CUDA_SUCCESS) api_.cuStreamSynchronize(nullptr);  // The memory is about to go.
  check(over, "cuStreamSynchronize");
}

void Device::unmap(Address address, size_t bytes) const noexcept {
  api_.cuMemUnmap(address, bytes);
}

void* Device::host_alloc(size_t bytes) {
  use();
  const unsigned cores = std::max(1u, std::thread::hardware_concurrency());
  void* at = pages::take(bytes, numa_node_, std::min(kPopulateThreads, (cores + 1) / 2));
  // Memory that stays pageable would make every copy of it wait: refused instead.
  const CUresult result =
      api_.cuMemHostRegister(at, bytes, CU_MEMHOSTREGISTER_PORTABLE | CU_MEMHOSTREGISTER_DEVICEMAP);
  if (result != CUDA_SUCCESS) {
    pages::give_back(at, bytes);
    check(result, "cuMemHostRegister", size_text(bytes));
  }
  if (same_addresses_) return at;
  CUdeviceptr device = 0;
  const CUresult found = api_.cuMemHostGetDevicePointer(&device, at, 0);
  if (found != CUDA_SUCCESS) {
    host_free(at, bytes);
    check(found, "cuMemHostGetDevicePointer");
  }
  std::lock_guard<std::mutex> lock(mutex_);
  reached_[reinterpret_cast<Address>(at)] = device;
  return at;
}

Address Device::reach(Address host) const {
  if (same_addresses_) return host;
  std::lock_guard<std::mutex> lock(mutex_);
  const auto above = reached_.upper_bound(host);
  if (above == reached_.begin()) throw Error(PIE_ERR_STATE, "an address of memory not registered");
  const auto& [first, device] = *std::prev(above);
  return device + (host - first);
}

std::string Device::arch() const {
  int major = 0, minor = 0;
  for (auto [value, which] : {std::pair(&major, CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR),
                              std::pair(&minor, CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)}) {
    check(api_.cuDeviceGetAttribute(value, which, device_), "cuDeviceGetAttribute");
  }
  return "sm_" + std::to_string(major) + std::to_string(minor);
}

void Device::host_free(void* pointer, size_t bytes) noexcept {
  try {
    use();
  } catch (const Error&) {
  }  // The context is gone, and the registration with it.
  {
    std::lock_guard<std::mutex> lock(mutex_);
    reached_.erase(reinterpret_cast<Address>(pointer));
  }
  api_.cuMemHostUnregister(pointer);
  pages::give_back(pointer, bytes);
}

}  // namespace pie::cuda
