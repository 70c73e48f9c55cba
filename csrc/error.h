// The one exception of the engine; the C ABI turns it into a code and a text.
#pragma once

#include <stdexcept>
#include <string>

#include "pie.h"

namespace pie {

class Error : public std::runtime_error {
 public:
  Error(int code, const std::string& text) : std::runtime_error(text), code_(code) {}
  // One of PIE_ERR_*.
  int code() const { return code_; }

 private:
  int code_;
};

// Throws PIE_ERR_TRANSFER: "what: strerror(errno)".
[[noreturn]] void throw_errno(const std::string& what);

}  // namespace pie
