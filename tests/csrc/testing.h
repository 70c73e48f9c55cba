// What tests ask of an engine's driver beyond pie.h: work of the host in streams, waits, faults.
//
// Not part of libpie.so. The functions take open engines of a libpie.so that was built from the
// same headers; they check no pointer. They return codes of pie.h, whose text is
// pie_test_last_error().
#pragma once

#include "drivers/driver.h"
#include "pie.h"

extern "C" {

PIE_API const char* pie_test_last_error(void);

// fault: PIE_FAULT_* of the host driver. directions: bit 0 host to device, bit 1 device to host.
PIE_API int pie_test_inject(pie_engine* engine, int fault, int directions, double a, double b,
                            uint64_t seed);
PIE_API int pie_test_launch_host(pie_engine* engine, uint64_t stream, void (*fn)(void*), void* arg);
PIE_API int pie_test_stream_wait(pie_engine* engine, uint64_t stream, uint64_t event);
PIE_API int pie_test_event_query(pie_engine* engine, uint64_t event, int* complete);
PIE_API int pie_test_event_synchronize(pie_engine* engine, uint64_t event);
}
