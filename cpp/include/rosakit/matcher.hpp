// Batch entry points: all rows and routes of a call over the thread pool.
#pragma once

#include "rosakit/types.hpp"

namespace rosakit {

struct Shape {
  std::size_t batch = 0, routes = 0, length = 0;
};

/// One call's arrays, C-contiguous: q, k, position, length [B, R, T]; segment_starts [B, T] or null
/// (-1 at padding); flipped [B, R, T, flip_bits] or null; flip_at [B, T] or null: nonzero where the
/// flips are computed, elsewhere `flipped` repeats `position`.
template <class T>
struct MatchCall {
  const T* q = nullptr;
  const T* k = nullptr;
  const i32* segment_starts = nullptr;
  i32* position = nullptr;
  i32* length = nullptr;
  i32* flipped = nullptr;
  unsigned flip_bits = 0;
  Shape shape;
  Rule rule;
  const u8* flip_at = nullptr;
};

/// The exact match of semantics 2 for every stream. Throws std::invalid_argument for negative
/// symbols and std::length_error for streams of 2^31 positions or more.
template <class T>
void match(const MatchCall<T>& call);

/// Section 5: for every position of tokens [B, T] the `candidates` best distinct successors among
/// earlier positions, ordered by (match length, position); position, length are [B, T, candidates].
struct SuccessorCall {
  const i32* tokens = nullptr;
  const i32* segment_starts = nullptr;
  i32* position = nullptr;
  i32* length = nullptr;
  unsigned candidates = 1;
  std::size_t batch = 0, time = 0;
  u32 max_length = kUnlimited, min_length = 1;
};
void best_successors(const SuccessorCall& call);

}  // namespace rosakit
