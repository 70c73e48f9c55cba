// The gate calls of one pass through the layers.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace pie {

class Gates {
 public:
  void reserve(int64_t layers);
  void write(int64_t layer);  // the layer's KV write
  void enter(int64_t layer) { gated_.push_back(layer); }
  void leave(int64_t layer) { left_.push_back(layer); }

  bool none() const { return written_.empty() && gated_.empty() && left_.empty(); }
  int64_t passed() const { return static_cast<int64_t>(gated_.size()); }
  // Throws PIE_ERR_GATE unless each layer was gated and left once and in order; `who` passed them.
  // `writes`: the same of the writes, each ahead of its layer's attention.
  void check(const std::string& who, int64_t layers, bool writes) const;

 private:
  std::string reads_text(int64_t layers) const;
  std::string writes_text(int64_t layers) const;

  std::vector<int64_t> written_, gated_, left_;  // layers in the order of their calls
  std::vector<int64_t> late_;                    // written after their attention
};

}  // namespace pie
