// Which NUMA nodes memory is placed on. Exits with 1 at the first wrong choice.
#include "drivers/placement.h"

#include <cstdio>

namespace {

using pie::pages::placement;
using Nodes = std::vector<int>;

bool failed = false;

void check(const char* what, const pie::pages::Placement& found, const Nodes& nodes, bool strict) {
  if (found.nodes == nodes && found.strict == strict) return;
  std::printf("wrong: %s\n", what);
  failed = true;
}

}  // namespace

int main() {
  constexpr size_t kChunk = size_t{64} << 20;
  const Nodes two = {0, 1}, grace = {0, 1, 2, 10};
  check("two sockets", placement(kChunk, 1, two, two, 1 << 30), {1}, false);
  check("two sockets, one short: the other helps", placement(kChunk, 1, two, two, 5), {1}, false);
  check("not known what is left", placement(kChunk, 0, {0}, {0}, -1), {0}, false);
  check("a GPU's memory is a node", placement(kChunk, 1, grace, two, 1 << 30), {1}, true);
  check("short beside a GPU's memory", placement(kChunk, 1, grace, two, 5), {0, 1}, true);
  check("not known beside it", placement(kChunk, 0, grace, two, -1), {0, 1}, true);
  check("never the GPU's own", placement(kChunk, 2, grace, two, 1 << 30), {0, 1}, true);
  check("anywhere", placement(kChunk, -1, two, two, -1), {}, false);
  check("anywhere but on a GPU", placement(kChunk, -1, grace, two, -1), {0, 1}, true);
  check("no node is known", placement(kChunk, 0, {}, {}, -1), {0}, false);
  if (pie::pages::numbers("0-3,8,10-11") != Nodes{0, 1, 2, 3, 8, 10, 11})
    check("list", {}, {0}, true);
  if (!pie::pages::numbers("").empty()) check("an empty list", {}, {0}, true);
  if (!failed) std::printf("all right\n");
  return failed ? 1 : 0;
}
