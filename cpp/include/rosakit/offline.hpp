// Exact answers about the past, from the automaton of the whole key stream.
//
// Once the automaton is complete, "the longest suffix of the query that occurs in keys[0..E]" is
// the nearest link ancestor whose first end is <= E, and "its latest end <= E" is a maximum over
// the subtree of that state, restricted to the ends inserted so far. First ends decrease towards
// the root, so ancestors are found through jump pointers (Myers' skew-binary ones) in O(log T);
// subtrees are intervals of slots, and a 64-ary tree of maxima answers in O(log T). Nothing here
// depends on how repetitive the streams are.
#pragma once

#include <array>

#include "rosakit/stream.hpp"

namespace rosakit {

/// Maxima over intervals of slots whose values arrive in increasing order.
class RecencyTree {
 public:
  void reset(u32 slots) {
    depth_ = 0;
    for (u32 n = slots;;) {
      levels_[depth_].fill(n, kNull);
      ++depth_;
      if (n <= 1) break;
      n = (n + 63) / 64;
    }
  }
  void put(u32 slot, i32 value) {
    for (unsigned d = 0; d < depth_; ++d, slot /= 64) levels_[d][slot] = value;
  }
  i32 max(u32 begin, u32 end) const {
    i32 best = kNull;
    for (unsigned d = 0; begin < end; ++d) {
      const u32 b = (begin + 63) / 64, e = end / 64;
      const Buffer<i32>& level = levels_[d];
      if (b >= e) {
        best = scan(level, begin, end, best);
        break;
      }
      best = scan(level, begin, b * 64, best);
      best = scan(level, e * 64, end, best);
      begin = b;
      end = e;
    }
    return best;
  }

 private:
  static i32 scan(const Buffer<i32>& v, u32 begin, u32 end, i32 best) {
    for (u32 i = begin; i < end; ++i) best = v[i] > best ? v[i] : best;
    return best;
  }
  Buffer<i32> levels_[7];
  unsigned depth_ = 0;
};

template <class Tree>
class Offline {
 public:
  /// `primary[i]` is the state that keys[0..i] as a whole belongs to.
  /// `flips`: also prepare for queries by symbols that the stream did not go on with.
  void build(const Tree& tree, const Buffer<u32>& primary, bool flips) {
    tree_ = &tree;
    const u32 n = tree.size(), symbols = tree.length();
    sort_by_length(n, symbols);
    first_.fill(n, std::numeric_limits<i32>::max());
    slots_.fill(n, 0);
    for (u32 i = 0; i < symbols; ++i) {
      first_[primary[i]] = static_cast<i32>(i);
      slots_[primary[i]] = 1;
    }
    for (u32 k = n; k-- > 1;) {
      const u32 u = order_[k], p = tree.link(u);
      slots_[p] += slots_[u];
      if (first_[u] < first_[p]) first_[p] = first_[u];
    }
    begin_.resize(n);
    fill_.resize(n);
    begin_[0] = fill_[0] = 0;
    for (u32 k = 1; k < n; ++k) {
      const u32 u = order_[k], p = tree.link(u);
      begin_[u] = fill_[p];
      fill_[p] += slots_[u];
      fill_[u] = begin_[u];
      if (first_[u] + 1 == static_cast<i32>(tree.len(u))) ++fill_[u];  // u is primary: its own slot
    }
    slot_.resize(symbols);
    for (u32 i = 0; i < symbols; ++i) slot_[i] = begin_[primary[i]];
    build_jumps(n);
    hops_ = flips;
    if (flips) build_hops(n);
    recency_.reset(symbols);
    previous_.resize(symbols);
    newest_.fill(kNull);
    known_ = 0;
  }

  /// Makes the ends 0..last of `keys` known to `latest`.
  template <class Keys>
  void reveal(i32 last, const Keys& keys) {
    for (; known_ <= last; ++known_) {
      const auto e = static_cast<u32>(known_);
      recency_.put(slot_[e], known_);
      i32& newest = newest_[keys[e] % newest_.size()];
      previous_[e] = newest;
      newest = known_;
    }
  }

  /// Latest known end of state `u`, whose strings end in symbol `s`: few slots are looked through,
  /// otherwise the last ends of `s` before the tree of maxima.
  i32 latest(u32 u, u32 s) const {
    const u32 b = begin_[u], n = slots_[u];
    if (n > 8) {
      i32 e = newest_[s % newest_.size()];
      for (int tries = 0; e != kNull && tries < 16; ++tries, e = previous_[static_cast<u32>(e)])
        if (slot_[static_cast<u32>(e)] - b < n) return e;
    }
    return recency_.max(b, b + n);
  }

  /// Whether symbol `s` is among keys[0..by].
  bool seen(u32 s, i32 by) const { return target(0, s, by) != 0; }
  bool occurs(u32 u, i32 by) const { return first_[u] <= by; }

  /// The longest suffix of the place `from` that can be followed by `s` within keys[0..by]:
  /// returns the state reached and the length of the match, or length 0.
  Cursor follow(Cursor from, u32 s, i32 by, u32 cap) const {
    u32 u = from.state;
    u32 t = target(u, s, by);
    if (!t) {
      if (!u || !target(0, s, by)) return {};
      if (hops_) {
        while (!(symbols_[u] >> (s & 63u) & 1u)) u = hop_[u];
        t = target(u, s, by);
      } else {
        for (int tries = 0; tries < 3 && !t; ++tries) t = target(u = tree_->link(u), s, by);
      }
      while (!t) {
        const u32 j = jump_[u];
        const u32 tj = target(j, s, by);
        if (tj) t = target(u = tree_->link(u), s, by);
        else u = j;
      }
      from.length = tree_->len(u);
    }
    Cursor to{t, from.length + 1};
    if (to.length > cap) {
      to.length = cap;
      if (tree_->len(tree_->link(t)) >= cap) to.state = tree_->link(t);
    }
    return to;
  }

  /// The longest suffix of the place `from` that occurs within keys[0..by].
  Cursor occurring(Cursor from, i32 by) const {
    u32 u = from.state;
    if (first_[u] <= by || !u) return u ? from : Cursor{};
    while (u && first_[u] > by) {
      const u32 j = jump_[u];
      u = (j && first_[j] > by) ? j : tree_->link(u);
    }
    return {u, tree_->len(u)};
  }

 private:
  u32 target(u32 u, u32 s, i32 by) const {
    const u32 t = tree_->find(u, s);
    return t && first_[t] <= by ? t : 0;
  }
  void sort_by_length(u32 n, u32 symbols) {
    count_.fill(std::size_t{symbols} + 2, 0);
    for (u32 u = 0; u < n; ++u) ++count_[tree_->len(u) + 1];
    for (u32 l = 0; l <= symbols; ++l) count_[l + 1] += count_[l];
    order_.resize(n);
    for (u32 u = 0; u < n; ++u) order_[count_[tree_->len(u)]++] = u;
  }
  void build_jumps(u32 n) {
    jump_.resize(n);
    depth_.resize(n);
    jump_[0] = depth_[0] = 0;
    for (u32 k = 1; k < n; ++k) {
      const u32 u = order_[k], p = tree_->link(u), j = jump_[p];
      depth_[u] = depth_[p] + 1;
      jump_[u] = depth_[p] - depth_[j] == depth_[j] - depth_[jump_[j]] ? jump_[j] : p;
    }
  }

  /// Symbols that go on from a state go on from its ancestors: where a state lacks one, its nearest
  /// ancestor with other symbols is the next that may have it. At most 64 hops reach the root.
  void build_hops(u32 n) {
    symbols_.resize(n);
    hop_.resize(n);
    for (u32 k = 0; k < n; ++k) {
      const u32 u = order_[k];
      u64 set = 0;
      if constexpr (requires { tree_->symbols(u); })
        set = tree_->symbols(u);
      else tree_->for_each(u, [&](u32 s, u32) { set |= u64{1} << (s & 63u); });
      symbols_[u] = set;
      const u32 p = u ? tree_->link(u) : 0;
      hop_[u] = symbols_[p] == set ? hop_[p] : p;
      if (!u) hop_[u] = 0;
    }
  }

  const Tree* tree_ = nullptr;
  Buffer<u32> order_, count_, slots_, begin_, fill_, slot_, jump_, depth_;
  Buffer<i32> first_;
  Buffer<u64> symbols_;  // of a state's transitions, modulo 64
  Buffer<u32> hop_;
  bool hops_ = false;
  RecencyTree recency_;
  Buffer<i32> previous_;  // of an end: the end before it whose symbol is the same modulo 64
  std::array<i32, 64> newest_{};
  i32 known_ = 0;
};

}  // namespace rosakit
