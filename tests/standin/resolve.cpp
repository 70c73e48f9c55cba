#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>

#include "state.h"

namespace standin {
namespace {

// The entry whose key is the greatest one not above the address.
template <typename Map>
auto at_or_below(Map& map, uint64_t address) {
  auto found = map.upper_bound(address);
  return found == map.begin() ? map.end() : std::prev(found);
}

bool resolve_host(uint64_t address, size_t bytes, Range& range, std::string& why) {
  Areas& areas = state().memory.registrations;
  const uint64_t plain = address & ~kAliasBit;
  const auto found = at_or_below(areas, plain);
  if (found == areas.end() || plain >= found->first + found->second->bytes) {
    if (setting("pageable") > 0 && plain == address && is_mapped(address, bytes)) {
      range.side = Side::kHost;
      range.pointer = reinterpret_cast<char*>(address);
      range.spans.push_back({nullptr, address, bytes});
      return range.pageable = true;
    }
    why = "is not registered";
    return false;
  }
  const AreaPtr& area = found->second;
  if (plain + bytes > area->address + area->bytes) {
    why = "reaches beyond the registration " + range_text(area->address, area->bytes);
    return false;
  }
  range.side = Side::kHost;
  range.pointer = reinterpret_cast<char*>(plain);
  range.spans.push_back({area, plain, bytes});
  return true;
}

}  // namespace

Reservation* reservation_of(uint64_t address, uint64_t* start) {
  auto& all = state().memory.reservations;
  const auto found = at_or_below(all, address);
  if (found == all.end() || address >= found->first + found->second.bytes) return nullptr;
  if (start) *start = found->first;
  return &found->second;
}

Side side_of(uint64_t address) { return reservation_of(address) ? Side::kDevice : Side::kHost; }

bool resolve(uint64_t address, size_t bytes, bool write, Range& range, std::string& why) {
  uint64_t start = 0;
  Reservation* reservation = reservation_of(address, &start);
  if (reservation == nullptr) return resolve_host(address, bytes, range, why);
  range.side = Side::kDevice;
  range.pointer = reinterpret_cast<char*>(address);
  if (address + bytes > start + reservation->bytes) {
    why = "reaches beyond the reservation " + range_text(start, reservation->bytes);
    return false;
  }
  const int needed = write ? PROT_READ | PROT_WRITE : PROT_READ;
  for (uint64_t at = address; at < address + bytes;) {
    const auto found = at_or_below(reservation->mappings, at);
    if (found == reservation->mappings.end() || at >= found->first + found->second->bytes) {
      why = "is not mapped at " + hex(at);
      return false;
    }
    const AreaPtr& area = found->second;
    if ((area->access & needed) != needed) {
      why = "is not accessible at " + hex(at);
      return false;
    }
    const uint64_t end = std::min<uint64_t>(address + bytes, area->address + area->bytes);
    range.spans.push_back({area, at - area->address, end - at});
    at = end;
  }
  return true;
}

bool is_mapped(uint64_t address, size_t bytes) {
  const auto page = static_cast<uint64_t>(sysconf(_SC_PAGESIZE));
  const uint64_t end = address + bytes;  // mincore rounds up, an emulator to the pages below it
  std::vector<unsigned char> present(4096);
  for (uint64_t at = address / page * page; at < end; at += present.size() * page) {
    const size_t length = std::min<size_t>(present.size() * page, end - at);
    if (mincore(reinterpret_cast<void*>(at), length, present.data()) != 0) return false;
  }
  return true;
}

bool add_handle(size_t bytes, int device, int fd, std::shared_ptr<Handle>& handle) {
  Memory& memory = state().memory;
  if (memory.device_bytes + bytes > static_cast<size_t>(setting("device_memory"))) return false;
  handle = std::make_shared<Handle>(Handle{state().next_id++, bytes, device, fd});
  memory.device_bytes += bytes;
  return true;
}

void drop_if_unused(Handle& handle) {
  if (!handle.released || handle.mappings > 0) return;
  state().memory.device_bytes -= handle.bytes;
  state().races.forget(handle.id, 0, handle.bytes);
  state().shadow.erase(handle.id);
  if (handle.fd >= 0) close(handle.fd);
}

}  // namespace standin
