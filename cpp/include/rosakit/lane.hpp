// One stream of a SuffixMemory: its matcher and the symbols it was fed with.
#pragma once

#include <memory>

#include "rosakit/candidates.hpp"
#include "rosakit/run_stream.hpp"

namespace rosakit {

class Lane {
 public:
  virtual ~Lane() = default;
  virtual std::unique_ptr<Lane> clone() const = 0;
  virtual u32 length() const = 0;
  /// Feeds one position; the result is (position, length) of semantics 2.
  virtual void step(u32 q, u32 k, i32* position, i32* length) = 0;
  /// Feeds one position of a self-matching stream and collects its best successors.
  virtual void step_candidates(u32 token, unsigned candidates, i32* position, i32* length) = 0;
  virtual void truncate(u32 length) = 0;
  virtual u32 query(u32 i) const = 0;
  virtual u32 key(u32 i) const = 0;
  virtual bool self() const = 0;  // query and keys are equal so far
  virtual std::size_t live_bytes() const = 0;
  virtual std::size_t reserved_bytes() const = 0;
};

template <bool kWide>
class TypedLane final : public Lane {
 public:
  using Symbol = typename Automaton<kWide>::Symbol;

  TypedLane(const Rule& rule, unsigned bits) : rule_(rule), bits_(bits) { runs_.reset(bits); }

  std::unique_ptr<Lane> clone() const override { return std::make_unique<TypedLane>(*this); }
  u32 length() const override { return static_cast<u32>(keys_.size()); }

  void step(u32 q, u32 k, i32* position, i32* length) override {
    record(q, k);
    const Hit h = advance(static_cast<Symbol>(q), static_cast<Symbol>(k));
    const bool ok = h.length && h.length >= rule_.min_length;
    *position = ok ? h.end + 1 : kNull;
    *length = ok ? static_cast<i32>(h.length) : 0;
  }
  void step_candidates(u32 token, unsigned candidates, i32* position, i32* length) override {
    record(token, token);
    advance(static_cast<Symbol>(token), static_cast<Symbol>(token));
    runs_.stream.normalise();
    candidates_.collect(runs_.stream, runs_.stream.at, candidates, rule_.min_length, 0, position, length);
  }
  void truncate(u32 length) override {
    if (length >= keys_.size()) return;
    runs_.reset(bits_);
    keys_.resize(length);
    if (!self_) queries_.resize(length);
    for (u32 i = 0; i < length; ++i) advance(self_ ? keys_[i] : queries_[i], keys_[i]);
  }
  u32 query(u32 i) const override { return self_ ? keys_[i] : queries_[i]; }
  u32 key(u32 i) const override { return keys_[i]; }
  bool self() const override { return self_; }
  std::size_t live_bytes() const override {
    return sizeof *this + runs_.stream.tree.live_bytes() +
           (keys_.size() + queries_.size() + runs_.query_run.size() + runs_.key_run.size()) * sizeof(Symbol) +
           runs_.key_start.size() * 4;
  }
  std::size_t reserved_bytes() const override {
    return sizeof *this + runs_.stream.tree.reserved_bytes() +
           (keys_.capacity() + queries_.capacity() + runs_.query_run.capacity() + runs_.key_run.capacity()) *
               sizeof(Symbol) +
           runs_.key_start.capacity() * 4;
  }

 private:
  void record(u32 q, u32 k) {
    if (self_ && q != k) {
      queries_.assign(keys_.data(), keys_.size());
      self_ = false;
    }
    keys_.push_back(static_cast<Symbol>(k));
    if (!self_) queries_.push_back(static_cast<Symbol>(q));
  }
  Hit advance(Symbol q, Symbol k) {
    if (rule_.granularity == Granularity::run) {
      runs_.step(q, k, rule_, 0, nullptr);
      return runs_.hit();
    }
    Stream<kWide>& s = runs_.stream;
    s.normalise();
    s.advance(q, rule_.max_length);
    const Hit h = s.hit();
    s.append(k);
    return h;
  }

  Rule rule_;
  unsigned bits_;
  RunStream<kWide> runs_;
  Candidates<kWide> candidates_;
  Buffer<Symbol> keys_, queries_;
  bool self_ = true;
};

}  // namespace rosakit
