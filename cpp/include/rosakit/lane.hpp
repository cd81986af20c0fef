// One stream of a SuffixMemory: its matcher, the symbols it was fed with, and its undo log.
#pragma once

#include <algorithm>
#include <memory>
#include <mutex>

#include "rosakit/candidates.hpp"
#include "rosakit/run_stream.hpp"

namespace rosakit {

class Lane {
 public:
  static constexpr unsigned kStages = 6;  // of `approach`
  /// Steps that can always be undone without replaying the stream.
  static constexpr std::size_t kUndoDepth = 16;

  virtual ~Lane() = default;
  /// A copy that shares all pages. Safe to call from several threads as long as nobody feeds the
  /// source, which only its sole owner may.
  virtual std::shared_ptr<Lane> clone() const = 0;
  virtual u32 length() const = 0;  // symbols fed
  virtual u32 start() const = 0;   // the first symbol that is still remembered
  /// Whether the lane can take `n` more symbols.
  virtual bool has_room(std::size_t n) const = 0;

  /// Feeds one position; the result is (position, length) of semantics 2. `undoable` steps form the
  /// end of what was fed: an undoable step is not followed by one that is not.
  virtual void step(u32 q, u32 k, bool undoable, i32* position, i32* length) = 0;
  /// Feeds one position of a self-matching stream and collects its best successors.
  virtual void step_candidates(u32 token, unsigned candidates, bool undoable, i32* position,
                               i32* length) = 0;
  /// Brings what the next step with (q, k) will touch nearer, one dependent access a stage; `chain`
  /// is the caller's to keep between the stages.
  virtual void approach(unsigned stage, u32 q, u32 k, u32& chain) const = 0;
  virtual void truncate(u32 length) = 0;
  /// Of an empty lane: lets its stream start at `position`.
  virtual void skip(u32 position) = 0;
  /// Forgets all but the last `keep` symbols, as if the stream had started there.
  virtual void evict(u32 keep) = 0;

  virtual u32 query(u32 i) const = 0;
  virtual u32 key(u32 i) const = 0;
  virtual bool self() const = 0;  // query and keys are equal so far
  virtual bool linked() const = 0;
  virtual std::size_t live_bytes() const = 0;
  virtual std::size_t reserved_bytes() const = 0;
  /// No less than reserved_bytes() will be after `n` more symbols.
  virtual std::size_t reserved_after(std::size_t n) const = 0;
};

template <bool kWide, bool kRun>
class TypedLane final : public Lane {
 public:
  using Streaming = Stream<Automaton<kWide, Paged>, LinkCut<Paged>>;
  using Engine = std::conditional_t<kRun, RunStream<Streaming, Paged>, Streaming>;
  using Symbol = typename Automaton<kWide>::Symbol;

  TypedLane(const Rule& rule, unsigned bits, const Budget& budget)
      : rule_(rule), bits_(bits), engine_(bits) {
    stream().budget = budget;
    attach_journal();
  }
  TypedLane(const TypedLane& other)
      : rule_(other.rule_),
        bits_(other.bits_),
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

  void step(u32 q, u32 k, bool undoable, i32* position, i32* length) override {
    const Hit h = feed(q, k, undoable);
    const bool ok = h.length && h.length >= rule_.min_length;
    *position = ok ? static_cast<i32>(start_) + h.end + 1 : kNull;
    *length = ok ? static_cast<i32>(h.length) : 0;
  }
  void step_candidates(u32 token, unsigned candidates, bool undoable, i32* position,
                       i32* length) override {
    feed(token, token, undoable);
    static thread_local Candidates scratch;
    scratch.collect(stream(), stream().at, candidates, rule_.min_length, static_cast<i32>(start_),
                    position, length);
  }

  void approach(unsigned stage, u32 q, u32 k, u32& chain) const override {
    const auto& tree = stream().tree;
    const u32 at = stream().at.state;
    if (stage == 0) {
      tree.prefetch_state(at);
      tree.prefetch_state(tree.last());
    } else if (stage == 1) {
      tree.prefetch_row(at);
      chain = tree.link(tree.last());
      tree.prefetch_state(chain);
    } else if (stage == 2) {
      if (const u32 t = tree.find(at, q)) tree.prefetch_state(t);
      else tree.prefetch_state(tree.link(at));
      tree.prefetch_row(chain);
      tree.prefetch_state(tree.link(chain));
    } else {
      // Where the key leads from this ancestor of the newest state: the chain whose ends will move.
      if (const u32 t = tree.find(chain, k)) tree.prefetch_state(t);
      chain = tree.link(chain);
      tree.prefetch_row(chain);
      tree.prefetch_state(tree.link(chain));
    }
  }

  void truncate(u32 length) override {
    if (length >= this->length()) return;
    if (length < start_) {  // what it would go back to is forgotten: an empty memory of that length
      start_ = length;
      replay(0, 0);
      return;
    }
    const std::size_t kept = length - start_, surplus = keys_.size() - kept;
    if (surplus <= journal_.steps()) {
      for (std::size_t s = 0; s < surplus; ++s)
        journal_.undo_step([this](const auto& e) { undo_entry(e); },
                           [this](const auto& m) { undo_mark(m); });
      keys_.resize(kept);
      if (!self_) queries_.resize(kept);
    } else {
      replay(0, kept);
    }
  }
  void skip(u32 position) override { start_ = position; }
  void evict(u32 keep) override {
    if (keep >= keys_.size()) return;
    const std::size_t first = keys_.size() - keep;
    start_ += static_cast<u32>(first);
    replay(first, keys_.size());
  }

  u32 query(u32 i) const override { return self_ ? keys_[i - start_] : queries_[i - start_]; }
  u32 key(u32 i) const override { return keys_[i - start_]; }
  bool self() const override { return self_; }
  bool linked() const override { return stream().linked; }
  std::size_t live_bytes() const override {
    return sizeof *this + journal_.live_bytes() +
           sum([](const auto& part) { return part.live_bytes(); });
  }
  std::size_t reserved_bytes() const override {
    return sizeof *this + journal_.reserved_bytes() +
           sum([](const auto& part) { return part.reserved_bytes(); });
  }

  std::size_t reserved_after(std::size_t n) const override {
    constexpr std::size_t kGrowth = 256;  // states, rows, nodes and symbols
    constexpr std::size_t kSlack =
        12 * kPageBytes;  // pages begun, copies of shared ones, the journal
    const std::size_t change_over = linked() ? 0 : stream().tree.size() * std::size_t{16};
    return reserved_bytes() + n * kGrowth + change_over + kSlack;
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
    if (e.area >= LinkCut<Paged>::kAreaFirst && e.area <= LinkCut<Paged>::kAreaLast)
      stream().forest.undo(e);
    else stream().tree.undo(e);
  }
  void undo_mark(const Journal::Mark& mark) {
    stream().tree.undo_mark(mark);
    if (stream().linked) stream().forest.resize(mark.states);
    stream().at = {mark.scalars[2], mark.scalars[3]};
    if constexpr (kRun) {
      engine_.positions = mark.scalars[4];
      engine_.newest = static_cast<i32>(mark.scalars[5]);
      engine_.known = static_cast<i32>(mark.scalars[6]);
      engine_.query_run.resize(mark.scalars[7]);
      engine_.key_run.resize(mark.scalars[8]);
      engine_.key_start.resize(mark.scalars[8]);
      engine_.growth.reset();  // it may speak of runs that are gone
    } else {
      before_ = {static_cast<i32>(mark.scalars[4]), mark.scalars[5]};
    }
  }
  /// Starts anew from the symbols first..last of those remembered.
  void replay(std::size_t first, std::size_t last) {
    journal_.turn(false);
    engine_.reset(bits_);
    before_ = {};
    const auto keys = std::move(keys_), queries = std::move(queries_);
    const bool self = std::exchange(self_, true);
    keys_ = {};
    queries_ = {};
    for (std::size_t i = first; i < last; ++i)
      feed(self ? keys[i] : queries[i], keys[i], i + kUndoDepth >= last);
  }

  Rule rule_;
  unsigned bits_;
  bool self_ = true;
  u32 start_ = 0;
  Hit before_;  // token granularity: the last match
  Engine engine_;
  PagedArray<Symbol> keys_, queries_;
  Journal journal_;
  mutable std::mutex copying_;
};

}  // namespace rosakit
