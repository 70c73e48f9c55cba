#include "host_memory.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <string>

#ifndef MADV_POPULATE_WRITE
#define MADV_POPULATE_WRITE 23
#endif

namespace pie::host_memory {
namespace {

void* pointer(Address address) { return reinterpret_cast<void*>(address); }

std::string size_text(size_t bytes) { return std::to_string(bytes) + " bytes"; }

// At once: meanwhile nobody else in the process can map or unmap memory, as large prompts do.
constexpr size_t kSlice = size_t{4} << 20;

bool populate_slices(char* address, size_t bytes) {
  for (size_t i = 0; i < bytes; i += kSlice) {
    if (madvise(address + i, std::min(kSlice, bytes - i), MADV_POPULATE_WRITE) != 0) return false;
  }
  return true;
}

// Puts a page behind every address, so that no step pays for faults. Contents do not change.
void populate(void* address, size_t bytes, const char* what) {
  if (populate_slices(static_cast<char*>(address), bytes)) return;
  if (errno != EINVAL) throw_errno(std::string("populate ") + what + " of " + size_text(bytes));
  const size_t page = granularity();  // A kernel before 5.14.
  for (size_t i = 0; i < bytes; i += page) {
    volatile char* at = static_cast<volatile char*>(address) + i;
    *at = *at;
  }
}

}  // namespace

size_t granularity() { return static_cast<size_t>(sysconf(_SC_PAGESIZE)); }

Address reserve(size_t bytes, size_t alignment) {
  // mmap aligns to a page: reserve more, and give back what lies before and behind.
  const size_t slack = alignment - granularity();
  void* at =
      mmap(nullptr, bytes + slack, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (at == MAP_FAILED) throw_errno("reserve an address range of " + size_text(bytes));
  const auto first = reinterpret_cast<Address>(at);
  const Address aligned = (first + alignment - 1) / alignment * alignment;
  const size_t before = aligned - first;
  if (before > 0) munmap(at, before);
  if (slack > before) munmap(pointer(aligned + bytes), slack - before);
  return aligned;
}

void unreserve(Address address, size_t bytes) noexcept { munmap(pointer(address), bytes); }

Handle create(size_t bytes) {
  const int fd = memfd_create("pie-device", MFD_CLOEXEC);
  if (fd < 0) throw_errno("create device memory of " + size_text(bytes));
  // fallocate takes the memory now: a later lack of it would be a signal, not an error.
  if (ftruncate(fd, static_cast<off_t>(bytes)) != 0 ||
      fallocate(fd, 0, 0, static_cast<off_t>(bytes)) != 0) {
    const int saved = errno;
    close(fd);
    errno = saved;
    throw_errno("create device memory of " + size_text(bytes));
  }
  return static_cast<Handle>(fd);
}

void release(Handle handle) noexcept { close(static_cast<int>(handle)); }

void map(Address address, size_t bytes, Handle handle) {
  void* at =
      mmap(pointer(address), bytes, PROT_NONE, MAP_FIXED | MAP_SHARED, static_cast<int>(handle), 0);
  if (at == MAP_FAILED) throw_errno("map device memory of " + size_text(bytes));
}

void set_access(Address address, size_t bytes) {
  if (mprotect(pointer(address), bytes, PROT_READ | PROT_WRITE) != 0) {
    throw_errno("set access of " + size_text(bytes));
  }
  populate(pointer(address), bytes, "device memory");
}

void unmap(Address address, size_t bytes) noexcept {
  // Back to a reserved hole, so that nothing else can be placed inside the range.
  mmap(pointer(address), bytes, PROT_NONE, MAP_FIXED | MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE,
       -1, 0);
}

void* host_alloc(size_t bytes) {
  void* at = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (at == MAP_FAILED) throw_errno("allocate host memory of " + size_text(bytes));
  madvise(at, bytes, MADV_HUGEPAGE);  // A kernel without huge pages refuses; no harm.
  try {
    populate(at, bytes, "host memory");
  } catch (...) {
    munmap(at, bytes);
    throw;
  }
  return at;
}

void host_free(void* pointer, size_t bytes) noexcept { munmap(pointer, bytes); }

}  // namespace pie::host_memory
