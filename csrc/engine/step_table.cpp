#include "engine/step_table.h"

#include <algorithm>
#include <cstring>

namespace pie {

StepTable::Parts::Parts(Driver& driver, size_t most)
    : room(most), device(driver, bytes()), staging(driver, kSlots * bytes()) {
  sent.reserve(kSlots);
  for (size_t i = 0; i < kSlots; ++i) sent.emplace_back(driver);
}

void StepTable::use(const void* image, size_t size, size_t threshold, int blocks) {
  if (driver_.arch().empty()) {
    throw Error(PIE_ERR_UNSUPPORTED, "this driver runs no kernels; the gather kernel is CUDA's");
  }
  if (threshold == 0) {
    parts_.reset();
  } else if (image == nullptr && parts_ != nullptr) {
    driver_.load_gather(GatherUse::kSteps, nullptr, 0, blocks);
  } else {
    // No step has more runs: each has a row, and a block, of its own.
    const int64_t most = std::min(geometry_.rows, geometry_.resident + geometry_.pooled);
    auto made = std::make_unique<Parts>(driver_, std::min<size_t>(kMostPieces, most));
    driver_.load_gather(GatherUse::kSteps, image, size, blocks);
    parts_ = std::move(made);
  }
  threshold_ = threshold;
}

void StepTable::divide(const Runs& promotions, const Runs& loads) {
  promotions_ = promotions;
  loads_ = loads;
  table_.clear();
  numbers_ = {};
  promoted_pages_ = pages_ = 0;
  if (parts_ == nullptr) return;
  const auto is_short = [&](const pie_run& run) {
    return static_cast<size_t>(run.count * geometry_.page) < threshold_;
  };
  const auto shorts = [&](const Runs& runs) {
    return static_cast<size_t>(std::count_if(runs.begin(), runs.end(), is_short));
  };
  if (shorts(promotions) + shorts(loads) < kFewest) return;
  for (Runs* const runs : {&promotions_, &loads_}) {
    const auto taken = [&](const pie_run& run) {
      if (!is_short(run) || table_.size() == parts_->room) return false;
      pieces_.append(table_, run);
      pages_ += run.count;
      return true;
    };
    runs->erase(std::remove_if(runs->begin(), runs->end(), taken), runs->end());
    if (runs == &promotions_) {
      numbers_.promotions = table_.size();
      promoted_pages_ = pages_;
    }
  }
  numbers_.all = table_.size();
  sent_ = false;
}

int64_t StepTable::copy(Stream stream, int64_t layer, bool loads) {
  const uint64_t count = loads ? numbers_.all : numbers_.promotions;
  if (count == 0) return 0;
  if (!sent_) send(stream);
  GatherLaunch launch = pieces_.in_layer(layer);
  const Address header = parts_->device.address();
  launch.table = header + sizeof(Header);
  launch.count = header + (loads ? offsetof(Header, all) : offsetof(Header, promotions));
  driver_.gather(stream, launch, (loads ? pages_ : promoted_pages_) * geometry_.page,
                 static_cast<int64_t>(count));
  return static_cast<int64_t>(count);
}

// Rule 23: the launches that read what was there are before it in the same stream, and the slot was
// read when its event is complete.
void StepTable::send(Stream stream) {
  Parts& parts = *parts_;
  const size_t slot = parts.next;
  driver_.event_synchronize(parts.sent[slot]);
  uint8_t* const staged = parts.staging.data() + slot * parts.bytes();
  std::memcpy(staged, &numbers_, sizeof numbers_);
  const size_t bytes = table_.size() * sizeof(TablePiece);
  std::memcpy(staged + sizeof numbers_, table_.data(), bytes);
  driver_.copy_own(stream, Direction::kHostToDevice, parts.device.address(),
                   reinterpret_cast<Address>(staged), sizeof numbers_ + bytes);
  driver_.event_record(parts.sent[slot], stream);
  parts.next = (slot + 1) % kSlots;
  sent_ = true;
}

}  // namespace pie
