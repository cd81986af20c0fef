// Run granularity: how a match grows when a new key run arrives while the query's run stays.
#pragma once

#include <array>
#include <bit>

#include "rosakit/stream.hpp"

namespace rosakit {

/// What a comparison found is remembered by its cost, one for every power of two. A query that runs
/// ahead of a lagged copy of the keys meets the same diagonal again and pays only for what is new.
/// And on changing diagonals, costly comparisons are rare: of those of 2^s to 2^(s+1) steps, a
/// constant number fall into any 2^s / 8 new runs, because three overlapping ones make query and
/// keys periodic, where the match would not have fallen so far. Together O(T log T); the proof is
/// in docs/decisions/core-suffix-memory.md.
class Growth {
 public:
  void reset() { seen_ = {}; }
  /// Forgets what is said of query runs and key runs from these on.
  void cut(u32 query_runs, u32 key_runs) {
    for (Seen& s : seen_)
      if (s.rho >= static_cast<i32>(query_runs) || s.e >= static_cast<i32>(key_runs)) s = {};
  }

  /// Key run `e` has just been appended and the query is at run `rho`. If the string under the
  /// cursor also ends at `e`, compares further to the left: a longer string that ends at `e` occurs
  /// nowhere earlier, so its place is the newest state. Returns the symbols compared.
  template <class Stream, class Symbols>
  u32 update(Stream& stream, const Symbols& query, const Symbols& keys, i32 rho, i32 e, u32 cap) {
    const auto differ = [&](u32 back) {
      return query[static_cast<u32>(rho) - back] != keys[static_cast<u32>(e) - back];
    };
    if (differ(0)) return 0;
    Cursor& at = stream.at;
    if (at.length && stream.latest(at.state) != e) return 0;
    const u32 longest = static_cast<u32>(rho < e ? rho : e) + 1;
    const u32 limit = longest < cap ? longest : cap;
    const Seen* memo = recall(rho, e);
    const u32 back = memo ? static_cast<u32>(rho - memo->rho) : 0;
    u32 length = at.length, compared = 0;
    for (; length < limit; ++length, ++compared) {
      if (memo && length >= back) {
        length = back + memo->length < limit ? back + memo->length : limit;
        break;
      }
      if (differ(length)) break;
    }
    seen_[static_cast<u32>(std::bit_width(compared))] = {rho, e, length};
    if (length > at.length) at = {stream.tree.last(), length};
    return compared;
  }

 private:
  struct Seen {
    i32 rho = 0, e = 0;
    u32 length = 0;  // of the strings compared, which are no longer equal beyond; 0: none
  };
  /// What was last found on the diagonal of (rho, e).
  const Seen* recall(i32 rho, i32 e) const {
    const Seen* newest = nullptr;
    for (const Seen& s : seen_)
      if (s.length && s.e - s.rho == e - rho && (!newest || s.e > newest->e)) newest = &s;
    return newest;
  }
  std::array<Seen, 33> seen_{};
};

}  // namespace rosakit
