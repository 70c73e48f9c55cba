// Which stream waits for which event: the order rules, by their numbers in csrc/DESIGN.md.
#pragma once

#include <memory>
#include <optional>
#include <vector>

#include "drivers/owned.h"
#include "engine/stall.h"

namespace pie {

// Has the copy streams, and the events between them and the compute stream of the newest step. It
// copies nothing: the engine submits copies between a call before_... and the one after_... them.
// Each wait means a record that was submitted earlier in program order (rule 0).
class Order {
 public:
  Order(Driver& driver, int64_t layers, int64_t slots);

  Stream h2d() const { return h2d_; }  // loads and promotions
  Stream d2h() const { return d2h_; }  // stores
  StallClock& stall() { return stall_; }
  int64_t newest_step() const { return newest_step_; }

  // A step begins: the newest one from now on.
  void open_step(int64_t step, Stream compute);
  // Rules 3, 20, 25 and 26. `emptied`: recorded when the tables of graphs are empty; none without
  // graphs.
  void submit_barrier(bool after_all, bool stores_after_all, std::optional<Event> emptied);
  void before_store(int64_t layer);                // rule 1
  void after_store(int64_t layer);                 // rule 1
  void before_load(int64_t layer, bool promotes);  // rule 2
  void after_load(int64_t layer);                  // rule 2
  // The compute waits; throws PIE_ERR_TRANSFER where that blocks the caller and a copy failed.
  void before_write(int64_t layer, bool promotes);  // rule 4
  void before_attention(int64_t layer);             // rule 5
  void after_attention(int64_t layer);              // rule 6
  void after_idle(bool stores, bool promotions);    // rule 7
  void after_all_stores();                          // rule 24
  void after_all_promotions();                      // rule 27

  // Draft layers, which run after the gates of a step (rule 28). drafts_begin: the step copies some
  // of their pages. drafts_wait: the compute waits for these; as the other waits of the compute.
  void drafts_begin();
  void before_draft_stores();
  void after_draft_stores();
  void before_draft_loads();
  void after_draft_loads();
  void drafts_wait();

  // Rule 15: the compute waits for the loads up to `loaded` and for all stores. -1: none.
  void before_launch(int64_t loaded);
  void after_launch();  // rule 17

  // Throws PIE_ERR_TRANSFER with the text of a copy stream's error.
  void check_streams() const;
  void drain();
  // Rule 11, for a second thread: waits for the copies submitted so far, failed ones too.
  void wait_for_copies() const;
  // Rule 18: waits for the compute, and says nothing of what failed there.
  void wait_for_compute();
  bool fails(Stream stream) const { return !driver_.stream_error(stream).empty(); }
  // Rule 9: waits for all three streams, and clears the errors that can be cleared; then reset().
  void recover();
  // Step numbers start anew.
  void forget_steps();

 private:
  // One event a layer, of each meaning. The newest record of each is the one that counts.
  struct Events {
    Events(Driver& driver, int64_t layers);
    std::vector<OwnedEvent> ready;   // H2D stream: the layer's loads and promotions are there
    std::vector<OwnedEvent> stored;  // D2H stream: the layer's stores are out
    std::vector<OwnedEvent> done;    // compute: the layer's attention is over
    OwnedEvent barrier;              // compute: all that was submitted before the step
    OwnedEvent replayed;             // compute: the newest replay of a step is over
    OwnedEvent drafted;              // compute: the drafts before the step are over
    OwnedEvent draft_stored;         // D2H stream: the stores of draft pages are out
    OwnedEvent draft_ready;          // H2D stream: the loads of draft pages are there
  };
  static size_t at(int64_t layer) { return static_cast<size_t>(layer); }
  void reset();
  void compute_waits(Event event);

  Driver& driver_;
  const int64_t layers_, slots_;
  const OwnedStream h2d_, d2h_;
  std::unique_ptr<Events> events_;
  StallClock stall_;
  int64_t newest_step_ = 0;
  Stream compute_ = 0;               // of the newest step, open or not
  Stream before_ = 0;                // the compute stream of the step before
  bool unknown_ = true;              // what the compute did since the newest step
  bool barrier_ = false;             // the newest step begins with one
  std::vector<int64_t> slot_user_;   // the layer that used a ring slot last, -1: none
  std::vector<bool> store_pending_;  // stores that no compute was told to wait for
  bool drafts_stored_ = false, drafts_loaded_ = false;  // that no compute was told to wait for
};

}  // namespace pie
