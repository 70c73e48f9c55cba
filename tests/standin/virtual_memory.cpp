// cuMemAddressReserve and its family: reserved ranges, handles, mappings.
#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstring>

#include "state.h"

using namespace standin;

namespace {

constexpr int kGarbage = 0xA5;  // CUDA does not promise zero
constexpr int kHole = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
constexpr int kVmm = kInit | kSticky;

void* pointer(uint64_t address) { return reinterpret_cast<void*>(address); }

size_t granularity() { return static_cast<size_t>(setting("granularity")); }

bool is_whole(uint64_t value) { return value % granularity() == 0; }

CUresult check_prop(const CUmemAllocationProp* prop) {
  if (!setting("vmm_supported")) return CUDA_ERROR_NOT_SUPPORTED;
  if (prop == nullptr || prop->type != CU_MEM_ALLOCATION_TYPE_PINNED) {
    return CUDA_ERROR_INVALID_VALUE;
  }
  if (prop->location.type != CU_MEM_LOCATION_TYPE_DEVICE) return CUDA_ERROR_NOT_SUPPORTED;
  const bool known = prop->location.id >= 0 && prop->location.id < setting("device_count");
  return known ? CUDA_SUCCESS : CUDA_ERROR_INVALID_DEVICE;
}

int memory_file(size_t bytes) {
  const int fd = memfd_create("standin-device", MFD_CLOEXEC);
  if (fd < 0) return -1;
  void* at = MAP_FAILED;
  if (ftruncate(fd, static_cast<off_t>(bytes)) == 0 &&
      fallocate(fd, 0, 0, static_cast<off_t>(bytes)) == 0) {
    at = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
  }
  if (at == MAP_FAILED) {
    close(fd);
    return -1;
  }
  std::memset(at, kGarbage, bytes);
  munmap(at, bytes);
  return fd;
}

// The mappings that make up a range exactly; false where it cuts one or has a hole.
bool whole_mappings(uint64_t address, size_t bytes, std::vector<AreaPtr>& found) {
  uint64_t start = 0;
  Reservation* reservation = reservation_of(address, &start);
  if (reservation == nullptr || reservation->alloc) return false;
  uint64_t at = address;
  while (at < address + bytes) {
    const auto area = reservation->mappings.find(at);
    if (area == reservation->mappings.end()) return false;
    found.push_back(area->second);
    at += area->second->bytes;
  }
  return at == address + bytes && !found.empty();
}

}  // namespace

CUresult cuMemGetAllocationGranularity(size_t* bytes, const CUmemAllocationProp* prop,
                                       CUmemAllocationGranularity_flags) {
  Call call("cuMemGetAllocationGranularity", kVmm);
  if (call.failed()) return call.code();
  if (const CUresult code = check_prop(prop)) return code;
  if (bytes == nullptr) return CUDA_ERROR_INVALID_VALUE;
  *bytes = granularity();
  return CUDA_SUCCESS;
}

CUresult cuMemAddressReserve(CUdeviceptr* ptr, size_t size, size_t alignment, CUdeviceptr,
                             unsigned long long flags) {
  Call call("cuMemAddressReserve", kVmm);
  if (call.failed()) return call.code();
  if (!setting("vmm_supported")) return CUDA_ERROR_NOT_SUPPORTED;
  if (ptr == nullptr || size == 0 || !is_whole(size) || flags != 0) return CUDA_ERROR_INVALID_VALUE;
  if ((alignment & (alignment - 1)) != 0) return CUDA_ERROR_INVALID_VALUE;
  const size_t unit = std::max(alignment, granularity());
  if (size + unit < size) return CUDA_ERROR_OUT_OF_MEMORY;
  void* at = mmap(nullptr, size + unit, PROT_NONE, kHole, -1, 0);
  if (at == MAP_FAILED) return CUDA_ERROR_OUT_OF_MEMORY;
  const auto first = reinterpret_cast<uint64_t>(at);
  const uint64_t aligned = (first + unit - 1) / unit * unit;
  if (aligned > first) munmap(at, aligned - first);
  if (first + unit > aligned) munmap(pointer(aligned + size), first + unit - aligned);
  state().memory.reservations.emplace(aligned, Reservation{size, false});
  *ptr = aligned;
  return CUDA_SUCCESS;
}

CUresult cuMemAddressFree(CUdeviceptr ptr, size_t size) {
  Call call("cuMemAddressFree", kInit | kRelease);
  if (call.failed()) return call.code();
  auto& all = state().memory.reservations;
  const auto found = all.find(ptr);
  if (found == all.end() || found->second.alloc || found->second.bytes != size) {
    return call.wrong(CUDA_ERROR_INVALID_VALUE, range_text(ptr, size) + " is no whole reservation");
  }
  if (!found->second.mappings.empty()) {
    return call.wrong(CUDA_ERROR_INVALID_VALUE, range_text(ptr, size) + " has mappings");
  }
  munmap(pointer(ptr), size);
  all.erase(found);
  return call.done();
}

CUresult cuMemCreate(CUmemGenericAllocationHandle* out, size_t size,
                     const CUmemAllocationProp* prop, unsigned long long flags) {
  Call call("cuMemCreate", kVmm);
  if (call.failed()) return call.code();
  if (const CUresult code = check_prop(prop)) return code;
  if (out == nullptr || size == 0 || !is_whole(size) || flags != 0) return CUDA_ERROR_INVALID_VALUE;
  std::shared_ptr<Handle> handle;
  if (!add_handle(size, prop->location.id, -1, handle)) return CUDA_ERROR_OUT_OF_MEMORY;
  handle->fd = memory_file(size);
  if (handle->fd < 0) {
    handle->released = true;
    drop_if_unused(*handle);
    return CUDA_ERROR_OUT_OF_MEMORY;
  }
  state().memory.handles.emplace(handle->id, handle);
  *out = handle->id;
  return CUDA_SUCCESS;
}

CUresult cuMemRelease(CUmemGenericAllocationHandle id) {
  Call call("cuMemRelease", kInit | kRelease);
  if (call.failed()) return call.code();
  auto& handles = state().memory.handles;
  const auto found = handles.find(id);
  if (found == handles.end()) {
    return call.wrong(CUDA_ERROR_INVALID_VALUE, hex(id) + " is no handle");
  }
  found->second->released = true;
  drop_if_unused(*found->second);
  handles.erase(found);
  return call.done();
}

CUresult cuMemMap(CUdeviceptr ptr, size_t size, size_t offset, CUmemGenericAllocationHandle id,
                  unsigned long long flags) {
  Call call("cuMemMap", kVmm);
  if (call.failed()) return call.code();
  Memory& memory = state().memory;
  const std::string text = range_text(ptr, size);
  const auto found = memory.handles.find(id);
  if (found == memory.handles.end()) {
    return call.wrong(CUDA_ERROR_INVALID_VALUE, hex(id) + " is no handle");
  }
  const std::shared_ptr<Handle>& handle = found->second;
  if (offset != 0 || flags != 0 || size != handle->bytes || !is_whole(ptr)) {
    return call.wrong(CUDA_ERROR_INVALID_VALUE, text + " is not aligned or not the whole handle");
  }
  uint64_t start = 0;
  Reservation* reservation = reservation_of(ptr, &start);
  if (reservation == nullptr || reservation->alloc || ptr + size > start + reservation->bytes) {
    return call.wrong(CUDA_ERROR_INVALID_VALUE, text + " is not inside one reservation");
  }
  auto above = reservation->mappings.lower_bound(ptr);
  bool taken = above != reservation->mappings.end() && above->first < ptr + size;
  if (above != reservation->mappings.begin()) {
    const auto below = std::prev(above);
    taken = taken || below->first + below->second->bytes > ptr;
  }
  if (taken) return call.wrong(CUDA_ERROR_INVALID_VALUE, text + " is mapped already");
  if (mmap(pointer(ptr), size, PROT_NONE, MAP_FIXED | MAP_SHARED, handle->fd, 0) == MAP_FAILED) {
    return CUDA_ERROR_OUT_OF_MEMORY;
  }
  ++handle->mappings;
  reservation->mappings.emplace(ptr, std::make_shared<Area>(Area{ptr, size, handle, PROT_NONE}));
  return CUDA_SUCCESS;
}

CUresult cuMemSetAccess(CUdeviceptr ptr, size_t size, const CUmemAccessDesc* desc, size_t count) {
  Call call("cuMemSetAccess", kVmm);
  if (call.failed()) return call.code();
  if (desc == nullptr || count != 1 || desc->location.type != CU_MEM_LOCATION_TYPE_DEVICE) {
    return CUDA_ERROR_INVALID_VALUE;
  }
  std::vector<AreaPtr> areas;
  if (!whole_mappings(ptr, size, areas)) {
    return call.wrong(CUDA_ERROR_INVALID_VALUE, range_text(ptr, size) + " cuts mappings or a hole");
  }
  int access = PROT_NONE;
  if (desc->flags == CU_MEM_ACCESS_FLAGS_PROT_READ) access = PROT_READ;
  if (desc->flags == CU_MEM_ACCESS_FLAGS_PROT_READWRITE) access = PROT_READ | PROT_WRITE;
  for (const AreaPtr& area : areas) {
    if (desc->location.id != area->handle->device) return CUDA_ERROR_INVALID_DEVICE;
  }
  for (const AreaPtr& area : areas) {
    if ((area->access & ~access) != 0) check_unused(*area, "cuMemSetAccess");
    area->access = access;
    wait_for_pins(call.lock, *area);
    mprotect(pointer(area->address), area->bytes, access);
  }
  return CUDA_SUCCESS;
}

CUresult cuMemUnmap(CUdeviceptr ptr, size_t size) {
  Call call("cuMemUnmap", kInit | kRelease);
  if (call.failed()) return call.code();
  std::vector<AreaPtr> areas;
  if (!whole_mappings(ptr, size, areas)) {
    return call.wrong(CUDA_ERROR_INVALID_VALUE, range_text(ptr, size) + " is no whole mappings");
  }
  Reservation* reservation = reservation_of(ptr);
  for (const AreaPtr& area : areas) {
    check_unused(*area, "cuMemUnmap");
    area->alive = false;  // queued copies fail; only one that runs now is let finish
    reservation->mappings.erase(area->address);
  }
  for (const AreaPtr& area : areas) {
    wait_for_pins(call.lock, *area);
    mmap(pointer(area->address), area->bytes, PROT_NONE, MAP_FIXED | kHole, -1, 0);
    --area->handle->mappings;
    drop_if_unused(*area->handle);
  }
  return call.done();
}
