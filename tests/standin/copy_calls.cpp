#include <cstring>

#include "copy.h"

using namespace standin;

namespace {

CUresult one(Call& call, uint64_t dst, uint64_t src, size_t bytes, CUstream handle, int expected,
             const char* what) {
  if (call.failed()) return call.code();
  Stream* stream;
  if (!find_stream(handle, stream)) return CUDA_ERROR_INVALID_HANDLE;
  if (bytes == 0) return CUDA_SUCCESS;
  Batch batch(stream, what);
  std::string why;
  if (!batch.add(dst, src, bytes, expected, Accesses::kInOrder, why)) {
    return call.wrong(CUDA_ERROR_INVALID_VALUE, why);
  }
  return batch.submit(call);
}

bool valid_attributes(const CUmemcpyAttributes* attrs, const size_t* starts, size_t attr_count,
                      size_t count) {
  if (!attrs || !starts || attr_count == 0 || attr_count > count || starts[0] != 0) return false;
  for (size_t i = 0; i < attr_count; ++i) {
    if (i > 0 && starts[i] <= starts[i - 1]) return false;
    if (starts[i] >= count) return false;
    if (attrs[i].srcAccessOrder < CU_MEMCPY_SRC_ACCESS_ORDER_STREAM ||
        attrs[i].srcAccessOrder > CU_MEMCPY_SRC_ACCESS_ORDER_ANY) {
      return false;
    }
    if (attrs[i].flags > CU_MEMCPY_FLAG_PREFER_OVERLAP_WITH_COMPUTE) return false;
  }
  return true;
}

CUresult batch_copy(const CUdeviceptr* dsts, const CUdeviceptr* srcs, const size_t* sizes,
                    size_t count, const CUmemcpyAttributes* attrs, const size_t* starts,
                    size_t attr_count, size_t* fail_index, CUstream handle) {
  Call call("cuMemcpyBatchAsync", kUse);
  if (fail_index) *fail_index = SIZE_MAX;  // no copy in particular
  if (call.failed()) return call.code();
  if (!setting("batch_supported")) return CUDA_ERROR_NOT_SUPPORTED;
  Stream* stream;
  if (!find_stream(handle, stream)) return CUDA_ERROR_INVALID_HANDLE;
  if (handle == nullptr || handle == CU_STREAM_LEGACY) return CUDA_ERROR_INVALID_VALUE;
  if (stream && stream->capture) return CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED;  // it goes on
  if (!dsts || !srcs || !sizes || !valid_attributes(attrs, starts, attr_count, count)) {
    return call.wrong(CUDA_ERROR_INVALID_VALUE, "invalid arrays or attributes");
  }
  state().settings["batch_flags"] = attrs[0].flags;
  Batch batch(stream, "cuMemcpyBatchAsync");
  for (size_t i = 0, a = 0; i < count; ++i) {
    if (a + 1 < attr_count && starts[a + 1] == i) ++a;
    auto when = Accesses::kInOrder;
    if (attrs[a].srcAccessOrder == CU_MEMCPY_SRC_ACCESS_ORDER_ANY) when = Accesses::kEarly;
    if (attrs[a].srcAccessOrder == CU_MEMCPY_SRC_ACCESS_ORDER_DURING_API_CALL) {
      when = Accesses::kDuringCall;
    }
    std::string why = "no bytes";
    if (sizes[i] == 0 || !batch.add(dsts[i], srcs[i], sizes[i], -1, when, why)) {
      if (fail_index) *fail_index = i;
      return call.wrong(CUDA_ERROR_INVALID_VALUE, "copy " + std::to_string(i) + ": " + why);
    }
  }
  const CUresult code = batch.submit(call);
  const auto cost = std::chrono::nanoseconds(setting("submit_ns")) * static_cast<int64_t>(count);
  const auto over = Time::now() + cost;
  call.lock.unlock();
  while (Time::now() < over) {  // The caller's processor works.
  }
  call.lock.lock();
  return code;
}

CUresult set_bytes(Call& call, uint64_t dst, unsigned char value, size_t bytes, CUstream handle,
                   const char* what) {
  if (call.failed()) return call.code();
  Stream* stream;
  if (!find_stream(handle, stream)) return CUDA_ERROR_INVALID_HANDLE;
  if (bytes == 0) return CUDA_SUCCESS;
  Range range;
  std::string why;
  if (side_of(dst) != Side::kDevice) why = "is not device memory";
  if (!why.empty() || !resolve(dst, bytes, true, range, why)) {
    return call.wrong(CUDA_ERROR_INVALID_VALUE, range_text(dst, bytes) + " " + why);
  }
  return enqueue(call, stream, [range, dst, value, bytes, what](const Actor& actor) {
    Accesses(actor, what).add(range, dst, true);
    foresee(range, value);
    std::vector<AreaPtr> areas;
    add_areas(areas, range);
    return Run([areas, what, at = range.pointer, value, bytes](Lock& lock) {
      if (!pin(areas, what)) return;
      lock.unlock();
      std::memset(at, value, bytes);
      lock.lock();
      unpin(areas);
    });
  });
}

// One side of a 2D copy: its first byte, and how far its rows are apart.
bool side(CUmemorytype type, const void* host, CUdeviceptr device, size_t pitch, size_t width,
          uint64_t& address, size_t& apart) {
  if (type == CU_MEMORYTYPE_HOST) {
    address = reinterpret_cast<uint64_t>(host);
  } else if (type == CU_MEMORYTYPE_DEVICE) {
    address = device;
  } else {
    return false;
  }
  apart = pitch == 0 ? width : pitch;
  return apart >= width;
}

}  // namespace

CUresult cuMemcpyAsync(CUdeviceptr dst, CUdeviceptr src, size_t bytes, CUstream stream) {
  Call call("cuMemcpyAsync", kUse);
  return one(call, dst, src, bytes, stream, -1, "cuMemcpyAsync");
}

CUresult cuMemcpyHtoDAsync(CUdeviceptr dst, const void* src, size_t bytes, CUstream stream) {
  Call call("cuMemcpyHtoDAsync", kUse);
  return one(call, dst, reinterpret_cast<uint64_t>(src), bytes, stream, 0, "cuMemcpyHtoDAsync");
}

CUresult cuMemcpyDtoHAsync(void* dst, CUdeviceptr src, size_t bytes, CUstream stream) {
  Call call("cuMemcpyDtoHAsync", kUse);
  return one(call, reinterpret_cast<uint64_t>(dst), src, bytes, stream, 1, "cuMemcpyDtoHAsync");
}

CUresult cuMemcpy2DAsync(const CUDA_MEMCPY2D* copy, CUstream handle) {
  Call call("cuMemcpy2DAsync", kUse);
  if (call.failed()) return call.code();
  Stream* stream;
  if (!find_stream(handle, stream)) return CUDA_ERROR_INVALID_HANDLE;
  uint64_t src = 0, dst = 0;
  size_t src_apart = 0, dst_apart = 0;
  if (!copy || copy->srcXInBytes || copy->srcY || copy->dstXInBytes || copy->dstY ||
      copy->WidthInBytes == 0 || copy->Height == 0 ||
      !side(copy->srcMemoryType, copy->srcHost, copy->srcDevice, copy->srcPitch, copy->WidthInBytes,
            src, src_apart) ||
      !side(copy->dstMemoryType, copy->dstHost, copy->dstDevice, copy->dstPitch, copy->WidthInBytes,
            dst, dst_apart)) {
    return call.wrong(CUDA_ERROR_INVALID_VALUE, "memory types or sizes that are not here");
  }
  Batch batch(stream, "cuMemcpy2DAsync", true);
  for (size_t row = 0; row < copy->Height; ++row) {
    std::string why;
    if (!batch.add(dst + row * dst_apart, src + row * src_apart, copy->WidthInBytes, -1,
                   Accesses::kInOrder, why)) {
      return call.wrong(CUDA_ERROR_INVALID_VALUE, why);
    }
  }
  return batch.submit(call);
}

CUresult cuMemsetD8(CUdeviceptr dst, unsigned char value, size_t bytes) {
  Call call("cuMemsetD8", kUse);
  return set_bytes(call, dst, value, bytes, nullptr, "cuMemsetD8");
}

CUresult cuMemsetD8Async(CUdeviceptr dst, unsigned char value, size_t bytes, CUstream stream) {
  Call call("cuMemsetD8Async", kUse);
  return set_bytes(call, dst, value, bytes, stream, "cuMemsetD8Async");
}

CUresult cuMemcpyBatchAsync(CUdeviceptr* dsts, CUdeviceptr* srcs, size_t* sizes, size_t count,
                            CUmemcpyAttributes* attrs, size_t* starts, size_t attr_count,
                            CUstream stream) {
  return batch_copy(dsts, srcs, sizes, count, attrs, starts, attr_count, nullptr, stream);
}

// The signature of CUDA 12.8; the header's macro leads to the one above.
#undef cuMemcpyBatchAsync
extern "C" __attribute__((visibility("default"))) CUresult cuMemcpyBatchAsync(
    CUdeviceptr* dsts, CUdeviceptr* srcs, size_t* sizes, size_t count, CUmemcpyAttributes* attrs,
    size_t* starts, size_t attr_count, size_t* fail_index, CUstream stream) {
  return batch_copy(dsts, srcs, sizes, count, attrs, starts, attr_count, fail_index, stream);
}
