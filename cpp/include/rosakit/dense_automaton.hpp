// The suffix automaton over a small alphabet with a full row of targets in every state: a
// transition is one load without branches. Twice the bytes of Automaton, and about twice as fast.
// For whole-sequence calls of short streams (16-bit numbering) or 1 and 2 bits; longer ones of 4
// bits: packed_automaton.hpp. Same interface as Automaton.
#pragma once

#include <algorithm>
#include <cstring>

#if defined(__SSE2__)
#include <emmintrin.h>
#endif

#include "rosakit/automaton.hpp"

namespace rosakit {

/// `Id` numbers states; `kBits`: symbols are below 2^kBits.
template <class Id, unsigned kBits>
class Dense {
 public:
  using Symbol = u8;
  using End = std::make_signed_t<Id>;
  static constexpr unsigned kMaxBits = kBits;
  static constexpr std::size_t kMaxSymbols = sizeof(Id) == 2 ? 32760 : std::size_t{1} << 29;

  /// Room for the stream must be reserved before it is appended.
  void reset(unsigned) {
    if (!rows_.size()) reserve(1);
    size_ = 0;
    last_ = length_ = root_symbols_ = 0;
    new_state(0, kNull);
  }
  void reserve(std::size_t symbols) {
    if (rows_.size() >= 2 * symbols + 2) return;
    rows_.resize(2 * symbols + 2);
    meta_.resize(2 * symbols + 2);
  }

  u32 size() const { return size_; }
  u32 length() const { return length_; }
  u32 last() const { return last_; }
  u32 link(u32 u) const { return meta_[u].link; }
  i32 end(u32 u) const { return meta_[u].end; }
  u32 len(u32 u) const { return meta_[u].len; }
  u32 find(u32 u, u32 s) const { return rows_[u].next[s & (kWidth - 1)]; }

  void prefetch_row(u32 u) const { __builtin_prefetch(&rows_[u]); }
  template <class F>
  void for_each(u32 u, F&& f) const {
    for (u32 s = 0; s < kWidth; ++s)
      if (rows_[u].next[s]) f(s, u32{rows_[u].next[s]});
  }

  /// The symbols that go on from `u`, as a set.
  u64 symbols(u32 u) const {
    Parts row;
    std::memcpy(&row, &rows_[u], sizeof row);
    return ~row.missing() & ((u32{1} << kWidth) - 1);
  }

  /// targets[m]: where `s` with bit m flipped leads from the nearest state at or above `u` that it
  /// goes on from, or 0. Whole rows are merged on the way to the root: asking for one symbol after
  /// the other mispredicts where each is found. Returns the link steps taken.
  u32 nearest(u32 u, u32 s, unsigned bits, u32* targets) const {
    u32 wanted = 0;
    for (unsigned m = 0; m < bits; ++m) wanted |= u32{1} << (s ^ (u32{1} << m));
    wanted &= root_symbols_;
    Parts merged;
    std::memcpy(&merged, &rows_[u], sizeof merged);
    u32 steps = 0;
    for (; u && (merged.missing() & wanted); steps += 2)
      for (int i = 0; i < 2; ++i) {  // the root is its own link
        u = meta_[u].link;
        merged.merge(rows_[u]);
      }
    Row row;
    std::memcpy(&row, &merged, sizeof row);
    for (unsigned m = 0; m < bits; ++m) targets[m] = row.next[s ^ (u32{1} << m)];
    return steps;
  }

  [[gnu::always_inline]] Appended append(u32 c) {
    const u32 cur = new_state(length_ + 1, static_cast<i32>(length_));
    ++length_;
    u32 p = last_, t;
    last_ = cur;
    for (; (t = rows_[p].next[c]) == 0; p = meta_[p].link) {
      rows_[p].next[c] = static_cast<Id>(cur);
      if (p == 0) {
        root_symbols_ |= u32{1} << c;
        return {cur, 0, 0};
      }
    }
    const u32 plen = meta_[p].len + 1u;
    if (meta_[t].len == plen) {
      meta_[cur].link = static_cast<Id>(t);
      return {cur, 0, 0};
    }
    const u32 clone = size_++;
    rows_[clone] = rows_[t];
    meta_[clone] = meta_[t];
    meta_[clone].len = static_cast<Id>(plen);
    meta_[t].link = meta_[cur].link = static_cast<Id>(clone);
    for (; rows_[p].next[c] == t; p = meta_[p].link) {
      rows_[p].next[c] = static_cast<Id>(clone);
      if (p == 0) break;
    }
    return {cur, clone, t};
  }

  /// Four states at a time: the root is its own link, and its end is never read, so overshooting it
  /// is harmless and costs less than mispredicting where the chain stops.
  u32 propagate(u32 u, i32 position) {
    const auto end = static_cast<End>(position);
    u32 steps = 0;
    for (u32 v = meta_[u].link; v != 0; steps += 4)
      for (int i = 0; i < 4; ++i) {
        meta_[v].end = end;
        // The next key is looked up along the same chain.
        if constexpr (sizeof(Id) == 4) __builtin_prefetch(&rows_[v]);
        v = meta_[v].link;
      }
    return steps;
  }

 private:
  static constexpr u32 kWidth = u32{1} << kBits;
  struct alignas(kWidth * sizeof(Id)) Row {
    Id next[kWidth];
  };
  /// A row as vectors of 16 bytes.
  struct Parts {
    typedef Id Vector __attribute__((vector_size(16)));  // `using` takes no dependent type
    static constexpr std::size_t kLanes = 16 / sizeof(Id), kCount = sizeof(Row) / 16;
    Vector part[kCount];

    /// Fills what is 0 from `row`.
    void merge(const Row& row) {
      Vector other[kCount];
      std::memcpy(other, &row, sizeof other);
      for (std::size_t i = 0; i < kCount; ++i)
        part[i] |= other[i] & (Vector)(part[i] == 0);
    }
    /// The set of the symbols without a target.
    u32 missing() const {
#if defined(__SSE2__)
      if constexpr (kLanes == 8 && kCount == 2) {
        const __m128i zero = _mm_setzero_si128();
        const auto lane = [&](int i) {
          return _mm_cmpeq_epi16(reinterpret_cast<const __m128i&>(part[i]), zero);
        };
        return static_cast<u32>(_mm_movemask_epi8(_mm_packs_epi16(lane(0), lane(1))));
      }
#endif
      u32 set = 0;
      for (u32 s = 0; s < kWidth; ++s) set |= u32{part[s / kLanes][s % kLanes] == 0} << s;
      return set;
    }
  };
  struct alignas(4 * sizeof(Id)) Meta {
    Id link, len;
    End end;
  };

  u32 new_state(u32 length, i32 position) {
    const u32 id = size_++;
    rows_[id] = Row{};
    meta_[id] = {0, static_cast<Id>(length), static_cast<End>(position)};
    return id;
  }

  Buffer<Row> rows_;
  Buffer<Meta> meta_;
  u32 size_ = 0, last_ = 0, length_ = 0, root_symbols_ = 0;
};

using DenseAutomaton = Dense<u16, 4>;
using LongSmallAutomaton = Dense<u32, 2>;  // for 1 and 2 bits

}  // namespace rosakit
