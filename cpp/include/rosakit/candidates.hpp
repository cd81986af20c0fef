// The K best distinct successors of a self-matching stream (semantics 5).
#pragma once

#include <algorithm>

#include "rosakit/stream.hpp"

namespace rosakit {

/// Collects candidates for the stream's current cursor, just after its key was appended: at each
/// state from the match towards the root, the successors not seen before, latest first.
/// `position`/`length` have `k` places, filled with -1/0 where there are fewer candidates.
///
/// What follows a state also follows its ancestors, so only ancestors with more successors than the
/// last state's have something new: at most k states are looked at, whatever the length of the
/// chain (Stream::wider finds them in O(log T) amortised). States with many successors keep them in
/// order if the stream does (Stream::keep_order): of those at most k are looked at, too.
class Candidates {
 public:
  /// Returns the successors looked at.
  template <class Stream>
  u32 collect(Stream& stream, Cursor at, unsigned k, u32 min_length, i32 base, i32* position,
              i32* length) {
    unsigned found = 0;
    u32 looked = 0;
    seen_.clear();
    for (u32 u = at.state, n = at.length; u && n >= min_length;
         u = stream.wider(u), n = stream.tree.len(u)) {
      if constexpr (Stream::kMayOrder) {
        if (stream.tree.listed(u)) {
          stream.tree.for_each_in_order(u, [&](u32 symbol, u32 target) {
            ++looked;
            if (!seen(symbol)) {
              position[found] = base + stream.latest(target);
              length[found++] = static_cast<i32>(n);
              seen_.push_back(symbol);
            }
            return found < k;
          });
          if (found == k) break;
          continue;
        }
      }
      round_.clear();
      stream.tree.for_each(u, [&](u32 symbol, u32 target) {
        ++looked;
        if (!seen(symbol)) round_.push_back({stream.latest(target), symbol});
      });
      const std::size_t take = std::min<std::size_t>(k - found, round_.size());
      std::partial_sort(round_.data(), round_.data() + take, round_.data() + round_.size(),
                        [](const Next& a, const Next& b) { return a.end > b.end; });
      for (std::size_t r = 0; r < take; ++r, ++found) {
        position[found] = base + round_[r].end;
        length[found] = static_cast<i32>(n);
        seen_.push_back(round_[r].symbol);
      }
      if (found == k) break;
    }
    for (; found < k; ++found) {
      position[found] = kNull;
      length[found] = 0;
    }
    return looked;
  }

 private:
  bool seen(u32 symbol) const {
    for (u32 s : seen_)
      if (s == symbol) return true;
    return false;
  }

  struct Next {
    i32 end;
    u32 symbol;
  };
  Buffer<Next> round_;
  Buffer<u32> seen_;
};

}  // namespace rosakit
