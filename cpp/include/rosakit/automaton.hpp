// The online suffix automaton of one key stream (Blumer et al., 1985), laid out for caches.
//
// A state is a class of substrings with equal sets of end positions; `link` leads to the class of
// its longest proper suffix outside the class. A state with one transition holds it inline; a
// branching state owns a row (rows.hpp).
//
// Narrow: symbols < 256 and fewer than 2^23 of them; 16-byte states.
// Wide:   symbols < 2^31; 20-byte states.
#pragma once

#include "rosakit/rows.hpp"
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
  u32 sym;  // inline symbol, or kRow | entries used << 8 | class of the row
};

/// What appending a symbol did to the link tree: `state` is a new leaf under link(state); if
/// `clone` is not 0, it was first put between `split` and its former link.
struct Appended {
  u32 state, clone, split;
};

template <bool kWide, class Storage = Flat>
class Automaton {
 public:
  using Symbol = std::conditional_t<kWide, u32, u8>;
  using State = std::conditional_t<kWide, WideState, NarrowState>;
  static constexpr u32 kRoot = 0;
  static constexpr unsigned kMaxBits = 8;  // of `nearest`
  static constexpr std::size_t kMaxSymbols =
      kWide ? (std::size_t{1} << 31) - 2 : std::size_t{1} << 23;

  explicit Automaton(unsigned bits = 8) { reset(bits); }

  /// Forgets everything; keeps the memory. `bits`: symbols are below 2^bits (narrow only).
  void reset(unsigned bits) {
    states_.clear();
    rows_.reset(bits);
    last_ = length_ = 0;
    new_lists_.clear();
    has_lists_ = false;
    State root{};
    root.end = kNull;
    states_.push_back(root);
  }
  /// Of an empty automaton: from now on states that many symbols follow keep these in an order,
  /// latest first, if Stream says when one comes.
  void keep_order()
    requires kWide
  {
    rows_.keep_order();
  }
  bool ordered() const
    requires kWide
  {
    return rows_.ordered();
  }
  void reserve(std::size_t symbols) { states_.reserve(symbols + symbols / 2 + 4); }

  u32 size() const { return static_cast<u32>(states_.size()); }
  u32 length() const { return length_; }  // symbols appended
  u32 last() const { return last_; }
  u32 link(u32 u) const { return states_[u].link; }
  i32 end(u32 u) const { return states_[u].end; }
  u32 len(u32 u) const { return len_of(states_[u]); }

  /// The target of the transition of `u` on `s`, or 0.
  u32 find(u32 u, u32 s) const {
    const State& x = states_[u];
    if (!has_row(x)) return inline_symbol(x) == s ? x.next : 0;
    return rows_.find(row_of(x), s);
  }
  /// targets[m]: where `s` with bit m flipped leads from the nearest state at or above `u` that it
  /// goes on from, or 0, in one walk for all bits. Returns the link steps taken.
  u32 nearest(u32 u, u32 s, unsigned bits, u32* targets) const
    requires(!kWide)
  {
    u32 root[kMaxBits] = {}, found[kMaxBits] = {}, steps = 0;
    flips(kRoot, s, bits, root);  // what does not go on from the root never occurred
    const auto pending = [&] {
      u32 any = 0;
      for (unsigned m = 0; m < kMaxBits; ++m) any |= found[m] ? 0 : root[m];
      return any != 0;
    };
    for (; u && pending(); u = link(u), ++steps) flips(u, s, bits, found);
    for (unsigned m = 0; m < bits; ++m) targets[m] = found[m] ? found[m] : root[m];
    return steps;
  }

  /// Calls f(symbol, target) for every transition of `u`.
  template <class F>
  void for_each(u32 u, F&& f) const {
    const State& x = states_[u];
    if (has_row(x)) rows_.for_each(row_of(x), f);
    else if (x.next) f(inline_symbol(x), x.next);
  }

  /// How many transitions `u` has.
  u32 degree(u32 u) const {
    const State& x = states_[u];
    return has_row(x) ? rows_.used(row_of(x)) : x.next != 0;
  }

  // --- order of successors ------------------------------------------------------------------
  /// Whether the successors of `u` are kept in order.
  bool listed(u32 u) const {
    const State& x = states_[u];
    return has_row(x) && rows_.listed(row_of(x));
  }
  /// Whether a state other than the root is or was listed.
  bool has_lists() const { return has_lists_; }
  /// Of a listed state.
  u32 first_successor(u32 u) const { return rows_.first(row_of(states_[u])); }
  void to_front(u32 u, u32 s) { rows_.to_front(row_of(states_[u]), s); }
  /// Calls f(symbol, target) in order until it returns false.
  template <class F>
  void for_each_in_order(u32 u, F&& f) const {
    rows_.for_each_in_order(row_of(states_[u]), f);
  }
  /// Orders the successors of states that have become listed by end(target), latest first.
  template <class F>
  void order_new_lists(F&& end) {
    for (const u32 u : new_lists_) rows_.order(row_of(states_[u]), end);
    new_lists_.clear();
  }

  /// Appends symbol `c` at position length(). Latest ends are not propagated.
  Appended append(u32 c) {
    if (length_ >= kMaxSymbols) throw std::length_error("suffix automaton: stream too long");
    const u32 cur = new_state(length_ + 1, static_cast<i32>(length_));
    ++length_;
    u32 p = last_, t;
    last_ = cur;
    while ((t = find(p, c)) == 0) {
      add_transition(p, c, cur);
      if (p == kRoot) return {cur, 0, 0};  // link is the root already
      p = states_[p].link;
    }
    const u32 plen = len(p) + 1;
    if (len(t) == plen) {
      states_.mut(cur).link = t;
      return {cur, 0, 0};
    }
    const u32 clone = clone_state(t, plen);
    set(t, kLink, &State::link, clone);
    states_.mut(cur).link = clone;
    for (;; p = states_[p].link) {
      if (find(p, c) != t) break;
      redirect(p, c, clone);
      if (p == kRoot) break;
    }
    return {cur, clone, t};
  }

  /// Marks `position` as the latest end along the link chain above `u`; returns the states visited.
  u32 propagate(u32 u, i32 position) {
    u32 steps = 0;
    for (u32 v = states_[u].link; v != kRoot; v = states_[v].link, ++steps) {
      set_end(v, position);
      prefetch_row(v);  // the next key is looked up along the same chain
    }
    return steps;
  }
  void set_end(u32 u, i32 position) { set(u, kEnd, &State::end, position); }

  void prefetch_state(u32 u) const { __builtin_prefetch(states_.ptr(u)); }
  /// Of a state in cache: brings its row nearer.
  void prefetch_row(u32 u) const {
    const State& x = states_[u];
    if (has_row(x)) __builtin_prefetch(rows_.address(row_of(x)));
  }

  // --- undoing (streaming storage) ----------------------------------------------------------
  void set_journal(Journal* journal) {
    journal_ = journal;
    rows_.set_journal(journal);
  }
  /// Starts a step that `undo` and `undo_mark` can take back; fills the mark's first two scalars.
  Journal::Mark& begin_step(std::size_t depth) {
    Journal::Mark& mark = journal_->begin_step(depth, size(), rows_.size_in_units());
    mark.scalars[0] = last_;
    mark.scalars[1] = length_;
    return mark;
  }
  void undo_mark(const Journal::Mark& mark) {
    states_.resize(mark.states);
    rows_.undo_size(mark.rows);
    last_ = mark.scalars[0];
    length_ = mark.scalars[1];
  }
  void undo(const Journal::Entry& e) {
    if (e.area > kSym) {
      rows_.undo(e);
      return;
    }
    State& x = states_.mut(e.index);
    if (e.area == kLink) x.link = e.old;
    else if (e.area == kEnd) x.end = static_cast<i32>(e.old);
    else if (e.area == kNext) x.next = e.old;
    else sym_word(x) = e.old;
  }

  std::size_t row_bytes() const { return rows_.reserved_bytes(); }
  std::size_t row_growth_bytes() const { return rows_.growth_bytes(); }
  std::size_t live_bytes() const { return states_.live_bytes() + rows_.live_bytes(); }
  std::size_t reserved_bytes() const { return states_.reserved_bytes() + rows_.reserved_bytes(); }

 private:
  static constexpr u32 kRow = u32{1} << 31;
  enum : u32 { kLink, kEnd, kNext, kSym };  // areas of the journal

  static u32 len_of(const State& x) {
    if constexpr (kWide) return x.len;
    else return x.len_sym >> 8;
  }
  static bool has_row(const State& x) {
    if constexpr (kWide) return x.sym & kRow;
    else return x.next & kRow;
  }
  static u32 inline_symbol(const State& x) {
    if constexpr (kWide) return x.sym;
    else return x.len_sym & 255u;
  }
  static RowRef row_of(const State& x) {
    if constexpr (kWide) return {x.sym & 255u, x.next, (x.sym & ~kRow) >> 8};
    else return {x.len_sym & 255u, x.next & ~kRow, 0};
  }
  static u32& sym_word(State& x) {
    if constexpr (kWide) return x.sym;
    else return x.len_sym;
  }

  void flips(u32 u, u32 s, unsigned bits, u32 (&found)[kMaxBits]) const {
    const State& x = states_[u];
    if (has_row(x)) {
      rows_.flips(row_of(x), s, bits, found);
    } else if (const u32 m = kFlippedBit[(inline_symbol(x) ^ s) & 255u]; m < bits && !found[m]) {
      found[m] = x.next;
    }
  }
  template <class Field, class Value>
  void set(u32 u, u32 area, Field State::* field, Value value) {
    State& x = states_.mut(u);
    note(area, u, static_cast<u32>(x.*field));
    x.*field = value;
  }
  void note(u32 area, u32 index, u32 old) {
    if constexpr (Storage::template Array<State>::kShared)
      if (index < journal_->state_floor()) journal_->note(area, index, old);
  }
  void set_next(u32 u, u32 sym, u32 next) {
    State& x = states_.mut(u);
    note(kNext, u, x.next);
    note(kSym, u, sym_word(x));
    x.next = next;
    if constexpr (kWide) x.sym = sym;
    else x.len_sym = (x.len_sym & ~255u) | sym;
  }
  void set_row(u32 u, RowRef row) {
    if constexpr (kWide) set_next(u, kRow | row.used << 8 | row.cls, row.offset);
    else set_next(u, row.cls, kRow | row.offset);
  }

  u32 new_state(u32 length, i32 position) {
    State x{};
    x.end = position;
    if constexpr (kWide) x.len = length;
    else x.len_sym = length << 8;
    const u32 id = size();
    states_.push_back(x);
    return id;
  }
  u32 clone_state(u32 t, u32 length) {
    State x = states_[t];
    if constexpr (kWide) x.len = length;
    else x.len_sym = (x.len_sym & 255u) | (length << 8);
    if (has_row(x)) {
      const u32 offset = rows_.copy(row_of(x)).offset;
      x.next = kWide ? offset : kRow | offset;
    }
    const u32 id = size();
    states_.push_back(x);
    for (std::size_t i = 0, n = new_lists_.size(); i < n; ++i)
      if (new_lists_[i] == t) new_lists_.push_back(id);
    return id;
  }
  void add_transition(u32 p, u32 s, u32 target) {
    const State x = states_[p];
    if (has_row(x)) {
      const RowRef before = row_of(x);
      const RowRef after = rows_.insert(before, s, target);
      if (after.offset != before.offset || after.cls != before.cls || after.used != before.used)
        set_row(p, after);
      if (rows_.listed(after) && !rows_.listed(before)) {
        new_lists_.push_back(p);
        has_lists_ |= p != kRoot;
      }
    } else if (!x.next) {
      set_next(p, s, target);
    } else {
      set_row(p, rows_.make(inline_symbol(x), x.next, s, target));
    }
  }
  /// Points a present transition elsewhere.
  void redirect(u32 p, u32 s, u32 target) {
    const State& x = states_[p];
    if (has_row(x)) rows_.replace(row_of(x), s, target);
    else set(p, kNext, &State::next, target);
  }

  typename Storage::template Array<State> states_;
  Rows<kWide, Storage> rows_;
  u32 last_ = 0;
  u32 length_ = 0;
  Buffer<u32> new_lists_;
  bool has_lists_ = false;
  Journal* journal_ = nullptr;
};

}  // namespace rosakit
