// The gate calls of one pass through the layers.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace pie {

struct Gates {
  std::vector<int64_t> gated, left;  // layers in the order of their calls

  void reserve(int64_t layers);
  bool none() const { return gated.empty() && left.empty(); }
  // Throws PIE_ERR_GATE unless each layer was gated and left once and in order; `who` passed them.
  void check(const std::string& who, int64_t layers) const;
};

}  // namespace pie
