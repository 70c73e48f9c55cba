// The host driver: memfd as device memory, threads as streams, memcpy as copies.
#pragma once

#include <map>
#include <memory>
#include <mutex>

#include "drivers/host/host_stream.h"

namespace pie {

// Stream 0 is the calling thread itself: a wait blocks it, a record completes at once, copies and
// callbacks run at once. Thread-safe but for destroying what another thread uses.
class HostDriver : public Driver {
 public:
  explicit HostDriver(double link_bytes_per_s) : link_(link_bytes_per_s) {}
  ~HostDriver() override { synchronize(); }

  size_t granularity() const override;
  Address reserve(size_t bytes, size_t alignment) override;
  void unreserve(Address address, size_t bytes) noexcept override;
  Handle create(size_t bytes) override;
  void release(Handle handle) noexcept override;
  void map(Address address, size_t bytes, Handle handle) override;
  void set_access(Address address, size_t bytes) override;
  void zero(Address, size_t) override {}  // a new memfd is
  void unmap(Address address, size_t bytes) noexcept override;
  void* host_alloc(size_t bytes) override;
  void host_free(void* pointer, size_t bytes) noexcept override;
  bool device_is_host() const override { return true; }

  Stream stream_create() override;
  void stream_destroy(Stream stream) noexcept override;
  void stream_synchronize(Stream stream) override;
  bool stream_is_inline(Stream stream) const override { return stream == 0; }
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
  Counters counters(Direction direction) const override { return link_.counters(direction); }
  void inject(int fault, int directions, double a, double b, uint64_t seed) override;

 private:
  HostStream& find(Stream stream);
  RecordPtr newest(Event event);  // null: never recorded

  HostLink link_;
  Completion completion_;
  std::mutex mutex_;  // of the tables below
  uint64_t next_id_ = 1;
  std::map<Event, RecordPtr> events_;
  std::map<Stream, std::unique_ptr<HostStream>> streams_;
};

}  // namespace pie
