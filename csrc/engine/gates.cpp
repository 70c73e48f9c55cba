#include "engine/gates.h"

#include <algorithm>
#include <numeric>

#include "error.h"

namespace pie {
namespace {

using Layers = std::vector<int64_t>;

std::string names(const Layers& layers) {
  std::string text;
  for (size_t i = 0; i < layers.size() && i < 16; ++i) {
    text += (i == 0 ? "" : ", ") + std::to_string(layers[i]);
  }
  return layers.size() > 16 ? text + ", ..." : text;
}

bool in_order(const Layers& calls, int64_t layers) {
  Layers all(static_cast<size_t>(layers));
  std::iota(all.begin(), all.end(), 0);
  return calls == all;
}

std::string part(const char* what, const Layers& layers) {
  return layers.empty() ? std::string() : what + names(layers);
}

}  // namespace

void Gates::reserve(int64_t layers) {
  for (Layers* calls : {&written_, &gated_, &left_}) calls->reserve(static_cast<size_t>(layers));
}

void Gates::write(int64_t layer) {
  if (std::find(gated_.rbegin(), gated_.rend(), layer) != gated_.rend()) late_.push_back(layer);
  written_.push_back(layer);
}

std::string Gates::reads_text(int64_t layers) const {
  if (in_order(gated_, layers) && in_order(left_, layers)) return {};
  Layers missed, twice;
  for (int64_t l = 0; l < layers; ++l) {
    const auto in = std::count(gated_.begin(), gated_.end(), l);
    const auto out = std::count(left_.begin(), left_.end(), l);
    if (in < 1 || out < 1) missed.push_back(l);
    if (in > 1 || out > 1) twice.push_back(l);
  }
  const std::string text =
      part("; without their gate: layers ", missed) + part("; more than once: layers ", twice);
  return text.empty() ? part("; out of order: layers ", gated_) : text;
}

std::string Gates::writes_text(int64_t layers) const {
  if (in_order(written_, layers) && late_.empty()) return {};
  Layers missed, twice;
  for (int64_t l = 0; l < layers; ++l) {
    const auto calls = std::count(written_.begin(), written_.end(), l);
    if (calls < 1) missed.push_back(l);
    if (calls > 1) twice.push_back(l);
  }
  const std::string text = part("; without the gate of their KV write: layers ", missed) +
                           part("; with KV written more than once: layers ", twice) +
                           part("; with KV written after their attention: layers ", late_);
  return text.empty() ? part("; with KV written out of order: layers ", written_) : text;
}

void Gates::check(const std::string& who, int64_t layers, bool writes) const {
  const std::string read = reads_text(layers);
  const std::string wrote = writes ? writes_text(layers) : std::string();
  if (read.empty() && wrote.empty()) return;
  std::string text =
      who + " passed " + std::to_string(passed()) + " gates of " + std::to_string(layers);
  text += read + wrote + ".";
  if (!read.empty()) text += " What such a layer read may be another layer's KV.";
  if (!wrote.empty()) {
    text +=
        " Such a layer may have written over a page that was being copied: where a model or a "
        "backend fuses its KV write, use --block-manager default.";
  }
  throw Error(PIE_ERR_GATE, text);
}

}  // namespace pie
