// Whole-stream solvers: token and run granularity, with counterfactual flips.
//
// Both run the online automaton while its walks stay within a budget linear in the position, which
// ordinary streams never leave, and hand the rest of the stream to the offline answers
// (offline.hpp), whose cost does not depend on the input.
#pragma once

#include <algorithm>

#include "rosakit/hints.hpp"
#include "rosakit/offline.hpp"
#include "rosakit/run_stream.hpp"

namespace rosakit {

/// Where one stream's results go; positions are offset by `base`.
struct Output {
  i32* position = nullptr;
  i32* length = nullptr;
  i32* flipped = nullptr;  // [n, bits] or null
  unsigned bits = 0;
  i32 base = 0;
  const u8* flip_at = nullptr;  // [n]: where flips are wanted; null: everywhere
};

template <class Tree>
class Solver {
 public:
  using Symbol = typename Tree::Symbol;

  /// Of the online phase.
  Budget budget;
  /// Streams from this length on look ahead by hints, if the layout can.
  u32 hints_from = Hints<Tree>::kFrom;

  /// Symbols are below 2^symbol_bits. Flips may reach beyond: what those find is nothing.
  void match(const Symbol* q, const Symbol* k, u32 n, const Rule& rule, unsigned symbol_bits,
             const Output& out) {
    symbol_bits_ = symbol_bits;
    flip_bits_ = std::min(out.bits, symbol_bits);
    primary_.clear();
    primary_.reserve(n);
    walked_ = 0;
    rule_ = rule;
    least_ = std::max(rule.min_length, 1u);
    out_ = out;
    if constexpr (requires(Tree& tree) { tree.keep_symbols(true); })
      runs_.stream.tree.keep_symbols(out.bits > 0);
    if (rule.granularity == Granularity::token) tokens(q, k, n);
    else runs(q, k, n);
  }

 private:
  static constexpr bool kLooksAhead = requires(Tree& tree) { tree.expect(0u); };

  void write(u32 i, Hit h) {
    out_.position[i] = successor(h);
    out_.length[i] = h.length >= least_ ? static_cast<i32>(h.length) : 0;
  }
  /// Without a branch, which random streams would mispredict for every second flip.
  i32 successor(Hit h) const {
    static_assert(kNull == -1);
    return (out_.base + h.end + 1) | -static_cast<i32>(h.length < least_);
  }
  /// `hits`: of the flips below flip_bits_.
  void write_flips(u32 i, const Hit* hits) {
    i32* to = out_.flipped + std::size_t{i} * out_.bits;
    for (unsigned m = 0; m < flip_bits_; ++m) to[m] = successor(hits[m]);
    for (unsigned m = flip_bits_; m < out_.bits; ++m) to[m] = kNull;
  }

  void tokens(const Symbol* q, const Symbol* k, u32 n) {
    const u32 cap = rule_.max_length;
    Stream<Tree>& stream = runs_.stream;
    stream.tree.reserve(n);
    stream.reset(symbol_bits_);
    primary_.resize(n);
    Hit flips[16];
    u32 i = 0;
    const bool lengths = rule_.min_length > 1 || cap != kUnlimited;  // else a flip's is not needed
    const bool self = cap == kUnlimited && std::equal(q, q + n, k);
    // Flips walk the query's whole chain at every position, which hints would only slow down.
    const bool hints = kLooksAhead && n >= hints_from && !out_.bits;
    if constexpr (kLooksAhead)
      if (hints) hints_.reset(k, n);
    if (self && !out_.bits) i = itself(k, n, hints);
    for (; i < n && stream.chain_steps <= budget.at(i) && walked_ <= budget.at(i); ++i) {
      if constexpr (kLooksAhead)
        if (hints) hints_.ahead(stream.tree, i);
      const bool flip = flips_at(i);
      if (flip) {
        walked_ += stream.flips(q[i], flip_bits_, cap, flips, lengths);
        write_flips(i, flips);
      }
      if constexpr (kLooksAhead) stream.tree.expect(i + 1 < n ? k[i + 1] : 0);
      if (self) {
        write(i, stream.append_self(k[i]));
        primary_[i] = stream.tree.last();
      } else {
        stream.advance(q[i], cap);
        if constexpr (kLooksAhead)
          stream.tree.prefetch_target(stream.at.state, i + 1 < n ? q[i + 1] : 0);
        else stream.tree.prefetch_row(stream.at.state);
        write(i, stream.hit());
        primary_[i] = stream.append(k[i]);
      }
      if constexpr (kLooksAhead)
        if (hints) hints_.note(i, stream.tree.last());
      if (!flip) write_flips_as_match(i);
    }
    if (i == n) return;
    for (u32 j = i; j < n; ++j) primary_[j] = stream.tree.append(k[j]).state;
    stream.normalise();
    offline_.build(stream.tree, primary_, out_.bits > 0);
    Cursor at = stream.at;
    Hit before{};
    for (; i < n; ++i) {
      const i32 by = static_cast<i32>(i) - 1;
      offline_.reveal(by, k);
      const bool flip = flips_at(i);
      if (flip) {
        for (unsigned m = 0; m < flip_bits_; ++m) {
          const u32 s = q[i] ^ (u32{1} << m);
          flips[m] = offline_.seen(s, by) ? look_up(offline_.follow(at, s, by, cap), s) : Hit{};
        }
        write_flips(i, flips);
      }
      at = offline_.follow(at, q[i], by, cap);
      // A match that goes on keeps its (latest) place; only new matches are looked up.
      const bool goes_on =
          before.length && before.length < cap && k[static_cast<u32>(before.end) + 1] == q[i];
      before = goes_on ? Hit{before.end + 1, before.length + 1} : look_up(at, q[i]);
      write(i, before);
      if (!flip) write_flips_as_match(i);
    }
  }

  /// `tokens` where queries are the keys and no flips are wanted: the positions read online.
  u32 itself(const Symbol* k, u32 n, [[maybe_unused]] bool hints) {
    Stream<Tree>& stream = runs_.stream;
    u32 i = 0;
    for (; i < n && stream.chain_steps <= budget.at(i); ++i) {
      if constexpr (kLooksAhead) {
        if (hints) hints_.ahead(stream.tree, i);
        stream.tree.expect(i + 1 < n ? k[i + 1] : 0);
      }
      write(i, stream.append_self(k[i]));
      primary_[i] = stream.tree.last();
      if constexpr (kLooksAhead)
        if (hints) hints_.note(i, stream.tree.last());
    }
    return i;
  }

  void runs(const Symbol* q, const Symbol* k, u32 n) {
    runs_.stream.tree.reserve(n);
    runs_.reset(symbol_bits_);
    Hit flips[16];
    u32 i = 0;
    for (; i < n && runs_.walked <= budget.at(i) && runs_.stream.chain_steps <= budget.at(i); ++i) {
      const bool wanted = flips_at(i);
      const bool fresh = runs_.step(q[i], k[i], rule_, wanted ? flip_bits_ : 0, flips);
      if (primary_.size() < runs_.stream.tree.length())
        primary_.push_back(runs_.stream.tree.last());
      write(i, runs_.hit());
      if (fresh && wanted) write_flips(i, flips);
      else write_flips_as_match(i);
    }
    if (i < n) runs_offline(q, k, n, i);
  }

  void runs_offline(const Symbol* q, const Symbol* k, u32 n, u32 i) {
    const u32 cap = rule_.max_length;
    auto& tree = runs_.stream.tree;
    Hit now = runs_.stream.hit(), flips[16];
    // The keys still to come enter the automaton at once.
    Symbol last = runs_.key_run[runs_.key_run.size() - 1];
    for (u32 e = tree.length(); e < runs_.key_run.size(); ++e)
      primary_.push_back(tree.append(runs_.key_run[e]).state);
    for (u32 j = i; j < n; last = k[j++])
      if (k[j] != last) primary_.push_back(tree.append(k[j]).state);
    runs_.stream.normalise();
    offline_.build(tree, primary_, out_.bits > 0);
    // `whole`: the query's place among all key runs; `at`: its place among the known ones.
    const i32 all = static_cast<i32>(tree.length());
    Cursor at = runs_.stream.at, whole{};
    for (Symbol s : runs_.query_run) whole = offline_.follow(whole, s, all, cap);
    for (; i < n; ++i) {
      const bool rose = runs_.see_key(k[i], rule_.successor);
      const i32 known = runs_.known;
      offline_.reveal(known, runs_.key_run);
      const bool fresh = runs_.see_query(q[i]), flip = flips_at(i) && fresh;
      if (fresh) {
        for (unsigned m = 0; flip && m < flip_bits_; ++m) {
          const u32 s = q[i] ^ (u32{1} << m);
          flips[m] = runs_.successor(look_up(offline_.follow(at, s, known, cap), s));
        }
        if (flip) write_flips(i, flips);
        whole = offline_.follow(whole, q[i], all, cap);
        at = offline_.follow(at, q[i], known, cap);
        const bool goes_on = now.length && now.length < cap && now.end < known &&
                             runs_.key_run[static_cast<u32>(now.end) + 1] == q[i];
        now = goes_on ? Hit{now.end + 1, now.length + 1} : look_up(at, q[i]);
      } else if (rose && runs_.key_run[static_cast<u32>(known)] == q[i]) {
        at = offline_.occurring(whole, known);
        now = look_up(at, q[i]);
      }
      write(i, runs_.successor(now));
      if (!flip) write_flips_as_match(i);
    }
  }
  /// Whether flips are wanted at position i.
  bool flips_at(u32 i) const { return out_.bits && (!out_.flip_at || out_.flip_at[i]); }
  /// Where no flip is wanted, and inside a query run, where no single flip is defined: the match
  /// itself stands for every bit.
  void write_flips_as_match(u32 i) {
    for (unsigned m = 0; m < out_.bits; ++m)
      out_.flipped[std::size_t{i} * out_.bits + m] = out_.position[i];
  }
  /// The latest hit of the place `c`, whose string ends in symbol `s`.
  Hit look_up(Cursor c, u32 s) const {
    return c.length ? Hit{offline_.latest(c.state, s), c.length} : Hit{};
  }

  Offline<Tree> offline_;
  RunStream<Stream<Tree>, Flat> runs_;
  Hints<Tree> hints_;
  Buffer<u32> primary_;
  u64 walked_ = 0;
  unsigned symbol_bits_ = 8, flip_bits_ = 0;
  Rule rule_;
  u32 least_ = 1;  // length of a match
  Output out_;
};

}  // namespace rosakit
