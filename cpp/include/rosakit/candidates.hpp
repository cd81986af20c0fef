// The K best distinct successors of a self-matching stream (semantics 5).
#pragma once

#include <algorithm>

#include "rosakit/stream.hpp"

namespace rosakit {

/// Collects candidates for the stream's current cursor, whose last key `token` has just been
/// appended: walks from the match towards the root, and at each state takes the successors not seen
/// before, latest first. `position`/`length` have `k` places, filled with -1/0 where there are fewer
/// candidates.
///
/// What follows a state also follows its ancestors, so all that can be found follows the token alone.
/// A long walk asks once how much that is and ends when it has it: a constant or periodic stream has
/// chains of T states with one successor among them.
class Candidates {
 public:
  template <class Stream>
  void collect(Stream& stream, Cursor at, u32 token, unsigned k, u32 min_length, i32 base,
               i32* position, i32* length) {
    unsigned found = 0, wanted = k, hops = 0;
    u32 u = at.state, n = at.length;
    seen_.clear();
    while (u && n >= min_length && found < wanted) {
      if (++hops == kLongWalk) {
        unsigned successors = 0;
        stream.tree.for_each(stream.tree.find(0, token), [&](u32, u32) { ++successors; });
        wanted = std::min(k, successors);
        if (found == wanted) break;
      }
      round_.clear();
      stream.tree.for_each(u, [&](u32 symbol, u32 target) {
        for (u32 s : seen_)
          if (s == symbol) return;
        round_.push_back({stream.latest(target), symbol});
      });
      const std::size_t take = std::min<std::size_t>(k - found, round_.size());
      std::partial_sort(round_.data(), round_.data() + take, round_.data() + round_.size(),
                        [](const Next& a, const Next& b) { return a.end > b.end; });
      for (std::size_t r = 0; r < take; ++r, ++found) {
        position[found] = base + round_[r].end;
        length[found] = static_cast<i32>(n);
        seen_.push_back(round_[r].symbol);
      }
      u = stream.tree.link(u);
      n = stream.tree.len(u);
    }
    for (; found < k; ++found) {
      position[found] = kNull;
      length[found] = 0;
    }
  }

 private:
  static constexpr unsigned kLongWalk = 8;  // counting may cost as much as the alphabet
  struct Next {
    i32 end;
    u32 symbol;
  };
  Buffer<Next> round_;
  Buffer<u32> seen_;
};

}  // namespace rosakit
