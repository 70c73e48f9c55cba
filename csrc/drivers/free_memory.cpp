#include "drivers/free_memory.h"

#include <algorithm>
#include <fstream>
#include <limits>
#include <sstream>

namespace pie {
namespace {

// cgroup v1 writes a number near 2^63 for "no limit".
constexpr int64_t kNoLimit = int64_t{1} << 60;

// The number after the word; -1 where there is none.
int64_t number_after(const std::string& path, const std::string& word) {
  std::ifstream text(path);
  int64_t value = -1;
  for (std::string found; text >> found;) {
    if (found == word) return text >> value ? value : -1;
  }
  return -1;
}

int64_t number_in(const std::string& path) {
  std::ifstream text(path);
  int64_t value = -1;
  return text >> value ? value : -1;  // v2 writes "max" for no limit
}

struct Names {
  const char *limit, *used, *dropped;  // dropped: page cache that the kernel drops first
};
constexpr Names kV1{"/memory.limit_in_bytes", "/memory.usage_in_bytes", "total_inactive_file"};
constexpr Names kV2{"/memory.max", "/memory.current", "inactive_file"};

// What the limits of a group and of all above it leave. Inside a container the path may be the
// host's: what does not exist is passed over.
int64_t room_of(const std::string& mount, std::string path, const Names& names) {
  int64_t least = std::numeric_limits<int64_t>::max();
  for (;;) {
    const std::string group = mount + path;
    const int64_t limit = number_in(group + names.limit), used = number_in(group + names.used);
    if (limit >= 0 && limit < kNoLimit && used >= 0) {
      const int64_t cache = number_after(group + "/memory.stat", names.dropped);
      least = std::min(least, std::max<int64_t>(0, limit - used + std::max<int64_t>(0, cache)));
    }
    const size_t cut = path.rfind('/');
    if (path.empty() || cut == std::string::npos) return least;
    path.erase(cut);
  }
}

}  // namespace

int64_t free_memory(const std::string& root) {
  int64_t least = std::numeric_limits<int64_t>::max();
  const int64_t kib = number_after(root + "/proc/meminfo", "MemAvailable:");
  if (kib >= 0) least = kib * 1024;
  const std::string mount = root + "/sys/fs/cgroup";
  std::ifstream groups(root + "/proc/self/cgroup");
  for (std::string line; std::getline(groups, line);) {  // "4:memory:/a/b" or "0::/a/b"
    std::istringstream fields(line);
    std::string number, controllers, path;
    std::getline(fields, number, ':');
    std::getline(fields, controllers, ':');
    std::getline(fields, path);
    if (number == "0" && controllers.empty()) {
      least = std::min(least, room_of(mount, path, kV2));
    } else if (("," + controllers + ",").find(",memory,") != std::string::npos) {
      least = std::min(least, room_of(mount + "/memory", path, kV1));
    }
  }
  return least == std::numeric_limits<int64_t>::max() ? -1 : least;
}

}  // namespace pie
