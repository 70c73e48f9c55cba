#include "drivers/host/host_memory.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cerrno>
#include <string>

#include "drivers/pages.h"

namespace pie::host_memory {
namespace {

void* pointer(Address address) { return reinterpret_cast<void*>(address); }

std::string size_text(size_t bytes) { return std::to_string(bytes) + " bytes"; }

}  // namespace

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
  pages::populate(pointer(address), bytes, "device memory");
}

void unmap(Address address, size_t bytes) noexcept {
  // Back to a reserved hole, so that nothing else can be placed inside the range.
  mmap(pointer(address), bytes, PROT_NONE, MAP_FIXED | MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE,
       -1, 0);
}

}  // namespace pie::host_memory
