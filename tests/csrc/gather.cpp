// Random tables through the host build of the gather kernel.
//
//   gather FIRST_SEED COUNT
//
// Each seed draws buffers with gaps and, at the same addresses, some tables one after the other:
// pieces of 1 byte to 300 KB at any alignment, none, or more than are numbered at a time. Every
// byte of a piece must be written once and with the right value, nothing else be written or read,
// and every access be aligned. Prints the first thing that is wrong and returns 1.
#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <vector>

namespace {

void on_access(uint64_t address, size_t bytes, bool is_store);

}  // namespace

#define PIE_ON_ACCESS(address, bytes, is_store) on_access(address, bytes, is_store)
#include "gather_host.h"

namespace {

using Piece = pie_gather_detail::Piece;

constexpr uint8_t kGuard = 0xa5;
constexpr size_t kChunk = 4096;
constexpr unsigned kMaxGrid = 12;

// A buffer of exactly its size, which an address sanitizer can guard, and what was done to it.
struct Buffer {
  explicit Buffer(size_t size) : bytes(new uint8_t[size]), touched(size), size(size) {}
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  ~Buffer() { delete[] bytes; }
  uint64_t address() const { return reinterpret_cast<uint64_t>(bytes); }
  bool has(uint64_t at, size_t n) const { return at >= address() && at + n <= address() + size; }

  uint8_t* bytes;
  std::vector<uint8_t> touched;  // how often
  size_t size;
};

Buffer* destination = nullptr;
Buffer* source = nullptr;
size_t stored_by_block[kMaxGrid];

[[noreturn]] void fail(const char* what, uint64_t seed, size_t where) {
  std::printf("seed %lu: %s at %zu\n", static_cast<unsigned long>(seed), what, where);
  std::exit(1);
}

uint64_t current_seed = 0;

void on_access(uint64_t address, size_t bytes, bool is_store) {
  Buffer& buffer = is_store ? *destination : *source;
  if (address % bytes != 0) fail("unaligned access", current_seed, address);
  if (!buffer.has(address, bytes)) fail("access outside", current_seed, address);
  for (size_t i = 0; i < bytes; ++i) ++buffer.touched[address - buffer.address() + i];
  if (is_store) stored_by_block[pie_gather_host_cta] += bytes;
}

class Scenario {
 public:
  explicit Scenario(uint64_t seed) : random_(seed), seed_(seed) { current_seed = seed; }

  void run() {
    const size_t size = 1 << (16 + pick(6));  // to 2 MiB
    Buffer dst(size), src(size);
    destination = &dst;
    source = &src;
    // At fixed addresses, as a graph has them baked in.
    std::vector<Piece> table(size);
    unsigned long long count = 0;
    for (int round = 0; round < 3; ++round) {
      const std::vector<Piece> pieces = chance(10) ? std::vector<Piece>() : draw();
      std::copy(pieces.begin(), pieces.end(), table.begin());
      count = pieces.size();
      check(pieces, table.data(), &count);
    }
  }

  // Equal blocks of work, whatever the pieces: one big one, or many in several tiles.
  void check_spread(size_t piece_bytes, size_t n) {
    Buffer dst(piece_bytes * n + 16), src(piece_bytes * n + 16);
    destination = &dst;
    source = &src;
    std::vector<Piece> pieces;
    for (size_t i = 0; i < n; ++i) {
      pieces.push_back(
          {dst.address() + i * piece_bytes, src.address() + i * piece_bytes, piece_bytes});
    }
    unsigned long long count = n;
    for (unsigned grid : {1u, 5u, kMaxGrid}) {
      grid_ = grid;
      check(pieces, pieces.data(), &count);
      const auto [least, most] = std::minmax_element(stored_by_block, stored_by_block + grid_);
      if (*most - *least > kChunk) fail("uneven work", seed_, *most - *least);
    }
  }

 private:
  size_t pick(size_t n) { return std::uniform_int_distribution<size_t>(0, n - 1)(random_); }
  bool chance(size_t percent) { return pick(100) < percent; }

  size_t draw_bytes(size_t kind) {
    if (kind == 0) return 1 + pick(40);
    if (kind == 1) return 1 + pick(10000);
    if (kind == 2) return 16 * (1 + pick(1024));
    return 1 + pick(300000);
  }

  // Pieces that fill the buffers with gaps; source and destination in their own order.
  std::vector<Piece> draw() {
    const size_t kind = pick(4);
    const size_t alignment = 1 << pick(5);  // of both ends
    const size_t gap = chance(50) ? 1 : 64;
    const bool alike = chance(50);  // source and destination equally far from a boundary
    std::vector<Piece> pieces;
    uint64_t at = destination->address() + pick(64);
    for (;;) {
      at = (at + pick(gap) + alignment - 1) / alignment * alignment;
      const size_t bytes = draw_bytes(chance(80) ? kind : pick(4));
      if (!destination->has(at, bytes) || (chance(1) && !pieces.empty())) break;
      pieces.push_back({at, 0, bytes});
      at += bytes;
    }
    std::shuffle(pieces.begin(), pieces.end(), random_);
    at = source->address() + pick(64);
    size_t placed = 0;
    for (Piece& piece : pieces) {
      at = (at + alignment - 1) / alignment * alignment;
      if (alike) at += (piece.dst - at) % 16;
      if (!source->has(at, piece.bytes)) break;
      piece.src = at;
      at += piece.bytes + pick(gap);
      ++placed;
    }
    pieces.resize(placed);
    std::shuffle(pieces.begin(), pieces.end(), random_);
    if (chance(20)) {
      const Piece nothing = {destination->address() + pick(16), source->address() + pick(16), 0};
      pieces.insert(pieces.begin() + pick(placed + 1), nothing);
    }
    return pieces;
  }

  void check(const std::vector<Piece>& pieces, const Piece* table, unsigned long long* count) {
    std::fill_n(destination->bytes, destination->size, kGuard);
    for (size_t i = 0; i < source->size; i += 8) {
      const uint64_t word = random_();
      std::memcpy(source->bytes + i, &word, std::min<size_t>(8, source->size - i));
    }
    std::fill(destination->touched.begin(), destination->touched.end(), 0);
    std::fill(source->touched.begin(), source->touched.end(), 0);
    std::fill_n(stored_by_block, kMaxGrid, 0);
    std::vector<uint8_t> expected(destination->size, kGuard);
    std::vector<uint8_t> writes(destination->size), reads(source->size);
    for (const Piece& piece : pieces) {
      if (piece.bytes == 0) continue;
      const size_t to = piece.dst - destination->address();
      const size_t from = piece.src - source->address();
      std::copy_n(source->bytes + from, piece.bytes, expected.begin() + to);
      std::fill_n(writes.begin() + to, piece.bytes, 1);
      std::fill_n(reads.begin() + from, piece.bytes, 1);
    }
    const unsigned block = 32 << pick(5);
    pie_gather_host(table, count, nullptr, grid_ != 0 ? grid_ : 1 + pick(kMaxGrid), block);
    compare("written too often or not", destination->touched.data(), writes);
    compare("read too often or not", source->touched.data(), reads);
    compare("wrong byte", destination->bytes, expected);
  }

  void compare(const char* what, const uint8_t* found, const std::vector<uint8_t>& wanted) const {
    const auto at = std::mismatch(wanted.begin(), wanted.end(), found).first - wanted.begin();
    if (static_cast<size_t>(at) != wanted.size()) fail(what, seed_, at);
  }

  std::mt19937_64 random_;
  uint64_t seed_;
  unsigned grid_ = 0;  // 0: any
};

}  // namespace

int main(int argc, char** argv) {
  if (argc != 3) return 2;
  const uint64_t first = std::strtoull(argv[1], nullptr, 10);
  const uint64_t count = std::strtoull(argv[2], nullptr, 10);
  for (uint64_t seed = first; seed < first + count; ++seed) Scenario(seed).run();
  Scenario(first).check_spread(75 * kChunk, 1);
  Scenario(first).check_spread(kChunk, 1200);
  std::printf("%lu seeds, no wrong byte\n", static_cast<unsigned long>(count));
  return 0;
}
