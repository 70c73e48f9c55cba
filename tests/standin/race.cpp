#include "race.h"

#include <algorithm>

namespace standin {
namespace {

bool before(const Access& earlier, const Access& later, const VectorClock& seen) {
  if (earlier.submission == later.submission) return false;
  const auto actor = static_cast<size_t>(earlier.actor);
  return actor < seen.size() && seen[actor] >= earlier.tick;
}

}  // namespace

void join(VectorClock& into, const VectorClock& from) {
  if (into.size() < from.size()) into.resize(from.size(), 0);
  for (size_t i = 0; i < from.size(); ++i) into[i] = std::max(into[i], from[i]);
}

void Actor::precedes(VectorClock& other) {
  join(other, clock);
  ++clock[static_cast<size_t>(id)];  // what follows is not covered
}

void Races::split(Pieces& pieces, uint64_t at) {
  auto next = pieces.upper_bound(at);
  if (next == pieces.begin()) return;
  auto piece = std::prev(next);
  if (piece->first == at || piece->second.end <= at) return;
  Piece upper = piece->second;
  piece->second.end = at;
  pieces.emplace_hint(next, at, std::move(upper));
}

void Races::check(uint64_t key, uint64_t begin, size_t bytes, const Access& access,
                  const VectorClock& seen, std::vector<Conflict>& conflicts) {
  if (bytes == 0) return;
  Pieces& pieces = keys_[key];
  const uint64_t end = begin + bytes;
  split(pieces, begin);
  split(pieces, end);
  uint64_t at = begin;
  while (at < end) {
    auto piece = pieces.lower_bound(at);
    if (piece == pieces.end() || piece->first > at) {
      const uint64_t stop = piece == pieces.end() ? end : std::min(end, piece->first);
      piece = pieces.emplace_hint(piece, at, Piece{stop});
    }
    Piece& p = piece->second;
    at = p.end;
    if (p.written && !before(p.write, access, seen)) conflicts.emplace_back(p.write, access);
    if (access.write) {
      for (const Access& read : p.reads) {
        if (!before(read, access, seen)) conflicts.emplace_back(read, access);
      }
      p.reads.clear();
      p.write = access;
      p.written = true;
    } else {
      // A read that comes before this one cannot race with what comes after this one.
      const auto over = [&](const Access& read) { return before(read, access, seen); };
      p.reads.erase(std::remove_if(p.reads.begin(), p.reads.end(), over), p.reads.end());
      p.reads.push_back(access);
    }
  }
}

void Races::forget(uint64_t key, uint64_t begin, size_t bytes) {
  const auto found = keys_.find(key);
  if (found == keys_.end()) return;
  Pieces& pieces = found->second;
  split(pieces, begin);
  split(pieces, begin + bytes);
  pieces.erase(pieces.lower_bound(begin), pieces.lower_bound(begin + bytes));
  if (pieces.empty()) keys_.erase(found);
}

}  // namespace standin
