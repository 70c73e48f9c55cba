// One GPU: its context, its memory and the CPU memory that it reaches.
#pragma once

#include <map>
#include <mutex>
#include <string>

#include "drivers/cuda/cuda_api.h"
#include "drivers/driver.h"

namespace pie::cuda {

// Holds the device's primary context, the one that torch uses too.
class Device {
 public:
  // index < 0: the device whose context is current on this thread, else the first one. Throws
  // PIE_ERR_UNSUPPORTED where the device cannot map memory at addresses of our choice.
  explicit Device(int index);
  ~Device();
  Device(const Device&) = delete;
  Device& operator=(const Device&) = delete;

  // Makes the context current on the calling thread; cheap when it is.
  void use() const;

  size_t granularity() const { return granularity_; }
  // Blocks until all work of the context is done, streams of others included.
  CUresult synchronize() const;

  Address reserve(size_t bytes, size_t alignment) const;
  void unreserve(Address address, size_t bytes) const noexcept;
  Handle create(size_t bytes) const;
  void release(Handle handle) const noexcept;
  void map(Address address, size_t bytes, Handle handle) const;
  void set_access(Address address, size_t bytes) const;
  void zero(Address address, size_t bytes) const;
  void unmap(Address address, size_t bytes) const noexcept;

  // Zeroed, on the GPU's NUMA node, pinned. Any thread.
  void* host_alloc(size_t bytes);
  void host_free(void* pointer, size_t bytes) noexcept;
  // Where kernels find an address of that memory.
  Address reach(Address host) const;

  // The architecture by its compilers' name: "sm_90".
  std::string arch() const;

 private:
  int attribute(CUdevice_attribute which) const;
  int find_numa_node() const;
  CUmemAllocationProp properties() const;

  const Api& api_;
  CUdevice device_ = 0;
  CUcontext context_ = nullptr;
  size_t granularity_ = 0;
  int numa_node_ = -1;
  bool same_addresses_ = true;  // kernels find CPU memory where the CPU does
  mutable std::mutex mutex_;
  std::map<Address, Address> reached_;  // else: by the first address of what was registered
};

}  // namespace pie::cuda
