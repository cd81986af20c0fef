// The undo log of a stream: old values of the words its recent steps overwrote.
#pragma once

#include "rosakit/buffer.hpp"

namespace rosakit {

/// Words are named by an area and an index in it; what they are is the owner's business.
class Journal {
 public:
  struct Entry {
    u32 area, index, old;
  };

  bool on() const { return on_; }
  void turn(bool on) {
    on_ = on;
    if (!on) forget();
  }
  void note(u32 area, u32 index, u32 old) {
    if (on_) entries_.push_back({area, index, old});
  }
  /// Starts a step; its marker counts the entries before it. Keeps at least `depth` steps.
  void begin_step(std::size_t depth) {
    if (starts_.size() >= 2 * depth + 1) {
      const std::size_t drop = starts_.size() - depth;
      const u32 first = starts_[drop];
      std::memmove(entries_.data(), entries_.data() + first, (entries_.size() - first) * sizeof(Entry));
      entries_.resize(entries_.size() - first);
      for (std::size_t i = drop; i < starts_.size(); ++i) starts_[i - drop] = starts_[i] - first;
      starts_.resize(starts_.size() - drop);
    }
    starts_.push_back(static_cast<u32>(entries_.size()));
  }
  std::size_t steps() const { return starts_.size(); }
  /// Calls f(entry) for the last step's entries, newest first, and forgets the step.
  template <class F>
  void undo_step(F&& f) {
    const u32 start = starts_[starts_.size() - 1];
    for (std::size_t i = entries_.size(); i-- > start;) f(entries_[i]);
    entries_.resize(start);
    starts_.resize(starts_.size() - 1);
  }
  /// Forgets the past: earlier steps can no longer be undone.
  void forget() {
    entries_.clear();
    starts_.clear();
  }
  std::size_t live_bytes() const { return entries_.size() * sizeof(Entry) + starts_.size() * 4; }
  std::size_t reserved_bytes() const {
    return entries_.capacity() * sizeof(Entry) + starts_.capacity() * 4;
  }

 private:
  bool on_ = false;
  Buffer<Entry> entries_;
  Buffer<u32> starts_;
};

}  // namespace rosakit
