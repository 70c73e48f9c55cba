#include "testing.h"

#include <exception>
#include <string>

#include "capi.h"

namespace {

thread_local std::string test_error;

// Of the driver only virtual functions are called: their code is that of the engine's library.
template <typename Body>
int with_driver(pie_engine* engine, Body&& body) noexcept {
  try {
    body(engine->engine.driver());
    return PIE_OK;
  } catch (const pie::Error& error) {
    test_error = error.what();
    return error.code();
  } catch (const std::exception& error) {
    test_error = error.what();
    return PIE_ERR_TRANSFER;
  }
}

}  // namespace

const char* pie_test_last_error(void) { return test_error.c_str(); }

int pie_test_inject(pie_engine* engine, int fault, int directions, double a, double b,
                    uint64_t seed) {
  return with_driver(engine,
                     [&](pie::Driver& driver) { driver.inject(fault, directions, a, b, seed); });
}
int pie_test_launch_host(pie_engine* engine, uint64_t stream, void (*fn)(void*), void* arg) {
  return with_driver(engine, [&](pie::Driver& driver) { driver.launch_host(stream, fn, arg); });
}
int pie_test_stream_wait(pie_engine* engine, uint64_t stream, uint64_t event) {
  return with_driver(engine, [&](pie::Driver& driver) { driver.stream_wait(stream, event); });
}
int pie_test_event_query(pie_engine* engine, uint64_t event, int* complete) {
  return with_driver(engine,
                     [&](pie::Driver& driver) { *complete = driver.event_query(event) ? 1 : 0; });
}
int pie_test_event_synchronize(pie_engine* engine, uint64_t event) {
  return with_driver(engine, [&](pie::Driver& driver) { driver.event_synchronize(event); });
}
