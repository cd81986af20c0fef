// Guesses of the states that the coming keys will visit, so that the lines of an automaton larger
// than the caches are asked for in time. Only hints: no result depends on them.
//
// The states that a key visits are ends of what has been read: most lie on the link chain of the
// state that was newest where the same keys were read before. So the newest state is noted under a
// hash of its last six keys, looked up twelve keys ahead, and its chain is climbed one link every
// few keys, when the line asked for before has arrived.
#pragma once

#include "rosakit/buffer.hpp"

namespace rosakit {

/// `Tree`: an automaton over symbols of at most 4 bits with `prefetch_state`.
template <class Tree>
class Hints {
 public:
  /// Shorter streams find most of their states in the last cache, and hints only cost.
  static constexpr u32 kFrom = u32{1} << 19;

  /// For a stream of the `n` keys `k`.
  void reset(const u8* k, u32 n) {
    table_.fill(std::size_t{1} << kSlotBits, 0);
    keys_ = k;
    n_ = n;
    gram_ = 0;
    for (u32& state : state_) state = 0;  // those of another stream's automaton may not exist
    for (u32 j = 0; j < kTable && j < n; ++j) look_up(j);
  }
  /// Before key `i` is appended.
  void ahead(const Tree& tree, u32 i) {
    if (n_ - i <= kTable) return;
    look_up(i + kTable);
    const u32 j = (i + kState) % kRing;
    tree.prefetch_state(state_[j] = table_[slot_[j]]);
    for (u32 lead : {9u, 6u, 4u, 2u}) {
      u32& state = state_[(i + lead) % kRing];
      tree.prefetch_state(state = tree.link(state));
    }
  }
  /// `newest`: the automaton's state once key `i` is appended.
  void note(u32 i, u32 newest) { table_[slot_[i % kRing]] = newest; }

 private:
  static constexpr u32 kTable = 16, kState = 12;  // keys ahead: the table's line, the state's
  static constexpr u32 kRing = 32;                // more than kTable
  static constexpr u32 kSlotBits = 20, kGram = (u32{1} << 24) - 1;

  void look_up(u32 j) {
    gram_ = (gram_ << 4 | keys_[j]) & kGram;
    slot_[j % kRing] = gram_ * 0x9E3779B1u >> (32 - kSlotBits);
    __builtin_prefetch(&table_[slot_[j % kRing]]);
  }

  Buffer<u32> table_;
  const u8* keys_ = nullptr;
  u32 n_ = 0, gram_ = 0;
  u32 slot_[kRing] = {}, state_[kRing] = {};
};

}  // namespace rosakit
