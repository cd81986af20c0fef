// One stream of a SuffixMemory, as the memory sees it.
#pragma once

#include <memory>

#include "rosakit/types.hpp"

namespace rosakit {

/// There are two: the compact lane (compact_lane.hpp), made for decoding streams of up to 4 bits,
/// and the general one (typed_lane.hpp), which takes every stream and bounds the cost of any.
class Lane {
 public:
  /// Steps that can be undone without building the stream anew.
  static constexpr std::size_t kUndoDepth = 16;

  explicit Lane(bool is_compact) : compact(is_compact) {}
  virtual ~Lane() = default;

  const bool compact;

  /// A copy that shares all pages. Safe to call from several threads as long as nobody feeds the
  /// source, which only its sole owner may.
  virtual std::shared_ptr<Lane> clone() const = 0;
  virtual u32 length() const = 0;  // symbols fed
  virtual u32 start() const = 0;   // the first symbol that is still remembered
  /// Whether the lane can take `n` more symbols.
  virtual bool has_room(std::size_t n) const = 0;

  /// Feeds one position; the result is (position, length) of semantics 2. `undoable` steps form the
  /// end of what was fed: an undoable step is not followed by one that is not. Returns false, and
  /// changes nothing, where the stream has become one for a general lane.
  virtual bool step(u32 q, u32 k, bool undoable, i32* position, i32* length) = 0;
  /// Feeds one position of a self-matching stream and collects its best successors; the same
  /// return, also where the lane has symbols but does not keep their successors in order.
  virtual bool step_candidates(u32 token, unsigned candidates, bool undoable, i32* position,
                               i32* length) = 0;
  /// Whether the successors of states with many of them are kept in order, for step_candidates;
  /// and, of an empty lane, makes it so if it knows such states.
  virtual bool ordered() const { return false; }
  virtual void keep_order() {}
  /// Takes back what lies past `length`; false, and nothing changed, where that is too far back.
  virtual bool undo_to(u32 length) = 0;
  /// Of an empty lane: lets its stream start at `position`.
  virtual void skip(u32 position) = 0;

  virtual u32 query(u32 i) const = 0;
  virtual u32 key(u32 i) const = 0;
  virtual bool self() const = 0;  // query and keys are equal so far
  virtual std::size_t live_bytes() const = 0;
  virtual std::size_t reserved_bytes() const = 0;
  /// No less than reserved_bytes() will be after `n` more symbols; `ordering`: and after the lane
  /// has been replaced, if need be, by one that keeps successors in order.
  virtual std::size_t reserved_after(std::size_t n, bool ordering) const = 0;
};

}  // namespace rosakit
