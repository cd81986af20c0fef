// The undo log of a stream: old values of the words its recent steps overwrote.
#pragma once

#include "rosakit/buffer.hpp"

namespace rosakit {

/// Words are named by an area and an index in it, and a step's scalars are kept in its mark; what
/// they are is the owners' business. Words past the floors are new in this step: not worth noting.
class Journal {
 public:
  struct Entry {
    u32 area, index, old;
  };
  struct Mark {
    u32 entries;  // before the step
    u32 states, rows;
    u32 scalars[12];
  };

  bool on() const { return on_; }
  u32 state_floor() const { return state_floor_; }
  u32 row_floor() const { return row_floor_; }

  void turn(bool on) {
    on_ = on;
    if (!on) forget();
  }
  void note(u32 area, u32 index, u32 old) { entries_.push_back({area, index, old}); }

  /// Starts a step on `states` states and `rows` units of rows. Keeps at least `depth` steps.
  Mark& begin_step(std::size_t depth, u32 states, u32 rows) {
    if (marks_.size() > 2 * depth) drop(marks_.size() - depth);
    state_floor_ = states;
    row_floor_ = rows;
    Mark mark{};
    mark.entries = static_cast<u32>(entries_.size());
    mark.states = states;
    mark.rows = rows;
    marks_.push_back(mark);
    return marks_[marks_.size() - 1];
  }
  std::size_t steps() const { return marks_.size(); }

  /// Calls entry(Entry) for the last step's entries, newest first, then mark(Mark), and forgets it.
  template <class F, class G>
  void undo_step(F&& entry, G&& mark) {
    const Mark last = marks_[marks_.size() - 1];
    for (std::size_t i = entries_.size(); i-- > last.entries;) entry(entries_[i]);
    mark(last);
    entries_.resize(last.entries);
    marks_.resize(marks_.size() - 1);
  }
  /// Forgets the past: this step and earlier ones can no longer be undone.
  void forget() {
    entries_.clear();
    marks_.clear();
    state_floor_ = row_floor_ = 0;
  }
  std::size_t live_bytes() const {
    return entries_.size() * sizeof(Entry) + marks_.size() * sizeof(Mark);
  }
  std::size_t reserved_bytes() const {
    return entries_.capacity() * sizeof(Entry) + marks_.capacity() * sizeof(Mark);
  }

 private:
  void drop(std::size_t steps) {
    const u32 first = marks_[steps].entries;
    if (entries_.size() > first)
      std::memmove(entries_.data(), entries_.data() + first,
                   (entries_.size() - first) * sizeof(Entry));
    entries_.resize(entries_.size() - first);
    for (std::size_t i = steps; i < marks_.size(); ++i) {
      marks_[i - steps] = marks_[i];
      marks_[i - steps].entries -= first;
    }
    marks_.resize(marks_.size() - steps);
  }

  bool on_ = false;
  u32 state_floor_ = 0, row_floor_ = 0;  // 0 while nothing is noted
  Buffer<Entry> entries_;
  Buffer<Mark> marks_;
};

}  // namespace rosakit
