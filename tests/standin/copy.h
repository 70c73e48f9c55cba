// Copies as submitted: checked, their early sources read, then run in the order of the stream.
#pragma once

#include "state.h"

namespace standin {

struct Copy {
  int direction;
  char* dst;
  const char* src;
  size_t bytes;
  bool pageable = false;         // of memory that is not registered
  bool fails = false;            // ordered by standin_fail_copy
  std::vector<char> snapshot{};  // of a source that was read at the call
};

class Batch {
 public:
  // foreseen: standin_peek knows what it will have written.
  Batch(Stream* stream, const char* what, bool foreseen = false);
  // Nothing is recorded or run before submit(). False, with the reason, for memory that cannot be
  // copied. expected: a direction, or -1 for what the addresses say.
  bool add(uint64_t dst, uint64_t src, size_t bytes, int expected, Accesses::When when,
           std::string& why);
  CUresult submit(Call& call);

 private:
  struct Checked {
    Range dst, src;
    uint64_t dst_address, src_address;
    Accesses::When when;
    int direction;
    size_t bytes;
    bool foreseen;
  };
  static Run prepare(const Actor& actor, const std::vector<Checked>& checked, const char* what);

  Stream* stream_;
  const char* what_;
  const bool foreseen_;
  bool pageable_ = false;
  std::vector<Checked> checked_;
};

// The areas of work, each once.
void add_areas(std::vector<AreaPtr>& areas, const Range& range);
// Holds areas in place while they are accessed. False where one is gone: that fails the context.
bool pin(const std::vector<AreaPtr>& areas, const char* what);
void unpin(const std::vector<AreaPtr>& areas);

}  // namespace standin
