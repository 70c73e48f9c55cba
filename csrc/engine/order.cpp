#include "engine/order.h"

#include <algorithm>
#include <string>
#include <utility>

namespace pie {

Order::Events::Events(Driver& driver, int64_t layers)
    : barrier(driver),
      replayed(driver),
      drafted(driver),
      draft_stored(driver),
      draft_ready(driver) {
  for (int64_t l = 0; l < layers; ++l) {
    ready.emplace_back(driver);
    stored.emplace_back(driver);
    done.emplace_back(driver);
  }
}

Order::Order(Driver& driver, int64_t layers, int64_t slots)
    : driver_(driver), layers_(layers), slots_(slots), h2d_(driver), d2h_(driver), stall_(driver) {
  reset();
}

void Order::open_step(int64_t step, Stream compute) {
  before_ = compute_;
  barrier_ = unknown_ || newest_step_ + 1 != step || before_ != compute;
  newest_step_ = step;
  compute_ = compute;
}

// Rule 3: whatever the compute did since the newest step here comes before the copies; and on a
// compute stream that is new, after them. Rule 25: what fills pages that layers without gates used
// comes after them. Rule 26: so does what stores pages that these wrote; other stores need no more
// than rule 1.
void Order::submit_barrier(bool after_all, bool stores_after_all, std::optional<Event> emptied) {
  if (!barrier_ && !after_all && !stores_after_all) return;
  driver_.event_record(events_->barrier, compute_);
  if (barrier_ || after_all) driver_.stream_wait(h2d_, events_->barrier);
  if (barrier_ || stores_after_all) driver_.stream_wait(d2h_, events_->barrier);
  if (!barrier_) return;
  unknown_ = false;
  if (before_ == compute_) return;
  const size_t last = at(layers_ - 1);
  for (const Stream stream : {Stream{h2d_}, Stream{d2h_}, compute_}) {
    driver_.stream_wait(stream, events_->done[last]);
  }
  driver_.stream_wait(compute_, events_->stored[last]);
  driver_.stream_wait(compute_, events_->ready[last]);
  driver_.stream_wait(compute_, events_->draft_stored);
  driver_.stream_wait(compute_, events_->draft_ready);
  // Rule 20: the tables are emptied after the replay.
  if (emptied) driver_.stream_wait(compute_, *emptied);
}

// Rule 1: after the last compute that wrote or read the pages (done), and after every earlier load
// that reads the rows to be written (ready).
void Order::before_store(int64_t layer) {
  driver_.stream_wait(d2h_, events_->done[at(layer)]);
  driver_.stream_wait(d2h_, events_->ready[at(layer)]);
}

void Order::after_store(int64_t layer) {
  driver_.event_record(events_->stored[at(layer)], d2h_);
  store_pending_[at(layer)] = true;
}

// Rule 2: after the last user of the slot, after the last compute on the layer's own pages (for
// promotions), and after the stores of the rows and from the pages it names.
void Order::before_load(int64_t layer, bool promotes) {
  const int64_t user = slot_user_[at(layer % slots_)];
  if (user >= 0) driver_.stream_wait(h2d_, events_->done[at(user)]);
  if (promotes) driver_.stream_wait(h2d_, events_->done[at(layer)]);
  driver_.stream_wait(h2d_, events_->stored[at(layer)]);
}

void Order::after_load(int64_t layer) {
  driver_.event_record(events_->ready[at(layer)], h2d_);
  slot_user_[at(layer % slots_)] = layer;
}

// Rule 4: a layer's KV write comes after the store that reads the same pages, and after the copy
// that fills the page first: the last block of a request that comes back is written on.
void Order::before_write(int64_t layer, bool promotes) {
  if (store_pending_[at(layer)]) {
    compute_waits(events_->stored[at(layer)]);
    store_pending_[at(layer)] = false;
  }
  if (promotes) compute_waits(events_->ready[at(layer)]);
}

// Rule 5: attention comes after the loads and promotions of its layer. The record that this wait
// means was submitted by begin_step, the first gate or after_attention(layer - B).
void Order::before_attention(int64_t layer) { compute_waits(events_->ready[at(layer)]); }

// Rule 6: the slot is free for layer + B only when this attention is over.
void Order::after_attention(int64_t layer) {
  driver_.event_record(events_->done[at(layer)], compute_);
}

// Rule 7: no gate follows, so the compute waits for all of it here.
void Order::after_idle(bool stores, bool promotions) {
  const size_t last = at(layers_ - 1);
  if (stores) compute_waits(events_->stored[last]);
  if (promotions) compute_waits(events_->ready[last]);
  store_pending_.assign(store_pending_.size(), false);
}

// Rule 24: what the compute does from here on may write a stored page without a gate. Stores are in
// order, so the last layer's record stands for all.
void Order::after_all_stores() {
  compute_waits(events_->stored[at(layers_ - 1)]);
  store_pending_.assign(store_pending_.size(), false);
}

// Rule 27: what the compute does from here on may read a filled page without a gate. H2D is in
// order.
void Order::after_all_promotions() {
  compute_waits(events_->ready[at(layers_ - 1)]);
  store_pending_.assign(store_pending_.size(), false);
}

// Rule 28: drafts pass no gate, so what the compute did before the step comes before all copies of
// their pages, and what it does after the step's last gate after them. It waited for the copies of
// earlier steps itself.
void Order::drafts_begin() { driver_.event_record(events_->drafted, compute_); }

void Order::before_draft_stores() { driver_.stream_wait(d2h_, events_->drafted); }

void Order::after_draft_stores() {
  driver_.event_record(events_->draft_stored, d2h_);
  drafts_stored_ = true;
}

void Order::before_draft_loads() {
  driver_.stream_wait(h2d_, events_->drafted);
  driver_.stream_wait(h2d_, events_->draft_stored);
}

void Order::after_draft_loads() {
  driver_.event_record(events_->draft_ready, h2d_);
  drafts_loaded_ = true;
}

void Order::drafts_wait() {
  const bool stored = std::exchange(drafts_stored_, false);
  const bool loaded = std::exchange(drafts_loaded_, false);
  if (stored) compute_waits(events_->draft_stored);
  if (loaded) compute_waits(events_->draft_ready);
}

void Order::before_launch(int64_t loaded) {
  if (loaded >= 0) driver_.stream_wait(compute_, events_->ready[at(loaded)]);
  if (std::find(store_pending_.begin(), store_pending_.end(), true) == store_pending_.end()) return;
  driver_.stream_wait(compute_, events_->stored[at(layers_ - 1)]);
  store_pending_.assign(store_pending_.size(), false);
}

// Rule 17: what the copy streams do from now on comes after the replay, which reads rows, and reads
// and writes pages, of all layers. Said now and not by a later step's barrier: that would come
// after what the compute does between two steps.
void Order::after_launch() {
  driver_.event_record(events_->replayed, compute_);
  for (const Stream stream : {Stream{h2d_}, Stream{d2h_}}) {
    driver_.stream_wait(stream, events_->replayed);
  }
}

void Order::compute_waits(Event event) {
  try {
    stall_.wait(event);
  } catch (const Error&) {
    if (driver_.stream_is_inline(compute_)) check_streams();  // says which copy failed
    throw;
  }
}

void Order::check_streams() const {
  for (const auto& [stream, name] : {std::pair<Stream, const char*>{h2d_, "loads"},
                                     std::pair<Stream, const char*>{d2h_, "stores"}}) {
    const std::string text = driver_.stream_error(stream);
    if (!text.empty())
      throw Error(PIE_ERR_TRANSFER, std::string("stream of ") + name + ": " + text);
  }
}

void Order::drain() {
  driver_.stream_synchronize(d2h_);
  driver_.stream_synchronize(h2d_);
}

void Order::wait_for_copies() const {
  for (const Stream stream : {Stream{h2d_}, Stream{d2h_}}) {
    const OwnedEvent submitted(driver_);
    driver_.event_record(submitted, stream);
    try {
      driver_.event_synchronize(submitted);
    } catch (const Error&) {
    }  // A copy failed; the engine's thread sees it. None is under way.
  }
}

void Order::wait_for_compute() {
  try {
    driver_.stream_synchronize(compute_);
  } catch (const Error&) {
  }
}

void Order::recover() {
  for (const Stream stream : {Stream{d2h_}, Stream{h2d_}, compute_}) {
    try {
      driver_.stream_synchronize(stream);
    } catch (const Error& error) {
      if (error.code() != PIE_ERR_STATE) driver_.stream_recover(stream);
    }  // PIE_ERR_STATE: the compute stream is gone
  }
  reset();
}

void Order::forget_steps() {
  newest_step_ = 0;
  compute_ = 0;
}

// Only when both copy streams are idle. New events drop the records that failed; what the compute
// does meanwhile is covered by the barrier of the next step (rule 3).
void Order::reset() {
  events_ = std::make_unique<Events>(driver_, layers_);
  slot_user_.assign(at(slots_), -1);
  store_pending_.assign(at(layers_), false);
  drafts_stored_ = drafts_loaded_ = false;
  unknown_ = true;
}

}  // namespace pie
