// Random choices and stream families for the tests, the soak and the fuzzer.
#pragma once

#include <algorithm>
#include <bit>
#include <utility>

#include "reference.hpp"

namespace rosakit::testing {

using reference::Symbols;

/// SplitMix64: the same numbers on every platform.
class Random {
 public:
  explicit Random(u64 seed) : state_(seed) {}
  u64 next() {
    u64 z = state_ += 0x9E3779B97F4A7C15u;
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9u;
    z = (z ^ z >> 27) * 0x94D049BB133111EBu;
    return z ^ z >> 31;
  }
  u32 below(u64 n) { return static_cast<u32>(next() % n); }
  bool chance(u32 percent) { return below(100) < percent; }

 private:
  u64 state_;
};

inline constexpr unsigned kFamilies = 10;

/// A pair (q, k) of n symbols below `alphabet`.
inline std::pair<Symbols, Symbols> draw(unsigned family, std::size_t n, u32 alphabet,
                                        Random& random) {
  Symbols k(n);
  const u32 period = 1 + random.below(5), a = random.below(alphabet), b = random.below(alphabet);
  for (std::size_t i = 0; i < n; ++i) {
    switch (family) {
      case 0:
        k[i] = random.below(alphabet);
        break;
      case 1:
        k[i] = a;
        break;
      case 2:
        k[i] = i < period ? random.below(alphabet) : k[i - period];
        break;
      case 3:
        k[i] = std::popcount(i) & 1 ? a : b;
        break;   // Thue-Morse
      case 4: {  // Fibonacci word: floor((i + 2) / phi) - floor((i + 1) / phi)
        const auto floor_phi = [](u64 x) {
          return static_cast<u64>(static_cast<double>(x) * 0.6180339887498949);
        };
        k[i] = floor_phi(i + 2) - floor_phi(i + 1) ? a : b;
        break;
      }
      case 5:
        k[i] = i && random.chance(70) ? k[i - 1] : random.below(alphabet);
        break;  // runs
      case 6:
        k[i] = i == n / 2 ? b : a;
        break;
      default:
        k[i] = random.below(alphabet);
        break;
    }
  }
  if (family >= 7)  // copied passages
    for (std::size_t at = 2; at + 1 < n;) {
      const std::size_t length = 1 + random.below(n / 3 + 1), from = random.below(at);
      for (std::size_t i = 0; i < length && at < n; ++i, ++at) k[at] = k[from + i];
      at += random.below(4);
    }
  Symbols q = k;
  if (family == 9)
    std::rotate(q.begin(), q.begin() + random.below(std::min<std::size_t>(n, 4)), q.end());
  if (family == 8 || random.chance(40))
    for (u32& s : q)
      if (random.chance(8)) s = random.below(alphabet);
  return {std::move(q), std::move(k)};
}

inline Rule draw_rule(Random& random) {
  Rule rule;
  if (random.chance(50)) rule.granularity = Granularity::run;
  if (random.chance(50)) rule.successor = Successor::strict;
  if (random.chance(30)) rule.max_length = 1 + random.below(6);
  if (random.chance(30)) rule.min_length = 1 + random.below(4);
  return rule;
}

}  // namespace rosakit::testing
