#include "drivers/cuda/cuda_driver.h"

#include <algorithm>

namespace pie::cuda {
namespace {

CUstream of(Stream stream) { return reinterpret_cast<CUstream>(stream); }
CUevent event_of(Event event) { return reinterpret_cast<CUevent>(event); }

// Batches of tens of thousands made drivers of 2026 fail (vLLM issue 49276).
constexpr size_t kMostInBatch = 1024;

// STREAM for both directions: a row is stored over, and a page written again, by work that other
// streams order after this copy; to read the source any earlier or later than in stream order would
// miss that.
CUmemcpyAttributes stream_ordered(bool overlap) {
  CUmemcpyAttributes attributes{};
  attributes.srcAccessOrder = CU_MEMCPY_SRC_ACCESS_ORDER_STREAM;
  attributes.flags = overlap ? CU_MEMCPY_FLAG_PREFER_OVERLAP_WITH_COMPUTE : CU_MEMCPY_FLAG_DEFAULT;
  return attributes;
}

}  // namespace

CudaDriver::CudaDriver(int device)
    : api_(api()), device_(device), meter_(api_), batches_(api_.batch12 || api_.batch13) {}

CudaDriver::~CudaDriver() {
  synchronize();
  for (const Event event : events_) api_.cuEventDestroy(event_of(event));
  for (const Stream stream : streams_) api_.cuStreamDestroy(of(stream));
}

Address CudaDriver::reserve(size_t bytes, size_t alignment) {
  return device_.reserve(bytes, alignment);
}
void CudaDriver::unreserve(Address a, size_t bytes) noexcept { device_.unreserve(a, bytes); }
Handle CudaDriver::create(size_t bytes) { return device_.create(bytes); }
void CudaDriver::release(Handle handle) noexcept { device_.release(handle); }
void CudaDriver::map(Address a, size_t bytes, Handle handle) { device_.map(a, bytes, handle); }
void CudaDriver::set_access(Address a, size_t bytes) { device_.set_access(a, bytes); }
void CudaDriver::zero(Address a, size_t bytes) { device_.zero(a, bytes); }
void CudaDriver::unmap(Address a, size_t bytes) noexcept { device_.unmap(a, bytes); }
void* CudaDriver::host_alloc(size_t bytes) { return device_.host_alloc(bytes); }
void CudaDriver::host_free(void* p, size_t bytes) noexcept { device_.host_free(p, bytes); }

Stream CudaDriver::stream_create() {
  device_.use();
  int least = 0, greatest = 0;
  check(api_.cuCtxGetStreamPriorityRange(&least, &greatest), "cuCtxGetStreamPriorityRange");
  CUstream stream = nullptr;
  // Not ordered with the legacy default stream: only events order it.
  check(api_.cuStreamCreateWithPriority(&stream, CU_STREAM_NON_BLOCKING, greatest),
        "cuStreamCreateWithPriority");
  std::lock_guard<std::mutex> lock(mutex_);
  return *streams_.insert(reinterpret_cast<Stream>(stream)).first;
}

void CudaDriver::stream_destroy(Stream stream) noexcept {
  {
    std::lock_guard<std::mutex> lock(mutex_);
    if (streams_.erase(stream) == 0) return;
    errors_.erase(stream);
  }
  api_.cuStreamSynchronize(of(stream));
  meter_.forget(stream);
  api_.cuStreamDestroy(of(stream));
}

void CudaDriver::stream_synchronize(Stream stream) {
  check(api_.cuStreamSynchronize(of(stream)), "cuStreamSynchronize");
  const std::string error = marked(stream);
  if (!error.empty()) throw Error(PIE_ERR_TRANSFER, error);
}

std::string CudaDriver::marked(Stream stream) {
  std::lock_guard<std::mutex> lock(mutex_);
  const auto found = errors_.find(stream);
  return found == errors_.end() ? std::string() : found->second;
}

std::string CudaDriver::stream_error(Stream stream) {
  const std::string error = marked(stream);
  if (!error.empty()) return error;
  const CUresult result = api_.cuStreamQuery(of(stream));
  if (result == CUDA_SUCCESS || result == CUDA_ERROR_NOT_READY) return {};
  return "cuStreamQuery: " + text_of(result, "cuStreamQuery");
}

void CudaDriver::stream_recover(Stream stream) {
  check(api_.cuStreamSynchronize(of(stream)), "cuStreamSynchronize");
  std::lock_guard<std::mutex> lock(mutex_);
  errors_.erase(stream);
}

void CudaDriver::submitted(CUresult result, const char* call, Stream stream) {
  if (result == CUDA_SUCCESS) return;
  {
    std::lock_guard<std::mutex> lock(mutex_);
    errors_.emplace(stream, std::string(call) + ": " + text_of(result, call));
  }
  check(result, call);
}

CUresult CudaDriver::copy_all(CUstream stream, Direction direction, const CopyOp* ops, size_t count,
                              const char*& call) {
  // The default stream takes no batches.
  const bool in = direction == Direction::kHostToDevice;
  if (batches_ && stream != nullptr) {
    call = "cuMemcpyBatchAsync";
    CUresult result = CUDA_SUCCESS;
    for (size_t done = 0; done < count && result == CUDA_SUCCESS; done += kMostInBatch) {
      result = copy_some(stream, in, ops + done, std::min(kMostInBatch, count - done));
    }
    if (result != CUDA_ERROR_NOT_SUPPORTED) return result;
    batches_ = false;
  }
  call = in ? "cuMemcpyHtoDAsync" : "cuMemcpyDtoHAsync";
  for (size_t i = 0; i < count; ++i) {
    const CUresult result =
        in ? api_.cuMemcpyHtoDAsync(ops[i].dst, reinterpret_cast<const void*>(ops[i].src),
                                    ops[i].bytes, stream)
           : api_.cuMemcpyDtoHAsync(reinterpret_cast<void*>(ops[i].dst), ops[i].src, ops[i].bytes,
                                    stream);
    if (result != CUDA_SUCCESS) return result;
  }
  return CUDA_SUCCESS;
}

CUresult CudaDriver::copy_some(CUstream stream, bool in, const CopyOp* ops, size_t count) {
  targets_.clear(), sources_.clear(), sizes_.clear();
  for (size_t i = 0; i < count; ++i) {
    // Batches do not translate host addresses, as single copies do.
    targets_.push_back(in ? ops[i].dst : device_.reach(ops[i].dst));
    sources_.push_back(in ? device_.reach(ops[i].src) : ops[i].src);
    sizes_.push_back(ops[i].bytes);
  }
  CUmemcpyAttributes attributes = stream_ordered(overlap_);
  size_t first = 0, failed = 0;
  return api_.batch13 ? api_.batch13(targets_.data(), sources_.data(), sizes_.data(), count,
                                     &attributes, &first, 1, stream)
                      : api_.batch12(targets_.data(), sources_.data(), sizes_.data(), count,
                                     &attributes, &first, 1, &failed, stream);
}

void CudaDriver::copy_batch(Stream stream, Direction direction, const CopyOp* ops, size_t count) {
  if (count == 0) return;
  device_.use();
  int64_t bytes = 0;
  for (size_t i = 0; i < count; ++i) bytes += static_cast<int64_t>(ops[i].bytes);
  meter_.before(stream);
  const char* call = nullptr;
  const CUresult result = copy_all(of(stream), direction, ops, count, call);
  submitted(result, call, stream);
  meter_.after(stream, direction, bytes, static_cast<int64_t>(count));
}

void CudaDriver::load_gather(GatherUse use, const void* image, size_t size, int blocks) {
  device_.use();
  std::unique_ptr<Kernel>& kernel = kernels_[use];
  if (image == nullptr && kernel != nullptr) return kernel->set_blocks(blocks);
  kernel = std::make_unique<Kernel>(device_, image, size, blocks);
}

void CudaDriver::launch_gather(GatherUse use, Stream stream, const GatherLaunch& launch) {
  device_.use();
  const char* call = nullptr;
  const CUresult result = kernels_.at(use)->launch(of(stream), launch, call);
  submitted(result, call, stream);
}

void CudaDriver::gather(Stream stream, const GatherLaunch& launch, int64_t bytes, int64_t pieces) {
  device_.use();
  meter_.before(stream);
  launch_gather(GatherUse::kSteps, stream, launch);
  meter_.after(stream, Direction::kHostToDevice, bytes, pieces);
}

// The rows of a 2D copy, of which there is one: calls that move KV are others.
void CudaDriver::copy_own(Stream stream, Direction direction, Address dst, Address src,
                          size_t bytes) {
  device_.use();
  CUDA_MEMCPY2D copy{};
  copy.WidthInBytes = bytes;
  copy.Height = 1;
  if (direction == Direction::kHostToDevice) {
    copy.srcMemoryType = CU_MEMORYTYPE_HOST;
    copy.srcHost = reinterpret_cast<const void*>(src);
    copy.dstMemoryType = CU_MEMORYTYPE_DEVICE;
    copy.dstDevice = dst;
  } else {
    copy.srcMemoryType = CU_MEMORYTYPE_DEVICE;
    copy.srcDevice = src;
    copy.dstMemoryType = CU_MEMORYTYPE_HOST;
    copy.dstHost = reinterpret_cast<void*>(dst);
  }
  submitted(api_.cuMemcpy2DAsync(&copy, of(stream)), "cuMemcpy2DAsync", stream);
}

bool CudaDriver::stream_is_capturing(Stream stream) {
  device_.use();
  CUstreamCaptureStatus status = CU_STREAM_CAPTURE_STATUS_NONE;
  check(api_.cuStreamIsCapturing(of(stream), &status), "cuStreamIsCapturing");
  return status == CU_STREAM_CAPTURE_STATUS_ACTIVE;
}

void CudaDriver::memset_async(Stream stream, Address dst, int value, size_t bytes) {
  device_.use();
  submitted(api_.cuMemsetD8Async(dst, static_cast<unsigned char>(value), bytes, of(stream)),
            "cuMemsetD8Async", stream);
}

void CudaDriver::launch_host(Stream stream, HostFn fn, void* arg) {
  device_.use();
  submitted(api_.cuLaunchHostFunc(of(stream), fn, arg), "cuLaunchHostFunc", stream);
}

Event CudaDriver::event_create(bool timed) {
  device_.use();
  CUevent event = nullptr;
  // The pool's thread waits for some on the host: without spinning.
  const unsigned flags =
      CU_EVENT_BLOCKING_SYNC | (timed ? CU_EVENT_DEFAULT : CU_EVENT_DISABLE_TIMING);
  check(api_.cuEventCreate(&event, flags), "cuEventCreate");
  std::lock_guard<std::mutex> lock(mutex_);
  return *events_.insert(reinterpret_cast<Event>(event)).first;
}

void CudaDriver::event_destroy(Event event) noexcept {
  std::lock_guard<std::mutex> lock(mutex_);
  if (events_.erase(event) > 0) api_.cuEventDestroy(event_of(event));
}

void CudaDriver::event_record(Event event, Stream stream) {
  device_.use();
  submitted(api_.cuEventRecord(event_of(event), of(stream)), "cuEventRecord", stream);
}

void CudaDriver::stream_wait(Stream stream, Event event) {
  device_.use();
  submitted(api_.cuStreamWaitEvent(of(stream), event_of(event), CU_EVENT_WAIT_DEFAULT),
            "cuStreamWaitEvent", stream);
}

bool CudaDriver::event_query(Event event) {
  const CUresult result = api_.cuEventQuery(event_of(event));
  if (result == CUDA_ERROR_NOT_READY) return false;
  check(result, "cuEventQuery");
  return true;
}

void CudaDriver::event_synchronize(Event event) {
  check(api_.cuEventSynchronize(event_of(event)), "cuEventSynchronize");
}

double CudaDriver::event_elapsed(Event start, Event end) {
  float milliseconds = 0;
  const CUresult result = api_.cuEventElapsedTime(&milliseconds, event_of(start), event_of(end));
  if (result == CUDA_ERROR_NOT_READY) {
    throw Error(PIE_ERR_STATE, "elapsed time needs two events whose records are complete");
  }
  check(result, "cuEventElapsedTime");
  return milliseconds * 1e-3;
}

void CudaDriver::synchronize() noexcept {
  try {
    device_.use();
  } catch (const Error&) {
    return;  // The context is lost; nothing runs in it.
  }
  device_.synchronize();
}

Counters CudaDriver::counters(Direction direction) const { return meter_.counters(direction); }

}  // namespace pie::cuda
