// On which NUMA nodes memory is placed.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

namespace pie::pages {

// These nodes alone, or others, too, when they are short.
struct Placement {
  std::vector<int> nodes;
  bool strict;
};

// Memory near `node` (-1: anywhere, and no nodes are named), of which `left` bytes are free (-1:
// not known). Nodes without CPUs, which are a GPU's memory (GH200), get none of it: where there are
// such, the choice is strict, among all nodes with CPUs where `node` is short. Else the kernel goes
// on with the nearest.
Placement placement(size_t bytes, int node, const std::vector<int>& with_memory,
                    const std::vector<int>& with_cpus, int64_t left);

// The numbers in a list such as "0-3,8"; what cannot be read ends it.
std::vector<int> numbers(const std::string& list);

}  // namespace pie::pages
