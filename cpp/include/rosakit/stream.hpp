// The streaming matcher of one stream: an automaton over the keys and a cursor for the query.
//
// The latest end of every state is kept exact by walking the link chain of each appended key
// (`chain_steps` counts the walk, so that callers can bound it).
#pragma once

#include "rosakit/automaton.hpp"

namespace rosakit {

struct Hit {
  i32 end = kNull;  // latest end of the matched string in key coordinates
  u32 length = 0;
};

/// A place in the automaton: the suffix of length `length` of the query, which lies in `state`.
struct Cursor {
  u32 state = 0;
  u32 length = 0;
};

template <bool kWide>
struct Stream {
  using Tree = Automaton<kWide>;
  Tree tree;
  Cursor at;
  u64 chain_steps = 0;

  explicit Stream(unsigned bits = 8) : tree(bits) {}
  void reset(unsigned bits) {
    tree.reset(bits);
    at = {};
    chain_steps = 0;
  }

  /// Appends a key and makes it known to every state it ends in.
  u32 append(u32 key) {
    const u32 cur = tree.append(key);
    chain_steps += tree.propagate(cur, static_cast<i32>(tree.length() - 1));
    return cur;
  }

  /// Follows clones made since the cursor was placed.
  void normalise() {
    while (at.state && at.length <= tree.len(tree.link(at.state))) at.state = tree.link(at.state);
  }

  /// Moves the cursor to the longest suffix of query + s (of at most `cap` symbols).
  void advance(u32 s, u32 cap) {
    u32 t;
    while ((t = tree.find(at.state, s)) == 0) {
      if (!at.state) {
        at.length = 0;
        return;
      }
      at.state = tree.link(at.state);
      at.length = tree.len(at.state);
    }
    at.state = t;
    if (++at.length > cap) {
      at.length = cap;
      if (tree.len(tree.link(t)) >= cap) at.state = tree.link(t);
    }
  }

  Hit hit() const {
    return at.length ? Hit{tree.end(at.state), at.length} : Hit{};
  }

  /// For each bit m < bits: the match of the query whose next symbol is s with bit m flipped.
  /// Call on a normalised cursor. Returns the link steps taken.
  u32 flips(u32 s, unsigned bits, u32 cap, Hit* out) const {
    u32 pending = (u32{1} << bits) - 1, steps = 0;
    for (unsigned m = 0; m < bits; ++m) out[m] = {};
    u32 u = at.state, length = at.length;
    for (;; ++steps) {
      for (u32 rest = pending; rest; rest &= rest - 1) {
        const unsigned m = static_cast<unsigned>(std::countr_zero(rest));
        u32 t = tree.find(u, s ^ (u32{1} << m));
        if (!t) continue;
        pending &= ~(u32{1} << m);
        u32 n = length + 1;
        if (n > cap) {
          n = cap;
          if (tree.len(tree.link(t)) >= cap) t = tree.link(t);
        }
        out[m] = {tree.end(t), n};
      }
      if (!pending || !u) return steps;
      u = tree.link(u);
      length = tree.len(u);
    }
  }
};

}  // namespace rosakit
