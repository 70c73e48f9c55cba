#include "drivers/host/host_stream.h"

#include <sys/prctl.h>

#include <cstring>

namespace pie {
namespace {

// About 2 us on a 3 GHz core: shorter than going to sleep, no burden when two cores are all.
constexpr int kSpins = 64;

void pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

}  // namespace

void Completion::finish(Record& record, const std::string& error) {
  record.when = Clock::now();
  record.error = error;
  {
    std::lock_guard<std::mutex> lock(mutex_);
    record.state.store(error.empty() ? Record::kDone : Record::kFailed, std::memory_order_release);
  }
  changed_.notify_all();
}

bool Completion::wait(const Record& record) {
  const auto state = [&] { return record.state.load(std::memory_order_acquire); };
  for (int i = 0; i < kSpins && state() == Record::kPending; ++i) pause();
  if (state() == Record::kPending) {
    std::unique_lock<std::mutex> lock(mutex_);
    changed_.wait(lock, [&] { return state() != Record::kPending; });
  }
  return state() == Record::kFailed;
}

HostStream::HostStream(HostLink& link, Completion& completion)
    : link_(link), completion_(completion), thread_([this] { run(); }) {}

HostStream::~HostStream() {
  submit(Command{Command::kStop, nullptr});
  thread_.join();
}

void HostStream::submit(Command command) {
  bool wake;
  {
    std::lock_guard<std::mutex> lock(mutex_);
    wake = queue_.empty();
    queue_.push_back(std::move(command));
  }
  if (wake) filled_.notify_one();
}

std::string HostStream::error() const {
  std::lock_guard<std::mutex> lock(mutex_);
  return error_;
}

void HostStream::recover() {
  std::lock_guard<std::mutex> lock(mutex_);
  error_.clear();
}

void HostStream::fail(const std::string& text) {
  std::lock_guard<std::mutex> lock(mutex_);
  if (error_.empty()) error_ = text;
}

void HostStream::run() {
  prctl(PR_SET_NAME, "pie-stream");
  prctl(PR_SET_TIMERSLACK, 1);  // The link emulation sleeps for tens of microseconds.
  for (;;) {
    Command command;
    {
      std::unique_lock<std::mutex> lock(mutex_);
      filled_.wait(lock, [&] { return !queue_.empty(); });
      command = std::move(queue_.front());
      queue_.pop_front();
    }
    if (command.kind == Command::kStop) return;
    execute(command);
  }
}

void HostStream::execute(Command& command) {
  const std::string before = error();
  if (command.kind == Command::kRecord) return completion_.finish(*command.record, before);
  if (!before.empty()) return;
  switch (command.kind) {
    case Command::kWait:
      if (completion_.wait(*command.record)) fail(command.record->error);
      break;
    case Command::kCopy:
      try {
        link_.copy(command.direction, command.ops.data(), command.ops.size());
      } catch (const Error& error) {
        fail(error.what());
      }
      break;
    case Command::kMemset:
      std::memset(reinterpret_cast<void*>(command.dst), command.value, command.bytes);
      break;
    case Command::kHostFn:
      command.fn(command.arg);
      break;
    default:
      break;
  }
}

}  // namespace pie
