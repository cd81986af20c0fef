// Compares the solver, a chunked memory and the best distinct successors with their definitions on
// inputs that the fuzzer makes up.
// Without libFuzzer (ROSAKIT_FUZZ off) this is a program that draws its inputs: fuzz [seconds]
// [seed].
#include <cstdio>
#include <cstdlib>

#include "rosakit/dense_automaton.hpp"
#include "rosakit/memory.hpp"
#include "rosakit/packed_automaton.hpp"
#include "rosakit/solver.hpp"
#include "streams.hpp"

using namespace rosakit;

namespace {

/// What one stream is compared by.
struct Case {
  std::vector<u8> q, k;
  Rule rule;
  unsigned bits, flips;  // flips may reach beyond the symbols
  Budget budget;
  u32 hints_from;
  const u8* flip_at;
};

/// Solves with the layout `Tree`, whatever the length of the stream would choose.
template <class Tree>
void solve(const Case& c, const reference::Result& want) {
  using Symbol = typename Tree::Symbol;
  static Solver<Tree> solver;  // dirty from the case before
  const std::size_t n = c.q.size();
  const std::vector<Symbol> q(c.q.begin(), c.q.end()), k(c.k.begin(), c.k.end());
  reference::Result got{std::vector<i32>(n, -7), std::vector<i32>(n, -7),
                        std::vector<i32>(n * c.flips, -7)};
  solver.budget = c.budget;
  solver.hints_from = c.hints_from;
  solver.match(
      q.data(), k.data(), static_cast<u32>(n), c.rule, c.bits,
      Output{got.position.data(), got.length.data(), got.flipped.data(), c.flips, 0, c.flip_at});
  if (got != want) std::abort();
}

/// Compares the best successors of a token stream at some positions, over a rollback if
/// `speculate`.
void compare_candidates(const std::vector<u8>& keys, unsigned k, const Budget& budget,
                        bool speculate) {
  const reference::Symbols x(keys.begin(), keys.end());
  SuffixMemory memory({1, 1, 0, {}, budget.per_symbol, budget.base, 0});
  std::vector<i32> position(k), length(k);
  const auto feed = [&](u32 symbol) {
    const i32 token = static_cast<i32>(symbol);
    memory.extend(Chunk<i32>{&token, &token, nullptr, position.data(), length.data(), 1, k});
  };
  const u32 n = static_cast<u32>(x.size()), stride = 1 + n / 64;
  for (u32 i = 0; i < n; ++i) {
    if (speculate && i % 7 == 6) {
      for (u32 s = 0; s < 5; ++s) feed(x[(i * 5 + s) % n]);
      memory.truncate(0, i);
    }
    feed(x[i]);
    if (i % stride) continue;
    const auto want = reference::candidates(x, i, k);
    for (unsigned c = 0; c < k; ++c)
      if (length[c] != want[c][0] || position[c] != want[c][1]) std::abort();
  }
}

/// Bytes: 6 of options, then q and k interleaved. Returns the positions compared.
std::size_t compare(const u8* data, std::size_t size) {
  if (size < 8) return 0;
  Rule rule;
  rule.granularity = data[0] & 1 ? Granularity::run : Granularity::token;
  rule.successor = data[0] & 2 ? Successor::strict : Successor::available;
  if (data[0] & 4) rule.max_length = 1 + data[1] % 8u;
  if (data[0] & 8) rule.min_length = 1 + data[2] % 4u;
  const unsigned bits = 1 + data[3] % 8u, flips = data[3] / 8u % (bits + 2);
  const u8 mask = static_cast<u8>((1u << bits) - 1);
  const Budget budget{data[0] & 16 ? 32u : 0u, data[0] & 32 ? 8192u : data[4]};
  std::vector<u8> q, k;
  for (std::size_t i = 6; i + 1 < size; i += 2) {
    q.push_back(data[i] & mask);
    k.push_back(data[i + 1] & mask);
  }
  const std::size_t n = q.size();
  reference::Result want =
      reference::match({q.begin(), q.end()}, {k.begin(), k.end()}, rule, flips);
  std::vector<u8> flip_at;
  if (data[5] & 64) {  // flips at some positions; the match stands at the others
    for (std::size_t i = 0; i < n; ++i) flip_at.push_back((i + data[4]) % (2 + data[2] % 5u) == 0);
    for (std::size_t i = 0; i < n; ++i)
      for (unsigned m = 0; m < flips; ++m)
        if (!flip_at[i]) want.flipped[i * flips + m] = want.position[i];
  }
  const Case drawn{q,
                   k,
                   rule,
                   bits,
                   flips,
                   budget,
                   data[5] & 128 ? 0u : ~0u,
                   flip_at.empty() ? nullptr : flip_at.data()};
  solve<Automaton<false>>(drawn, want);
  solve<Automaton<true>>(drawn, want);
  if (bits <= PackedAutomaton::kMaxBits) {
    solve<DenseAutomaton>(drawn, want);
    solve<PackedAutomaton>(drawn, want);
  }
  if (bits <= LongSmallAutomaton::kMaxBits) solve<LongSmallAutomaton>(drawn, want);

  const MemoryOptions options{1, 1, bits, rule, budget.per_symbol, budget.base, 0};
  SuffixMemory memory(options);
  reference::Result got{std::vector<i32>(n), std::vector<i32>(n), {}};
  const std::size_t chunk = 1 + data[5] % 32u;
  for (std::size_t i = 0; i < n; i += chunk) {
    const std::size_t m = std::min(chunk, n - i);
    memory.extend(Chunk<u8>{q.data() + i, k.data() + i, nullptr, got.position.data() + i,
                            got.length.data() + i, m, 0});
    if (data[5] & 32 && i + m < n) {  // speculate, then take it back
      std::vector<i32> position(m), length(m);
      memory.extend(Chunk<u8>{k.data(), q.data(), nullptr, position.data(), length.data(), m, 0});
      memory.truncate(0, static_cast<i64>(i + m));
    }
  }
  if (got.position != want.position || got.length != want.length) std::abort();
  compare_candidates(k, 1 + data[1] % 6u, budget, data[5] & 32);
  return n * 3;
}

}  // namespace

#if defined(ROSAKIT_LIBFUZZER)
extern "C" int LLVMFuzzerTestOneInput(const u8* data, std::size_t size) {
  compare(data, std::min<std::size_t>(size, 2000));
  return 0;
}
#else
#include <chrono>

int main(int argc, char** argv) {
  const double seconds = argc > 1 ? std::atof(argv[1]) : 10;
  testing::Random random(argc > 2 ? std::strtoull(argv[2], nullptr, 10) : 1);
  const auto start = std::chrono::steady_clock::now();
  u64 positions = 0, streams = 0;
  while (std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count() <
         seconds) {
    const std::size_t n = 1 + random.below(random.chance(10) ? 200 : 40);
    const auto [q, k] =
        testing::draw(random.below(testing::kFamilies), n, 2u << random.below(5), random);
    std::vector<u8> data(6);
    for (u8& b : data) b = static_cast<u8>(random.below(256));
    for (std::size_t i = 0; i < n; ++i) {
      data.push_back(static_cast<u8>(q[i]));
      data.push_back(static_cast<u8>(k[i]));
    }
    positions += compare(data.data(), data.size());
    ++streams;
  }
  std::printf("%llu positions of %llu streams agree\n", static_cast<unsigned long long>(positions),
              static_cast<unsigned long long>(streams));
}
#endif
