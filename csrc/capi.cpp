// The C interface: exceptions become codes, and nothing else happens here.
#include <exception>
#include <memory>
#include <new>
#include <string>

#include "engine.h"

struct pie_engine {
  pie::Engine engine;
};

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

pie::Driver& driver(pie_engine* engine) { return engine->engine.driver(); }

}  // namespace

int pie_abi_version(void) { return PIE_ABI_VERSION; }
const char* pie_last_error(void) { return last_error.c_str(); }

int pie_granularity(const char* kind, int64_t* bytes) {
  return guarded([&] { *bytes = static_cast<int64_t>(pie::make_driver(kind, 0)->granularity()); });
}

int pie_open(const pie_geometry* geometry, const char* kind, double link_bytes_per_s,
             uint32_t debug, int64_t chunks, pie_engine** engine) {
  return guarded(
      [&] { *engine = new pie_engine{{*geometry, kind, link_bytes_per_s, debug, chunks}}; });
}

int pie_close(pie_engine* engine) {
  return guarded([&] {
    const std::unique_ptr<pie_engine> ends(engine);
    engine->engine.finish();
  });
}

int pie_arena(pie_engine* engine, uint64_t* address, int64_t* virtual_bytes) {
  return guarded([&] {
    *address = engine->engine.arena().base();
    *virtual_bytes = engine->engine.geometry().virtual_bytes;
  });
}

int pie_bytes(pie_engine* engine, int64_t* host, int64_t* device) {
  return guarded([&] {
    *host = engine->engine.pool().bytes();
    *device = engine->engine.geometry().device_bytes;
  });
}

int pie_row_page(pie_engine* engine, int64_t row, int64_t layer, uint64_t* address) {
  return guarded([&] {
    const pie::Geometry& g = engine->engine.geometry();
    if (row < 0 || row >= g.rows || layer < 0 || layer >= g.layers) {
      throw pie::Error(PIE_ERR_PLAN,
                       "no row " + std::to_string(row) + " with a layer " + std::to_string(layer));
    }
    if (!engine->engine.pool().holds(row)) {
      throw pie::Error(PIE_ERR_PLAN, "the chunk of row " + std::to_string(row) + " is not there");
    }
    *address = engine->engine.pool().page(row, layer);
  });
}

int pie_commit_chunk(pie_engine* engine, int64_t chunk) {
  return guarded([&] { engine->engine.commit_chunk(chunk); });
}
int pie_release_chunk(pie_engine* engine, int64_t chunk) {
  return guarded([&] { engine->engine.release_chunk(chunk); });
}

int pie_set_option(pie_engine* engine, int option, int value) {
  return guarded([&] { engine->engine.set_option(option, value != 0); });
}

int pie_begin_step(pie_engine* engine, const pie_plan* plan, uint64_t compute_stream) {
  return guarded([&] { engine->engine.begin_step(*plan, compute_stream); });
}
int pie_begin_graph_step(pie_engine* engine, const pie_plan* plan, uint64_t compute_stream,
                         int* fits) {
  return guarded([&] { *fits = engine->engine.begin_step(*plan, compute_stream, true) ? 1 : 0; });
}
int pie_enter_graph(pie_engine* engine) {
  return guarded([&] { engine->engine.enter_graph(); });
}
int pie_before_write(pie_engine* engine, int64_t layer) {
  return guarded([&] { engine->engine.before_write(layer); });
}
int pie_before_attention(pie_engine* engine, int64_t layer) {
  return guarded([&] { engine->engine.before_attention(layer); });
}
int pie_after_attention(pie_engine* engine, int64_t layer) {
  return guarded([&] { engine->engine.after_attention(layer); });
}
int pie_end_step(pie_engine* engine, pie_stats* stats) {
  return guarded([&] { *stats = engine->engine.end_step(); });
}
int pie_run_idle(pie_engine* engine, const pie_plan* plan, uint64_t compute_stream,
                 pie_stats* stats) {
  return guarded([&] { *stats = engine->engine.run_idle(*plan, compute_stream); });
}
int pie_abort_step(pie_engine* engine) {
  return guarded([&] { engine->engine.abort_step(); });
}
int pie_drain(pie_engine* engine) {
  return guarded([&] { engine->engine.drain(); });
}
int pie_self_test(pie_engine* engine) {
  return guarded([&] { engine->engine.self_test(); });
}
int pie_zero_ring(pie_engine* engine) {
  return guarded([&] { engine->engine.zero_ring(); });
}

int pie_device_arch(pie_engine* engine, char* arch, int64_t size) {
  return guarded([&] {
    const std::string found = driver(engine).arch();
    if (size > 0) arch[found.copy(arch, static_cast<size_t>(size) - 1)] = 0;
  });
}
int pie_use_gather(pie_engine* engine, const void* image, int64_t size, int64_t threshold_bytes,
                   int blocks) {
  return guarded([&] {
    if (size < 0 || threshold_bytes < 0) throw pie::Error(PIE_ERR_CONFIG, "sizes below 0");
    driver(engine).use_gather(image, static_cast<size_t>(size),
                              static_cast<size_t>(threshold_bytes), blocks);
  });
}
int pie_use_graphs(pie_engine* engine, const void* image, int64_t size, int64_t pieces,
                   int blocks) {
  return guarded([&] {
    if (size < 0) throw pie::Error(PIE_ERR_CONFIG, "a size below 0");
    engine->engine.use_graphs(image, static_cast<size_t>(size), pieces, blocks);
  });
}
int pie_begin_capture(pie_engine* engine, uint64_t compute_stream) {
  return guarded([&] { engine->engine.begin_capture(compute_stream); });
}
int pie_end_capture(pie_engine* engine) {
  return guarded([&] { engine->engine.end_capture(); });
}

int pie_counters_of(pie_engine* engine, int direction, pie_counters* counters) {
  return guarded([&] {
    const auto c = driver(engine).counters(static_cast<pie::Direction>(direction != 0));
    *counters = {c.bytes, c.copies, c.seconds};
  });
}
int pie_inject(pie_engine* engine, int fault, int directions, double a, double b, uint64_t seed) {
  return guarded([&] { driver(engine).inject(fault, directions, a, b, seed); });
}

int pie_stream_create(pie_engine* engine, uint64_t* stream) {
  return guarded([&] { *stream = driver(engine).stream_create(); });
}
int pie_stream_destroy(pie_engine* engine, uint64_t stream) {
  return guarded([&] { driver(engine).stream_destroy(stream); });
}
int pie_stream_synchronize(pie_engine* engine, uint64_t stream) {
  return guarded([&] { driver(engine).stream_synchronize(stream); });
}
int pie_stream_wait(pie_engine* engine, uint64_t stream, uint64_t event) {
  return guarded([&] { driver(engine).stream_wait(stream, event); });
}
int pie_launch_host(pie_engine* engine, uint64_t stream, void (*fn)(void*), void* arg) {
  return guarded([&] { driver(engine).launch_host(stream, fn, arg); });
}
int pie_copy(pie_engine* engine, uint64_t stream, int direction, uint64_t dst, uint64_t src,
             int64_t bytes) {
  return guarded([&] {
    const pie::CopyOp op{dst, src, static_cast<size_t>(bytes)};
    driver(engine).copy_batch(stream, static_cast<pie::Direction>(direction != 0), &op, 1);
  });
}
int pie_event_create(pie_engine* engine, uint64_t* event) {
  return guarded([&] { *event = driver(engine).event_create(true); });
}
int pie_event_destroy(pie_engine* engine, uint64_t event) {
  return guarded([&] { driver(engine).event_destroy(event); });
}
int pie_event_record(pie_engine* engine, uint64_t event, uint64_t stream) {
  return guarded([&] { driver(engine).event_record(event, stream); });
}
int pie_event_query(pie_engine* engine, uint64_t event, int* complete) {
  return guarded([&] { *complete = driver(engine).event_query(event) ? 1 : 0; });
}
int pie_event_synchronize(pie_engine* engine, uint64_t event) {
  return guarded([&] { driver(engine).event_synchronize(event); });
}
int pie_event_elapsed(pie_engine* engine, uint64_t start, uint64_t end, double* seconds) {
  return guarded([&] { *seconds = driver(engine).event_elapsed(start, end); });
}
