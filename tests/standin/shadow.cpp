// What device memory will hold once the work submitted so far is over: kernels that read a table
// there must say at their launch what they will access, when the table may still be on its way.
#include <algorithm>
#include <cstring>

#include "memory.h"
#include "state.h"

namespace standin {
namespace {

constexpr uint64_t kPage = 4096;

// Calls body(page's bytes or null, offset in it, offset in the range, length) for each page's part.
template <typename Body>
void each_page(const Range& range, bool make, Body body) {
  size_t done = 0;
  for (const Span& span : range.spans) {
    auto& pages = state().shadow[span.area->key()];
    for (size_t at = 0; at < span.bytes;) {
      const uint64_t offset = span.offset + at;
      const size_t length = std::min<size_t>(span.bytes - at, kPage - offset % kPage);
      auto found = pages.find(offset / kPage);
      if (found == pages.end() && make) {
        found = pages.emplace(offset / kPage, std::vector<char>(kPage, 0)).first;
      }
      body(found == pages.end() ? nullptr : found->second.data(), offset % kPage, done + at,
           length);
      at += length;
    }
    done += span.bytes;
  }
}

}  // namespace

void foresee(const Range& range, const char* bytes) {
  each_page(range, true, [&](char* page, size_t offset, size_t at, size_t length) {
    std::memcpy(page + offset, bytes + at, length);
  });
}

void foresee(const Range& range, unsigned char value) {
  each_page(range, false, [&](char* page, size_t offset, size_t, size_t length) {
    if (page) std::memset(page + offset, value, length);
  });
}

}  // namespace standin

using namespace standin;

extern "C" int standin_peek(uint64_t address, size_t bytes, void* out) {
  Range range;
  std::string why;
  std::memset(out, 0, bytes);
  if (bytes == 0 || !resolve(address, bytes, false, range, why)) return 0;
  if (range.side == Side::kHost) {
    std::memcpy(out, range.pointer, bytes);
    return 0;
  }
  each_page(range, false, [&](const char* page, size_t offset, size_t at, size_t length) {
    if (page) std::memcpy(static_cast<char*>(out) + at, page + offset, length);
  });
  return 1;
}
