#include "drivers/pages.h"

#include <linux/mempolicy.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <fstream>
#include <string>
#include <thread>
#include <vector>

#include "drivers/placement.h"

#ifndef MADV_POPULATE_WRITE
#define MADV_POPULATE_WRITE 23
#endif

namespace pie::pages {
namespace {

const std::string kNodes = "/sys/devices/system/node/";

constexpr size_t kHuge = size_t{2} << 20;

// At once: meanwhile nobody else in the process can map or unmap memory, as large prompts do.
constexpr size_t kSlice = size_t{4} << 20;

std::string size_text(size_t bytes) { return std::to_string(bytes) + " bytes"; }

// 0, or the errno of the first slice that failed. Each thread takes the next slice that is left.
int populate_slices(char* address, size_t bytes, unsigned threads) {
  std::atomic<size_t> next{0};
  std::atomic<int> failed{0};
  const auto work = [&] {
    for (size_t i = next.fetch_add(kSlice); i < bytes && failed == 0; i = next.fetch_add(kSlice)) {
      if (madvise(address + i, std::min(kSlice, bytes - i), MADV_POPULATE_WRITE) != 0) {
        failed = errno;
      }
    }
  };
  const size_t slices = (bytes + kSlice - 1) / kSlice;
  std::vector<std::thread> others;
  for (size_t t = 1; t < std::min<size_t>(threads, slices); ++t) others.emplace_back(work);
  work();
  for (std::thread& other : others) other.join();
  return failed;
}

// Bytes that the node can give: free ones, and those of cached files but for what lies in memory
// only. -1: not known.
int64_t node_bytes(int node) {
  std::ifstream text(kNodes + "node" + std::to_string(node) + "/meminfo");
  int64_t found = -1;
  for (std::string word; text >> word;) {  // "Node 0 MemFree:  123 kB"
    if (word != "MemFree:" && word != "FilePages:" && word != "Shmem:") continue;
    int64_t kib = 0;
    if (!(text >> kib)) break;
    found = std::max<int64_t>(found, 0) + (word == "Shmem:" ? -kib : kib) * 1024;
  }
  return found;
}

std::string line_of(const std::string& file) {
  std::ifstream text(kNodes + file);
  std::string line;
  std::getline(text, line);
  return line;
}

void bind(void* address, size_t bytes, int node) {
  const Placement where = placement(bytes, node, numbers(line_of("has_memory")),
                                    numbers(line_of("has_cpu")), node_bytes(node));
  if (where.nodes.empty()) return;
  constexpr int kBits = 8 * sizeof(unsigned long);
  std::vector<unsigned long> mask;
  for (const int n : where.nodes) {
    mask.resize(std::max(mask.size(), static_cast<size_t>(n / kBits) + 1));
    mask[static_cast<size_t>(n / kBits)] |= 1UL << (n % kBits);
  }
  // Containers often forbid it; memory from elsewhere is slower, not wrong.
  syscall(SYS_mbind, address, bytes, where.strict ? MPOL_BIND : MPOL_PREFERRED, mask.data(),
          mask.size() * kBits + 1, 0);
}

}  // namespace

size_t size() { return static_cast<size_t>(sysconf(_SC_PAGESIZE)); }

Address reserve(size_t bytes, size_t alignment) {
  // mmap aligns to a page: reserve more, and give back what lies before and behind.
  const size_t slack = alignment - std::min(alignment, size());
  void* at =
      mmap(nullptr, bytes + slack, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (at == MAP_FAILED) throw_errno("reserve an address range of " + size_text(bytes));
  const auto first = reinterpret_cast<Address>(at);
  const Address aligned = (first + alignment - 1) / alignment * alignment;
  const size_t before = aligned - first;
  if (before > 0) munmap(at, before);
  // The kernel rounds a length up to pages, so a rest that shares the last page stays.
  const size_t used = (bytes + size() - 1) / size() * size();
  const size_t all = (bytes + slack + size() - 1) / size() * size();
  if (all > before + used) {
    munmap(reinterpret_cast<void*>(aligned + used), all - before - used);
  }
  return aligned;
}

void unreserve(Address address, size_t bytes) noexcept {
  munmap(reinterpret_cast<void*>(address), bytes);
}

void populate(void* address, size_t bytes, const char* what, unsigned threads) {
  const int failed = populate_slices(static_cast<char*>(address), bytes, threads);
  if (failed == 0) return;
  errno = failed;
  if (failed != EINVAL) throw_errno(std::string("populate ") + what + " of " + size_text(bytes));
  const size_t page = size();  // A kernel before 5.14.
  for (size_t i = 0; i < bytes; i += page) {
    volatile char* at = static_cast<volatile char*>(address) + i;
    *at = *at;
  }
}

void* take(size_t bytes, int numa_node, unsigned threads) {
  const Address address = reserve(bytes, bytes < kHuge ? size() : kHuge);
  void* at = reinterpret_cast<void*>(address);
  try {
    if (mprotect(at, bytes, PROT_READ | PROT_WRITE) != 0) {
      throw_errno("allocate host memory of " + size_text(bytes));
    }
    madvise(at, bytes, MADV_HUGEPAGE);  // A kernel without huge pages refuses; no harm.
    madvise(at, bytes, MADV_DONTFORK);  // A child would get a copy of all that is pinned.
    bind(at, bytes, numa_node);
    populate(at, bytes, "host memory", threads);
  } catch (...) {
    unreserve(address, bytes);
    throw;
  }
  return at;
}

void give_back(void* pointer, size_t bytes) noexcept { munmap(pointer, bytes); }

}  // namespace pie::pages
