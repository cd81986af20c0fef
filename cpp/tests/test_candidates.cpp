// The K best distinct successors (semantics 5) against their definition.
#include <doctest/doctest.h>

#include <array>
#include <stdexcept>

#include "hubs.hpp"
#include "rosakit/memory.hpp"
#include "rosakit/typed_lane.hpp"

using namespace rosakit;
using namespace rosakit::testing;

namespace {

/// A stream of about n symbols; most have places with more than a dozen successors.
Symbols draw_wide(u32 n, Random& random) {
  switch (random.below(10)) {
    case 0:
      return nested_runs(n);
    case 1:
      return nested_periods(n);
    case 2:
      return draw(random.below(kFamilies), n, 2 + random.below(40), random).second;
    case 3:
      return hubs(n, 1 + random.below(3), 30);
    case 4:
      return rising_hubs(n, 2 + random.below(4));
    case 5: {
      Symbols x = ramp_then_constant(n / 2), y = hubs(n - n / 2, 2, 40);
      x.insert(x.end(), y.begin(), y.end());
      return x;
    }
    case 6: {  // what follows repeats in blocks, then goes back to an older one
      Symbols x;
      for (u32 i = 0; x.size() < n; ++i) {
        x.insert(x.end(), 1 + i / 40 % 3, 1);
        x.push_back(random.chance(70) ? 2 + i / 9 % 20 : 2 + random.below(25));
      }
      return x;
    }
    case 7:
      return zipf(n, 60);
    default: {  // contexts within contexts, each with a habit that the others do not share
      Symbols x;
      std::array<u32, 27> habit{};
      const u32 between = random.chance(50) ? 0 : kMostShallow + 1;  // or near the root
      while (x.size() < n) {
        u32 context = 0;
        for (u32 i = random.below(4); i; --i) {
          x.push_back(50 + random.below(3));
          context = (context * 3 + x.back() - 50) % 27;
        }
        for (u32 i = 0; i < between; ++i) x.push_back(60 + i);
        x.push_back(1);
        if (random.chance(40)) habit[context] = 2 + random.below(18);
        x.push_back(habit[context]);
      }
      x.resize(n);
      return x;
    }
  }
}

}  // namespace

TEST_CASE("candidates equal their definition, before and past the change") {
  Random random(11);
  u32 undone = 0;
  for (u32 round = 0; round < 160; ++round) {
    const u32 n = 40 + random.below(round % 3 ? 160 : 2500);
    const Symbols x = draw_wide(n, random);
    const unsigned k = 1 + random.below(random.chance(80) ? 5 : 30);
    const Budget budget{0, random.below(3) * 40};
    TypedLane<true, false> lane({}, 0, budget);
    std::vector<i32> position(k), length(k);
    for (u32 i = 0; i < n; ++i) {
      if (i > 20 && random.chance(5)) {  // speculate, then take it back
        for (u32 s = 1 + random.below(12); s; --s)
          lane.step_candidates(random.chance(50) ? x[random.below(i)] : random.below(50), k, true,
                               position.data(), length.data());
        if (!lane.undo_to(i)) break;  // the change came in between
        ++undone;
      }
      lane.step_candidates(x[i], k, true, position.data(), length.data());
      if (!random.chance(30)) continue;
      const auto want = reference::candidates(x, i, k);
      for (unsigned c = 0; c < k; ++c) {
        REQUIRE(position[c] == want[c][1]);
        REQUIRE(length[c] == want[c][0]);
      }
    }
  }
  CHECK(undone > 60);
}

TEST_CASE("candidates of a state that is split by the key with which its successors become many") {
  for (u32 many = 8; many < 30; ++many)
    for (const u64 base : {u64{0}, u64{1} << 20}) {
      Symbols x;
      for (u32 i = 0; i < many; ++i) x.insert(x.end(), {1, 2, 10 + (i * 7) % many});
      x.insert(x.end(), {1, 2, 2, 3, 2, 4, 1, 2});
      TypedLane<true, false> lane({}, 0, Budget{0, base});
      std::array<i32, 5> position, length;
      for (u32 i = 0; i < x.size(); ++i) {
        lane.step_candidates(x[i], 5, true, position.data(), length.data());
        const auto want = reference::candidates(x, i, 5);
        for (unsigned c = 0; c < 5; ++c) {
          REQUIRE(position[c] == want[c][1]);
          REQUIRE(length[c] == want[c][0]);
        }
      }
    }
}

TEST_CASE("candidates of a memory: plain steps between, forks, truncation, files, eviction") {
  struct Twin {
    SuffixMemory memory;
    Symbols x;
  };
  u64 evicted = 0;
  for (u64 seed = 0; seed < 60; ++seed) {
    CAPTURE(seed);
    Random random(seed);
    const u64 most = random.chance(30) ? 200000 : 0;
    const MemoryOptions options{.batch = 1,
                                .routes = 1,
                                .bits = random.chance(50) ? 16u : 0u,
                                .rule = {},
                                .walk_per_symbol = 0,
                                .walk_base = random.chance(50) ? 8192 : random.below(40),
                                .max_bytes = most};
    std::vector<Twin> twins;
    twins.push_back({SuffixMemory(options), {}});
    for (u32 operation = 0; operation < 60; ++operation) {
      Twin& t = twins[random.below(twins.size())];
      const u32 choice = random.below(100);
      if (choice < 60) {
        const Symbols fresh = draw_wide(1 + random.below(most ? 300 : 60), random);
        const unsigned k = random.chance(80) ? 1 + random.below(6) : 0;  // 0: no candidates
        const std::size_t n = fresh.size(), width = k ? k : 1, before = t.x.size();
        const std::vector<i32> symbols(fresh.begin(), fresh.end());
        std::vector<i32> position(n * width, -7), length(position);
        t.memory.extend(Chunk<i32>{symbols.data(), symbols.data(), nullptr, position.data(),
                                   length.data(), n, k});
        t.x.insert(t.x.end(), fresh.begin(), fresh.end());
        if (most) REQUIRE(t.memory.reserved_bytes() <= most);
        const auto start = static_cast<u32>(t.memory.starts()[0]);
        evicted += start > 0;
        for (std::size_t i = 0; i < n; ++i) {
          if (before + i < start || !random.chance(20)) continue;
          if (most && i + 1 < n) continue;  // room may have been made within the chunk
          const auto want = reference::candidates(t.x, static_cast<u32>(before + i),
                                                  static_cast<unsigned>(width), start);
          for (std::size_t c = 0; c < width; ++c) {
            REQUIRE(position[i * width + c] == want[c][1]);
            REQUIRE(length[i * width + c] == want[c][0]);
          }
        }
      } else if (choice < 78) {
        const i64 now = t.memory.lengths()[0];
        const i64 back = random.below(random.chance(80) ? 12 : static_cast<u64>(now) + 1);
        const i64 to = std::max(t.memory.starts()[0], now - back);
        t.memory.truncate(0, to);
        t.x.resize(static_cast<std::size_t>(to));
      } else if (choice < 92) {
        Twin other{t.memory.index_select(std::array<i64, 1>{0}), t.x};
        if (twins.size() < 4) twins.push_back(std::move(other));
        else twins[random.below(twins.size())] = std::move(other);
      } else {
        const std::string bytes = t.memory.serialize();
        t.memory = SuffixMemory::deserialize({bytes.data(), bytes.size()});
      }
    }
  }
  CHECK(evicted > 20);
}

TEST_CASE("a budget is kept where rows are long and become lists on the way") {
  for (const std::size_t most : {300000u, 1000000u})
    for (const unsigned k : {0u, 2u})
      for (const std::size_t chunk : {1u, 50u}) {
        SuffixMemory memory({.batch = 1, .routes = 1, .bits = 0, .rule = {}, .max_bytes = most});
        const Symbols x = hubs(24000, 1, 0);
        const std::vector<i32> symbols(x.begin(), x.end());
        std::vector<i32> position(chunk * 2), length(chunk * 2);
        for (std::size_t i = 0; i + chunk <= symbols.size(); i += chunk) {
          const i32* at = symbols.data() + i;
          memory.extend(
              Chunk<i32>{at, at, nullptr, position.data(), length.data(), chunk, i < 7000 ? 0 : k});
          REQUIRE(memory.reserved_bytes() <= most);
        }
        CHECK(memory.starts()[0] > 0);
      }
}
