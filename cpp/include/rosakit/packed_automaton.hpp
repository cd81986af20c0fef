// The suffix automaton of a long stream of at most 4 bits a symbol, one cache line a state: sixteen
// 24-bit targets and the state's link, length and latest end. What limits long streams is the lines
// they miss, so a state costs one, and the lines that the next key leads to are asked for while the
// walk along the current chain goes on. For whole-sequence calls; same interface as Automaton.
#pragma once

#include <cstring>

#include "rosakit/automaton.hpp"

namespace rosakit {

class PackedAutomaton {
 public:
  using Symbol = u8;
  static constexpr unsigned kMaxBits = 4;
  static constexpr std::size_t kMaxSymbols = (std::size_t{1} << 23) - 2;  // targets have 24 bits

  /// Room for the stream must be reserved before it is appended.
  void reset(unsigned) {
    if (!nodes_.size()) reserve(1);
    size_ = 0;
    last_ = length_ = ahead_ = 0;
    new_state(0, kNull);
  }
  void reserve(std::size_t symbols) {
    if (nodes_.size() < 2 * symbols + 2) nodes_.resize(2 * symbols + 2);
  }
  /// The next key: where it leads from the states in hand is fetched in advance.
  void expect(u32 symbol) { ahead_ = symbol; }

  u32 size() const { return size_; }
  u32 length() const { return length_; }
  u32 last() const { return last_; }
  u32 link(u32 u) const { return nodes_[u].link; }
  i32 end(u32 u) const { return nodes_[u].end; }
  u32 len(u32 u) const { return nodes_[u].len; }
  u32 find(u32 u, u32 s) const { return load(u, s & 15u) & kTarget; }

  [[gnu::always_inline]] void prefetch_target(u32 u, u32 s) const {
    __builtin_prefetch(&nodes_[find(u, s)]);
  }
  [[gnu::always_inline]] void prefetch_state(u32 u) const { __builtin_prefetch(&nodes_[u]); }
  template <class F>
  void for_each(u32 u, F&& f) const {
    for (u32 s = 0; s < 16; ++s)
      if (const u32 t = find(u, s)) f(s, t);
  }

  /// Whether `symbols` and `nearest` will be asked for; said before the stream is appended.
  void keep_symbols(bool keep) { keeps_symbols_ = keep; }
  /// The symbols that go on from `u`, as a set.
  u64 symbols(u32 u) const { return nodes_[u].symbols; }

  /// targets[m]: where `s` with bit m flipped leads from the nearest state at or above `u` that it
  /// goes on from, or 0. Every bit's state is chosen without branches on the way to the root, and
  /// the targets are read at the end, all at once. Returns the link steps taken.
  u32 nearest(u32 u, u32 s, unsigned bits, u32* targets) const {
    u32 from[kMaxBits], wanted = 0, steps = 0;
    for (unsigned m = 0; m < bits; ++m) wanted |= u32{1} << (s ^ (u32{1} << m));
    wanted &= nodes_[0].symbols;
    for (u32& state : from) state = u;
    for (; wanted & ~nodes_[u].symbols; steps += 2)
      for (int i = 0; i < 2; ++i) {  // the root is its own link
        const u32 set = nodes_[u].symbols;
        u = nodes_[u].link;
        for (unsigned m = 0; m < kMaxBits; ++m)
          from[m] = set >> ((s ^ (u32{1} << m)) & 15u) & 1u ? from[m] : u;
      }
    for (unsigned m = 0; m < bits; ++m) targets[m] = find(from[m], s ^ (u32{1} << m));
    return steps;
  }

  Appended append(u32 c) { return keeps_symbols_ ? append_to<true>(c) : append_to<false>(c); }

  u32 propagate(u32 u, i32 position) {
    u32 steps = 0;
    for (u32 v = nodes_[u].link; v != 0; steps += 2)
      for (int i = 0; i < 2; ++i) {  // the root is its own link, and its end is never read
        nodes_[v].end = position;
        prefetch_target(v, ahead_);
        v = nodes_[v].link;
      }
    return steps;
  }

 private:
  template <bool kSets>
  Appended append_to(u32 c) {
    const u32 cur = new_state(length_ + 1, static_cast<i32>(length_));
    ++length_;
    u32 p = last_, t;
    last_ = cur;
    for (; (t = find(p, c)) == 0; p = nodes_[p].link) {
      store(p, c, cur);
      if constexpr (kSets) nodes_[p].symbols |= u32{1} << c;
      if (p == 0) return {cur, 0, 0};
    }
    const u32 plen = nodes_[p].len + 1;
    if (nodes_[t].len == plen) {
      nodes_[cur].link = t;
      return {cur, 0, 0};
    }
    const u32 clone = size_++;
    nodes_[clone] = nodes_[t];
    nodes_[clone].len = plen;
    nodes_[t].link = nodes_[cur].link = clone;
    for (; find(p, c) == t; p = nodes_[p].link) {
      store(p, c, clone);
      if (p == 0) break;
    }
    return {cur, clone, t};
  }

  static constexpr u32 kTarget = (u32{1} << 24) - 1;
  struct alignas(64) Node {
    u8 next[48];  // 16 targets of 3 bytes
    u32 link, len;
    i32 end;
    u32 symbols;  // the set of those that go on
  };

  /// Four bytes from a target's first on; the last target's fourth byte is the link's first.
  u32 load(u32 u, u32 s) const {
    u32 word;
    std::memcpy(&word, reinterpret_cast<const char*>(&nodes_[u]) + 3 * s, 4);
    return word;
  }
  void store(u32 u, u32 s, u32 target) {
    const u32 word = (load(u, s) & ~kTarget) | target;
    std::memcpy(reinterpret_cast<char*>(&nodes_[u]) + 3 * s, &word, 4);
  }
  u32 new_state(u32 length, i32 position) {
    const u32 id = size_++;
    nodes_[id] = Node{};
    nodes_[id].len = length;
    nodes_[id].end = position;
    return id;
  }

  Buffer<Node> nodes_;
  u32 size_ = 0, last_ = 0, length_ = 0, ahead_ = 0;
  bool keeps_symbols_ = true;
};

}  // namespace rosakit
