// Guesses of the states that the coming symbols will visit, so that the lines of an automaton
// larger than the caches are asked for in time. Only hints: no result depends on them.
//
// The states that a symbol visits are ends of what has been read: all of them lie on the link chain
// of a state that was newest where the same symbols were read before. So the newest state is noted
// under a hash of its last six symbols, looked up twelve symbols ahead of those that come, and its
// chain is climbed one link every few steps, when the line asked for before has arrived.
#pragma once

#include "rosakit/buffer.hpp"

namespace rosakit {

/// `Tree`: an automaton over symbols of at most 4 bits with `prefetch_state`.
template <class Tree>
class Hints {
 public:
  /// Shorter streams find most of their states in the last cache, and hints only cost.
  static constexpr u32 kFrom = u32{1} << 19;

  /// For a stream of `n` pairs; `self`: the queries are the keys.
  void reset(const u8* q, const u8* k, u32 n, bool self) {
    table_.fill(std::size_t{1} << kSlotBits, 0);
    query_ = {q};
    key_ = {k};
    n_ = n;
    self_ = self;
    for (u32 j = 0; j < kTable && j < n; ++j) look_up(j);
  }
  /// Before pair `i` is read.
  void ahead(const Tree& tree, u32 i) {
    if (n_ - i <= kTable) return;
    look_up(i + kTable);
    begin(tree, key_, i);
    for (u32 lead : {9u, 6u, 4u, 2u}) climb(tree, key_, i + lead);
    if (self_) return;
    begin(tree, query_, i);
    for (u32 lead : {9u, 6u, 3u}) climb(tree, query_, i + lead);
  }
  /// `newest`: the automaton's state once key `i` is appended.
  void note(u32 i, u32 newest) { table_[key_.slot[i % kRing]] = newest; }

 private:
  static constexpr u32 kTable = 16, kState = 12;  // symbols ahead: the table's line, the state's
  static constexpr u32 kRing = 32;                // more than kTable
  static constexpr u32 kSlotBits = 20, kGram = (u32{1} << 24) - 1;

  struct Lane {
    const u8* symbols = nullptr;
    u32 gram = 0;
    u32 slot[kRing] = {}, state[kRing] = {};
  };

  void look_up(u32 j) {
    look_up(key_, j);
    if (!self_) look_up(query_, j);
  }
  void look_up(Lane& lane, u32 j) {
    lane.gram = (lane.gram << 4 | lane.symbols[j]) & kGram;
    const u32 slot = lane.gram * 0x9E3779B1u >> (32 - kSlotBits);
    lane.slot[j % kRing] = slot;
    __builtin_prefetch(&table_[slot]);
  }
  void begin(const Tree& tree, Lane& lane, u32 i) {
    const u32 j = (i + kState) % kRing;
    tree.prefetch_state(lane.state[j] = table_[lane.slot[j]]);
  }
  void climb(const Tree& tree, Lane& lane, u32 j) {
    u32& state = lane.state[j % kRing];
    tree.prefetch_state(state = tree.link(state));
  }

  Buffer<u32> table_;
  Lane query_, key_;
  u32 n_ = 0;
  bool self_ = false;
};

}  // namespace rosakit
