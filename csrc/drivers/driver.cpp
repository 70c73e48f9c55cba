#include "drivers/driver.h"

#include <cerrno>
#include <climits>
#include <cstdlib>
#include <cstring>

#include "drivers/host/host_driver.h"
#if PIE_WITH_CUDA
#include "drivers/cuda/cuda_driver.h"
#endif

namespace pie {
namespace {

std::unique_ptr<Driver> make_cuda(const std::string& kind) {
#if PIE_WITH_CUDA
  int device = -1;
  if (kind.size() > 5) {
    char* end = nullptr;
    const long number = std::strtol(kind.c_str() + 5, &end, 10);
    if (*end != 0 || number < 0 || number > INT_MAX) {
      throw Error(PIE_ERR_UNSUPPORTED, "driver \"" + kind + "\" names no device; \"cuda:0\" does");
    }
    device = static_cast<int>(number);
  }
  return std::make_unique<cuda::CudaDriver>(device);
#else
  throw Error(PIE_ERR_UNSUPPORTED,
              "driver \"" + kind + "\" is not in this build: there was no cuda.h of CUDA 12.8 or " +
                  "newer; pip install nvidia-cuda-runtime, then build again");
#endif
}

}  // namespace

void throw_errno(const std::string& what) {
  throw Error(PIE_ERR_TRANSFER, what + ": " + std::strerror(errno));
}

void Driver::sample(bool) {}
void Driver::prefer_overlap(bool) {}

std::string Driver::arch() const { return {}; }

void Driver::load_gather(GatherUse, const void*, size_t, int) {
  throw Error(PIE_ERR_UNSUPPORTED, "this driver runs no kernels; the gather kernel is CUDA's");
}
void Driver::launch_gather(GatherUse use, Stream, const GatherLaunch&) {
  load_gather(use, nullptr, 0, 0);
}
void Driver::gather(Stream, const GatherLaunch&, int64_t, int64_t) {
  load_gather(GatherUse::kSteps, nullptr, 0, 0);
}
void Driver::copy_own(Stream, Direction, Address, Address, size_t) {
  load_gather(GatherUse::kGraphs, nullptr, 0, 0);
}
Address Driver::reach(Address host) const { return host; }
bool Driver::stream_is_capturing(Stream) { return false; }

void Driver::inject(int, int, double, double, uint64_t) {
  throw Error(PIE_ERR_UNSUPPORTED, "this driver has no fault injection; use the host driver");
}

std::unique_ptr<Driver> make_driver(const std::string& kind, double link_bytes_per_s) {
  if (kind == "host") return std::make_unique<HostDriver>(link_bytes_per_s);
  if (kind == "cuda" || kind.rfind("cuda:", 0) == 0) return make_cuda(kind);
  throw Error(PIE_ERR_UNSUPPORTED,
              "unknown driver \"" + kind + "\"; known: \"host\", \"cuda\", \"cuda:N\" (device N)");
}

}  // namespace pie
