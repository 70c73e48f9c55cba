// The C interface: pointers are checked, exceptions become codes, and nothing else happens here.
#include "capi.h"

#include <algorithm>
#include <exception>
#include <memory>
#include <mutex>
#include <new>
#include <string>
#include <vector>

namespace {

thread_local std::string last_error;

template <typename Body>
int guarded(Body&& body) noexcept {
  try {
    body();
    return PIE_OK;
  } catch (const pie::Error& error) {
    last_error = error.what();
    return error.code();
  } catch (const std::bad_alloc&) {
    last_error = "out of memory";
  } catch (const std::exception& error) {
    last_error = error.what();
  } catch (...) {
    last_error = "unknown failure";
  }
  return PIE_ERR_TRANSFER;
}

// The engines that are open: a call with any other pointer is an error, and not a crash.
class OpenEngines {
 public:
  void add(pie_engine* engine) {
    std::lock_guard<std::mutex> lock(mutex_);
    engines_.push_back(engine);
  }
  void check(const pie_engine* engine) {
    std::lock_guard<std::mutex> lock(mutex_);
    find(engine);
  }
  void remove(const pie_engine* engine) {
    std::lock_guard<std::mutex> lock(mutex_);
    engines_.erase(find(engine));
  }

 private:
  std::vector<pie_engine*>::iterator find(const pie_engine* engine) {
    const auto found = std::find(engines_.begin(), engines_.end(), engine);
    if (found != engines_.end()) return found;
    throw pie::Error(PIE_ERR_STATE, "the transfer engine is closed, or never was open; open one");
  }

  std::mutex mutex_;
  std::vector<pie_engine*> engines_;  // one or two
};

OpenEngines& open_engines() {
  static auto* const all = new OpenEngines;  // never destroyed: threads may outlive main
  return *all;
}

pie::Engine& open(pie_engine* engine) {
  open_engines().check(engine);
  return engine->engine;
}

pie::Driver& driver(pie_engine* engine) { return open(engine).driver(); }

template <typename T>
T& at(T* pointer, const char* name) {
  if (pointer != nullptr) return *pointer;
  throw pie::Error(PIE_ERR_CONFIG, std::string("a null pointer for ") + name);
}

// How far memory goes, only its owner knows.
void check_copy(uint64_t dst, uint64_t src, int64_t bytes) {
  constexpr int64_t kMost = int64_t{1} << 52;
  if (bytes >= 0 && bytes <= kMost && dst != 0 && src != 0) return;
  throw pie::Error(PIE_ERR_CONFIG, "a copy of " + std::to_string(bytes) +
                                       " bytes, or at a null pointer; 0 to " +
                                       std::to_string(kMost) + " bytes can be");
}

void check_image(const void* image, int64_t size) {
  if (size < 0) throw pie::Error(PIE_ERR_CONFIG, "an image of a size below 0");
  if (size > 0) at(static_cast<const char*>(image), "image");
}

}  // namespace

int pie_abi_version(void) { return PIE_ABI_VERSION; }
const char* pie_last_error(void) { return last_error.c_str(); }

int pie_granularity(const char* kind, int64_t* bytes) {
  return guarded([&] {
    at(bytes, "bytes") =
        static_cast<int64_t>(pie::make_driver(&at(kind, "driver"), 0)->granularity());
  });
}

int pie_open(const pie_geometry* geometry, const char* kind, double link_bytes_per_s,
             uint32_t debug, int64_t chunks, pie_engine** engine) {
  return guarded([&] {
    at(engine, "engine") = nullptr;
    std::unique_ptr<pie_engine> made(new pie_engine{
        {at(geometry, "geometry"), &at(kind, "driver"), link_bytes_per_s, debug, chunks}});
    open_engines().add(made.get());
    *engine = made.release();
  });
}

int pie_close(pie_engine* engine) {
  return guarded([&] {
    open_engines().remove(engine);
    const std::unique_ptr<pie_engine> ends(engine);
    engine->engine.finish();
  });
}

int pie_arena(pie_engine* engine, uint64_t* address, int64_t* virtual_bytes) {
  return guarded([&] {
    pie::Engine& opened = open(engine);
    at(address, "address") = opened.arena().base();
    at(virtual_bytes, "virtual_bytes") = opened.geometry().virtual_bytes;
  });
}

int pie_bytes(pie_engine* engine, int64_t* host, int64_t* device) {
  return guarded([&] {
    pie::Engine& opened = open(engine);
    at(host, "host") = opened.pool().bytes();
    at(device, "device") = opened.geometry().device_bytes;
  });
}

int pie_row_page(pie_engine* engine, int64_t row, int64_t layer, uint64_t* address) {
  return guarded([&] {
    pie::Engine& opened = open(engine);
    const pie::Geometry& g = opened.geometry();
    if (row < 0 || row >= g.rows || layer < 0 || layer >= g.row_pages) {
      throw pie::Error(PIE_ERR_PLAN,
                       "no row " + std::to_string(row) + " with a layer " + std::to_string(layer));
    }
    if (!opened.pool().holds(row)) {
      throw pie::Error(PIE_ERR_PLAN, "the chunk of row " + std::to_string(row) + " is not there");
    }
    at(address, "address") = opened.pool().page(row, layer);
  });
}

int pie_commit_chunk(pie_engine* engine, int64_t chunk) {
  return guarded([&] { open(engine).commit_chunk(chunk); });
}
int pie_release_chunk(pie_engine* engine, int64_t chunk) {
  return guarded([&] { open(engine).release_chunk(chunk); });
}

int pie_set_option(pie_engine* engine, int option, int value) {
  return guarded([&] { open(engine).set_option(option, value != 0); });
}

int pie_begin_step(pie_engine* engine, const pie_plan* plan, uint64_t compute_stream) {
  return guarded([&] { open(engine).begin_step(at(plan, "plan"), compute_stream); });
}
int pie_begin_graph_step(pie_engine* engine, const pie_plan* plan, uint64_t compute_stream,
                         int* fits) {
  return guarded([&] {
    pie::Engine& opened = open(engine);
    int& answer = at(fits, "fits");
    answer = opened.begin_step(at(plan, "plan"), compute_stream, true) ? 1 : 0;
  });
}
int pie_enter_graph(pie_engine* engine) {
  return guarded([&] { open(engine).enter_graph(); });
}
int pie_before_write(pie_engine* engine, int64_t layer) {
  return guarded([&] { open(engine).before_write(layer); });
}
int pie_before_attention(pie_engine* engine, int64_t layer) {
  return guarded([&] { open(engine).before_attention(layer); });
}
int pie_after_attention(pie_engine* engine, int64_t layer) {
  return guarded([&] { open(engine).after_attention(layer); });
}
int pie_end_step(pie_engine* engine, pie_stats* stats) {
  return guarded([&] {
    pie::Engine& opened = open(engine);
    pie_stats& report = at(stats, "stats");
    report = opened.end_step();
  });
}
int pie_run_idle(pie_engine* engine, const pie_plan* plan, uint64_t compute_stream,
                 pie_stats* stats) {
  return guarded([&] {
    pie::Engine& opened = open(engine);
    pie_stats& report = at(stats, "stats");
    report = opened.run_idle(at(plan, "plan"), compute_stream);
  });
}
int pie_abort_step(pie_engine* engine) {
  return guarded([&] { open(engine).abort_step(); });
}
int pie_drain(pie_engine* engine) {
  return guarded([&] { open(engine).drain(); });
}
int pie_self_test(pie_engine* engine) {
  return guarded([&] { open(engine).self_test(); });
}
int pie_zero_ring(pie_engine* engine) {
  return guarded([&] { open(engine).zero_ring(); });
}

int pie_device_arch(pie_engine* engine, char* arch, int64_t size) {
  return guarded([&] {
    const std::string found = driver(engine).arch();
    if (size <= 0) return;
    char* const text = &at(arch, "arch");
    text[found.copy(text, static_cast<size_t>(size) - 1)] = 0;
  });
}
int pie_use_gather(pie_engine* engine, const void* image, int64_t size, int64_t threshold_bytes,
                   int blocks) {
  return guarded([&] {
    check_image(image, size);
    if (threshold_bytes < 0) throw pie::Error(PIE_ERR_CONFIG, "a threshold below 0");
    open(engine).use_gather(image, static_cast<size_t>(size), static_cast<size_t>(threshold_bytes),
                            blocks);
  });
}
int pie_use_graphs(pie_engine* engine, const void* image, int64_t size, int64_t pieces,
                   int blocks) {
  return guarded([&] {
    check_image(image, size);
    open(engine).use_graphs(image, static_cast<size_t>(size), pieces, blocks);
  });
}
int pie_begin_capture(pie_engine* engine, uint64_t compute_stream) {
  return guarded([&] { open(engine).begin_capture(compute_stream); });
}
int pie_end_capture(pie_engine* engine) {
  return guarded([&] { open(engine).end_capture(); });
}

int pie_counters_of(pie_engine* engine, int direction, pie_counters* counters) {
  return guarded([&] {
    const auto c = driver(engine).counters(static_cast<pie::Direction>(direction != 0));
    at(counters, "counters") = {c.bytes, c.copies, c.seconds};
  });
}

int pie_stream_create(pie_engine* engine, uint64_t* stream) {
  return guarded([&] {
    pie::Driver& device = driver(engine);
    uint64_t& made = at(stream, "stream");
    made = device.stream_create();
  });
}
int pie_stream_destroy(pie_engine* engine, uint64_t stream) {
  return guarded([&] { driver(engine).stream_destroy(stream); });
}
int pie_stream_synchronize(pie_engine* engine, uint64_t stream) {
  return guarded([&] { driver(engine).stream_synchronize(stream); });
}
int pie_copy(pie_engine* engine, uint64_t stream, int direction, uint64_t dst, uint64_t src,
             int64_t bytes) {
  return guarded([&] {
    pie::Engine& opened = open(engine);
    check_copy(dst, src, bytes);
    const pie::CopyOp op{dst, src, static_cast<size_t>(bytes)};
    opened.driver().copy_batch(stream, static_cast<pie::Direction>(direction != 0), &op, 1);
  });
}
int pie_event_create(pie_engine* engine, uint64_t* event) {
  return guarded([&] {
    pie::Driver& device = driver(engine);
    uint64_t& made = at(event, "event");
    made = device.event_create(true);
  });
}
int pie_event_destroy(pie_engine* engine, uint64_t event) {
  return guarded([&] { driver(engine).event_destroy(event); });
}
int pie_event_record(pie_engine* engine, uint64_t event, uint64_t stream) {
  return guarded([&] { driver(engine).event_record(event, stream); });
}
int pie_event_elapsed(pie_engine* engine, uint64_t start, uint64_t end, double* seconds) {
  return guarded([&] {
    pie::Driver& device = driver(engine);
    double& answer = at(seconds, "seconds");
    answer = device.event_elapsed(start, end);
  });
}
