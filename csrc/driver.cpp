#include "driver.h"

#include <cerrno>
#include <cstring>

#include "drivers/host.h"

namespace pie {

void throw_errno(const std::string& what) {
  throw Error(PIE_ERR_TRANSFER, what + ": " + std::strerror(errno));
}

void Driver::inject(int, int, double, double, uint64_t) {
  throw Error(PIE_ERR_UNSUPPORTED, "this driver has no fault injection; use the host driver");
}

std::unique_ptr<Driver> make_driver(const std::string& kind, double link_bytes_per_s) {
  if (kind == "host") return std::make_unique<HostDriver>(link_bytes_per_s);
  if (kind == "cuda") {
    throw Error(PIE_ERR_UNSUPPORTED,
                "driver \"cuda\" is not built in this version; driver \"host\" is");
  }
  throw Error(PIE_ERR_UNSUPPORTED, "unknown driver \"" + kind + "\"; known: \"host\", \"cuda\"");
}

}  // namespace pie
