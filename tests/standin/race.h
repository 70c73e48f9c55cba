// Happens-before by vector clocks, and the check of accesses to physical memory against it.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <string>
#include <utility>
#include <vector>

namespace standin {

using VectorClock = std::vector<uint64_t>;

void join(VectorClock& into, const VectorClock& from);

// Whatever runs in order by itself: a stream, a thread, a thread's NULL stream.
struct Actor {
  int id;
  VectorClock clock;

  uint64_t now() const { return clock[static_cast<size_t>(id)]; }
  // What the actor did so far comes before what `other` does next.
  void precedes(VectorClock& other);
};

struct Access {
  int actor;
  uint64_t tick;        // of that actor
  uint64_t submission;  // accesses of one submission are unordered among themselves
  uint64_t address;     // virtual, as the program said it
  size_t bytes;
  bool write;
  const char* what;
};

using Conflict = std::pair<Access, Access>;  // earlier, later

// Last write and the reads since, for each piece of physical memory. Pieces are split where
// accesses end, so neighbours that share a page never meet.
class Races {
 public:
  // key and begin: physical. seen: the clock of what `access` knows to be over.
  void check(uint64_t key, uint64_t begin, size_t bytes, const Access& access,
             const VectorClock& seen, std::vector<Conflict>& conflicts);
  void forget(uint64_t key, uint64_t begin, size_t bytes);
  void clear() { keys_.clear(); }

 private:
  struct Piece {
    uint64_t end;
    bool written = false;
    Access write{};
    std::vector<Access> reads{};
  };
  using Pieces = std::map<uint64_t, Piece>;
  static void split(Pieces& pieces, uint64_t at);

  std::map<uint64_t, Pieces> keys_;
};

}  // namespace standin
