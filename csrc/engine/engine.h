// Carries out step plans: who copies what, when, and who waits for it. Makes no choice.
//
// One thread calls everything and submits in program order. Who waits for whom is in order.h, by
// the numbers of the rules in csrc/DESIGN.md.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "engine/draft_pages.h"
#include "engine/gates.h"
#include "engine/graph_steps.h"
#include "engine/order.h"
#include "engine/pieces.h"
#include "engine/plan.h"
#include "engine/step_table.h"
#include "memory/arena.h"
#include "memory/pool.h"

namespace pie {

class Engine {
 public:
  // Throws PIE_ERR_CONFIG, PIE_ERR_UNSUPPORTED or PIE_ERR_TRANSFER, leaving nothing behind.
  // `chunks` of the pool are there from the start: all when negative, at least one.
  Engine(const pie_geometry& geometry, const std::string& driver, double link_bytes_per_s,
         uint32_t debug, int64_t chunks);
  ~Engine();  // waits for all work first
  Engine(const Engine&) = delete;
  Engine& operator=(const Engine&) = delete;

  const Geometry& geometry() const { return geometry_; }
  const Arena& arena() const { return arena_; }
  const Pool& pool() const { return pool_; }
  Driver& driver() { return *driver_; }

  // Throws PIE_ERR_STATE inside a step, PIE_ERR_CONFIG for an unknown option.
  void set_option(int option, bool on);

  // Submits the stores, promotions and loads of the head; the first gate submits all other stores,
  // and promotions and loads of the first B layers (rule 21). With PIE_PLAN_STORES_FIRST all stores
  // are submitted, and the compute waits for them, with PIE_PLAN_PROMOTIONS_FIRST all promotions;
  // where that blocks the caller, it throws PIE_ERR_TRANSFER for one that failed, and aborts the
  // step. A bad plan throws PIE_ERR_PLAN and
  // changes nothing; a submission that fails throws and aborts the step. `graph`: true where the
  // step fits a graph.
  bool begin_step(const pie_plan& plan, Stream compute, bool graph = false);
  // The launch of a graph follows: the step has no gates.
  void enter_graph();
  void before_write(int64_t layer);      // later writes of the layer come after stores, promotions
  void before_attention(int64_t layer);  // later reads of the layer come after its loads
  void after_attention(int64_t layer);   // submits the loads of layer + B
  // Closes the step, also when it throws: PIE_ERR_GATE, or PIE_ERR_TRANSFER of a failed copy.
  pie_stats end_step();
  // Stores and promotions of a step that runs no model; later compute comes after them.
  pie_stats run_idle(const pie_plan& plan, Stream compute);
  // Ends an open step: remaining stores and promotions are still copied (rows and pages stay
  // consistent), streams drain, errors that can be cleared are. Also without an open step.
  void abort_step();
  // Waits for the copies submitted so far. Throws PIE_ERR_TRANSFER when one failed.
  void drain();
  // Waits for all work; throws PIE_ERR_GATE when the graph of a step did not copy all its layers.
  void finish();

  // The kernel for short runs of later steps, as StepTable::use(). Throws PIE_ERR_STATE inside a
  // step. An error changes nothing.
  void use_gather(const void* image, size_t size, size_t threshold, int blocks);
  // Captured steps: table and kernel, once. An error changes nothing.
  void use_graphs(const void* image, size_t size, int64_t pieces, int blocks);
  // Between the two, gate calls put copies into the capture of `compute`.
  void begin_capture(Stream compute);
  void end_capture();

  // Throws PIE_ERR_TRANSFER. Needs an idle device; leaves ring, rows and pages it used zeroed.
  void self_test();
  void zero_ring();  // needs an idle device

  // The pool grows and shrinks by whole chunks; a second thread may call these. commit_chunk throws
  // PIE_ERR_TRANSFER when the memory cannot be had. release_chunk waits for the copies submitted so
  // far; a later step that names a row of the chunk is refused.
  void commit_chunk(int64_t chunk);
  void release_chunk(int64_t chunk);

 private:
  // Layers whose copies go ahead of what the caller submits before the first gate, such as the
  // inputs of the step, or the launch of a graph.
  static constexpr int64_t kHead = 1;
  struct Step {
    bool open = false;
    int64_t number = 0;
    Stream compute = 0;
    bool forward = false;     // runs the model: ring pages are loaded
    bool streams_in = false;  // has loads or promotions: the gates wait
    int64_t next_store = 0;   // the first layer whose stores are not submitted
    int64_t next_load = 0;    // the first layer whose loads are not submitted
    bool fits = false;        // a graph
    bool in_graph = false;
    bool stores_first = false, after_all = false;             // rules 24 and 25
    bool stores_after_all = false, promotions_first = false;  // rules 26 and 27
    Runs stores, promotions;
    Runs draft_loads;  // pages of pooled blocks that the drafts of the step read first
    bool drafts_stored = false, drafts_loaded = false;  // submitted
    int64_t promoted_bytes = 0, loaded_bytes = 0;       // of a layer
    Gates gates;
    pie_stats stats{};
  };

  void open_step(const pie_plan& plan, bool forward, Stream compute);
  template <typename Body>
  void or_abort(Body&& body);
  void submit_first(int64_t stores, int64_t loads);
  void submit_rest() { submit_first(geometry_.layers, geometry_.slots); }
  void submit_store(int64_t layer);
  void submit_load(int64_t layer);
  void fill_first();
  bool moves_drafts() const;
  void submit_draft_stores();
  void submit_draft_loads();
  void finish_promotions();
  void copy(Direction direction, const Runs& runs, int64_t layer);
  void poison(int64_t layer);
  bool fits_graph() const;
  void check_layer(int64_t layer) const;
  void check_chunk(int64_t chunk) const;
  pie_stats close_step();
  void skip_counters();
  bool debug(uint32_t flag) const { return (debug_ & flag) != 0; }

  // Torn down from the bottom up: graphs, events, streams, pool, arena, driver.
  const uint32_t debug_;
  const std::unique_ptr<Driver> driver_;
  const Geometry geometry_;
  const Arena arena_;
  Pool pool_;
  Order order_;
  PlanReader plans_;
  const Pieces pieces_;
  StepTable table_;
  DraftPages draft_pages_;
  GraphSteps graphs_;

  bool head_first_ = true;
  Step step_;
  int64_t gated_steps_ = 0;
  std::vector<CopyOp> scratch_;
  Counters reported_in_, reported_out_;
};

}  // namespace pie
