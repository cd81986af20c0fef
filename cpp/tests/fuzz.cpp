// Compares the solver and a chunked memory with the definition on inputs that the fuzzer makes up.
// Without libFuzzer (ROSAKIT_FUZZ off) this is a program that draws its inputs: fuzz [seconds]
// [seed].
#include <cstdio>
#include <cstdlib>

#include "rosakit/dense_automaton.hpp"
#include "rosakit/memory.hpp"
#include "rosakit/solver.hpp"
#include "streams.hpp"

using namespace rosakit;

namespace {

/// Bytes: 6 of options, then q and k interleaved. Returns the positions compared.
std::size_t compare(const u8* data, std::size_t size) {
  if (size < 8) return 0;
  Rule rule;
  rule.granularity = data[0] & 1 ? Granularity::run : Granularity::token;
  rule.successor = data[0] & 2 ? Successor::strict : Successor::available;
  if (data[0] & 4) rule.max_length = 1 + data[1] % 8u;
  if (data[0] & 8) rule.min_length = 1 + data[2] % 4u;
  const unsigned bits = 1 + data[3] % 8u, flips = data[3] / 8u % (bits + 1);
  const u8 mask = static_cast<u8>((1u << bits) - 1);
  const Budget budget{data[0] & 16 ? 32u : 0u, data[0] & 32 ? 8192u : data[4]};
  std::vector<u8> q, k;
  for (std::size_t i = 6; i + 1 < size; i += 2) {
    q.push_back(data[i] & mask);
    k.push_back(data[i + 1] & mask);
  }
  const std::size_t n = q.size();
  const reference::Result want =
      reference::match({q.begin(), q.end()}, {k.begin(), k.end()}, rule, flips);
  reference::Result got{std::vector<i32>(n), std::vector<i32>(n), std::vector<i32>(n * flips)};
  static Solver<Automaton<false>> solver;
  solver.budget = budget;
  solver.match(q.data(), k.data(), static_cast<u32>(n), rule, bits,
               Output{got.position.data(), got.length.data(), got.flipped.data(), flips, 0});
  if (got != want) std::abort();
  if (bits <= DenseAutomaton::kMaxBits) {
    static Solver<DenseAutomaton> dense;
    dense.budget = budget;
    dense.match(q.data(), k.data(), static_cast<u32>(n), rule, bits,
                Output{got.position.data(), got.length.data(), got.flipped.data(), flips, 0});
    if (got != want) std::abort();
  }

  const MemoryOptions options{1, 1, bits, rule, budget.per_symbol, budget.base, 0};
  SuffixMemory memory(options);
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
  return n * 2;
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
