// Exact finite differences of a stream that is query and key at once.
#pragma once

#include <cstddef>

#include "rosakit/types.hpp"

namespace rosakit {

/// One call over streams [B, R, T] of `bits`-bit symbols; token granularity.
template <class Symbol>
struct TiedBitflipCall {
  const Symbol* x = nullptr;            // [B, R, T]: queries and keys
  const Symbol* v = nullptr;            // [B, R, T]: what is read
  bool flip_values = false;             // v is x too: a flip changes what is read at its place
  const i32* segment_starts = nullptr;  // [B, T] or null
  const double* grad = nullptr;         // [B, R, T, M]: dL/dy
  const double* e0 = nullptr;           // [R, M]
  const double* e1 = nullptr;
  const double* e_null = nullptr;  // [R, M]: what a null reads, or null for zeros
  bool unmatched_self = false;     // a null reads the value of its own position
  double* credit = nullptr;        // [B, R, T, M]: <grad, y(bit flipped) - y>
  std::size_t batch = 0, routes = 0, time = 0;
  unsigned bits = 0;
  u32 max_length = kUnlimited, min_length = 1;
};

/// O(T^2) a stream for all flips together, O(T * M) memory a thread.
template <class Symbol>
void bitflip_tied(const TiedBitflipCall<Symbol>& call);

}  // namespace rosakit
