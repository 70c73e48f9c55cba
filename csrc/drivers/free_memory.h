// How much CPU memory there is to take, before it is taken.
#pragma once

#include <cstdint>
#include <string>

namespace pie {

// Bytes that this process can still take: the least of the machine's MemAvailable and of what the
// memory limits of its cgroups (v1, v2) leave. `root` stands for "/". -1: not known.
int64_t free_memory(const std::string& root = "");

}  // namespace pie
