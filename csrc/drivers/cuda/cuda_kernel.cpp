#include "drivers/cuda/cuda_kernel.h"

#include <cstddef>
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

// Memory of the trial: a table, a chunk of two layers that it copies from, and where to.
struct Trial {
  static constexpr uint64_t kPage = 1000, kPages = 64, kLayer = 1;

  explicit Trial(Device& device)
      : device(device),
        memory(static_cast<Memory*>(device.host_alloc(sizeof(Memory)))),
        address(device.reach(reinterpret_cast<Address>(memory))) {}
  ~Trial() { device.host_free(memory, sizeof(Memory)); }
  Trial(const Trial&) = delete;
  Trial& operator=(const Trial&) = delete;

  struct Memory {
    uint64_t count, copied;
    TablePiece pieces[kPages];
    unsigned char from[2][kPages][kPage], to[kPages][kPage];
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

CUresult Kernel::launch(CUstream stream, const GatherLaunch& what, const char*& call) const {
  GatherLaunch copy = what;
  void* parameters[] = {&copy.table, &copy.count, &copy.copied,
                        &copy.base,  &copy.page,  &copy.layer};
  call = "cuLaunchKernel";
  return api_.cuLaunchKernel(module_.kernel(), blocks_, 1, 1, kThreads, 1, 1, 0, stream, parameters,
                             nullptr);
}

// On a device that has not run it yet: rows to other blocks, from and to CPU memory, which the
// kernel writes like any memory. This also has the driver load the code now: a step would wait for
// that, and a capture does not allow it.
void Kernel::try_it(Device& device) const {
  const Trial trial(device);
  Trial::Memory& memory = *trial.memory;
  auto* const bytes = &memory.from[0][0][0];
  for (size_t i = 0; i < sizeof memory.from; ++i) {
    bytes[i] = static_cast<unsigned char>(i * 31 + i / 251);
  }
  const auto there = [&](size_t offset) { return trial.address + offset; };
  constexpr auto kPages = static_cast<uint32_t>(Trial::kPages);
  for (uint32_t row = 0; row < kPages; ++row) {
    memory.pieces[memory.count++] = {there(offsetof(Trial::Memory, from)), kPages, row,
                                     kPages - 1 - row, 1};
  }
  const char* call = nullptr;
  const CUresult launched =
      launch(nullptr,
             {there(offsetof(Trial::Memory, pieces)), there(offsetof(Trial::Memory, count)),
              there(offsetof(Trial::Memory, copied)), there(offsetof(Trial::Memory, to)),
              Trial::kPage, Trial::kLayer},
             call);
  check(launched, call, kName);
  const CUresult over = api_.cuStreamSynchronize(nullptr);
  if (over != CUDA_SUCCESS) api_.cuStreamSynchronize(nullptr);  // The memory is about to go.
  check(over, "cuStreamSynchronize");
  for (size_t row = 0; row < Trial::kPages; ++row) {
    const auto* const found = memory.to[Trial::kPages - 1 - row];
    if (std::memcmp(memory.from[Trial::kLayer][row], found, Trial::kPage) != 0) {
      throw Error(PIE_ERR_TRANSFER, "the gather kernel copies other bytes than it should");
    }
  }
  if (memory.copied != 1) {
    throw Error(PIE_ERR_TRANSFER, "the gather kernel does not count its launches");
  }
}

}  // namespace pie::cuda
