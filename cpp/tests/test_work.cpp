// Bounds on work: counted, at doubling lengths, on streams made to break them.
#include <doctest/doctest.h>

#include <array>
#include <bit>
#include <functional>
#include <set>

#include "rosakit/typed_lane.hpp"
#include "streams.hpp"

using namespace rosakit;
using namespace rosakit::testing;

namespace {

constexpr Budget kLinkedAtOnce{0, 0};

/// Constant runs of rising length, each broken off by a symbol of its own, then one of n symbols:
/// the candidates of a place deep in it lie near the root.
Symbols nested_runs(u32 n) {
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
Symbols nested_periods(u32 n) {
  Symbols x;
  u32 next = 4;
  for (u32 length = 3; x.size() < n / 2; length = length < n / 16 ? 2 * length : 5) {
    for (u32 i = 0; i < length; ++i) x.push_back(1 + i % 3);
    x.push_back(next++ % 7 + 4);
  }
  while (x.size() < n) x.push_back(1 + static_cast<u32>(x.size()) % 3);
  return x;
}
Symbols de_bruijn(u32 n, unsigned order) {
  std::vector<bool> seen(std::size_t{1} << order);
  const u32 mask = (u32{1} << order) - 1;
  Symbols word(order, 0), x;
  u32 state = 0;
  seen[0] = true;
  for (u32 i = 1; i < u32{1} << order; ++i) {
    const u32 one = (state << 1 | 1u) & mask;
    state = seen[one] ? state << 1 & mask : one;
    seen[state] = true;
    word.push_back(state & 1u);
  }
  for (u32 i = 0; i < n; ++i) x.push_back(word[i % word.size()]);
  return x;
}

u64 work_of_candidates(const Symbols& x, unsigned k, const Budget& budget) {
  TypedLane<true, false> lane({}, 0, budget);
  std::vector<i32> position(k), length(k);
  for (u32 token : x) lane.step_candidates(token, k, false, position.data(), length.data());
  return lane.work();
}

/// Positions of query and key runs: `moves` says, one position each, what moves on.
struct Staircase {
  Symbols q, k;
};
/// The query runs `ahead` runs ahead of the keys, which then catch up. On the way a symbol that
/// both ends of the stretch share makes a short match on another diagonal.
Staircase catching_up(u32 n, u32 ahead) {
  Symbols runs;
  Random random(1);
  while (runs.size() < n) {
    const u32 mark = (u32{1} << 20) + static_cast<u32>(runs.size());
    runs.push_back(mark);
    for (u32 i = 2; i < ahead; ++i) runs.push_back(1 + random.below(1u << 16));
    runs.push_back(mark);
  }
  Staircase out;
  for (u32 at = 0; out.q.size() + 2 * ahead < n; at += ahead) {
    for (u32 i = 0; i < ahead; ++i) {
      out.q.push_back(runs[at + i]);
      out.k.push_back(at ? runs[at - 1] : 0);
    }
    for (u32 i = 0; i < ahead; ++i) {
      out.q.push_back(runs[at + ahead - 1]);
      out.k.push_back(runs[at + i]);
    }
  }
  return out;
}
/// Periodic runs whose two sides pause by turns, so that every match grows on another diagonal.
Staircase shifting_periods(u32 n, u32 level) {
  Random random(level);
  Staircase out;
  const auto symbol = [level](u32 run) {
    u32 s = run % 2, unit = 2;
    for (u32 l = 0; l < level; ++l, unit *= 8)
      if (run / unit % 8 == 7 && run % unit == unit - 1) s = 2 + l;
    return s;
  };
  for (u32 a = 0, c = 0; out.q.size() < n;) {
    const bool query = random.chance(50);
    for (u32 i = 1 + random.below(random.chance(20) ? 64 : 4); i && out.q.size() < n; --i) {
      a += query;
      c += !query;
      out.q.push_back(symbol(a));
      out.k.push_back(symbol(c));
    }
  }
  return out;
}

u64 work_of_runs(const Staircase& s, const Budget& budget) {
  Rule rule;
  rule.granularity = Granularity::run;
  rule.successor = Successor::strict;  // a key run is known as soon as it starts
  TypedLane<true, true> lane(rule, 0, budget);
  i32 position, length;
  for (std::size_t i = 0; i < s.q.size(); ++i) lane.step(s.q[i], s.k[i], false, &position, &length);
  return lane.work();
}

/// At most `factor` n log2 n for every n; from one n to its double it grows by a factor of at most
/// `growth`, and n.
void check_bound(const std::function<u64(u32)>& work, double factor, double growth = 2.5) {
  u64 before = 0;
  for (u32 n = 4096; n <= 65536; n *= 2) {
    CAPTURE(n);
    const u64 now = work(n);
    CAPTURE(now);
    CHECK(static_cast<double>(now) < factor * n * (std::bit_width(n) - 1));
    if (before) CHECK(static_cast<double>(now) < growth * static_cast<double>(before) + n);
    before = now;
  }
}

/// The K best distinct successors by the definition of semantics 5.
std::vector<std::array<i32, 2>> naive_candidates(const Symbols& x, u32 i, unsigned k) {
  std::vector<std::array<i32, 2>> all;  // length, position
  for (u32 j = 0; j < i; ++j) {
    i32 l = 0;
    while (l <= static_cast<i32>(j) && x[j - static_cast<u32>(l)] == x[i - static_cast<u32>(l)])
      ++l;
    if (l) all.push_back({l, static_cast<i32>(j) + 1});
  }
  std::sort(all.rbegin(), all.rend());
  std::vector<std::array<i32, 2>> best;
  std::set<u32> seen;
  for (const auto& c : all)
    if (best.size() < k && seen.insert(x[static_cast<u32>(c[1])]).second) best.push_back(c);
  best.resize(k, {0, kNull});
  return best;
}

}  // namespace

TEST_CASE("work: candidates on nested repeats") {
  for (const Budget& budget : {Budget{}, kLinkedAtOnce})
    for (unsigned k : {1u, 4u, 16u}) {
      CAPTURE(k);
      check_bound([&](u32 n) { return work_of_candidates(nested_runs(n), k, budget); }, 4 + k);
      check_bound([&](u32 n) { return work_of_candidates(nested_periods(n), k, budget); }, 4 + k);
      check_bound([&](u32 n) { return work_of_candidates(Symbols(n, 1), k, budget); }, 4 + k);
    }
}

TEST_CASE("work: run granularity, a query ahead of its keys and matches on ever new diagonals") {
  for (const Budget& budget : {Budget{}, kLinkedAtOnce}) {
    for (u32 ahead : {2u, 17u, 33u, 65u, 129u})
      check_bound([&](u32 n) { return work_of_runs(catching_up(n, ahead), budget); }, 4, 3);
    for (u32 level : {0u, 1u, 2u, 4u})
      check_bound([&](u32 n) { return work_of_runs(shifting_periods(n, level), budget); }, 6, 3);
  }
}

TEST_CASE("work: periodic streams past the change to a link-cut tree") {
  for (unsigned order : {4u, 8u, 12u})
    check_bound(
        [&](u32 n) {
          const Symbols x = de_bruijn(n, order);
          TypedLane<false, false> lane({}, 4, kLinkedAtOnce);
          i32 position, length;
          for (u32 s : x) lane.step(s, s, false, &position, &length);
          return lane.work();
        },
        2, 2.3);
}

TEST_CASE("candidates equal their definition, before and past the change") {
  Random random(11);
  u32 undone = 0;
  for (u32 round = 0; round < 60; ++round) {
    const u32 n = 40 + random.below(160);
    Symbols x = round % 4 == 0 ? nested_runs(n)
                : round % 4 == 1
                    ? nested_periods(n)
                    : draw(random.below(kFamilies), n, 2 + random.below(6), random).second;
    const unsigned k = 1 + random.below(5);
    const Budget budget{0, random.below(3) * 40};
    TypedLane<true, false> lane({}, 0, budget);
    std::vector<i32> position(k), length(k);
    for (u32 i = 0; i < n; ++i) {
      if (i > 20 && random.chance(5)) {  // speculate, then take it back
        for (u32 s = 0; s < 4; ++s)
          lane.step_candidates(random.below(4), k, true, position.data(), length.data());
        if (!lane.undo_to(i)) break;  // the change came in between
        ++undone;
      }
      lane.step_candidates(x[i], k, true, position.data(), length.data());
      if (!random.chance(30)) continue;
      const auto want = naive_candidates(x, i, k);
      for (unsigned c = 0; c < k; ++c) {
        REQUIRE(position[c] == want[c][1]);
        REQUIRE(length[c] == want[c][0]);
      }
    }
  }
  CHECK(undone > 20);
}
