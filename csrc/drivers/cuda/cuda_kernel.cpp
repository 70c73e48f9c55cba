#include "drivers/cuda/cuda_kernel.h"

#include <algorithm>
#include <cstring>

namespace pie::cuda {
namespace {

constexpr const char* kName = "pie_gather";
constexpr unsigned kThreads = 512;  // 64 KiB in flight a block

unsigned checked(int blocks) {
  if (blocks < 1 || blocks > Kernel::kMostBlocks) {
    throw Error(PIE_ERR_CONFIG, "the gather kernel needs 1 to " +
                                    std::to_string(Kernel::kMostBlocks) + " blocks, not " +
                                    std::to_string(blocks));
  }
  return static_cast<unsigned>(blocks);
}

// Memory of the trial: a table, what it copies, and where to.
struct Trial {
  static constexpr size_t kBytes = 1 << 16, kPiece = 1000, kPieces = (kBytes + kPiece - 1) / kPiece;

  explicit Trial(Device& device)
      : device(device),
        memory(static_cast<Memory*>(device.host_alloc(sizeof(Memory)))),
        address(device.reach(reinterpret_cast<Address>(memory))) {}
  ~Trial() { device.host_free(memory, sizeof(Memory)); }
  Trial(const Trial&) = delete;
  Trial& operator=(const Trial&) = delete;

  struct Memory {
    uint64_t count, copied;
    CopyOp pieces[kPieces];
    unsigned char from[kBytes], to[kBytes];
  };
  Device& device;
  Memory* const memory;
  const Address address;
};

}  // namespace

Kernel::Module::Module(const void* image, size_t size) {
  if (image == nullptr || size == 0) {
    throw Error(PIE_ERR_CONFIG, "the gather kernel needs an image and 1 to " +
                                    std::to_string(kMostBlocks) + " blocks, not 0 bytes");
  }
  // PTX must end with a zero byte, and the caller's bytes may lie at any address.
  const std::string copy(static_cast<const char*>(image), size);
  check(api().cuModuleLoadData(&module_, copy.data()), "cuModuleLoadData");
  const CUresult result = api().cuModuleGetFunction(&kernel_, module_, kName);
  if (result == CUDA_SUCCESS) return;
  api().cuModuleUnload(module_);
  check(result, "cuModuleGetFunction", kName);
}

Kernel::Module::~Module() {
  if (!kept_) api().cuModuleUnload(module_);
}

Kernel::Kernel(Device& device, const void* image, size_t size, int blocks)
    : api_(api()), blocks_(checked(blocks)), module_(image, size) {
  try_it(device);
  module_.keep();
}

void Kernel::set_blocks(int blocks) { blocks_ = checked(blocks); }

CUresult Kernel::launch(CUstream stream, Address table, Address count, Address copied,
                        const char*& call) const {
  void* parameters[] = {&table, &count, &copied};
  call = "cuLaunchKernel";
  return api_.cuLaunchKernel(module_.kernel(), blocks_, 1, 1, kThreads, 1, 1, 0, stream, parameters,
                             nullptr);
}

// On a device that has not run it yet: a few pieces from and to CPU memory, which the kernel writes
// like any memory. This also has the driver load the code now: a step would wait for that, and a
// capture does not allow it.
void Kernel::try_it(Device& device) const {
  const Trial trial(device);
  Trial::Memory& memory = *trial.memory;
  for (size_t i = 0; i < Trial::kBytes; ++i) {
    memory.from[i] = static_cast<unsigned char>(i * 31 + i / 251);
  }
  const Address source = trial.address + offsetof(Trial::Memory, from);
  const Address target = trial.address + offsetof(Trial::Memory, to);
  for (size_t at = 0; at < Trial::kBytes; at += Trial::kPiece) {
    memory.pieces[memory.count++] = {target + at, source + at,
                                     std::min(Trial::kPiece, Trial::kBytes - at)};
  }
  const char* call = nullptr;
  const CUresult launched = launch(nullptr, trial.address + offsetof(Trial::Memory, pieces),
                                   trial.address + offsetof(Trial::Memory, count),
                                   trial.address + offsetof(Trial::Memory, copied), call);
  check(launched, call, kName);
  const CUresult over = api_.cuStreamSynchronize(nullptr);
  if (over != CUDA_SUCCESS) api_.cuStreamSynchronize(nullptr);  // The memory is about to go.
  check(over, "cuStreamSynchronize");
  if (std::memcmp(memory.from, memory.to, Trial::kBytes) != 0) {
    throw Error(PIE_ERR_TRANSFER, "the gather kernel copies other bytes than it should");
  }
  if (memory.copied != 1) {
    throw Error(PIE_ERR_TRANSFER, "the gather kernel does not count its launches");
  }
}

}  // namespace pie::cuda
