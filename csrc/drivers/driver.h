// What the engine asks of a device. Two implementations: drivers/host and drivers/cuda.
//
// The meaning of every call is CUDA's; csrc/DESIGN.md numbers the behaviour that is relied on.
// Errors are thrown as pie::Error. Device addresses are integers on purpose: only drivers/host
// may assume that device memory is host memory.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "error.h"

// Faults of copies, for inject().
enum {
  PIE_FAULT_NONE = 0,  // take all faults of these directions back
  PIE_FAULT_FAIL = 1,  // the a-th copy from now fails (1: the next)
  PIE_FAULT_LATE = 2,  // each batch waits a..b ms first, uniform, seeded
  PIE_FAULT_TORN = 3,  // each batch stops for a ms between its halves
};

namespace pie {

using Address = uint64_t;  // of the device or of the host
using Stream = uint64_t;   // 0: host driver: the calling thread itself; CUDA: the default stream
using Event = uint64_t;
using Handle = uint64_t;  // physical device memory
using HostFn = void (*)(void*);

enum class Direction { kHostToDevice = PIE_HOST_TO_DEVICE, kDeviceToHost = PIE_DEVICE_TO_HOST };

struct CopyOp {
  Address dst;
  Address src;
  size_t bytes;
};

// Neighbouring pages of a chunk of the pool and of the device, as all layers have them: an entry of
// gather.cu.
struct TablePiece {
  Address chunk;  // as reach() says
  uint32_t chunk_rows;
  uint32_t row;  // in the chunk
  uint32_t block;
  uint32_t count;  // of pages

  bool operator==(const TablePiece& o) const {
    return chunk == o.chunk && chunk_rows == o.chunk_rows && row == o.row && block == o.block &&
           count == o.count;
  }
};
using TablePieces = std::vector<TablePiece>;

// One launch of the gather kernel: the pieces of a table in one layer.
struct GatherLaunch {
  Address table;   // of TablePieces, on the device
  Address count;   // of a uint64: their number
  Address copied;  // of a uint64 that the launch adds 1 to; 0: nothing
  Address base;    // of the layer's block 0
  uint64_t page;   // bytes
  uint64_t layer;
};

// Whose launches: each has a kernel, and a grid, of its own.
enum class GatherUse { kSteps, kGraphs };

// Totals of complete copies: bytes, number, and seconds that copies of this direction took.
struct Counters {
  int64_t bytes = 0;
  int64_t copies = 0;
  double seconds = 0;
};

class Driver {
 public:
  virtual ~Driver() = default;

  // Memory. Sizes and addresses are multiples of granularity().
  virtual size_t granularity() const = 0;
  virtual Address reserve(size_t bytes, size_t alignment) = 0;
  virtual void unreserve(Address address, size_t bytes) noexcept = 0;
  virtual Handle create(size_t bytes) = 0;
  virtual void release(Handle handle) noexcept = 0;                    // mappings keep the memory
  virtual void map(Address address, size_t bytes, Handle handle) = 0;  // the whole handle
  virtual void set_access(Address address, size_t bytes) = 0;          // may cover many mappings
  virtual void zero(Address address, size_t bytes) = 0;  // new memory, before its first use
  virtual void unmap(Address address, size_t bytes) noexcept = 0;  // does not wait for work
  virtual void* host_alloc(size_t bytes) = 0;                      // zeroed, populated, registered
  virtual bool device_is_host() const { return false; }  // device memory is CPU memory too
  virtual void host_free(void* pointer, size_t bytes) noexcept = 0;

  // Streams.
  virtual Stream stream_create() = 0;
  virtual void stream_destroy(Stream stream) noexcept = 0;
  virtual void stream_synchronize(Stream stream) = 0;
  virtual bool stream_is_inline(Stream stream) const = 0;
  // Text of the stream's sticky error, empty when there is none; does not wait.
  virtual std::string stream_error(Stream stream) = 0;
  // Clears a sticky error of an idle stream; throws where the device cannot.
  virtual void stream_recover(Stream stream) = 0;
  // Copies of one batch are unordered among themselves and ordered against the rest of the stream.
  virtual void copy_batch(Stream stream, Direction direction, const CopyOp* ops, size_t count) = 0;
  virtual void memset_async(Stream stream, Address dst, int value, size_t bytes) = 0;
  virtual void launch_host(Stream stream, HostFn fn, void* arg) = 0;

  // Events.
  // Only events that were made with `timed` have an elapsed time.
  virtual Event event_create(bool timed) = 0;
  virtual void event_destroy(Event event) noexcept = 0;
  virtual void event_record(Event event, Stream stream) = 0;
  // The stream's later work waits for the newest record submitted before this call.
  virtual void stream_wait(Stream stream, Event event) = 0;
  virtual bool event_query(Event event) = 0;
  virtual void event_synchronize(Event event) = 0;
  virtual double event_elapsed(Event start, Event end) = 0;  // seconds

  // Waits for all work of all streams; errors stay on their streams.
  virtual void synchronize() noexcept = 0;
  virtual Counters counters(Direction direction) const = 0;
  // Whether copies from now on are timed; a driver may time all, and estimates what it does not.
  virtual void sample(bool on);
  // Whether batches ask for copies that overlap with compute, where the device knows of that.
  virtual void prefer_overlap(bool on);
  // The device's architecture as compilers call it ("sm_90"); empty: it runs no kernels.
  virtual std::string arch() const;

  // Only a device with kernels has these.
  // Loads the kernel in the image (gather.cu) and tries it; null: the one that is loaded. `blocks`:
  // the grid from now on. An error changes nothing.
  virtual void load_gather(GatherUse use, const void* image, size_t size, int blocks);
  // Copies what the table holds when this runs. May be captured.
  virtual void launch_gather(GatherUse use, Stream stream, const GatherLaunch& launch);
  // The same of copies that counters() knows: so many pieces, of so many bytes together.
  virtual void gather(Stream stream, const GatherLaunch& launch, int64_t bytes, int64_t pieces);
  // Where kernels find an address of host memory.
  virtual Address reach(Address host) const;
  // A small copy of the engine's own data, which no counter knows.
  virtual void copy_own(Stream stream, Direction direction, Address dst, Address src, size_t bytes);
  virtual bool stream_is_capturing(Stream stream);

  // For tests: PIE_FAULT_*, of copies in `directions` (bit 0 host to device, bit 1 device to host).
  // Only the host driver has faults.
  virtual void inject(int fault, int directions, double a, double b, uint64_t seed);
};

// kind: "host", "cuda" (the device whose context is current, else the first) or "cuda:N". Throws
// PIE_ERR_UNSUPPORTED for a driver this build or this machine lacks.
std::unique_ptr<Driver> make_driver(const std::string& kind, double link_bytes_per_s);

}  // namespace pie
