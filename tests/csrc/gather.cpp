// Random tables through the host build of the gather kernel.
//
//   gather FIRST_SEED COUNT
//
// Each seed draws buffers with gaps and, at the same addresses, some tables one after the other:
// pieces of 1 byte to 300 KB at any alignment, none, or more than are numbered at a time. Then runs
// of pages of several chunks, and one table of them that is copied in several layers. Every byte of
// a piece must be written once and with the right value, nothing else be written or read, and every
// access be aligned. Prints the first thing that is wrong and returns 1.
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

using pie_gather_detail::Entry;
using pie_gather_detail::Layer;

struct Piece {
  uint64_t dst, src, bytes;
};

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
    std::vector<Entry> table(size);
    unsigned long long count = 0;
    for (int round = 0; round < 3; ++round) {
      const std::vector<Piece> pieces = chance(10) ? std::vector<Piece>() : draw();
      count = pieces.size();
      check(pieces, as_bytes(pieces, table), table.data(), &count);
    }
    run_layers();
  }

  // A pool of three chunks, the last one shorter, as [chunk][layer][row][page], and layers that lie
  // a stride apart on the device: the table says nothing of them.
  void run_layers() {
    const size_t page = chance(50) ? 16 * (1 + pick(40)) : 1 + pick(700);
    const size_t layers = 2 + pick(4), chunk_rows = 5 + pick(60), last = 1 + pick(chunk_rows);
    const size_t rows = 2 * chunk_rows + last, blocks = rows + pick(20);
    const size_t shift = pick(64), stride = blocks * page + shift + pick(100);
    Buffer dst(layers * stride), src(rows * layers * page);
    destination = &dst;
    source = &src;
    std::vector<Entry> table;
    std::vector<std::vector<Piece>> pieces(layers);
    size_t block = pick(5);
    for (size_t row = pick(3); row < rows;) {
      const size_t chunk = row / chunk_rows, in_chunk = chunk < 2 ? chunk_rows : last;
      const size_t inside = row - chunk * chunk_rows;
      const size_t count = 1 + pick(std::min<size_t>(4, in_chunk - inside));
      if (block + count > blocks) break;
      const size_t begin = chunk * chunk_rows * layers * page;
      table.push_back({src.address() + begin, static_cast<unsigned>(in_chunk),
                       static_cast<unsigned>(inside), static_cast<unsigned>(block),
                       static_cast<unsigned>(count)});
      for (size_t l = 0; l < layers; ++l) {
        pieces[l].push_back({dst.address() + l * stride + shift + block * page,
                             src.address() + begin + l * in_chunk * page + inside * page,
                             count * page});
      }
      block += count + pick(3);
      row += count + pick(3);
    }
    std::shuffle(table.begin(), table.end(), random_);
    const unsigned long long count = table.size();
    for (size_t l = 0; l < layers; ++l) {
      check(pieces[l], {dst.address() + l * stride + shift, page, l}, table.data(), &count);
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
    std::vector<Entry> table(n);
    const Layer layer = as_bytes(pieces, table);
    unsigned long long count = n;
    for (unsigned grid : {1u, 5u, kMaxGrid}) {
      grid_ = grid;
      check(pieces, layer, table.data(), &count);
      const auto [least, most] = std::minmax_element(stored_by_block, stored_by_block + grid_);
      if (*most - *least > kChunk) fail("uneven work", seed_, *most - *least);
    }
  }

 private:
  size_t pick(size_t n) { return std::uniform_int_distribution<size_t>(0, n - 1)(random_); }
  bool chance(size_t percent) { return pick(100) < percent; }

  // Pages of one byte, in any layer of a chunk that begins before the source.
  Layer as_bytes(const std::vector<Piece>& pieces, std::vector<Entry>& table) {
    const uint64_t layer = pick(80), chunk_rows = pick(1000);
    for (size_t i = 0; i < pieces.size(); ++i) {
      const Piece& piece = pieces[i];
      table[i] = {source->address() - layer * chunk_rows, static_cast<unsigned>(chunk_rows),
                  static_cast<unsigned>(piece.src - source->address()),
                  static_cast<unsigned>(piece.dst - destination->address()),
                  static_cast<unsigned>(piece.bytes)};
    }
    return {destination->address(), 1, layer};
  }

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

  void check(const std::vector<Piece>& pieces, const Layer& layer, const Entry* table,
             const unsigned long long* count) {
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
    const unsigned grid = grid_ != 0 ? grid_ : 1 + pick(kMaxGrid);
    pie_gather_host(table, count, nullptr, layer, grid, block);
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
