// Bounds on work: counted, at doubling lengths, on streams made to break them.
#include <doctest/doctest.h>

#include <bit>
#include <functional>

#include "hubs.hpp"
#include "rosakit/typed_lane.hpp"

using namespace rosakit;
using namespace rosakit::testing;

namespace {

constexpr Budget kLinkedAtOnce{0, 0};

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
/// `growth`, and `more` steps a symbol.
void check_bound(const std::function<u64(u32)>& work, double factor, double growth = 2.5,
                 u32 more = 1) {
  u64 before = 0;
  for (u32 n = 4096; n <= 65536; n *= 2) {
    CAPTURE(n);
    const u64 now = work(n);
    CAPTURE(now);
    CHECK(static_cast<double>(now) < factor * n * (std::bit_width(n) - 1));
    if (before) CHECK(static_cast<double>(now) < growth * static_cast<double>(before) + more * n);
    before = now;
  }
}

}  // namespace

TEST_CASE("work: candidates on nested repeats") {
  for (const Budget& budget : {Budget{}, kLinkedAtOnce})
    for (unsigned k : {1u, 4u, 16u}) {
      CAPTURE(k);
      // Between two of these lengths the first list appears; from then on the chains, at most 24
      // states a symbol, are walked twice.
      check_bound([&](u32 n) { return work_of_candidates(nested_runs(n), k, budget); }, 4 + k, 2.5,
                  25);
      check_bound([&](u32 n) { return work_of_candidates(nested_periods(n), k, budget); }, 4 + k);
      check_bound([&](u32 n) { return work_of_candidates(Symbols(n, 1), k, budget); }, 4 + k);
    }
}

TEST_CASE("work: candidates after what is followed by something else each time") {
  // All successors used to be looked at: 8,192 steps a token for the first family at 65,536.
  for (const Budget& budget : {Budget{}, kLinkedAtOnce})
    for (unsigned k : {1u, 4u, 16u}) {
      CAPTURE(k);
      check_bound([&](u32 n) { return work_of_candidates(hubs(n, 1, 0), k, budget); }, 2);
      check_bound([&](u32 n) { return work_of_candidates(hubs(n, 1, 50000), k, budget); }, 2);
      check_bound([&](u32 n) { return work_of_candidates(hubs(n, 8, 0), k, budget); }, 2 + k / 4);
      check_bound([&](u32 n) { return work_of_candidates(rising_hubs(n, 16), k, budget); },
                  2 + k / 4);
      check_bound([&](u32 n) { return work_of_candidates(ramp_then_constant(n), k, budget); },
                  6 + k);
      check_bound([&](u32 n) { return work_of_candidates(zipf(n, 50000), k, budget); }, 2 + k / 4);
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
