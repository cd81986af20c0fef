// The undo log of a compact lane: a ring of overwritten words and a ring of steps.
#pragma once

#include "rosakit/buffer.hpp"

namespace rosakit {

/// Writing costs one store: an entry takes the place of the oldest one, and a step whose entries
/// were overtaken can no longer be undone. The ring of entries grows where `kDepth` steps fill it.
class UndoRing {
 public:
  static constexpr u32 kDepth = 32;  // steps remembered, a power of two
  struct Entry {
    u32 word, old;
  };
  /// What a step changes besides words: the owner's business.
  struct Mark {
    u32 entries;  // written before the step
    u32 scalars[7];
  };

  void note(u32 word, u32 old) { entries_[written_++ & mask_] = {word, old}; }

  Mark& begin_step() {
    if (depth_ && written_ - marks_[(steps_ - depth_) & (kDepth - 1)].entries > mask_ / 4 * 3)
        [[unlikely]]
      grow();
    Mark& mark = marks_[steps_++ & (kDepth - 1)];
    depth_ += depth_ < kDepth;
    mark.entries = written_;
    return mark;
  }

  /// Whether the last `n` steps can be undone.
  bool holds(std::size_t n) const {
    if (n > depth_) return false;
    const u32 first = marks_[(steps_ - static_cast<u32>(n)) & (kDepth - 1)].entries;
    const bool gone = newest() - lost_ <= mask_ + 1 && static_cast<i32>(first - lost_) < 0;
    return !n || (newest() - first <= mask_ + 1 && !gone);
  }
  /// Calls restore(Entry), newest first, for the last step and returns its mark. The step must be
  /// held.
  template <class F>
  const Mark& undo_step(F&& restore) {
    const Mark& mark = marks_[--steps_ & (kDepth - 1)];
    --depth_;
    newest_ = newest();
    while (written_ != mark.entries) restore(entries_[--written_ & mask_]);
    return mark;
  }
  void forget() { depth_ = 0; }

  /// The lines that the next step will write.
  [[gnu::always_inline]] void prefetch() const {
    __builtin_prefetch(&marks_[steps_ & (kDepth - 1)], 1);
    __builtin_prefetch(&entries_[written_ & mask_], 1);
    __builtin_prefetch(&entries_[(written_ + 8) & mask_], 1);
  }
  std::size_t reserved_bytes() const {
    return entries_.capacity() * sizeof(Entry) + marks_.capacity() * sizeof(Mark);
  }

  UndoRing() {
    entries_.fill(mask_ + 1, Entry{});
    marks_.fill(kDepth, Mark{});
  }

 private:
  static constexpr u32 kMost = 1u << 14;

  /// The entries up to here have taken older ones' places, whether or not they were undone since.
  u32 newest() const { return static_cast<i32>(newest_ - written_) > 0 ? newest_ : written_; }

  void grow() {
    const u32 wider = 2 * mask_ + 1;
    if (wider >= kMost) return;
    Buffer<Entry> entries;
    entries.fill(wider + 1, Entry{});
    for (u32 back = 1; back <= mask_ + 1; ++back)
      entries[(newest() - back) & wider] = entries_[(newest() - back) & mask_];
    entries_ = std::move(entries);
    const u32 lost = newest() - mask_ - 1;
    if (static_cast<i32>(lost - lost_) > 0) lost_ = lost;
    mask_ = wider;
  }

  Buffer<Entry> entries_;
  Buffer<Mark> marks_;
  u32 mask_ = 255;
  u32 written_ = 0;  // entries ever, modulo 2^32
  u32 newest_ = 0, lost_ = 0;  // before `lost_`: gone when the ring grew
  u32 steps_ = 0, depth_ = 0;
};

}  // namespace rosakit
