// The lane for any stream: adaptive rows in pages, and a link-cut tree once its link chains grow
// long.
#pragma once

#include <algorithm>
#include <memory>
#include <mutex>

#include "rosakit/candidates.hpp"
#include "rosakit/lane.hpp"
#include "rosakit/run_stream.hpp"

namespace rosakit {

template <bool kWide, bool kRun>
class TypedLane final : public Lane {
 public:
  using Streaming = Stream<Automaton<kWide, Paged>, LinkCut<Paged>>;
  using Engine = std::conditional_t<kRun, RunStream<Streaming, Paged>, Streaming>;
  using Symbol = typename Automaton<kWide>::Symbol;

  TypedLane(const Rule& rule, unsigned bits, const Budget& budget)
      : Lane(false), rule_(rule), engine_(bits) {
    stream().budget = budget;
    attach_journal();
  }
  TypedLane(const TypedLane& other)
      : Lane(false),
        rule_(other.rule_),
        self_(other.self_),
        start_(other.start_),
        before_(other.before_),
        engine_(other.engine_),
        keys_(other.keys_),
        queries_(other.queries_),
        journal_(other.journal_) {
    attach_journal();
  }
  TypedLane& operator=(const TypedLane&) = delete;

  std::shared_ptr<Lane> clone() const override {
    std::lock_guard lock(copying_);
    return std::make_shared<TypedLane>(*this);
  }
  u32 length() const override { return start_ + static_cast<u32>(keys_.size()); }
  u32 start() const override { return start_; }
  bool has_room(std::size_t n) const override {
    return keys_.size() + n <= Automaton<kWide>::kMaxSymbols;
  }

  bool step(u32 q, u32 k, bool undoable, i32* position, i32* length) override {
    const Hit h = feed(q, k, undoable);
    const bool ok = h.length && h.length >= rule_.min_length;
    *position = ok ? static_cast<i32>(start_) + h.end + 1 : kNull;
    *length = ok ? static_cast<i32>(h.length) : 0;
    return true;
  }
  bool step_candidates(u32 token, unsigned candidates, bool undoable, i32* position,
                       i32* length) override {
    if constexpr (kWide) {
      if (!ordered()) {
        if (keys_.size()) return false;
        keep_order();
      }
    }
    feed(token, token, undoable);
    static thread_local Candidates scratch;
    work_ += scratch.collect(stream(), stream().at, candidates, rule_.min_length,
                             static_cast<i32>(start_), position, length);
    return true;
  }

  bool ordered() const override {
    if constexpr (kWide) return stream().tree.ordered();
    else return false;
  }
  void keep_order() override {
    if constexpr (kWide) stream().keep_order();
  }

  /// Steps taken so far whose number the input decides, for tests of their bounds: link steps,
  /// rotations, keys compared, successors looked at.
  u64 work() const {
    u64 total = work_ + stream().chain_steps + stream().wider_steps + stream().order_steps +
                stream().forest.steps();
    if constexpr (kRun) total += engine_.walked;
    return total;
  }

  bool undo_to(u32 length) override {
    const std::size_t kept = length - start_, surplus = keys_.size() - kept;
    if (length < start_ || surplus > journal_.steps()) return false;
    for (std::size_t s = 0; s < surplus; ++s)
      journal_.undo_step([this](const auto& e) { undo_entry(e); },
                         [this](const auto& m) { undo_mark(m); });
    keys_.resize(kept);
    if (!self_) queries_.resize(kept);
    return true;
  }
  void skip(u32 position) override { start_ = position; }

  u32 query(u32 i) const override { return self_ ? keys_[i - start_] : queries_[i - start_]; }
  u32 key(u32 i) const override { return keys_[i - start_]; }
  bool self() const override { return self_; }
  std::size_t live_bytes() const override {
    return sizeof *this + journal_.live_bytes() +
           sum([](const auto& part) { return part.live_bytes(); });
  }
  std::size_t reserved_bytes() const override {
    return sizeof *this + journal_.reserved_bytes() +
           sum([](const auto& part) { return part.reserved_bytes(); });
  }

  std::size_t reserved_after(std::size_t n, bool ordering) const override {
    constexpr std::size_t kGrowth = 256;  // states, rows, nodes and symbols
    constexpr std::size_t kSlack =
        12 * kPageBytes;  // pages begun, copies of shared ones, the journal
    const std::size_t change_over = stream().linked ? 0 : stream().tree.size() * std::size_t{16};
    const auto& tree = stream().tree;
    const std::size_t lists = kWide && ordering && !ordered() ? tree.row_bytes() : 0;
    return reserved_bytes() + n * kGrowth + change_over + tree.row_growth_bytes() + lists + kSlack;
  }

 private:
  auto& stream() {
    if constexpr (kRun) return engine_.stream;
    else return engine_;
  }
  const auto& stream() const { return const_cast<TypedLane*>(this)->stream(); }
  void attach_journal() {
    stream().tree.set_journal(&journal_);
    stream().forest.set_journal(&journal_);
  }
  template <class F>
  std::size_t sum(F&& bytes) const {
    std::size_t total =
        bytes(stream().tree) + bytes(stream().forest) + bytes(keys_) + bytes(queries_);
    if constexpr (kRun)
      total += bytes(engine_.query_run) + bytes(engine_.key_run) + bytes(engine_.key_start);
    return total;
  }

  Hit feed(u32 q, u32 k, bool undoable) {
    if (undoable != journal_.on()) journal_.turn(undoable);
    if (undoable) begin_step();
    if (self_ && q != k) {
      for (std::size_t i = 0; i < keys_.size(); ++i) queries_.push_back(keys_[i]);
      self_ = false;
    }
    keys_.push_back(static_cast<Symbol>(k));
    if (!self_) queries_.push_back(static_cast<Symbol>(q));
    const Hit h = advance(static_cast<Symbol>(q), static_cast<Symbol>(k));
    if (stream().over_budget()) [[unlikely]] {
      journal_.forget();
      stream().link_up();
    }
    return h;
  }
  Hit advance(Symbol q, Symbol k) {
    if constexpr (kRun) {
      engine_.step(q, k, rule_, 0, nullptr);
      return engine_.hit();
    } else {
      if (self_ && rule_.max_length == kUnlimited && !engine_.linked)
        return before_ = engine_.append_self(k);
      engine_.advance(q, rule_.max_length);
      // A match that goes on keeps its (latest) place: no need to ask the link-cut tree.
      const u32 next = static_cast<u32>(before_.end) + 1;
      if (engine_.linked && before_.length && before_.length < rule_.max_length &&
          keys_[next] == q && next + 1 < keys_.size())
        before_ = {before_.end + 1, before_.length + 1};
      else before_ = engine_.hit();
      engine_.append(k);
      return before_;
    }
  }

  void begin_step() {
    Journal::Mark& mark = stream().tree.begin_step(kUndoDepth);
    mark.scalars[2] = stream().at.state;
    mark.scalars[3] = stream().at.length;
    mark.scalars[9] = stream().low.state;
    mark.scalars[10] = stream().low.length;
    mark.scalars[11] = static_cast<u32>(stream().forest.groups().size());
    if constexpr (kRun) {
      mark.scalars[4] = engine_.positions;
      mark.scalars[5] = static_cast<u32>(engine_.newest);
      mark.scalars[6] = static_cast<u32>(engine_.known);
      mark.scalars[7] = static_cast<u32>(engine_.query_run.size());
      mark.scalars[8] = static_cast<u32>(engine_.key_run.size());
    } else {
      mark.scalars[4] = static_cast<u32>(before_.end);
      mark.scalars[5] = before_.length;
    }
  }
  void undo_entry(const Journal::Entry& e) {
    if (LinkCut<Paged>::is_area(e.area)) stream().forest.undo(e);
    else stream().tree.undo(e);
  }
  void undo_mark(const Journal::Mark& mark) {
    stream().tree.undo_mark(mark);
    if (stream().linked) stream().forest.resize(mark.states);
    stream().at = {mark.scalars[2], mark.scalars[3]};
    stream().low = {mark.scalars[9], mark.scalars[10]};
    stream().forest.resize_groups(mark.scalars[11]);
    if constexpr (kRun) {
      engine_.positions = mark.scalars[4];
      engine_.newest = static_cast<i32>(mark.scalars[5]);
      engine_.known = static_cast<i32>(mark.scalars[6]);
      engine_.query_run.resize(mark.scalars[7]);
      engine_.key_run.resize(mark.scalars[8]);
      engine_.key_start.resize(mark.scalars[8]);
      engine_.growth.cut(mark.scalars[7], mark.scalars[8]);
    } else {
      before_ = {static_cast<i32>(mark.scalars[4]), mark.scalars[5]};
    }
  }

  Rule rule_;
  bool self_ = true;
  u32 start_ = 0;
  Hit before_;  // token granularity: the last match
  u64 work_ = 0;
  Engine engine_;
  PagedArray<Symbol> keys_, queries_;
  Journal journal_;
  mutable std::mutex copying_;
};

}  // namespace rosakit
