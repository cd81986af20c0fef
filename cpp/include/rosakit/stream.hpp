// The streaming matcher of one stream: an automaton over the keys and a cursor for the query.
//
// Latest ends are kept exact by walking the link chain of each appended key, which is the fastest
// way on ordinary streams (`chain_steps` counts the walk). Where chains grow long, a streaming
// matcher changes over to a link-cut tree, and a whole-sequence call to offline answers
// (offline.hpp).
#pragma once

#include "rosakit/automaton.hpp"
#include "rosakit/link_cut.hpp"

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

struct NoForest {
  void clear() {}
};

/// Past the change to a link-cut tree, states of strings up to this long may still be walked: where
/// streams branch, near the root, a walk of a few states is cheaper than changing paths.
inline constexpr u32 kMostShallow = 16;

/// Link steps that walking chains may take up to stream position i.
struct Budget {
  u64 per_symbol = 24, base = 2048;
  u64 at(u64 i) const { return per_symbol * i + base; }
};

/// `Tree`: an automaton. `Forest`: LinkCut for streaming, NoForest where the caller bounds the
/// walks.
template <class Tree_, class Forest = NoForest>
struct Stream {
  using Tree = Tree_;
  static constexpr bool kMayLink = !std::is_same_v<Forest, NoForest>;
  static constexpr bool kMayOrder = requires(Tree t) { t.ordered(); };
  Tree tree;
  Forest forest;  // in use if `linked`
  Cursor at;
  u64 chain_steps = 0, wider_steps = 0, order_steps = 0;
  bool linked = false;
  Budget budget;  // streaming only: past it, `forest` takes over
  u32 brink = 0;  // if `linked`: states of strings up to this long are walked
  Cursor low;     // if `linked`: the longest suffix of the keys of at most `brink` symbols

  explicit Stream(unsigned bits = 8) { tree.reset(bits); }
  void reset(unsigned bits) {
    tree.reset(bits);
    forest.clear();
    at = {};
    chain_steps = wider_steps = order_steps = 0;
    linked = false;
  }

  /// Of an empty stream: keeps the successors of states with many of them in order (Candidates).
  void keep_order()
    requires kMayOrder
  {
    tree.keep_order();
    if constexpr (kMayLink) forest.keep_groups();
  }

  /// Advances a self-matching stream by one symbol and returns its match: the newest state's link
  /// is the longest suffix that occurred before.
  Hit append_self(u32 key) {
    touch(key);
    const Appended a = tree.append(key);
    const i32 position = static_cast<i32>(tree.length() - 1);
    at.state = tree.link(a.state);
    at.length = tree.len(at.state);
    const Hit found = hit();
    chain_steps += tree.propagate(a.state, position);
    order_new_lists();
    return found;
  }

  /// Appends a key, makes it known to every state it ends in, and keeps the cursor's state right.
  u32 append(u32 key) {
    touch(key);
    const Appended a = tree.append(key);
    const i32 position = static_cast<i32>(tree.length() - 1);
    if (a.clone && a.split == at.state && at.length <= tree.len(a.clone)) at.state = a.clone;
    if constexpr (kMayLink) {
      if (linked) {
        // The forest numbers nodes like the tree: the new state comes before the clone.
        forest.add(a.clone ? 0 : deep_link(a.state), position);
        if (a.clone && shallow(a.clone)) {
          forest.add(0, position);  // only its number is needed
        } else if (a.clone) {
          forest.add_above(a.split);
          forest.hang(a.state, a.clone);
        }
        forest.mark(a.state, position);
        mark_shallow(key, a, position);
        order_new_lists();
        return a.state;
      }
    }
    chain_steps += tree.propagate(a.state, position);
    order_new_lists();
    return a.state;
  }
  bool over_budget() const { return !linked && chain_steps > budget.at(tree.length()); }

  /// Changes over to the link-cut tree.
  void link_up()
    requires kMayLink
  {
    forest.clear();
    brink = 0;
    for (u32 u = 1; u < tree.size(); ++u)
      if (const u32 n = tree.len(u); n > brink && n <= kMostShallow && tree.degree(u) > 1)
        brink = n;
    for (u32 u = 0; u < tree.size(); ++u) forest.add(deep_link(u), tree.end(u));
    linked = true;
    const u32 n = tree.length();
    low = {brink ? tree.last() : 0, n < brink ? n : brink};
    while (low.state && tree.len(tree.link(low.state)) >= brink) low.state = tree.link(low.state);
    if (n) forest.mark(tree.last(), static_cast<i32>(n) - 1);  // one solid path, as after a step
  }

  i32 latest(u32 u) {
    if constexpr (kMayLink)
      if (linked && !shallow(u)) return forest.latest(u);
    return tree.end(u);
  }

  /// The nearest ancestor of `u` that more symbols follow than `u` (what follows a state follows
  /// its ancestors), or 0. `u` is an ancestor of the newest state, so walking costs no more than
  /// propagating did, and past the change its deep ancestors lie on one solid path.
  u32 wider(u32 u) {
    const auto wide = [this, had = tree.degree(u)](u32 w) { return tree.degree(w) > had; };
    u32 v = tree.link(u);
    if constexpr (kMayLink) {
      if (linked && !shallow(u)) {
        if (const u32 w = forest.lowest_above(u, wide)) return w;
        v = shallow(low.state) ? low.state : tree.link(low.state);
      }
    }
    for (; v && !wide(v); v = tree.link(v)) ++wider_steps;
    return v;
  }

  /// Follows clones made behind the cursor's back, by appending to `tree` directly.
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

  Hit hit() { return at.length ? Hit{latest(at.state), at.length} : Hit{}; }

  /// For each bit m < bits: the match of the query whose next symbol is s with bit m flipped.
  /// Without `lengths`, a match's length need only be right in being 0 or not. Returns the link
  /// steps taken.
  u32 flips(u32 s, unsigned bits, u32 cap, Hit* out, bool lengths = true) const {
    if constexpr (requires(u32* targets) { tree.nearest(0u, 0u, 0u, targets); }) {
      if (!lengths) {
        u32 targets[Tree::kMaxBits];
        const u32 taken = tree.nearest(at.state, s, bits, targets);
        for (unsigned m = 0; m < bits; ++m) out[m] = {tree.end(targets[m]), targets[m] != 0};
        return taken;
      }
    }
    u32 pending = 0, steps = 0;
    for (unsigned m = 0; m < bits; ++m) {
      out[m] = {};
      if (tree.find(0, s ^ (u32{1} << m))) pending |= u32{1} << m;  // else it never occurred
    }
    if (!pending) return 0;
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

 private:
  /// Before `key` is appended: makes it the first successor of the listed states that the keys end
  /// in and that it follows already; of the others it becomes the first when it is added.
  ///
  /// In all of a stream, at most O(T log T) states have another first successor than the key to
  /// come: in the suffix tree of the keys a state's string is an inner node, an occurrence of it is
  /// a visit to the leaf of the suffix that starts there, and every leaf is visited once; see
  /// docs/decisions/core-suffix-memory.md. Past the change the others are passed over in groups.
  void touch(u32 key) {
    if constexpr (kMayOrder) {
      if (!tree.has_lists()) return;
      u32 walked = tree.last();
      if constexpr (kMayLink) {
        if (linked) {
          if (!shallow(walked)) touch_deep(key);
          walked = low.state;
        }
      }
      for (; walked; walked = tree.link(walked), ++order_steps)
        if ((!linked || shallow(walked)) && tree.listed(walked) &&
            tree.first_successor(walked) != key)
          tree.to_front(walked, key);
    }
  }
  /// The same for deep states, which since the last mark lie on one solid path, listed ones at its
  /// top. Those of one group had the same latest end, so the same symbol came first in them.
  void touch_deep(u32 key)
    requires kMayLink
  {
    const Buffer<u32>& groups = forest.groups();
    std::size_t g = 0;
    u32 u = forest.lowest_above(tree.last(), [this](u32 w) { return tree.listed(w); });
    for (; u && !shallow(u); ++order_steps) {
      if (tree.first_successor(u) != key) {
        tree.to_front(u, key);
        u = tree.link(u);
        continue;
      }
      for (; g < groups.size() && tree.len(groups[g]) >= tree.len(u); ++g) ++order_steps;
      u = g < groups.size() ? groups[g] : 0;
    }
  }
  void order_new_lists() {
    if constexpr (kMayOrder)
      if (tree.ordered()) tree.order_new_lists([this](u32 t) { return latest(t); });
  }

  bool shallow(u32 u) const { return tree.len(u) <= brink; }
  u32 deep_link(u32 u) const { return shallow(tree.link(u)) ? 0 : tree.link(u); }

  /// Makes `position` the latest end of the shallow states that the newest key ends.
  void mark_shallow(u32 key, const Appended& a, i32 position) {
    if (!brink) return;
    if (a.clone && a.split == low.state && low.length <= tree.len(a.clone)) low.state = a.clone;
    low.state = tree.find(low.state, key);
    if (++low.length > brink) {
      low.length = brink;
      if (tree.len(tree.link(low.state)) >= brink) low.state = tree.link(low.state);
    }
    for (u32 v = low.state; v; v = tree.link(v))
      if (shallow(v)) tree.set_end(v, position);
  }
};

}  // namespace rosakit
