#include "cuda_gather.h"

#include <algorithm>
#include <cstring>

namespace pie::cuda {
namespace {

constexpr const char* kKernel = "pie_gather";
constexpr unsigned kThreads = 512;  // 64 KiB in flight a block

}  // namespace

Gather::Tables::Tables(Device& device)
    : device_(device),
      memory_(static_cast<Table*>(device.host_alloc(kTables * sizeof(Table)))),
      address_(device.reach(reinterpret_cast<Address>(memory_))) {}

Gather::Tables::~Tables() { device_.host_free(memory_, kTables * sizeof(Table)); }

Gather::Module::Module(const void* image, size_t size) {
  // PTX must end with a zero byte, and the caller's bytes may lie at any address.
  const std::string copy(static_cast<const char*>(image), size);
  check(api().cuModuleLoadData(&module_, copy.data()), "cuModuleLoadData");
  const CUresult result = api().cuModuleGetFunction(&kernel_, module_, kKernel);
  if (result == CUDA_SUCCESS) return;
  api().cuModuleUnload(module_);
  check(result, "cuModuleGetFunction", kKernel);
}

Gather::Module::~Module() { api().cuModuleUnload(module_); }

Gather::Events::Events() : all_(kTables, nullptr) {
  for (CUevent& event : all_) {
    const CUresult result = api().cuEventCreate(&event, CU_EVENT_DISABLE_TIMING);
    if (result == CUDA_SUCCESS) continue;
    for (const CUevent made : all_) {
      if (made != nullptr) api().cuEventDestroy(made);
    }
    check(result, "cuEventCreate");
  }
}

Gather::Events::~Events() {
  for (const CUevent event : all_) {
    api().cuEventSynchronize(event);
    api().cuEventDestroy(event);
  }
}

Gather::Gather(Device& device, const void* image, size_t size, int blocks)
    : api_(api()),
      device_(device),
      blocks_(static_cast<unsigned>(blocks)),
      tables_(device),
      module_(image, size) {
  try_it();
}

Gather::~Gather() = default;

CUresult Gather::launch(CUstream stream, size_t table, const char*& call) const {
  Address count = tables_.address(table) + offsetof(Table, count);
  Address pieces = tables_.address(table) + offsetof(Table, pieces);
  void* parameters[] = {&pieces, &count};
  call = "cuLaunchKernel";
  const CUresult result = api_.cuLaunchKernel(module_.kernel(), blocks_, 1, 1, kThreads, 1, 1, 0,
                                              stream, parameters, nullptr);
  if (result != CUDA_SUCCESS) return result;
  call = "cuEventRecord";
  return api_.cuEventRecord(over_[table], stream);
}

// On a device that has not run it yet: a few pieces from one table to another, which the kernel
// writes like any memory. This also has the driver load the code now, when nothing waits for it.
void Gather::try_it() {
  constexpr size_t kBytes = 1 << 16, kPiece = 1000;
  static_assert(kBytes < sizeof(Table::pieces), "fits");
  auto* const from = reinterpret_cast<unsigned char*>(tables_[1].pieces);
  const auto* const to = reinterpret_cast<unsigned char*>(tables_[2].pieces);
  const Address source = tables_.address(1) + offsetof(Table, pieces);
  const Address target = tables_.address(2) + offsetof(Table, pieces);
  for (size_t i = 0; i < kBytes; ++i) from[i] = static_cast<unsigned char>(i * 31 + i / 251);
  Table& table = tables_[0];
  for (size_t at = 0; at < kBytes; at += kPiece) {
    table.pieces[table.count++] = {target + at, source + at, std::min(kPiece, kBytes - at)};
  }
  const char* call = nullptr;
  const CUresult launched = launch(nullptr, 0, call);
  check(launched, call, kKernel);
  check(api_.cuStreamSynchronize(nullptr), "cuStreamSynchronize");
  if (std::memcmp(from, to, kBytes) != 0) {
    throw Error(PIE_ERR_TRANSFER, "the gather kernel copies other bytes than it should");
  }
}

CUresult Gather::copy(CUstream stream, const CopyOp* ops, size_t count, const char*& call) {
  for (size_t done = 0; done < count; done += kPieces) {
    const size_t at = next_;
    next_ = (next_ + 1) % kTables;
    call = "cuEventSynchronize";
    CUresult result = api_.cuEventSynchronize(over_[at]);  // at once, but when the ring goes round
    if (result != CUDA_SUCCESS) return result;
    Table& table = tables_[at];
    table.count = std::min(kPieces, count - done);
    for (size_t i = 0; i < table.count; ++i) {
      const CopyOp& op = ops[done + i];
      table.pieces[i] = {op.dst, device_.reach(op.src), op.bytes};
    }
    if ((result = launch(stream, at, call)) != CUDA_SUCCESS) return result;
  }
  return CUDA_SUCCESS;
}

}  // namespace pie::cuda
