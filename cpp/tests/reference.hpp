// The definitions of semantics 2 and 5, quadratic, one stream: what the fast code is compared with.
#pragma once

#include <algorithm>
#include <array>
#include <set>
#include <vector>

#include "rosakit/types.hpp"

namespace rosakit::reference {

using Symbols = std::vector<u32>;

struct Result {
  std::vector<i32> position, length, flipped;  // flipped: [n * bits]
  bool operator==(const Result&) const = default;
};

inline u32 common_suffix(const Symbols& q, i64 i, const Symbols& k, i64 j, u32 last, u32 cap) {
  if (last != k[static_cast<std::size_t>(j)]) return 0;
  u32 l = 1;
  while (l < cap && l <= i && l <= j &&
         q[static_cast<std::size_t>(i - l)] == k[static_cast<std::size_t>(j - l)])
    ++l;
  return l;
}

inline Result match(const Symbols& q, const Symbols& k, const Rule& rule, unsigned bits = 0) {
  const std::size_t n = q.size();
  Result out{std::vector<i32>(n), std::vector<i32>(n), std::vector<i32>(n * bits)};
  const bool run = rule.granularity == Granularity::run;
  Symbols a, c;            // what is compared: runs, or the streams themselves
  std::vector<i32> start;  // of key runs
  for (std::size_t i = 0; i < n; ++i) {
    const bool fresh = !run || !i || q[i] != q[i - 1];
    if (fresh) a.push_back(q[i]);
    if (!run || !i || k[i] != k[i - 1]) {
      c.push_back(k[i]);
      start.push_back(static_cast<i32>(i));
    }
    const i64 rho = static_cast<i64>(a.size()) - 1, newest = static_cast<i64>(c.size()) - 1;
    const i64 candidates = run && rule.successor == Successor::strict ? newest + 1 : newest;
    const auto find = [&](u32 last, i32& length) {
      i64 winner = -1;
      u32 best = 0;
      for (i64 e = 0; e < candidates; ++e) {
        const u32 l = common_suffix(a, rho, c, e, last, rule.max_length);
        if (l && l >= best) best = l, winner = e;
      }
      const bool ok = best >= rule.min_length && best && winner < newest;
      length = ok ? static_cast<i32>(best) : 0;
      return ok ? start[static_cast<std::size_t>(winner + 1)] : kNull;
    };
    out.position[i] = find(a.back(), out.length[i]);
    i32 ignored;
    for (unsigned m = 0; m < bits; ++m)
      out.flipped[i * bits + m] = fresh ? find(a.back() ^ u32{1} << m, ignored) : out.position[i];
  }
  return out;
}

/// (length, position) of the K best distinct successors at position i of a stream from `start` on.
inline std::vector<std::array<i32, 2>> candidates(const Symbols& x, u32 i, unsigned k,
                                                  u32 start = 0) {
  std::vector<std::array<i32, 2>> all;
  for (u32 j = start; j < i; ++j) {
    u32 l = 0;
    while (start + l <= j && x[j - l] == x[i - l]) ++l;
    if (l) all.push_back({static_cast<i32>(l), static_cast<i32>(j) + 1});
  }
  std::sort(all.rbegin(), all.rend());
  std::vector<std::array<i32, 2>> best;
  std::set<u32> seen;
  for (const auto& c : all)
    if (best.size() < k && seen.insert(x[static_cast<u32>(c[1])]).second) best.push_back(c);
  best.resize(k, {0, kNull});
  return best;
}

}  // namespace rosakit::reference
