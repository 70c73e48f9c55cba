/* C interface of the transfer engine.
 *
 * Every function that can fail returns PIE_OK or a PIE_ERR_* code; the text of the last failure of
 * the calling thread is pie_last_error(). Nothing aborts the process: null pointers, engines that
 * are not open, and sizes that overflow are errors. One thread makes all calls of one engine; the
 * interpreter lock need not be held (callbacks take it themselves).
 */
#ifndef PIE_H_
#define PIE_H_

#include <stdint.h>

#define PIE_ABI_VERSION 11
#define PIE_API __attribute__((visibility("default")))

#ifdef __cplusplus
extern "C" {
#endif

enum {
  PIE_OK = 0,
  PIE_ERR_CONFIG = 1,      /* sizes that cannot work */
  PIE_ERR_PLAN = 2,        /* a run outside its range, across a chunk, or against another run */
  PIE_ERR_TRANSFER = 3,    /* a copy, an allocation or a driver call failed */
  PIE_ERR_GATE = 4,        /* not every layer passed its gate, once and in order */
  PIE_ERR_STATE = 5,       /* a call at the wrong time, such as a gate without a step */
  PIE_ERR_UNSUPPORTED = 6, /* a driver or a feature that this build lacks */
};

/* Debug switches: negative controls of tests. */
enum {
  PIE_DEBUG_SKIP_LOADS = 1,   /* no load and no promotion is copied */
  PIE_DEBUG_SKIP_STORES = 2,  /* no store is copied */
  PIE_DEBUG_SKIP_GATE = 4,    /* before_attention of layer L / 2 does nothing, uncounted */
  PIE_DEBUG_LATE_SUBMIT = 8,  /* a layer's load is submitted after the wait for it */
  PIE_DEBUG_POISON = 16,      /* pooled pages are filled with 0xFF before each ring fill */
  PIE_DEBUG_SKIP_DRAFTS = 32, /* no draft page of a pooled block is filled */
};

/* What can be done in two ways, for pie_set_option. */
enum {
  PIE_OPTION_HEAD_FIRST = 0, /* 1 (at start): begin_step submits the copies of layer 0 alone, the
                                first gate the others: copies that the caller submits in between
                                do not wait for these. 0: begin_step submits all it can. */
  PIE_OPTION_OVERLAP = 1,    /* 1 (at start): batches ask the device to prefer copies that overlap
                                with compute. 0: they do not. */
};

enum { PIE_HOST_TO_DEVICE = 0, PIE_DEVICE_TO_HOST = 1 };

/* As pie_vllm.geometry.Geometry. */
typedef struct {
  int64_t num_layers, page_bytes, resident_blocks, pooled_blocks;
  int64_t ring_slots, rows, chunk_rows, granularity;
  int64_t num_regions; /* at least num_layers + draft_layers */
  /* Regions after the first num_layers whose layers run after all gates of a step, pass none, and
   * have pages of their own for pooled blocks; rows hold their pages too. */
  int64_t draft_layers;
} pie_geometry;

/* A run of neighbouring blocks and rows. */
typedef struct {
  int64_t block, row, count;
} pie_run;

/* For pie_plan.flags. Compute without gates uses resident pages too: layers without a pool,
 * zeroing, copies on the device. */
enum {
  PIE_PLAN_STORES_FIRST = 1,     /* compute that is submitted after pie_begin_step comes after all
                                    stores of the step: it may write their pages without a gate */
  PIE_PLAN_AFTER_ALL = 2,        /* promotions and loads come after all compute that was submitted
                                    before pie_begin_step: it may have used their pages without one */
  PIE_PLAN_STORES_AFTER_ALL = 4, /* stores do: it may have written their pages without one */
  PIE_PLAN_PROMOTIONS_FIRST = 8, /* compute that is submitted after pie_begin_step comes after all
                                    promotions of the step: it may read their pages without one */
};

/* The work of one step. loads == NULL with num_loads < 0: the runs of the step before. */
typedef struct {
  int64_t step;
  const pie_run* stores;
  int64_t num_stores;
  const pie_run* promotions;
  int64_t num_promotions;
  const pie_run* loads;
  int64_t num_loads;
  int64_t flags; /* PIE_PLAN_* */
} pie_plan;

/* Bytes and copies are those the step submitted; seconds those that finished since the last one,
 * and bytes_finished are the bytes to the device that load_seconds is of.
 * stall_seconds are of step stall_step: this one where waits block the caller, else an earlier one
 * that was timed and is over now, or -1: none. */
typedef struct {
  int64_t step, bytes_loaded, bytes_stored, bytes_promoted, bytes_finished, gates, copies,
      stall_step;
  double load_seconds, store_seconds, stall_seconds;
} pie_stats;

typedef struct {
  int64_t bytes, copies;
  double seconds;
} pie_counters;

typedef struct pie_engine pie_engine;

PIE_API int pie_abi_version(void);
PIE_API const char* pie_last_error(void);

/* driver: "host", "cuda" or "cuda:N". link_bytes_per_s <= 0: as fast as the machine. chunks of the
 * pool are there from the start: all when negative, at least one. */
PIE_API int pie_granularity(const char* driver, int64_t* bytes);
PIE_API int pie_open(const pie_geometry* geometry, const char* driver, double link_bytes_per_s,
                     uint32_t debug, int64_t chunks, pie_engine** engine);
/* Drains all streams, then gives everything back. */
PIE_API int pie_close(pie_engine* engine);

PIE_API int pie_arena(pie_engine* engine, uint64_t* address, int64_t* virtual_bytes);
/* Host: of the chunks that are there now. */
PIE_API int pie_bytes(pie_engine* engine, int64_t* host, int64_t* device);
/* These two may be called by one other thread, beside steps. Release waits for the copies submitted
 * so far; a plan that names a row of a chunk that is not there is refused with PIE_ERR_PLAN. */
PIE_API int pie_commit_chunk(pie_engine* engine, int64_t chunk);
PIE_API int pie_release_chunk(pie_engine* engine, int64_t chunk);

/* Between steps. */
PIE_API int pie_set_option(pie_engine* engine, int option, int value);

PIE_API int pie_begin_step(pie_engine* engine, const pie_plan* plan, uint64_t compute_stream);
/* As pie_begin_step; *fits says whether the step may run in a captured graph. Then only the loads
 * of the head are submitted; the first gate submits the others, if no graph is entered. */
PIE_API int pie_begin_graph_step(pie_engine* engine, const pie_plan* plan, uint64_t compute_stream,
                                 int* fits);
/* The step runs in a graph whose launch follows: fills the tables, and has the compute wait for all
 * that the graph does not copy. The step has no gates from here on. */
PIE_API int pie_enter_graph(pie_engine* engine);
PIE_API int pie_before_write(pie_engine* engine, int64_t layer);
PIE_API int pie_before_attention(pie_engine* engine, int64_t layer);
PIE_API int pie_after_attention(pie_engine* engine, int64_t layer);
PIE_API int pie_end_step(pie_engine* engine, pie_stats* stats);
PIE_API int pie_run_idle(pie_engine* engine, const pie_plan* plan, uint64_t compute_stream,
                         pie_stats* stats);
PIE_API int pie_abort_step(pie_engine* engine);
/* Waits for the copies submitted so far. */
PIE_API int pie_drain(pie_engine* engine);

PIE_API int pie_self_test(pie_engine* engine);
PIE_API int pie_zero_ring(pie_engine* engine);

/* The device's architecture as compilers call it ("sm_90"), cut to size; empty: no kernels. */
PIE_API int pie_device_arch(pie_engine* engine, char* arch, int64_t size);
/* Between steps. From the next one on runs to the device of less than threshold_bytes are copied by
 * the kernel pie_gather in the image, where a step has 16 of them or more, with a grid of 1 to 12
 * blocks; all others by the copy engines. image NULL: by the kernel in use. threshold_bytes 0: none
 * are, and the image is not looked at. PIE_ERR_UNSUPPORTED: no kernels, or the image is for other
 * devices. An error changes nothing. */
PIE_API int pie_use_gather(pie_engine* engine, const void* image, int64_t size,
                           int64_t threshold_bytes, int blocks);

/* Prepares captured steps: a table of `pieces` entries, and the kernel of the image, as for
 * pie_use_gather but whatever that does. Once an engine. PIE_ERR_UNSUPPORTED: no kernels, or the
 * image is for other devices. An error changes nothing. */
PIE_API int pie_use_graphs(pie_engine* engine, const void* image, int64_t size, int64_t pieces,
                           int blocks);
/* Between the two the gate calls put copies into the capture of compute_stream, which must be under
 * way. End: PIE_ERR_GATE unless each layer passed once and in order; the capture mode ends always.
 */
PIE_API int pie_begin_capture(pie_engine* engine, uint64_t compute_stream);
PIE_API int pie_end_capture(pie_engine* engine);

/* Totals of copies that are complete; those that a graph made are not among them. */
PIE_API int pie_counters_of(pie_engine* engine, int direction, pie_counters* counters);

/* Diagnostics: what the GPU check (benchmarks/gpu) needs on the machine of a user to see rows and
 * to time single copies of the engine's driver. Serving calls none of these. */

/* Host address of a row's page of one layer. */
PIE_API int pie_row_page(pie_engine* engine, int64_t row, int64_t layer, uint64_t* address);
PIE_API int pie_stream_create(pie_engine* engine, uint64_t* stream);
PIE_API int pie_stream_destroy(pie_engine* engine, uint64_t stream);
PIE_API int pie_stream_synchronize(pie_engine* engine, uint64_t stream);
PIE_API int pie_copy(pie_engine* engine, uint64_t stream, int direction, uint64_t dst, uint64_t src,
                     int64_t bytes);
PIE_API int pie_event_create(pie_engine* engine, uint64_t* event);
PIE_API int pie_event_destroy(pie_engine* engine, uint64_t event);
PIE_API int pie_event_record(pie_engine* engine, uint64_t event, uint64_t stream);
PIE_API int pie_event_elapsed(pie_engine* engine, uint64_t start, uint64_t end, double* seconds);

#ifdef __cplusplus
}
#endif
#endif /* PIE_H_ */
