// Which pieces of a step the gather kernel copies, and the one table of them that all layers read.
#pragma once

#include <memory>
#include <vector>

#include "drivers/owned.h"
#include "engine/pieces.h"

namespace pie {

// Steps with gates; those in graphs have GraphTables. Runs to the device that are shorter than a
// threshold are the kernel's where a step has some of them, all others the copy engines': a
// descriptor of these costs the calling thread 0.5 us in each layer (measured for
// cuMemcpyBatchAsync on an H100, vLLM PR 48434), a table one copy a step and one launch a layer.
class StepTable {
 public:
  // Fewer short runs than this are the copy engines'. vLLM's rule too (PR 42212).
  static constexpr size_t kFewest = 16;

  StepTable(Driver& driver, const Geometry& geometry, const Pieces& pieces)
      : driver_(driver), geometry_(geometry), pieces_(pieces) {}

  // From the next step on runs of less than `threshold` bytes are the kernel's; 0: none are. No
  // launch may be under way. As Driver::load_gather; an error changes nothing.
  void use(const void* image, size_t size, size_t threshold, int blocks);

  // The runs of the step that follows. Throws PIE_ERR_PLAN for a row that is not held.
  void divide(const Runs& promotions, const Runs& loads);
  // Those that are the copy engines'.
  const Runs& promotions() const { return promotions_; }
  const Runs& loads() const { return loads_; }
  // Copies the kernel's in one layer, the loads only if told so; returns how many. The first of a
  // step brings the table (rule 23), from pinned memory: it blocks when kSlots tables are on their
  // way. All launches are on one stream.
  int64_t copy(Stream stream, int64_t layer, bool loads);

 private:
  static constexpr size_t kSlots = 16;          // more than there are steps in flight
  static constexpr size_t kMostPieces = 65536;  // of a table: 1.5 MiB
  struct Header {
    uint64_t all, promotions;  // numbers of pieces; promotions are first
  };
  struct Parts {
    Parts(Driver& driver, size_t room);
    size_t bytes() const { return sizeof(Header) + room * sizeof(TablePiece); }

    const size_t room;
    DeviceBlock device;
    HostBlock staging;
    std::vector<OwnedEvent> sent;  // one a slot: what was in it is on the device
    size_t next = 0;
  };
  void send(Stream stream);

  Driver& driver_;
  const Geometry& geometry_;
  const Pieces& pieces_;
  size_t threshold_ = 0;
  std::unique_ptr<Parts> parts_;
  Runs promotions_, loads_;
  TablePieces table_;
  Header numbers_{};
  int64_t promoted_pages_ = 0, pages_ = 0;  // of the table's promotions, of all of it
  bool sent_ = false;
};

}  // namespace pie
