// Memory as the stand-in knows it: what an address is, and whose physical memory is behind it.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <vector>

namespace standin {

constexpr uint64_t kHostKey = 0;  // of host memory in the race check: offset is the address
// Device pointers of registered memory carry this bit where the device cannot use the host's.
constexpr uint64_t kAliasBit = uint64_t{1} << 56;

struct Handle {
  uint64_t id;
  size_t bytes;
  int device;
  int fd;  // -1: cuMemAlloc
  bool released = false;
  int mappings = 0;
};

// A mapping or a registration.
struct Area {
  uint64_t address;
  size_t bytes;
  std::shared_ptr<Handle> handle;  // null: registered host memory
  int access;                      // PROT_*
  bool alive = true;
  int pins = 0;                    // copies that run at this moment
  std::map<int, uint64_t> uses{};  // newest use of each actor

  uint64_t key() const { return handle ? handle->id : kHostKey; }
  uint64_t base() const { return handle ? 0 : address; }
};
using AreaPtr = std::shared_ptr<Area>;
using Areas = std::map<uint64_t, AreaPtr>;  // by address

struct Reservation {
  size_t bytes;
  bool alloc;  // by cuMemAlloc: reservation, handle and mapping in one
  Areas mappings{};
};

struct Memory {
  std::map<uint64_t, Reservation> reservations;
  std::map<uint64_t, std::shared_ptr<Handle>> handles;  // not released
  Areas registrations;
  size_t device_bytes = 0;  // of handles that are held or mapped
  size_t host_bytes = 0;    // registered
};

enum class Side { kHost, kDevice };

struct Span {
  AreaPtr area;
  uint64_t offset;  // physical, in key()
  size_t bytes;
};

struct Range {
  Side side = Side::kHost;
  char* pointer = nullptr;
  std::vector<Span> spans;
  bool pageable = false;  // host memory that is not registered, where that may be copied
};

// All of these need the state's lock.
Side side_of(uint64_t address);
// False, with the reason: not mapped, not accessible, not registered.
bool resolve(uint64_t address, size_t bytes, bool write, Range& range, std::string& why);
Reservation* reservation_of(uint64_t address, uint64_t* start = nullptr);
bool is_mapped(uint64_t address, size_t bytes);  // by the operating system
bool add_handle(size_t bytes, int device, int fd, std::shared_ptr<Handle>& handle);
void drop_if_unused(Handle& handle);

}  // namespace standin
