#include "drivers/cuda/cuda_gather.h"

#include <algorithm>
#include <cstddef>

namespace pie::cuda {
Gather::Tables::Tables(Device& device)
    : device_(device),
      memory_(static_cast<Table*>(device.host_alloc(kTables * sizeof(Table)))),
      address_(device.reach(reinterpret_cast<Address>(memory_))) {}

Gather::Tables::~Tables() { device_.host_free(memory_, kTables * sizeof(Table)); }

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
    : api_(api()), device_(device), tables_(device), kernel_(device, image, size, blocks) {}

Gather::~Gather() = default;

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
    const Address address = tables_.address(at);
    result = kernel_.launch(stream, address + offsetof(Table, pieces),
                            address + offsetof(Table, count), 0, call);
    if (result != CUDA_SUCCESS) return result;
    call = "cuEventRecord";
    if ((result = api_.cuEventRecord(over_[at], stream)) != CUDA_SUCCESS) return result;
  }
  return CUDA_SUCCESS;
}

}  // namespace pie::cuda
