// The lane that decoding is made of: streams of up to 4 bits a symbol in token granularity.
//
// Its cost is bounded by handing over: where link chains have grown past the budget, or the stream
// is too long, `step` refuses and the memory goes on with a general lane. A stream that has been
// constant so far (a route that learned nothing yet) holds no automaton at all: its matches are
// known in closed form.
#pragma once

#include <algorithm>
#include <mutex>

#include "rosakit/compact_automaton.hpp"
#include "rosakit/lane.hpp"
#include "rosakit/stream.hpp"

namespace rosakit {

class CompactLane final : public Lane {
 public:
  static constexpr unsigned kMaxBits = CompactAutomaton::kMaxBits;

  CompactLane(const Rule& rule, const Budget& budget)
      : Lane(true), rule_(rule), budget_(budget) {}
  CompactLane(const CompactLane& other)
      : Lane(true),
        constant_(other.constant_),
        self_(other.self_),
        symbol_(other.symbol_),
        hot_count_(other.hot_count_),
        size_(other.size_),
        start_(other.start_),
        at_(other.at_),
        walked_(other.walked_),
        rule_(other.rule_),
        budget_(other.budget_),
        tree_(other.tree_),
        symbols_(other.symbols_),
        undo_(other.undo_) {
    std::copy(other.hot_, other.hot_ + kHot, hot_);
  }
  CompactLane& operator=(const CompactLane&) = delete;

  std::shared_ptr<Lane> clone() const override {
    std::lock_guard lock(copying_);
    return std::make_shared<CompactLane>(*this);
  }
  u32 length() const override { return start_ + size_; }
  u32 start() const override { return start_; }
  bool has_room(std::size_t) const override { return true; }  // `step` says where it ends

  bool step(u32 q, u32 k, bool undoable, i32* position, i32* length) override {
    if (constant_) [[unlikely]] {
      if (!size_) symbol_ = static_cast<u8>(k << 4 | q);
      if (symbol_ == (k << 4 | q)) {
        const u32 seen = q == k ? size_ : 0;
        ++size_;
        write({static_cast<i32>(seen) - 1, std::min(seen, rule_.max_length)}, position, length);
        return true;
      }
      if (size_ > kShortRun) return false;
      leave_constant();
    }
    if (walked_ > budget_.at(size_) || size_ >= CompactAutomaton::kMaxSymbols) [[unlikely]]
      return false;
    write(undoable ? feed<true>(q, k) : feed<false>(q, k), position, length);
    return true;
  }
  bool step_candidates(u32, unsigned, bool, i32*, i32*) override { return false; }

  // Before a step: brings what it will touch nearer, in two stages of independent accesses. The
  // last step noted what this one starts from; where the symbols lead from there is known then.
  // (Always inlined: the compiler drops calls of functions that only prefetch.)
  [[gnu::always_inline]] void approach() const {
    for (u32 i = 0; i < hot_count_; ++i) tree_.prefetch(hot_[i]);
    undo_.prefetch();
  }
  [[gnu::always_inline]] void approach(u32 q, u32 k) const {
    if (constant_) return;
    u32 p = tree_.last();
    for (int depth = 0; depth < 8; ++depth) {
      if (const u32 t = tree_.find(p, k)) tree_.prefetch(t);
      if (!p) break;
      p = tree_.link(p);
    }
    if (!self_)
      if (const u32 t = tree_.find(at_.state, q)) tree_.prefetch(t);
  }

  bool undo_to(u32 length) override {
    if (length < start_) return false;
    const u32 kept = length - start_;
    if (!constant_) {
      if (!undo_.holds(size_ - kept)) return false;
      for (u32 n = size_ - kept; n; --n) undo_step();
      symbols_.resize(kept);
      hot_count_ = 0;
    }
    size_ = kept;
    return true;
  }
  void skip(u32 position) override { start_ = position; }

  u32 query(u32 i) const override { return symbol(i) & 15u; }
  u32 key(u32 i) const override { return symbol(i) >> 4; }
  bool self() const override { return constant_ ? symbol_ >> 4 == (symbol_ & 15) : self_; }
  std::size_t live_bytes() const override {
    return sizeof *this + undo_.reserved_bytes() + tree_.live_bytes() + symbols_.live_bytes();
  }
  std::size_t reserved_bytes() const override {
    return sizeof *this + undo_.reserved_bytes() + tree_.reserved_bytes() +
           symbols_.reserved_bytes();
  }
  std::size_t reserved_after(std::size_t n, bool) const override {
    constexpr std::size_t kGeneral = 192;  // worst bytes a symbol of the lane that takes over
    return reserved_bytes() + (size_ + n) * kGeneral;
  }

 private:
  static constexpr u32 kShortRun = 32;  // constant streams up to here cost nothing to build anew
  static constexpr u32 kHot = 24;

  u32 symbol(u32 i) const { return constant_ ? symbol_ : symbols_[i - start_]; }
  void write(Hit h, i32* position, i32* length) const {
    const bool ok = h.length && h.length >= rule_.min_length;
    *position = ok ? static_cast<i32>(start_) + h.end + 1 : kNull;
    *length = ok ? static_cast<i32>(h.length) : 0;
  }

  void leave_constant() {
    constant_ = false;
    const u32 n = std::exchange(size_, 0), q = symbol_ & 15u, k = symbol_ >> 4;
    for (u32 i = 0; i < n; ++i) feed<true>(q, k);
  }

  template <bool kNote>
  Hit feed(u32 q, u32 k) {
    if constexpr (kNote) {
      UndoRing::Mark& mark = undo_.begin_step();
      mark.scalars[0] = tree_.units();
      mark.scalars[1] = tree_.free_units();
      mark.scalars[2] = tree_.last();
      mark.scalars[3] = at_.state;
      mark.scalars[4] = at_.length;
      mark.scalars[5] = self_;
    } else {
      undo_.forget();
    }
    symbols_.extend(1);
    symbols_.mut(size_++) = static_cast<u8>(k << 4 | q);
    self_ = self_ && q == k;
    hot_count_ = 0;
    const auto seen = [this](u32 unit) {
      if (hot_count_ < kHot) hot_[hot_count_++] = unit;
    };
    Hit h;
    if (self_ && rule_.max_length == kUnlimited) {
      tree_.append<kNote>(k, undo_);
      seen(tree_.last());
      at_.state = tree_.link(tree_.last());
      at_.length = tree_.len(at_.state);
      h = hit();
    } else {
      advance(q);
      h = hit();
      const auto a = tree_.append<kNote>(k, undo_);
      if (a.clone && a.split == at_.state && at_.length <= tree_.len(a.clone)) at_.state = a.clone;
      seen(a.state);
      seen(at_.state);
      seen(tree_.row_unit(at_.state));
    }
    walked_ += tree_.propagate<kNote>(undo_, seen);
    return h;
  }
  Hit hit() const { return at_.length ? Hit{tree_.end(at_.state), at_.length} : Hit{}; }

  /// Moves the cursor to the longest suffix of query + s.
  void advance(u32 s) {
    u32 t;
    while ((t = tree_.find(at_.state, s)) == 0) {
      if (!at_.state) {
        at_.length = 0;
        return;
      }
      at_.state = tree_.link(at_.state);
      at_.length = tree_.len(at_.state);
    }
    at_.state = t;
    if (++at_.length > rule_.max_length) {
      at_.length = rule_.max_length;
      if (tree_.len(tree_.link(t)) >= at_.length) at_.state = tree_.link(t);
    }
  }

  void undo_step() {
    const auto& mark = undo_.undo_step([this](const auto& e) { tree_.restore(e); });
    tree_.restore(mark.scalars[0], mark.scalars[1], mark.scalars[2], tree_.length() - 1);
    at_ = {mark.scalars[3], mark.scalars[4]};
    self_ = mark.scalars[5];
  }

  bool constant_ = true;  // so far; then `symbol_` is all there is to know
  bool self_ = true;
  u8 symbol_ = 0;  // key << 4 | query
  u8 hot_count_ = 0;
  u32 size_ = 0;  // symbols remembered
  u32 start_ = 0;
  Cursor at_;
  u64 walked_ = 0;
  Rule rule_;
  Budget budget_;
  u32 hot_[kHot] = {};  // units that the next step starts from
  CompactAutomaton tree_;
  PagedArray<u8> symbols_;  // key << 4 | query
  UndoRing undo_;
  mutable std::mutex copying_;
};

}  // namespace rosakit
