// What all parts of the stand-in share: one lock, settings, faults, streams, events, memory.
#pragma once

#pragma GCC visibility push(default)
#include <cuda.h>
#pragma GCC visibility pop

#include <chrono>
#include <condition_variable>
#include <deque>
#include <functional>
#include <mutex>
#include <random>
#include <thread>

#include "memory.h"
#include "race.h"
#include "standin.h"

namespace standin {

using Time = std::chrono::steady_clock;
using Lock = std::unique_lock<std::mutex>;

// One submission of cuEventRecord; a later record of the same event is another object.
struct Record {
  enum { kPending, kDone, kFailed } state = kPending;
  VectorClock clock;
  Time::time_point when{};
};
using RecordPtr = std::shared_ptr<Record>;

struct Capture;
struct Graph;
struct Executable;

struct Event {
  unsigned flags;
  int device;
  RecordPtr newest;                     // null: never recorded
  std::shared_ptr<Capture> captured{};  // where it was recorded last, if in a capture
  std::vector<size_t> at{};             // and after which nodes
};

// One operation: checks its accesses as those of the actor, and returns what is to run, if
// anything.
using Run = std::function<void(Lock&)>;
using Op = std::function<Run(const Actor&)>;

struct Command {
  Run run;
  bool always = false;  // also after the context has failed
};

struct Stream {
  int device;
  unsigned flags;
  int priority;
  Actor actor;
  std::shared_ptr<Capture> capture{};
  std::condition_variable filled{};
  std::deque<Command> queue{};
  uint64_t submitted = 0;
  uint64_t completed = 0;
  bool stop = false;
  bool ended = false;
  std::thread thread{};
};

// A thread that calls the stand-in. Its NULL stream is an actor of its own: to CUDA what runs there
// is not over when the call returns.
struct HostThread {
  Actor host;
  Actor null_stream;
};

struct Fault {
  int64_t left;
  CUresult result;
};

constexpr int kNobody = -1;
struct Lane {                                     // one direction of the link
  double delay_min = 0, delay_max = 0, tear = 0;  // milliseconds
  std::mt19937_64 random{0};
  int64_t fail_in = 0;
  Time::time_point free_at{};
  int holder = kNobody;  // the actor that has the direction's copy engine
  int64_t copies = 0, bytes = 0;
};
constexpr int kDirections = 4;

struct State {
  std::mutex mutex;
  std::condition_variable changed;  // something completed or failed

  bool initialized = false;
  CUresult sticky = CUDA_SUCCESS;
  std::map<std::string, int64_t> settings;
  std::map<std::string, int64_t> calls;
  std::multimap<std::string, Fault> faults;
  std::vector<std::string> violations;
  size_t more_violations = 0;

  std::map<int, int> retained;  // primary contexts: references by device
  uint64_t next_id = 0x1000;
  uint64_t next_submission = 1;
  Memory memory;
  std::map<uint64_t, std::unique_ptr<Stream>> streams;
  std::vector<std::unique_ptr<Stream>> ending;  // destroyed, their queues not yet run dry
  std::map<uint64_t, Event> events;
  std::map<uint64_t, bool> modules;
  std::vector<std::shared_ptr<Capture>> captures;  // under way
  std::map<uint64_t, std::shared_ptr<Graph>> graphs;
  std::map<uint64_t, std::shared_ptr<Executable>> executables;
  // What 2D copies and memsets wrote, by key and page of 4 KiB; other bytes are taken for 0.
  std::map<uint64_t, std::map<uint64_t, std::vector<char>>> shadow;

  uint64_t generation = 1;  // of actors: standin_reset makes all of them anew
  std::vector<std::string> actor_names;
  std::vector<std::unique_ptr<HostThread>> threads;
  VectorClock fence;
  VectorClock ended;  // of destroyed streams: cuCtxSynchronize waits for these too
  Races races;

  Lane lanes[kDirections];
  double link = 0;  // bytes a second, each direction
  std::mt19937_64 shuffle{0};
};

State& state();
std::map<std::string, int64_t> default_settings();
int64_t setting(const char* key);

void violate(const std::string& text);
void fail_context(CUresult code);  // sticky; wakes all waiters
std::string hex(uint64_t value);
std::string range_text(uint64_t address, size_t bytes);
// The host cannot see a copy's data before this returns: sleeps without the lock.
void sleep_until(Lock& lock, Time::time_point when);
std::chrono::nanoseconds milliseconds(double ms);

// Holds the copy engine of a direction where there is one (setting "copy_engines").
class EngineUse {
 public:
  EngineUse(Lock& lock, int direction, int actor);
  ~EngineUse();
  EngineUse(const EngineUse&) = delete;
  EngineUse& operator=(const EngineUse&) = delete;

 private:
  const int actor_;
  const bool taken_;
};
// A stream has nothing to copy at once.
void leave_engines(int actor);

Actor new_actor(const std::string& name);
HostThread& this_thread();

// Streams. Null stands for the calling thread's NULL stream.
bool find_stream(CUstream handle, Stream*& stream);
Actor& actor_of(Stream* stream);
// Orders new work of the stream after what the calling thread did so far.
Actor& begin_work(Stream* stream);
void submit(Lock& lock, Stream* stream, Command command);
void reap(Lock& lock, bool wait);
std::string live_text();

// One call of the interface: takes the lock, counts, and finds what makes it fail at once.
enum Needs { kNothing = 0, kInit = 1, kContext = 3, kSticky = 4, kRelease = 8, kUnsafe = 16 };
class Call {
 public:
  // kSticky: the context's error stops it. kRelease: that error is returned, but the call works.
  // kUnsafe: a capture under way makes it fail.
  Call(const char* name, int needs);
  bool failed() const { return code_ != CUDA_SUCCESS; }
  CUresult code() const { return code_; }
  // What the call returns: the context's error comes first.
  CUresult done(CUresult code = CUDA_SUCCESS) const;
  // Of a mistake that CUDA may leave unpunished.
  CUresult wrong(CUresult code, const std::string& text);
  int device() const { return device_; }

 private:
  const char* const name_;
  const int needs_;
  CUresult code_ = CUDA_SUCCESS;
  int device_ = -1;

 public:
  Lock lock;
};

// To the stream, or into the graph that it captures. Returns the call's result.
CUresult enqueue(Call& call, Stream* stream, Op op);

constexpr int kUse = kContext | kSticky;
constexpr int kEnd = kContext | kRelease;

// Marks a thread that runs a callback: there CUDA forbids its calls.
struct InCallback {
  InCallback();
  ~InCallback();
};

// Contexts.
int current_device();  // -1: none
CUcontext context_of(int device);

// Accesses of one submission, checked when it is submitted.
class Accesses {
 public:
  Accesses(const Actor& actor, const char* what);
  // When a source is read: in the order of the stream, any time from the call on, in the call.
  enum When { kInOrder, kEarly, kDuringCall };
  void add(const Range& range, uint64_t address, bool write, When when = kInOrder);
  ~Accesses();
  Accesses(const Accesses&) = delete;
  Accesses& operator=(const Accesses&) = delete;

 private:
  const Actor& actor_;
  const char* const what_;
  const bool check_;
  const uint64_t submission_;
  std::vector<Conflict> conflicts_;
};

// For standin_peek: these bytes were submitted to be written there.
void foresee(const Range& range, const char* bytes);
void foresee(const Range& range, unsigned char value);

// Memory that goes away while work that uses it is not known to be over.
void check_unused(Area& area, const char* call);
void wait_for_pins(Lock& lock, Area& area);

}  // namespace standin
