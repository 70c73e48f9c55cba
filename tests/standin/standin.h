// How tests steer and question the stand-in for libcuda. Everything here is thread-safe.
#pragma once

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif
#pragma GCC visibility push(default)

// Directions: 0 host to device, 1 device to host, 2 device to device, 3 host to host.
// Masks of directions: 1 << direction.

// Settings by name; their meaning: state.cpp. 0, or -1 for an unknown name.
int standin_set(const char* key, int64_t value);
int64_t standin_get(const char* key);

// Faults, until standin_clear(). nth counts from 1, from now on.
void standin_fail(const char* function, int64_t nth, int result);
void standin_fail_copy(int direction, int64_t nth);
void standin_delay(int directions, double min_ms, double max_ms, uint64_t seed);
void standin_tear(int directions, double ms);
void standin_link(double bytes_per_s);
void standin_clear(void);

// Tells the race check what compute on a stream does, 0 or a CUDA error. STANDIN_HOST: the calling
// thread itself, outside any stream.
#define STANDIN_HOST (~(uint64_t)0)
int standin_access(uint64_t stream, uint64_t address, size_t bytes, int write);
// Orders the calling thread after all threads that called this before: a hand-over by other means.
void standin_host_fence(void);

// A kernel by name. Parameters are copied at launch: sizes has the bytes of each. declare (or null)
// runs at launch and names by standin_touch what the kernel will access.
typedef void (*standin_kernel)(void** params, const unsigned grid[3], const unsigned block[3]);
void standin_register_kernel(const char* name, standin_kernel run, standin_kernel declare,
                             const size_t* sizes, size_t count);
void standin_touch(uint64_t address, size_t bytes, int write);
// Inside declare only: what the memory will hold when the launch runs. Of device memory, as far as
// 2D copies and memsets wrote it; then 1, else 0.
int standin_peek(uint64_t address, size_t bytes, void* out);
// What a kernel dereferences for a device address: differs for cuMemHostGetDevicePointer's.
void* standin_pointer(uint64_t address);

// Counters and texts. A text is cut to size; the return value is its full length.
int64_t standin_calls(const char* function);
void standin_copied(int direction, int64_t* copies, int64_t* bytes);
size_t standin_violations(char* text, size_t size);
size_t standin_live(char* text, size_t size);
// Forgets violations, counters, faults, errors; settings go back. Refuses, with the text of
// standin_live, while anything is live. The return value is that text's length.
size_t standin_reset(char* text, size_t size);

#pragma GCC visibility pop
#ifdef __cplusplus
}
#endif
