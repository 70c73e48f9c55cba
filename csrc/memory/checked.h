// Arithmetic of sizes that cannot overflow unnoticed.
#pragma once

#include <cstdint>
#include <string>

#include "error.h"

namespace pie {

[[noreturn]] inline void throw_too_large(const std::string& what) {
  throw Error(PIE_ERR_CONFIG, what + " does not fit 63 bits; lower one of its factors");
}

inline int64_t product(int64_t a, int64_t b, const std::string& what) {
  int64_t result = 0;
  if (__builtin_mul_overflow(a, b, &result)) throw_too_large(what);
  return result;
}

inline int64_t sum(int64_t a, int64_t b, const std::string& what) {
  int64_t result = 0;
  if (__builtin_add_overflow(a, b, &result)) throw_too_large(what);
  return result;
}

// The least multiple that is not below the value; both are above 0.
inline int64_t rounded_up(int64_t value, int64_t multiple, const std::string& what) {
  return product((value - 1) / multiple + 1, multiple, what);
}

}  // namespace pie
