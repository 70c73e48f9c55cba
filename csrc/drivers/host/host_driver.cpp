#include "drivers/host/host_driver.h"

#include <cstring>

#include "drivers/host/host_memory.h"
#include "drivers/pages.h"

namespace pie {

size_t HostDriver::granularity() const { return pages::size(); }
Address HostDriver::reserve(size_t bytes, size_t alignment) {
  return pages::reserve(bytes, alignment);
}
void HostDriver::unreserve(Address a, size_t bytes) noexcept { pages::unreserve(a, bytes); }
Handle HostDriver::create(size_t bytes) { return host_memory::create(bytes); }
void HostDriver::release(Handle handle) noexcept { host_memory::release(handle); }
void HostDriver::map(Address a, size_t bytes, Handle h) { host_memory::map(a, bytes, h); }
void HostDriver::set_access(Address a, size_t bytes) { host_memory::set_access(a, bytes); }
void HostDriver::unmap(Address a, size_t bytes) noexcept { host_memory::unmap(a, bytes); }
void* HostDriver::host_alloc(size_t bytes) { return pages::take(bytes); }
void HostDriver::host_free(void* p, size_t bytes) noexcept { pages::give_back(p, bytes); }

HostStream& HostDriver::find(Stream stream) {
  std::lock_guard<std::mutex> lock(mutex_);
  const auto it = streams_.find(stream);
  if (it == streams_.end()) {
    throw Error(PIE_ERR_STATE, "no stream " + std::to_string(stream) + " in this engine");
  }
  return *it->second;
}

RecordPtr HostDriver::newest(Event event) {
  std::lock_guard<std::mutex> lock(mutex_);
  const auto it = events_.find(event);
  if (it == events_.end()) throw Error(PIE_ERR_STATE, "no event " + std::to_string(event));
  return it->second;
}

Stream HostDriver::stream_create() {
  auto stream = std::make_unique<HostStream>(link_, completion_);
  std::lock_guard<std::mutex> lock(mutex_);
  streams_.emplace(next_id_, std::move(stream));
  return next_id_++;
}

void HostDriver::stream_destroy(Stream stream) noexcept {
  std::unique_ptr<HostStream> gone;  // ends, and joins, outside the lock
  std::lock_guard<std::mutex> lock(mutex_);
  const auto it = streams_.find(stream);
  if (it == streams_.end()) return;
  gone = std::move(it->second);
  streams_.erase(it);
}

void HostDriver::stream_synchronize(Stream stream) {
  if (stream == 0) return;
  HostStream& target = find(stream);
  auto record = std::make_shared<Record>();
  target.submit(Command{Command::kRecord, record});
  if (completion_.wait(*record)) throw Error(PIE_ERR_TRANSFER, record->error);
}

std::string HostDriver::stream_error(Stream stream) {
  return stream == 0 ? std::string() : find(stream).error();
}

void HostDriver::stream_recover(Stream stream) {
  if (stream != 0) find(stream).recover();
}

void HostDriver::copy_batch(Stream stream, Direction direction, const CopyOp* ops, size_t count) {
  if (stream == 0) return link_.copy(direction, ops, count);
  Command command{Command::kCopy, nullptr};
  command.direction = direction;
  command.ops.assign(ops, ops + count);
  find(stream).submit(std::move(command));
}

void HostDriver::memset_async(Stream stream, Address dst, int value, size_t bytes) {
  if (stream == 0) {
    std::memset(reinterpret_cast<void*>(dst), value, bytes);
    return;
  }
  Command command{Command::kMemset, nullptr};
  command.dst = dst;
  command.value = value;
  command.bytes = bytes;
  find(stream).submit(std::move(command));
}

void HostDriver::launch_host(Stream stream, HostFn fn, void* arg) {
  if (stream == 0) return fn(arg);
  Command command{Command::kHostFn, nullptr};
  command.fn = fn;
  command.arg = arg;
  find(stream).submit(std::move(command));
}

Event HostDriver::event_create(bool) {
  std::lock_guard<std::mutex> lock(mutex_);
  events_.emplace(next_id_, nullptr);
  return next_id_++;
}

void HostDriver::event_destroy(Event event) noexcept {
  std::lock_guard<std::mutex> lock(mutex_);
  events_.erase(event);
}

void HostDriver::event_record(Event event, Stream stream) {
  auto record = std::make_shared<Record>();
  HostStream* target = stream == 0 ? nullptr : &find(stream);
  {
    std::lock_guard<std::mutex> lock(mutex_);
    const auto it = events_.find(event);
    if (it == events_.end()) throw Error(PIE_ERR_STATE, "no event " + std::to_string(event));
    it->second = record;
  }
  if (target == nullptr) return completion_.finish(*record, "");
  target->submit(Command{Command::kRecord, std::move(record)});
}

void HostDriver::stream_wait(Stream stream, Event event) {
  RecordPtr record = newest(event);
  if (record == nullptr || record->state.load(std::memory_order_acquire) == Record::kDone) return;
  if (stream != 0) return find(stream).submit(Command{Command::kWait, std::move(record)});
  if (completion_.wait(*record)) {
    throw Error(PIE_ERR_TRANSFER, record->error);
  }
}

bool HostDriver::event_query(Event event) {
  const RecordPtr record = newest(event);
  return record == nullptr || record->state.load(std::memory_order_acquire) != Record::kPending;
}

void HostDriver::event_synchronize(Event event) {
  const RecordPtr record = newest(event);
  if (record != nullptr && completion_.wait(*record)) {
    throw Error(PIE_ERR_TRANSFER, record->error);
  }
}

double HostDriver::event_elapsed(Event start, Event end) {
  const RecordPtr a = newest(start), b = newest(end);
  if (a == nullptr || b == nullptr || a->state.load() == Record::kPending ||
      b->state.load() == Record::kPending) {
    throw Error(PIE_ERR_STATE, "elapsed time needs two events whose records are complete");
  }
  return std::chrono::duration<double>(b->when - a->when).count();
}

// Streams may wait for one another, so all run dry before any of them ends.
void HostDriver::synchronize() noexcept {
  std::vector<RecordPtr> records;
  {
    std::lock_guard<std::mutex> lock(mutex_);
    for (auto& [id, stream] : streams_) {
      records.push_back(std::make_shared<Record>());
      stream->submit(Command{Command::kRecord, records.back()});
    }
  }
  for (const RecordPtr& record : records) completion_.wait(*record);
}

void HostDriver::inject(int fault, int directions, double a, double b, uint64_t seed) {
  link_.inject(fault, directions, a, b, seed);
}

}  // namespace pie
