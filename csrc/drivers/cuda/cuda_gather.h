// The gather kernel in use for batches: the tables of launches that are under way.
#pragma once

#include <string>
#include <vector>

#include "drivers/cuda/cuda_kernel.h"

namespace pie::cuda {

// One thread calls everything; the context is current there.
class Gather {
 public:
  // Fewer pieces than this are the copy engines'. vLLM's rule too (PR 42212), which takes its
  // kernel below 28 KiB a piece, with 12 SMs; that edge differs between machines, so it is
  // measured.
  static constexpr size_t kFewest = 16;

  // Loads the image and tries the kernel. Throws PIE_ERR_UNSUPPORTED when it is for other devices.
  Gather(Device& device, const void* image, size_t size, int blocks);
  // Waits for its launches.
  ~Gather();
  Gather(const Gather&) = delete;
  Gather& operator=(const Gather&) = delete;

  // Submits copies from registered memory. Blocks only when all tables are those of launches that
  // are not over yet. `call` is what the result is of.
  CUresult copy(CUstream stream, const CopyOp* ops, size_t count, const char*& call);
  void set_blocks(int blocks) { kernel_.set_blocks(blocks); }

 private:
  // Pieces of a table, which the kernel reads from CPU memory. More pieces take several launches.
  static constexpr size_t kPieces = 4096;
  struct Table {
    uint64_t count, unused;
    CopyOp pieces[kPieces];
  };
  static_assert(sizeof(CopyOp) == 24, "is a piece of gather.cu");
  // A few steps of a model with many layers; 24 MiB.
  static constexpr size_t kTables = 256;

  class Tables {
   public:
    explicit Tables(Device& device);
    ~Tables();
    Tables(const Tables&) = delete;
    Tables& operator=(const Tables&) = delete;
    Table& operator[](size_t i) const { return memory_[i]; }
    Address address(size_t i) const { return address_ + i * sizeof(Table); }  // the device's

   private:
    Device& device_;
    Table* memory_;
    Address address_;
  };
  class Events {
   public:
    Events();
    ~Events();
    Events(const Events&) = delete;
    Events& operator=(const Events&) = delete;
    CUevent operator[](size_t i) const { return all_[i]; }

   private:
    std::vector<CUevent> all_;
  };

  const Api& api_;
  Device& device_;
  // In this order: memory and code outlive what uses them, and the end of that is waited for first.
  Tables tables_;
  Kernel kernel_;
  Events over_;  // one a table, recorded after its newest launch
  size_t next_ = 0;
};

}  // namespace pie::cuda
