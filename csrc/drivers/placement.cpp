#include "drivers/placement.h"

#include <algorithm>
#include <sstream>

namespace pie::pages {

Placement placement(size_t bytes, int node, const std::vector<int>& with_memory,
                    const std::vector<int>& with_cpus, int64_t left) {
  const auto has_cpus = [&](int n) {
    return std::find(with_cpus.begin(), with_cpus.end(), n) != with_cpus.end();
  };
  const bool all = std::all_of(with_memory.begin(), with_memory.end(), has_cpus);
  // A node that is short gives what it has, and memory that a virtual machine gets when it touches
  // it is in no node before.
  if (all || with_cpus.empty())
    return {node < 0 ? std::vector<int>{} : std::vector<int>{node}, false};
  // The kernel would go on with the memory of a GPU, and kills the process when all of a strict
  // choice is empty.
  const bool fits = has_cpus(node) && left >= static_cast<int64_t>(bytes);
  return {fits ? std::vector<int>{node} : with_cpus, true};
}

std::vector<int> numbers(const std::string& list) {
  std::vector<int> found;
  std::istringstream text(list);
  for (int first = 0; text >> first;) {
    int last = first;
    if (text.peek() == '-' && text.get() && !(text >> last)) break;
    for (int n = first; n <= last; ++n) found.push_back(n);
    if (text.get() != ',') break;
  }
  return found;
}

}  // namespace pie::pages
