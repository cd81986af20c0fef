// The suffix automaton of a stream of at most 4 bits a symbol, for decoding: everything lies in one
// array of 16-byte units, so that a state is one cache line away, a row of transitions another, and
// undoing a step is putting words back.
//
// A state is a unit {link, latest end, next, length << 8 | kind}. Kind 0..15: its only transition is
// by that symbol, to `next` (0: none). kSmall: `next` is a unit of up to four entries
// target << 8 | symbol. kFull: `next` is four aligned units, one cache line, of 16 targets.
#pragma once

#include <bit>

#include "rosakit/storage.hpp"
#include "rosakit/undo_ring.hpp"

namespace rosakit {

class CompactAutomaton {
 public:
  static constexpr unsigned kMaxBits = 4;
  /// 2 states a symbol, and rows of at most 3 more units: unit numbers stay below 2^24.
  static constexpr std::size_t kMaxSymbols = std::size_t{1} << 21;

  CompactAutomaton() { clear(); }
  void clear() {
    units_.clear();
    units_.resize(1);
    units_.mut(0) = Unit{{0, static_cast<u32>(kNull), 0, 0}};
    free_ = last_ = length_ = 0;
  }

  u32 length() const { return length_; }
  u32 last() const { return last_; }
  u32 link(u32 u) const { return units_[u].w[kLink]; }
  i32 end(u32 u) const { return static_cast<i32>(units_[u].w[kEnd]); }
  u32 len(u32 u) const { return units_[u].w[kTag] >> 8; }

  /// The target of the transition of `u` on `s`, or 0.
  u32 find(u32 u, u32 s) const {
    const Unit& x = units_[u];
    const u32 kind = x.w[kTag] & 255u;
    if (kind < kSmall) return kind == s ? x.w[kNext] : 0;
    const u32* row = words(x.w[kNext]);
    if (kind == kFull) return row[s];
    u32 entry = 0;  // at most one agrees, so an OR needs no branches; an absent entry's target is 0
    for (u32 i = 0; i < 4; ++i) entry |= (row[i] & 255u) == s ? row[i] : 0u;
    return entry >> 8;
  }

  struct Appended {
    u32 state, clone, split;
  };
  /// Appends symbol `c`. Latest ends are not propagated. kNote: overwritten words go to `undo`.
  template <bool kNote>
  Appended append(u32 c, UndoRing& undo) {
    const u32 cur = make_unit();
    *units_.mut_ptr(cur) = Unit{{0, length_, 0, (length_ + 1) << 8}};
    ++length_;
    u32 p = last_, t;
    last_ = cur;
    for (; (t = find(p, c)) == 0; p = link(p)) {
      add<kNote>(p, c, cur, undo);
      if (!p) return {cur, 0, 0};
    }
    const u32 plen = len(p) + 1;
    if (len(t) == plen) {
      units_.mut(cur).w[kLink] = t;
      return {cur, 0, 0};
    }
    const u32 clone = clone_state<kNote>(t, plen, undo);
    write<kNote>(t, kLink, clone, undo);
    units_.mut(cur).w[kLink] = clone;
    for (;; p = link(p)) {
      if (find(p, c) != t) break;
      redirect<kNote>(p, c, clone, undo);
      if (!p) break;
    }
    return {cur, clone, t};
  }

  /// Marks the newest position as the latest end along the link chain above the newest state;
  /// returns the states visited. Calls seen(unit) for the lines that the next step will want.
  template <bool kNote, class F>
  u32 propagate(UndoRing& undo, F&& seen) {
    const u32 position = length_ - 1;
    u32 steps = 0;
    for (u32 v = link(last_); v; ++steps) {
      Unit& x = units_.mut(v);
      if constexpr (kNote) undo.note(v * 4 + kEnd, x.w[kEnd]);
      x.w[kEnd] = position;
      seen(v);
      if ((x.w[kTag] & 255u) >= kSmall) seen(x.w[kNext]);
      v = x.w[kLink];
    }
    return steps;
  }

  [[gnu::always_inline]] void prefetch(u32 unit) const { __builtin_prefetch(units_.ptr(unit)); }
  /// Of a state in cache: the unit that holds its row, or itself.
  u32 row_unit(u32 u) const {
    const Unit& x = units_[u];
    return (x.w[kTag] & 255u) >= kSmall ? x.w[kNext] : u;
  }

  // --- undoing ------------------------------------------------------------------------------
  u32 units() const { return static_cast<u32>(units_.size()); }
  u32 free_units() const { return free_; }
  void restore(const UndoRing::Entry& e) { units_.mut(e.word / 4).w[e.word & 3] = e.old; }
  void restore(u32 units, u32 free_units, u32 last, u32 length) {
    units_.resize(units);
    free_ = free_units;
    last_ = last;
    length_ = length;
  }

  std::size_t live_bytes() const { return units_.live_bytes(); }
  std::size_t reserved_bytes() const { return units_.reserved_bytes(); }

 private:
  struct alignas(16) Unit {
    u32 w[4];
  };
  enum : u32 { kLink, kEnd, kNext, kTag };
  static constexpr u32 kSmall = 16, kFull = 17;

  /// Of a unit, or of a full row's four: a row is more than one unit's array.
  const u32* words(u32 unit) const { return reinterpret_cast<const u32*>(units_.ptr(unit)); }
  u32* mut_words(u32 unit) { return reinterpret_cast<u32*>(units_.mut_ptr(unit)); }

  template <bool kNote>
  void write(u32 unit, u32 word, u32 value, UndoRing& undo) {
    u32& w = units_.mut(unit).w[word];
    if constexpr (kNote) undo.note(unit * 4 + word, w);
    w = value;
  }
  u32 make_unit() {
    const u32 id = units();
    units_.extend(1);
    return id;
  }
  template <bool kNote>
  u32 make_small(UndoRing& undo) {
    if (!free_) return make_unit();
    const u32 id = free_;
    const Unit& x = units_[id];
    free_ = x.w[0];
    if constexpr (kNote)
      for (u32 i = 0; i < 4; ++i) undo.note(id * 4 + i, x.w[i]);
    return id;
  }
  u32 make_full() {
    while (units() & 3) {  // the gap before an aligned row serves small ones
      const u32 id = make_unit();
      units_.mut(id).w[0] = free_;
      free_ = id;
    }
    const u32 id = units();
    units_.extend(4);
    return id;
  }

  template <bool kNote>
  void set_next(u32 u, u32 next, u32 kind, UndoRing& undo) {
    Unit& x = units_.mut(u);
    if constexpr (kNote) {
      undo.note(u * 4 + kNext, x.w[kNext]);
      undo.note(u * 4 + kTag, x.w[kTag]);
    }
    x.w[kNext] = next;
    x.w[kTag] = (x.w[kTag] & ~255u) | kind;
  }

  /// Adds a transition by a symbol that `u` does not have.
  template <bool kNote>
  void add(u32 u, u32 s, u32 target, UndoRing& undo) {
    const Unit x = units_[u];
    const u32 kind = x.w[kTag] & 255u, next = x.w[kNext];
    if (kind == kFull) {
      write<kNote>(next + s / 4, s & 3u, target, undo);
    } else if (kind == kSmall) {
      const Unit row = units_[next];
      for (u32 i = 2; i < 4; ++i)
        if (!row.w[i]) {
          write<kNote>(next, i, target << 8 | s, undo);
          return;
        }
      const u32 full = make_full();
      u32* r = mut_words(full);
      std::memset(r, 0, 64);
      for (u32 entry : row.w) r[entry & 255u] = entry >> 8;
      r[s] = target;
      write<kNote>(next, 0, free_, undo);
      free_ = next;
      set_next<kNote>(u, full, kFull, undo);
    } else if (next) {
      const u32 row = make_small<kNote>(undo);
      *units_.mut_ptr(row) = Unit{{next << 8 | kind, target << 8 | s, 0, 0}};
      set_next<kNote>(u, row, kSmall, undo);
    } else {
      set_next<kNote>(u, target, s, undo);
    }
  }
  /// Points a present transition elsewhere.
  template <bool kNote>
  void redirect(u32 u, u32 s, u32 target, UndoRing& undo) {
    const Unit& x = units_[u];
    const u32 kind = x.w[kTag] & 255u, next = x.w[kNext];
    if (kind == kFull) {
      write<kNote>(next + s / 4, s & 3u, target, undo);
    } else if (kind == kSmall) {
      u32 i = 0;
      while ((units_[next].w[i] & 255u) != s) ++i;
      write<kNote>(next, i, target << 8 | s, undo);
    } else {
      write<kNote>(u, kNext, target, undo);
    }
  }
  template <bool kNote>
  u32 clone_state(u32 t, u32 length, UndoRing& undo) {
    Unit x = units_[t];
    const u32 kind = x.w[kTag] & 255u;
    if (kind == kSmall) {
      const Unit row = units_[x.w[kNext]];
      x.w[kNext] = make_small<kNote>(undo);
      units_.mut(x.w[kNext]) = row;
    } else if (kind == kFull) {
      const u32 row = make_full();
      std::memcpy(mut_words(row), words(x.w[kNext]), 64);
      x.w[kNext] = row;
    }
    x.w[kTag] = length << 8 | kind;
    const u32 id = make_unit();
    units_.mut(id) = x;
    return id;
  }

  PagedArray<Unit> units_;
  u32 free_ = 0;  // small rows given up, linked through their first word
  u32 last_ = 0, length_ = 0;
};

}  // namespace rosakit
