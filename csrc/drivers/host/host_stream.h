// Streams and event records of the host driver: one thread and one queue a stream.
#pragma once

#include <atomic>
#include <condition_variable>
#include <deque>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "drivers/host/host_link.h"

namespace pie {

// One submission of cudaEventRecord. A new record of the same event is a new object, so a wait
// that captured this one is not touched by it.
struct Record {
  enum State { kPending, kDone, kFailed };
  std::atomic<int> state{kPending};
  Clock::time_point when{};  // this and error: valid once state is not kPending
  std::string error;         // what failed first, with kFailed
};
using RecordPtr = std::shared_ptr<Record>;

// Where all waits for records of one driver sleep.
class Completion {
 public:
  // error: empty, or why the record's stream had failed.
  void finish(Record& record, const std::string& error);
  // Blocks until the record is complete; true when its stream had failed.
  bool wait(const Record& record);

 private:
  std::mutex mutex_;
  std::condition_variable changed_;
};

struct Command {
  enum Kind { kRecord, kWait, kCopy, kMemset, kHostFn, kStop };
  Kind kind;
  RecordPtr record;
  Direction direction{};
  std::vector<CopyOp> ops{};
  Address dst = 0;
  int value = 0;
  size_t bytes = 0;
  HostFn fn = nullptr;
  void* arg = nullptr;
};

// Runs commands in order. After a failure all commands but records are skipped and records
// complete as failed, so waits elsewhere fail instead of hanging; recover() ends that.
class HostStream {
 public:
  HostStream(HostLink& link, Completion& completion);
  ~HostStream();  // runs what is queued, then joins
  HostStream(const HostStream&) = delete;
  HostStream& operator=(const HostStream&) = delete;

  void submit(Command command);
  std::string error() const;
  void recover();

 private:
  void run();
  void execute(Command& command);
  void fail(const std::string& text);

  HostLink& link_;
  Completion& completion_;
  mutable std::mutex mutex_;
  std::condition_variable filled_;
  std::deque<Command> queue_;
  std::string error_;
  std::thread thread_;  // last: the thread uses everything above
};

}  // namespace pie
