// Run granularity: how a match grows when a new key run arrives while the query's run stays.
#pragma once

#include <array>

#include "rosakit/stream.hpp"

namespace rosakit {

class Growth {
 public:
  void reset() { seen_ = {}; }

  /// Key run `e` has just been appended and the query is at run `rho`. If the string under the
  /// cursor also ends at `e`, compares further to the left: a longer string that ends at `e` occurs
  /// nowhere earlier, so its place is the newest state. Returns the symbols compared.
  ///
  /// What was found on a diagonal is remembered, so a query that runs ahead of a lagged copy of the
  /// keys is not compared again and again.
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
    Seen& memo = seen_[static_cast<u32>(e - rho) % seen_.size()];
    const bool same = memo.length && memo.e - memo.rho == e - rho && memo.rho <= rho;
    const u32 back = same ? static_cast<u32>(rho - memo.rho) : 0;
    u32 length = at.length, compared = 0;
    for (; length < limit; ++length, ++compared) {
      if (same && length >= back) {
        length = back + memo.length < limit ? back + memo.length : limit;
        break;
      }
      if (differ(length)) break;
    }
    memo = {rho, e, length};
    if (length > at.length) at = {stream.tree.last(), length};
    return compared;
  }

 private:
  struct Seen {
    i32 rho = 0, e = 0;
    u32 length = 0;
  };
  std::array<Seen, 64> seen_{};
};

}  // namespace rosakit
