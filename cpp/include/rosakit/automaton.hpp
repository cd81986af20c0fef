// The online suffix automaton of one key stream (Blumer et al., 1985), laid out for caches.
//
// A state is a class of substrings with equal sets of end positions; `link` points to the class of
// its longest proper suffix outside the class. A state with one transition holds it inline; a
// branching state owns a row that grows 2 -> 4 -> 8 -> ... and becomes directly indexed once it is
// as wide as the alphabet. Rows that were outgrown are recycled.
//
// Narrow: symbols < 256 and fewer than 2^23 symbols; 16-byte states, 4-byte row entries.
// Wide:   symbols < 2^31; 20-byte states, 8-byte row entries, hashed from 16 entries on.
#pragma once

#include <array>
#include <bit>
#include <stdexcept>

#include "rosakit/buffer.hpp"
#include "rosakit/types.hpp"

namespace rosakit {

struct NarrowState {
  u32 link;
  i32 end;      // the latest position at which the strings of this state end
  u32 next;     // 0: none; target; kRow | row offset
  u32 len_sym;  // length << 8 | (inline symbol, or the class of the row)
};

struct WideState {
  u32 link;
  i32 end;
  u32 next;
  u32 len;
  u32 sym;  // inline symbol, or kRow | class of the row
};

template <bool kWide>
class Automaton {
 public:
  using Symbol = std::conditional_t<kWide, u32, u8>;
  using State = std::conditional_t<kWide, WideState, NarrowState>;
  static constexpr u32 kRoot = 0;
  static constexpr u32 kRow = u32{1} << 31;
  static constexpr std::size_t kMaxSymbols = kWide ? (std::size_t{1} << 31) - 1 : std::size_t{1} << 23;

  Automaton() { reset(8); }
  explicit Automaton(unsigned bits) { reset(bits); }

  /// Forgets everything; keeps the memory. `bits`: symbols are below 2^bits (narrow only).
  void reset(unsigned bits) {
    if constexpr (!kWide) {
      sigma_ = u32{1} << (bits < 1 ? 1 : bits);
      direct_class_ = static_cast<u32>(std::bit_width(sigma_)) - 2;
    }
    states_.clear();
    rows_.clear();
    free_.fill(0);
    rows_.resize(2);  // offset 0 marks an empty free list
    last_ = 0;
    length_ = 0;
    State root{};
    root.end = kNull;
    states_.push_back(root);
  }
  void reserve(std::size_t symbols) { states_.reserve(symbols + symbols / 2 + 4); }

  u32 size() const { return static_cast<u32>(states_.size()); }
  u32 length() const { return length_; }  // symbols appended
  u32 last() const { return last_; }
  u32 link(u32 u) const { return states_[u].link; }
  i32 end(u32 u) const { return states_[u].end; }
  void set_end(u32 u, i32 e) { states_[u].end = e; }
  u32 len(u32 u) const {
    if constexpr (kWide) return states_[u].len;
    else return states_[u].len_sym >> 8;
  }

  /// The target of the transition of `u` on `s`, or 0.
  u32 find(u32 u, u32 s) const {
    const State& x = states_[u];
    if (!has_row(x)) return inline_symbol(x) == s ? x.next : 0;
    return find_in_row(x, s);
  }

  /// Calls f(symbol, target) for every transition of `u`.
  template <class F>
  void for_each(u32 u, F&& f) const {
    const State& x = states_[u];
    if (!has_row(x)) {
      if (x.next) f(inline_symbol(x), x.next);
      return;
    }
    entries(x, f);
  }

  /// Appends symbol `c` at position length(); returns its state. Latest ends are not propagated.
  u32 append(u32 c) {
    if (length_ >= kMaxSymbols) throw std::length_error("suffix automaton: stream too long");
    const i32 position = static_cast<i32>(length_);
    const u32 cur = new_state(length_ + 1, position);
    ++length_;
    u32 p = last_;
    u32 t;
    last_ = cur;
    while ((t = find_or_add(p, c, cur)) == 0) {
      if (p == kRoot) return cur;  // link is already the root
      p = states_[p].link;
    }
    const u32 plen = len(p) + 1;
    if (len(t) == plen) {
      states_[cur].link = t;
      return cur;
    }
    const u32 clone = clone_state(t, plen);
    states_[t].link = clone;
    states_[cur].link = clone;
    while (redirect(p, c, t, clone)) {
      if (p == kRoot) break;
      p = states_[p].link;
    }
    return cur;
  }

  /// Marks `position` as the latest end along the link chain of `u`; returns the states visited.
  u32 propagate(u32 u, i32 position) {
    u32 steps = 0;
    for (u32 v = states_[u].link; v != kRoot; v = states_[v].link, ++steps) states_[v].end = position;
    return steps;
  }

  std::size_t live_bytes() const { return states_.size() * sizeof(State) + rows_.size() * 4; }
  std::size_t reserved_bytes() const {
    return states_.capacity() * sizeof(State) + rows_.capacity() * 4;
  }

 private:
  // --- states -------------------------------------------------------------------------------
  static bool has_row(const State& x) {
    if constexpr (kWide) return x.sym & kRow;
    else return x.next & kRow;
  }
  static u32 inline_symbol(const State& x) {
    if constexpr (kWide) return x.sym;
    else return x.len_sym & 255u;
  }
  static u32 row_class(const State& x) { return inline_symbol(x) & 255u; }
  static void set_inline(State& x, u32 c, u32 target) {
    if constexpr (kWide) x.sym = c;
    else x.len_sym = (x.len_sym & ~255u) | c;
    x.next = target;
  }
  static void set_row(State& x, u32 cls, u32 offset) {
    if constexpr (kWide) {
      x.sym = kRow | cls;
      x.next = offset;
    } else {
      x.len_sym = (x.len_sym & ~255u) | cls;
      x.next = kRow | offset;
    }
  }
  u32 new_state(u32 length, i32 position) {
    State x{};
    x.end = position;
    if constexpr (kWide) x.len = length;
    else x.len_sym = length << 8;
    const u32 id = static_cast<u32>(states_.size());
    states_.push_back(x);
    return id;
  }
  u32 clone_state(u32 t, u32 length) {
    State x = states_[t];
    if (has_row(x)) {
      const u32 cls = row_class(x);
      const u32 offset = allocate(cls);
      std::memcpy(&rows_[std::size_t{offset} * 2], row(states_[t]), std::size_t{words(cls)} * 4);
      set_row(x, cls, offset);
    }
    if constexpr (kWide) x.len = length;
    else x.len_sym = (x.len_sym & 255u) | (length << 8);
    const u32 id = static_cast<u32>(states_.size());
    states_.push_back(x);
    return id;
  }

  // --- rows: class c holds 2 << c entries; offsets are in units of 8 bytes ---------------------
  static constexpr u32 capacity(u32 cls) { return u32{2} << cls; }
  static constexpr bool hashed(u32 cls) { return kWide && cls >= 3; }
  static constexpr u32 words(u32 cls) {
    return kWide ? capacity(cls) * 2 + (hashed(cls) ? 2 : 0) : capacity(cls);
  }
  const u32* row(const State& x) const {
    const u32 offset = kWide ? x.next : x.next & ~kRow;
    return rows_.data() + std::size_t{offset} * 2;
  }
  u32* row(const State& x) { return const_cast<u32*>(std::as_const(*this).row(x)); }

  u32 allocate(u32 cls) {
    if (free_[cls]) {
      const u32 offset = free_[cls];
      free_[cls] = rows_[std::size_t{offset} * 2];
      return offset;
    }
    const u32 n = words(cls);
    std::size_t at = rows_.size();
    if (!kWide && n == 16) {  // a 64-byte row is kept in one cache line; the gap is recycled
      while (at & 15) {
        const u32 gap = std::countr_zero(static_cast<u32>(at & 15) | 16u);
        rows_.resize(at + (std::size_t{1} << gap));
        recycle(static_cast<u32>(at / 2), gap - 1);
        at = rows_.size();
      }
    }
    if (at / 2 >= (kWide ? ~u32{0} : kRow - 1)) throw std::length_error("suffix automaton: too many rows");
    rows_.resize(at + n);
    return static_cast<u32>(at / 2);
  }
  void recycle(u32 offset, u32 cls) {
    rows_[std::size_t{offset} * 2] = free_[cls];
    free_[cls] = offset;
  }

  // Narrow packed entries are target << 8 | symbol and fill a row from the front; direct entries are
  // the target; wide entries are {symbol, target}. An absent entry has target 0.
  static u32 hash(u32 s) { return static_cast<u32>(s * u64{0x9E3779B97F4A7C15} >> 32); }

  /// Index of the word that holds (or, in a hashed row, would hold) the target of symbol `s`.
  static u32 probe(const u32* r, u32 cls, u32 s) {
    const u32 mask = capacity(cls) - 1;
    for (u32 i = hash(s) & mask;; i = (i + 1) & mask) {
      const u32 at = 2 + 2 * i;
      if (!r[at + 1] || r[at] == s) return at + 1;
    }
  }
  u32 find_in_row(const State& x, u32 s) const {
    const u32* r = row(x);
    const u32 cls = row_class(x);
    if constexpr (kWide) {
      if (hashed(cls)) return r[probe(r, cls, s)];
      for (u32 i = 0; i < capacity(cls); ++i)
        if (r[2 * i] == s) return r[2 * i + 1];  // absent entries are zero, so this is still 0
      return 0;
    } else {
      if (cls == direct_class_) return s < sigma_ ? r[s] : 0;
      u32 word = 0;  // at most one entry agrees: an OR needs no branches
      if (cls == 0) {
        for (u32 i = 0; i < 2; ++i) word |= (r[i] & 255u) == s ? r[i] : 0u;
      } else {
        for (u32 j = 0; j < capacity(cls); j += 4)
          for (u32 i = j; i < j + 4; ++i) word |= (r[i] & 255u) == s ? r[i] : 0u;
      }
      return word >> 8;
    }
  }
  void replace_in_row(State& x, u32 s, u32 target) {
    u32* r = row(x);
    const u32 cls = row_class(x);
    if constexpr (kWide) {
      if (hashed(cls)) {
        r[probe(r, cls, s)] = target;
        return;
      }
      u32 i = 0;
      while (r[2 * i] != s || !r[2 * i + 1]) ++i;
      r[2 * i + 1] = target;
    } else if (cls == direct_class_) {
      r[s] = target;
    } else {
      u32 i = 0;
      while ((r[i] & 255u) != s) ++i;
      r[i] = target << 8 | s;
    }
  }
  /// Puts an absent symbol into the row if there is room.
  bool insert_in_row(State& x, u32 s, u32 target) {
    u32* r = row(x);
    const u32 cls = row_class(x);
    if constexpr (kWide) {
      if (hashed(cls)) {
        if (r[0] >= capacity(cls) / 4 * 3) return false;
        ++r[0];
        const u32 at = probe(r, cls, s);
        r[at - 1] = s;
        r[at] = target;
        return true;
      }
      for (u32 i = 0; i < capacity(cls); ++i)
        if (!r[2 * i + 1]) {
          r[2 * i] = s;
          r[2 * i + 1] = target;
          return true;
        }
      return false;
    } else {
      if (cls == direct_class_) {
        r[s] = target;
        return true;
      }
      for (u32 i = 0; i < capacity(cls); ++i)
        if (!r[i]) {
          r[i] = target << 8 | s;
          return true;
        }
      return false;
    }
  }
  /// The class that follows `cls`; narrow rows of 32 entries and more are directly indexed.
  u32 next_class(u32 cls) const {
    if constexpr (kWide) return cls + 1;
    else return cls + 1 >= direct_class_ || cls >= 3 ? direct_class_ : cls + 1;
  }
  void add_transition(u32 p, u32 s, u32 target) {
    if (!has_row(states_[p])) {
      State& x = states_[p];
      if (!x.next) {
        set_inline(x, s, target);
        return;
      }
      const u32 symbol = inline_symbol(x), old = x.next;
      make_row(p, 0);
      insert_in_row(states_[p], symbol, old);
    }
    if (insert_in_row(states_[p], s, target)) return;
    const State before = states_[p];
    const u32 cls = row_class(before);
    make_row(p, next_class(cls));
    entries(before, [&](u32 symbol, u32 t) { insert_in_row(states_[p], symbol, t); });
    recycle(kWide ? before.next : before.next & ~kRow, cls);
    insert_in_row(states_[p], s, target);
  }
  void make_row(u32 p, u32 cls) {
    const u32 offset = allocate(cls);
    std::memset(&rows_[std::size_t{offset} * 2], 0, std::size_t{words(cls)} * 4);
    set_row(states_[p], cls, offset);
  }
  template <class F>
  void entries(const State& x, F&& f) const {
    const u32* r = row(x);
    const u32 cls = row_class(x);
    if constexpr (kWide) {
      if (hashed(cls)) r += 2;
      for (u32 i = 0; i < capacity(cls); ++i)
        if (r[2 * i + 1]) f(r[2 * i], r[2 * i + 1]);
    } else if (cls == direct_class_) {
      for (u32 s = 0; s < sigma_; ++s)
        if (r[s]) f(s, r[s]);
    } else {
      for (u32 i = 0; i < capacity(cls) && r[i]; ++i) f(r[i] & 255u, r[i] >> 8);
    }
  }
  /// The target of `p` on `s`; if there is none, adds `fresh` and returns 0.
  u32 find_or_add(u32 p, u32 s, u32 fresh) {
    const u32 t = find(p, s);
    if (!t) add_transition(p, s, fresh);
    return t;
  }
  bool redirect(u32 p, u32 s, u32 from, u32 to) {
    if (find(p, s) != from) return false;
    State& x = states_[p];
    if (has_row(x)) replace_in_row(x, s, to);
    else x.next = to;
    return true;
  }

  Buffer<State> states_;
  Buffer<u32> rows_;
  std::array<u32, 32> free_{};
  u32 last_ = 0;
  u32 length_ = 0;
  u32 sigma_ = 256;        // narrow: the alphabet
  u32 direct_class_ = 7;  // narrow: the class whose capacity is sigma_
};

}  // namespace rosakit
