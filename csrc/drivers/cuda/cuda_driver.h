// The CUDA driver: two copy streams beside the model's, copies by the GPU's copy engines.
#pragma once

#include <map>
#include <memory>
#include <mutex>
#include <set>
#include <string>
#include <vector>

#include "drivers/cuda/cuda_device.h"
#include "drivers/cuda/cuda_kernel.h"
#include "drivers/cuda/cuda_meter.h"

namespace pie::cuda {

// Streams and events are the driver's own handles, so a stream of torch's may be passed in. Stream
// 0 is the legacy default stream. A submission that fails marks its stream until it is recovered;
// work that fails later takes the whole context with it, and nothing recovers that.
class CudaDriver : public Driver {
 public:
  explicit CudaDriver(int device);
  ~CudaDriver() override;

  size_t granularity() const override { return device_.granularity(); }
  Address reserve(size_t bytes, size_t alignment) override;
  void unreserve(Address address, size_t bytes) noexcept override;
  Handle create(size_t bytes) override;
  void release(Handle handle) noexcept override;
  void map(Address address, size_t bytes, Handle handle) override;
  void set_access(Address address, size_t bytes) override;
  void zero(Address address, size_t bytes) override;
  void unmap(Address address, size_t bytes) noexcept override;
  void* host_alloc(size_t bytes) override;
  void host_free(void* pointer, size_t bytes) noexcept override;

  Stream stream_create() override;
  void stream_destroy(Stream stream) noexcept override;
  void stream_synchronize(Stream stream) override;
  bool stream_is_inline(Stream) const override { return false; }
  std::string stream_error(Stream stream) override;
  void stream_recover(Stream stream) override;
  void copy_batch(Stream stream, Direction direction, const CopyOp* ops, size_t count) override;
  void memset_async(Stream stream, Address dst, int value, size_t bytes) override;
  void launch_host(Stream stream, HostFn fn, void* arg) override;

  Event event_create(bool timed) override;
  void event_destroy(Event event) noexcept override;
  void event_record(Event event, Stream stream) override;
  void stream_wait(Stream stream, Event event) override;
  bool event_query(Event event) override;
  void event_synchronize(Event event) override;
  double event_elapsed(Event start, Event end) override;

  void synchronize() noexcept override;
  Counters counters(Direction direction) const override;
  void sample(bool on) override { meter_.sample(on); }
  void prefer_overlap(bool on) override { overlap_ = on; }
  std::string arch() const override { return device_.arch(); }

  void load_gather(GatherUse use, const void* image, size_t size, int blocks) override;
  void launch_gather(GatherUse use, Stream stream, const GatherLaunch& launch) override;
  void gather(Stream stream, const GatherLaunch& launch, int64_t bytes, int64_t pieces) override;
  Address reach(Address host) const override { return device_.reach(host); }
  void copy_own(Stream stream, Direction direction, Address dst, Address src,
                size_t bytes) override;
  bool stream_is_capturing(Stream stream) override;

 private:
  std::string marked(Stream stream);
  // Throws like check(), and marks the stream.
  void submitted(CUresult result, const char* call, Stream stream);
  CUresult copy_all(CUstream stream, Direction direction, const CopyOp* ops, size_t count,
                    const char*& call);
  CUresult copy_some(CUstream stream, bool in, const CopyOp* ops, size_t count);

  const Api& api_;
  Device device_;
  mutable Meter meter_;
  std::map<GatherUse, std::unique_ptr<Kernel>> kernels_;
  bool overlap_ = true;  // batches ask for it
  bool batches_;         // false: this machine has no batched copy
  std::mutex mutex_;     // of these three: the pool's thread makes events too
  std::map<Stream, std::string> errors_;
  std::set<Stream> streams_;  // made here and not destroyed yet
  std::set<Event> events_;
  std::vector<CUdeviceptr> targets_, sources_;
  std::vector<size_t> sizes_;
};

}  // namespace pie::cuda
