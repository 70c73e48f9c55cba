// Copies many pieces of one layer from mapped host memory to device memory in one launch.
//
//   pie_gather<<<grid, block>>>(table, count, copied, base, page, layer)
//
// `table` holds `*count` entries {chunk, chunk_rows, row, block, count}, the same for all layers:
// `count` pages of `page` bytes that follow one another on both sides. They go to block `block` of
// the layer, whose block 0 is at `base`, from row `row` of its part of a chunk of the pool, whose
// layers lie one after the other, `chunk_rows` pages each, from the address `chunk` on. A page of
// the ring needs no rule of its own: each layer maps the slot that it uses behind its own pages.
//
// Table and count lie in device memory at addresses that do not change, so that a captured launch
// may be replayed: what they hold may change between launches, and count 0 makes a launch do
// nothing. Pieces may have any size and alignment and must not overlap. `copied`, unless null,
// counts launches: proof that a captured one was replayed.
//
// The link is filled by bytes in flight and not by SMs (SGLang #40278 reads 48 GB/s a block with
// the registers of one, when the link answers after 1.3 us). A warp has 4 KiB in flight, a block of
// 512 threads 64 KiB, so a grid of 1 to 12 blocks is enough and leaves the other SMs to the model.
// (Not measured here yet.)
//
// The work is cut into chunks, one warp's 4 KiB, numbered through all pieces; chunk i goes to warp
// i mod the number of warps. So small pieces are in flight together, and a big one spreads.
//
// Without a CUDA compiler the same text is C++17: a block's threads become loops
// (test/gather_host.h). It includes nothing: NVRTC has no headers.

#ifdef __CUDACC__
#define PIE_FN __device__ __forceinline__
#define PIE_UNROLL _Pragma("unroll")
// The code between two barriers, for each thread t of the block.
#define PIE_EACH_THREAD(t, block) for (u32 t = threadIdx.x, once = 1; once; once = 0)
#define PIE_BARRIER() __syncthreads()
#else
#define PIE_FN inline
#define PIE_UNROLL
#define PIE_EACH_THREAD(t, block) for (u32 t = 0; t < (block); ++t)
#define PIE_BARRIER() (void)0
#ifndef PIE_ON_ACCESS  // a test may watch every access
#define PIE_ON_ACCESS(address, bytes, is_store) (void)0
#endif
#endif

namespace pie_gather_detail {

using u8 = unsigned char;
using u32 = unsigned int;
using u64 = unsigned long long;

struct Entry {
  u64 chunk;
  u32 chunk_rows, row, block, count;
};

// What differs between the launches of a table.
struct Layer {
  u64 base, page, number;
};

struct Piece {
  u64 dst, src, bytes;
};

PIE_FN Piece piece_of(const Entry& entry, const Layer& layer) {
  return {layer.base + entry.block * layer.page,
          entry.chunk + (layer.number * entry.chunk_rows + entry.row) * layer.page,
          entry.count * layer.page};
}

struct alignas(16) Wide {
  u32 word[4];
};

constexpr u32 kLanes = 32;
constexpr u32 kLoads = 8;                // independent loads of a thread
constexpr u32 kUnits = kLanes * kLoads;  // units in a chunk
constexpr u32 kMaxThreads = 512;         // of a block: with more, registers would run out
constexpr u32 kTile = 2 * kMaxThreads;   // pieces that are numbered at a time

// Chunks of the pieces of a tile up to and including each. 32 bits: a tile is less than 1 TB.
struct Scan {
  u32 buffers[2][kTile];
};

// A source does not change while a kernel runs, which the non-coherent path demands; a copy that
// rewrites it between launches is seen, because a launch begins with that path's cache empty.
// Nothing is kept in L1: no byte is read twice.
#ifdef __CUDACC__
PIE_FN void load(Wide& to, u64 from, bool wanted) {
  asm volatile(
      "{ .reg .pred p; setp.ne.u32 p, %5, 0;\n"
      "  @p ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4]; }"
      : "+r"(to.word[0]), "+r"(to.word[1]), "+r"(to.word[2]), "+r"(to.word[3])
      : "l"(from), "r"(static_cast<u32>(wanted)));
}

PIE_FN void load(u64& to, u64 from, bool wanted) {
  asm volatile(
      "{ .reg .pred p; setp.ne.u32 p, %2, 0;\n"
      "  @p ld.global.nc.L1::no_allocate.u64 %0, [%1]; }"
      : "+l"(to)
      : "l"(from), "r"(static_cast<u32>(wanted)));
}

PIE_FN void load(u32& to, u64 from, bool wanted) {  // one byte
  asm volatile(
      "{ .reg .pred p; setp.ne.u32 p, %2, 0;\n"
      "  @p ld.global.nc.L1::no_allocate.u8 %0, [%1]; }"
      : "+r"(to)
      : "l"(from), "r"(static_cast<u32>(wanted)));
}

PIE_FN void store(u64 to, const Wide& from) {
  asm volatile("st.global.L1::no_allocate.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(to),
               "r"(from.word[0]), "r"(from.word[1]), "r"(from.word[2]), "r"(from.word[3])
               : "memory");
}

PIE_FN void store(u64 to, u64 from) {
  asm volatile("st.global.L1::no_allocate.u64 [%0], %1;" ::"l"(to), "l"(from) : "memory");
}

PIE_FN void store(u64 to, u32 from) {  // one byte
  asm volatile("st.global.L1::no_allocate.u8 [%0], %1;" ::"l"(to), "r"(from) : "memory");
}
#else
template <class Value, class Stored>
PIE_FN void load_as(Value& to, u64 from, bool wanted) {
  if (!wanted) return;
  PIE_ON_ACCESS(from, sizeof(Stored), false);
  to = *reinterpret_cast<const Stored*>(from);
}

template <class Stored, class Value>
PIE_FN void store_as(u64 to, const Value& from) {
  PIE_ON_ACCESS(to, sizeof(Stored), true);
  *reinterpret_cast<Stored*>(to) = static_cast<Stored>(from);
}

PIE_FN void load(Wide& to, u64 from, bool wanted) { load_as<Wide, Wide>(to, from, wanted); }
PIE_FN void load(u64& to, u64 from, bool wanted) { load_as<u64, u64>(to, from, wanted); }
PIE_FN void load(u32& to, u64 from, bool wanted) { load_as<u32, u8>(to, from, wanted); }
PIE_FN void store(u64 to, const Wide& from) { store_as<Wide>(to, from); }
PIE_FN void store(u64 to, u64 from) { store_as<u64>(to, from); }
PIE_FN void store(u64 to, u32 from) { store_as<u8>(to, from); }
#endif

// Log2 of the bytes that one load may take: both ends must be aligned to it at the same time. 8 is
// what vLLM's gather kernel asks of KV pages (vLLM #42212); what is aligned to less must be right,
// not fast.
PIE_FN u32 unit_log(const Piece& piece) {
  const u64 apart = piece.dst ^ piece.src;
  return (apart & 15) == 0 ? 4 : (apart & 7) == 0 ? 3 : 0;
}

// Units are counted from the boundary at or before the piece, so the first may begin inside it.
PIE_FN u32 chunks_of(const Piece& piece) {
  const u32 log = unit_log(piece);
  const u64 end = (piece.dst & ((1u << log) - 1)) + piece.bytes;
  return static_cast<u32>((end + (kUnits << log) - 1) >> log) / kUnits;
}

struct Chunk {
  Piece piece;
  u64 index;  // within the piece
};

// The chunk with this number in the tile, or nothing when the number is past the end.
PIE_FN Chunk find(const Entry* entries, const Layer& layer, const u32* through, u32 total,
                  u32 number) {
  if (number >= total) return {};
  u32 at = 0;  // the first piece that reaches past the number
  for (u32 step = kTile / 2; step != 0; step /= 2) {
    if (through[at + step - 1] <= number) at += step;
  }
  return {piece_of(entries[at], layer), number - (at == 0 ? 0 : through[at - 1])};
}

// One lane's part of a chunk, with `Unit` for whole units and single bytes at a piece's ends.
// Returns the warp's next chunk, which is looked up while the loads are under way.
template <u32 kLog, class Unit, class FindNext>
PIE_FN Chunk copy_chunk(const Chunk& chunk, u32 lane, FindNext find_next) {
  constexpr u64 kSize = 1u << kLog;
  const u64 lead = chunk.piece.dst & (kSize - 1);
  const u64 end = lead + chunk.piece.bytes;
  const u64 start = chunk.index * kUnits;    // in units
  const u64 whole = (end >> kLog) - start;   // units from there that lie before the end
  const u32 from = start == 0 && lead != 0;  // of this chunk's units, those to take whole
  const u32 to = whole < kUnits ? static_cast<u32>(whole) : kUnits;
  const u64 dst = chunk.piece.dst - lead + (start + lane) * kSize;
  const u64 src = chunk.piece.src - lead + (start + lane) * kSize;

  // At most one byte a lane: the ends are shorter than a unit, and a unit than a warp.
  const u64 head_at = lead + lane;
  const bool head = from != 0 && head_at < (end < kSize ? end : kSize);
  const u64 tail_at = (start + whole) * kSize + lane;
  const bool tail = whole < kUnits && whole >= from && tail_at < end;
  const u64 piece_dst = chunk.piece.dst - lead;
  const u64 piece_src = chunk.piece.src - lead;
  u32 head_byte = 0, tail_byte = 0;
  if (kLog != 0) {
    load(head_byte, piece_src + head_at, head);
    load(tail_byte, piece_src + tail_at, tail);
  }
  Unit units[kLoads] = {};
  PIE_UNROLL
  for (u32 i = 0; i < kLoads; ++i) {
    const u32 unit = lane + i * kLanes;
    load(units[i], src + i * kLanes * kSize, unit >= from && unit < to);
  }
  const Chunk next = find_next();
  PIE_UNROLL
  for (u32 i = 0; i < kLoads; ++i) {
    const u32 unit = lane + i * kLanes;
    if (unit >= from && unit < to) store(dst + i * kLanes * kSize, units[i]);
  }
  if (kLog != 0) {
    if (head) store(piece_dst + head_at, head_byte);
    if (tail) store(piece_dst + tail_at, tail_byte);
  }
  return next;
}

PIE_FN void gather_block(const Entry* table, u64 count, const Layer& layer, Scan& scan, u32 cta,
                         u32 grid, u32 block) {
  const u32 warps = grid * (block / kLanes);
  u32 turn = 0;  // the warp that the tile's first chunk goes to
  for (u64 done = 0; done < count; done += kTile) {
    const Entry* entries = table + done;
    const u64 left = count - done;
    u32* from = scan.buffers[0];
    u32* to = scan.buffers[1];
    PIE_EACH_THREAD(t, block) {
      for (u32 i = t; i < kTile; i += block) {
        from[i] = i < left ? chunks_of(piece_of(entries[i], layer)) : 0;
      }
    }
    PIE_BARRIER();
    for (u32 reach = 1; reach < kTile; reach *= 2) {
      PIE_EACH_THREAD(t, block) {
        for (u32 i = t; i < kTile; i += block) to[i] = from[i] + (i < reach ? 0 : from[i - reach]);
      }
      PIE_BARRIER();
      u32* const swap = from;
      from = to;
      to = swap;
    }
    const u32 total = from[kTile - 1];
    PIE_EACH_THREAD(t, block) {
      // Neighbours to different blocks, so that a few chunks are not one SM's work.
      const u32 warp = t / kLanes * grid + cta;
      u32 number = (warp + warps - turn) % warps;
      Chunk chunk = find(entries, layer, from, total, number);
      while (number < total) {
        number += warps;
        auto next = [&] { return find(entries, layer, from, total, number); };
        const u32 log = unit_log(chunk.piece);
        if (log == 4) {
          chunk = copy_chunk<4, Wide>(chunk, t % kLanes, next);
        } else if (log == 3) {
          chunk = copy_chunk<3, u64>(chunk, t % kLanes, next);
        } else {
          chunk = copy_chunk<0, u32>(chunk, t % kLanes, next);
        }
      }
    }
    turn = (turn + total) % warps;
    PIE_BARRIER();
  }
}

}  // namespace pie_gather_detail

#ifdef __CUDACC__
extern "C" __global__ void __launch_bounds__(pie_gather_detail::kMaxThreads)
    pie_gather(const pie_gather_detail::Entry* table, const unsigned long long* count,
               unsigned long long* copied, unsigned long long base, unsigned long long page,
               unsigned long long layer) {
  __shared__ pie_gather_detail::Scan scan;
  pie_gather_detail::gather_block(table, *count, {base, page, layer}, scan, blockIdx.x, gridDim.x,
                                  blockDim.x);
  if (copied != nullptr && blockIdx.x == 0 && threadIdx.x == 0) atomicAdd(copied, 1ull);
}
#endif
