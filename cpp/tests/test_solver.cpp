#include <doctest/doctest.h>

#include "rosakit/dense_automaton.hpp"
#include "rosakit/packed_automaton.hpp"
#include "rosakit/solver.hpp"
#include "streams.hpp"

using namespace rosakit;
using namespace rosakit::testing;

namespace {

using Narrow = Automaton<false>;
using Wide = Automaton<true>;

template <class Tree>
reference::Result solve(const Symbols& q, const Symbols& k, const Rule& rule, unsigned symbol_bits,
                        unsigned flips, Budget budget) {
  using Symbol = typename Tree::Symbol;
  const std::vector<Symbol> qs(q.begin(), q.end()), ks(k.begin(), k.end());
  const std::size_t n = q.size();
  reference::Result out{std::vector<i32>(n, -7), std::vector<i32>(n, -7),
                        std::vector<i32>(n * flips, -7)};
  Solver<Tree> solver;
  solver.budget = budget;
  if (n % 2) solver.hints_from = 0;
  solver.match(qs.data(), ks.data(), static_cast<u32>(n), rule, symbol_bits,
               Output{out.position.data(), out.length.data(), out.flipped.data(), flips, 0});
  return out;
}

}  // namespace

TEST_CASE("every phase of the solver gives the definition") {
  Random random(1);
  for (int trial = 0; trial < 6000; ++trial) {
    const unsigned bits = 1 + random.below(8),
                   flips = random.chance(50) ? random.below(bits + 2) : 0;
    const std::size_t n = 1 + random.below(trial % 10 ? 60 : 250);
    const auto [q, k] =
        draw(random.below(kFamilies), n, u32{1} << std::min(bits, 1 + random.below(8)), random);
    const Rule rule = draw_rule(random);
    // All online, all offline, and a change in the middle.
    const Budget budget =
        std::array{Budget{}, Budget{0, 0}, Budget{0, 1 + random.below(200)}}[trial % 3];
    CAPTURE(trial);
    const reference::Result want = reference::match(q, k, rule, flips);
    REQUIRE(solve<Narrow>(q, k, rule, bits, flips, budget) == want);
    REQUIRE(solve<Wide>(q, k, rule, 32, flips, budget) == want);
    if (bits <= 4) {
      REQUIRE(solve<DenseAutomaton>(q, k, rule, bits, flips, budget) == want);
      REQUIRE(solve<PackedAutomaton>(q, k, rule, bits, flips, budget) == want);
      if (bits <= 2) REQUIRE(solve<LongSmallAutomaton>(q, k, rule, bits, flips, budget) == want);
    }
  }
}

TEST_CASE("wide symbols") {
  Random random(2);
  for (int trial = 0; trial < 60; ++trial) {
    auto [q, k] = draw(random.below(kFamilies), 400, 300, random);
    for (Symbols* x : {&q, &k})
      for (u32& s : *x) s = s * 7158278 % 0x7FFFFFFF;
    const Rule rule = draw_rule(random);
    const Budget budget{0, trial % 2 ? 0 : random.below(2000)};
    REQUIRE(solve<Wide>(q, k, rule, 32, 2, budget) == reference::match(q, k, rule, 2));
  }
}

TEST_CASE("work stays within the budget's order on periodic streams") {
  // Quadratic walking would need 10^10 steps here.
  const std::size_t n = 150000;
  for (unsigned family : {1u, 2u, 3u, 4u, 6u}) {
    Random random(family);
    const auto [q, k] = draw(family, n, 4, random);
    const reference::Result out = solve<Narrow>(q, k, Rule{}, 2, 2, Budget{});
    if (q == k) CHECK(out.length[n - 1] > 0);
  }
}
