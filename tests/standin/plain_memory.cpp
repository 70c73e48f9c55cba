// Registered host memory, cuMemAlloc, and what is free.
#include <sys/mman.h>
#include <unistd.h>

#include <cstring>

#include "state.h"

using namespace standin;

namespace {

size_t rounded(size_t bytes) {
  const auto page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
  return (bytes + page - 1) / page * page;
}

}  // namespace

CUresult cuMemHostRegister(void* p, size_t bytes, unsigned flags) {
  Call call("cuMemHostRegister", kUse | kUnsafe);
  if (call.failed()) return call.code();
  constexpr unsigned kKnown = CU_MEMHOSTREGISTER_PORTABLE | CU_MEMHOSTREGISTER_DEVICEMAP |
                              CU_MEMHOSTREGISTER_IOMEMORY | CU_MEMHOSTREGISTER_READ_ONLY;
  if (p == nullptr || bytes == 0 || (flags & ~kKnown)) return CUDA_ERROR_INVALID_VALUE;
  Memory& memory = state().memory;
  const auto address = reinterpret_cast<uint64_t>(p);
  if (side_of(address) == Side::kDevice) return CUDA_ERROR_INVALID_VALUE;
  auto above = memory.registrations.lower_bound(address);
  bool taken = above != memory.registrations.end() && above->first < address + bytes;
  if (above != memory.registrations.begin()) {
    const auto below = std::prev(above);
    taken = taken || below->first + below->second->bytes > address;
  }
  if (taken) {
    return call.wrong(CUDA_ERROR_HOST_MEMORY_ALREADY_REGISTERED,
                      range_text(address, bytes) + " is registered already");
  }
  if (!is_mapped(address, bytes)) {
    return call.wrong(CUDA_ERROR_INVALID_VALUE, "no memory behind " + range_text(address, bytes));
  }
  const auto most = static_cast<size_t>(setting("register_most"));
  if (most > 0 && bytes >= most) return CUDA_ERROR_INVALID_VALUE;
  const auto limit = static_cast<size_t>(setting("register_limit"));
  if (limit > 0 && memory.host_bytes + bytes > limit) return CUDA_ERROR_OUT_OF_MEMORY;
  memory.host_bytes += bytes;
  state().races.forget(kHostKey, address, bytes);  // of other memory, that was here before
  const int access = flags & CU_MEMHOSTREGISTER_READ_ONLY ? PROT_READ : PROT_READ | PROT_WRITE;
  memory.registrations.emplace(address,
                               std::make_shared<Area>(Area{address, bytes, nullptr, access}));
  return CUDA_SUCCESS;
}

CUresult cuMemHostUnregister(void* p) {
  Call call("cuMemHostUnregister", kEnd | kUnsafe);
  if (call.failed()) return call.code();
  Memory& memory = state().memory;
  const auto found = memory.registrations.find(reinterpret_cast<uint64_t>(p));
  if (found == memory.registrations.end()) {
    return call.wrong(CUDA_ERROR_HOST_MEMORY_NOT_REGISTERED,
                      hex(reinterpret_cast<uint64_t>(p)) + " begins no registration");
  }
  const AreaPtr area = found->second;
  check_unused(*area, "cuMemHostUnregister");
  area->alive = false;
  memory.host_bytes -= area->bytes;
  memory.registrations.erase(found);
  // The same addresses may come back as other memory.
  state().races.forget(kHostKey, area->address, area->bytes);
  wait_for_pins(call.lock, *area);
  return call.done();
}

CUresult cuMemHostGetDevicePointer(CUdeviceptr* out, void* p, unsigned flags) {
  Call call("cuMemHostGetDevicePointer", kUse);
  if (call.failed()) return call.code();
  if (out == nullptr || flags != 0) return CUDA_ERROR_INVALID_VALUE;
  const auto address = reinterpret_cast<uint64_t>(p);
  Range range;
  std::string why;
  if (side_of(address) != Side::kHost || !resolve(address, 1, false, range, why)) {
    return call.wrong(CUDA_ERROR_INVALID_VALUE, hex(address) + " " + why);
  }
  *out = setting("can_use_host_pointer") ? address : address | kAliasBit;
  return CUDA_SUCCESS;
}

CUresult cuMemAlloc(CUdeviceptr* out, size_t bytes) {
  Call call("cuMemAlloc", kUse | kUnsafe);
  if (call.failed()) return call.code();
  if (out == nullptr || bytes == 0) return CUDA_ERROR_INVALID_VALUE;
  std::shared_ptr<Handle> handle;
  if (!add_handle(bytes, call.device(), -1, handle)) return CUDA_ERROR_OUT_OF_MEMORY;
  handle->released = true;  // its mapping alone keeps it
  void* at =
      mmap(nullptr, rounded(bytes), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (at == MAP_FAILED) {
    drop_if_unused(*handle);
    return CUDA_ERROR_OUT_OF_MEMORY;
  }
  std::memset(at, 0xA5, rounded(bytes));
  const auto address = reinterpret_cast<uint64_t>(at);
  handle->mappings = 1;
  Reservation reservation{bytes, true};
  reservation.mappings.emplace(
      address, std::make_shared<Area>(Area{address, bytes, handle, PROT_READ | PROT_WRITE}));
  state().memory.reservations.emplace(address, std::move(reservation));
  *out = address;
  return CUDA_SUCCESS;
}

CUresult cuMemFree(CUdeviceptr address) {
  Call call("cuMemFree", kEnd | kUnsafe);
  if (call.failed()) return call.code();
  auto& all = state().memory.reservations;
  const auto found = all.find(address);
  if (found == all.end() || !found->second.alloc) {
    return call.wrong(CUDA_ERROR_INVALID_VALUE, hex(address) + " is not from cuMemAlloc");
  }
  const AreaPtr area = found->second.mappings.begin()->second;
  check_unused(*area, "cuMemFree");
  area->alive = false;
  all.erase(found);
  wait_for_pins(call.lock, *area);
  munmap(reinterpret_cast<void*>(address), rounded(area->bytes));
  area->handle->mappings = 0;
  drop_if_unused(*area->handle);
  return call.done();
}

CUresult cuMemGetInfo(size_t* free, size_t* total) {
  Call call("cuMemGetInfo", kUse);
  if (call.failed()) return call.code();
  if (free == nullptr || total == nullptr) return CUDA_ERROR_INVALID_VALUE;
  *total = static_cast<size_t>(setting("device_memory"));
  *free = *total - state().memory.device_bytes;
  const auto share = static_cast<size_t>(setting("page_table_share"));
  if (share > 0) *free -= state().memory.host_bytes / share;
  return CUDA_SUCCESS;
}
