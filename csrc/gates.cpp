#include "gates.h"

#include <algorithm>
#include <numeric>

#include "error.h"

namespace pie {
namespace {

std::string names(const std::vector<int64_t>& layers) {
  std::string text;
  for (size_t i = 0; i < layers.size() && i < 16; ++i) {
    text += (i == 0 ? "" : ", ") + std::to_string(layers[i]);
  }
  return layers.size() > 16 ? text + ", ..." : text;
}

}  // namespace

void Gates::reserve(int64_t layers) {
  gated.reserve(static_cast<size_t>(layers));
  left.reserve(static_cast<size_t>(layers));
}

void Gates::check(const std::string& who, int64_t layers) const {
  std::vector<int64_t> all(static_cast<size_t>(layers));
  std::iota(all.begin(), all.end(), 0);
  if (gated == all && left == all) return;
  std::vector<int64_t> missed, twice;
  for (int64_t l = 0; l < layers; ++l) {
    const auto in = std::count(gated.begin(), gated.end(), l);
    const auto out = std::count(left.begin(), left.end(), l);
    if (in < 1 || out < 1) missed.push_back(l);
    if (in > 1 || out > 1) twice.push_back(l);
  }
  std::string text;
  if (!missed.empty()) text += "; without their gate: layers " + names(missed);
  if (!twice.empty()) text += "; more than once: layers " + names(twice);
  if (text.empty()) text += "; out of order: layers " + names(gated);
  throw Error(PIE_ERR_GATE, who + " passed " + std::to_string(gated.size()) + " gates of " +
                                std::to_string(layers) + text +
                                ". What such a layer read may be another layer's KV");
}

}  // namespace pie
