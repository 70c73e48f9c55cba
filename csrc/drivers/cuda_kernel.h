// The gather kernel on a device: its code, and one launch of it.
#pragma once

#include "cuda_device.h"

namespace pie::cuda {

// One thread calls everything; the context is current there.
class Kernel {
 public:
  static constexpr int kMostBlocks = 12;

  // Loads the image and tries the kernel. Throws PIE_ERR_CONFIG, or PIE_ERR_UNSUPPORTED when it is
  // for other devices.
  Kernel(Device& device, const void* image, size_t size, int blocks);

  // Addresses of the device; copied is 0 for nothing to count. `call` is what the result is of.
  CUresult launch(CUstream stream, Address table, Address count, Address copied,
                  const char*& call) const;

 private:
  class Module {
   public:
    Module(const void* image, size_t size, int blocks);
    ~Module();
    Module(const Module&) = delete;
    Module& operator=(const Module&) = delete;
    CUfunction kernel() const { return kernel_; }

   private:
    CUmodule module_ = nullptr;
    CUfunction kernel_ = nullptr;
  };
  void try_it(Device& device) const;

  const Api& api_;
  const unsigned blocks_;
  Module module_;
};

}  // namespace pie::cuda
