// Exact finite differences: what would the output have been had one bit of q or k been flipped?
#pragma once

#include <cstddef>

#include "rosakit/types.hpp"

namespace rosakit {

/// One call over streams [B, R, T] of `bits`-bit symbols; token granularity.
template <class Symbol>
struct BitflipCall {
  const Symbol* q = nullptr;  // [B, R, T]
  const Symbol* k = nullptr;
  const Symbol* v = nullptr;
  const i32* segment_starts = nullptr;  // [B, T] or null
  const double* grad = nullptr;         // [B, R, T, M]: dL/dy
  const double* e0 = nullptr;           // [R, M]
  const double* e1 = nullptr;
  const double* e_null = nullptr;  // [R, M]: what a null reads, or null for zeros
  bool unmatched_self = false;     // a null reads the value of its own position
  double* credit_q = nullptr;      // [B, R, T, M]: <grad, y(bit flipped) - y>
  double* credit_k = nullptr;
  std::size_t batch = 0, routes = 0, time = 0;
  unsigned bits = 0;
  u32 max_length = kUnlimited, min_length = 1;
};

/// O(T^2) a stream for all flips together, O(T * M) memory a thread.
template <class Symbol>
void bitflip(const BitflipCall<Symbol>& call);

}  // namespace rosakit
