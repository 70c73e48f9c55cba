// The gather kernel on a device: its code, and one launch of it.
#pragma once

#include "drivers/cuda/cuda_device.h"

namespace pie::cuda {

// One thread calls everything; the context is current there.
class Kernel {
 public:
  static constexpr int kMostBlocks = 12;

  // Loads the image and tries the kernel. Throws PIE_ERR_CONFIG, or PIE_ERR_UNSUPPORTED when it is
  // for other devices.
  Kernel(Device& device, const void* image, size_t size, int blocks);

  // `call` is what the result is of.
  CUresult launch(CUstream stream, const GatherLaunch& what, const char*& call) const;
  // Blocks of the grid from now on. Throws PIE_ERR_CONFIG.
  void set_blocks(int blocks);

 private:
  class Module {
   public:
    Module(const void* image, size_t size);
    ~Module();
    Module(const Module&) = delete;
    Module& operator=(const Module&) = delete;
    CUfunction kernel() const { return kernel_; }
    // From now on it stays until the context ends: graphs that hold the kernel may outlive this,
    // and the driver does not know of them.
    void keep() { kept_ = true; }

   private:
    CUmodule module_ = nullptr;
    CUfunction kernel_ = nullptr;
    bool kept_ = false;
  };
  void try_it(Device& device) const;

  const Api& api_;
  unsigned blocks_;
  Module module_;
};

}  // namespace pie::cuda
