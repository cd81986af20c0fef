// Streams whose places are followed by many different symbols, on many levels: what the best
// distinct successors have to choose from.
#pragma once

#include <cmath>

#include "streams.hpp"

namespace rosakit::testing {

/// Constant runs of rising length, each broken off by a symbol of its own, then one of n symbols:
/// the candidates of a place deep in it lie near the root.
inline Symbols nested_runs(u32 n) {
  Symbols x;
  u32 next = 2;
  for (u32 length = 1; length < n / 8; length *= 2) {
    x.insert(x.end(), length, 1);
    x.push_back(next++);
  }
  x.resize(n, 1);
  return x;
}
/// The same with a period of three in the place of a constant, and entered again and again.
inline Symbols nested_periods(u32 n) {
  Symbols x;
  u32 next = 4;
  for (u32 length = 3; x.size() < n / 2; length = length < n / 16 ? 2 * length : 5) {
    for (u32 i = 0; i < length; ++i) x.push_back(1 + i % 3);
    x.push_back(next++ % 7 + 4);
  }
  while (x.size() < n) x.push_back(1 + static_cast<u32>(x.size()) % 3);
  return x;
}
/// `length` times one symbol, then one of `others` drawn ones, or (0) a new one: `a x1 a x2 a x3
/// ...`
inline Symbols hubs(u32 n, u32 length, u32 others) {
  Symbols x;
  Random random(1);
  for (u32 next = 2; x.size() < n; ++next) {
    x.insert(x.end(), length, 1);
    x.push_back(others ? 2 + random.below(others) : next);
  }
  x.resize(n);
  return x;
}
/// The same with 1 to `levels` times the symbol, by turns.
inline Symbols rising_hubs(u32 n, u32 levels) {
  Symbols x;
  for (u32 next = 0; x.size() < n; ++next) {
    x.insert(x.end(), 1 + next % levels, 1);
    x.push_back(2 + next);
  }
  x.resize(n);
  return x;
}
/// Many levels with many successors each, then a constant: they all lie on every key's chain.
inline Symbols ramp_then_constant(u32 n) {
  Symbols x;
  const u32 levels = static_cast<u32>(std::sqrt(n / 32.0)) + 1;
  for (u32 next = 0; x.size() < n / 2; ++next) {
    x.insert(x.end(), levels - next % levels, 1);
    x.push_back(2 + next);
  }
  x.resize(n, 1);
  return x;
}
/// Symbols by Zipf's law with copied passages: some are followed by a part of all others.
inline Symbols zipf(u32 n, u32 symbols) {
  Symbols x;
  Random random(3);
  while (x.size() < n) {
    if (x.size() > 30 && random.chance(2)) {
      const u32 from = random.below(x.size() - 10), length = 5 + random.below(60);
      for (u32 i = 0; i < length; ++i) x.push_back(x[from + i]);
      continue;
    }
    const double u = static_cast<double>(random.next() >> 11) * 0x1p-53;
    x.push_back(static_cast<u32>(std::exp(u * std::log(symbols))));
  }
  x.resize(n);
  return x;
}

}  // namespace rosakit::testing
