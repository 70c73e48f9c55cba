// Streams and events that end with their owner.
#pragma once

#include "drivers/driver.h"

namespace pie {

class OwnedStream {
 public:
  explicit OwnedStream(Driver& driver) : driver_(driver), id_(driver.stream_create()) {}
  ~OwnedStream() { driver_.stream_destroy(id_); }
  OwnedStream(const OwnedStream&) = delete;
  OwnedStream& operator=(const OwnedStream&) = delete;
  operator Stream() const { return id_; }  // NOLINT: is its id

 private:
  Driver& driver_;
  const Stream id_;
};

class OwnedEvent {
 public:
  explicit OwnedEvent(Driver& driver, bool timed = false)
      : driver_(&driver), id_(driver.event_create(timed)) {}
  OwnedEvent(OwnedEvent&& other) noexcept : driver_(other.driver_), id_(other.id_) {
    other.driver_ = nullptr;
  }
  OwnedEvent(const OwnedEvent&) = delete;
  OwnedEvent& operator=(const OwnedEvent&) = delete;
  ~OwnedEvent() {
    if (driver_ != nullptr) driver_->event_destroy(id_);
  }
  operator Event() const { return id_; }  // NOLINT: is its id

 private:
  Driver* driver_;
  Event id_;
};

}  // namespace pie
