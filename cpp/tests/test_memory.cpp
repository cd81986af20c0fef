#include <doctest/doctest.h>

#include <array>
#include <cstdlib>
#include <stdexcept>

#include "rosakit/memory.hpp"
#include "rosakit/page_pool.hpp"
#include "streams.hpp"

using namespace rosakit;
using namespace rosakit::testing;

namespace {

struct Twin {
  SuffixMemory memory;
  std::vector<std::array<Symbols, 2>> fed;  // [B * R]: queries, keys
};

/// Random operations on a memory against the definition replayed from the symbols it was fed.
void exercise(u64 seed, int operations) {
  Random random(seed);
  MemoryOptions options;
  options.batch = 1 + random.below(3);
  options.routes = 1 + random.below(3);
  options.bits = std::array{1u, 2u, 4u, 8u, 16u, 0u}[random.below(6)];
  options.rule = draw_rule(random);
  options.walk_per_symbol = random.chance(50) ? 32 : 0;  // link-cut trees from the start, or never
  options.walk_base = random.chance(50) ? 8192 : random.below(40);
  const u32 alphabet = u32{1} << std::min(options.bits ? options.bits : 12u, 1 + random.below(5));
  std::vector<Twin> twins;
  twins.push_back(
      {SuffixMemory(options), std::vector<std::array<Symbols, 2>>(options.batch * options.routes)});
  for (int step = 0; step < operations; ++step) {
    Twin& t = twins[random.below(twins.size())];
    const std::size_t batch = t.memory.options().batch, routes = options.routes;
    const u32 choice = random.below(100);
    if (choice < 60) {
      const std::size_t n = random.chance(70) ? 1 + random.below(3) : 1 + random.below(40);
      std::vector<i32> q(batch * routes * n), k = q, position(q.size(), -7), length(q.size(), -7);
      std::vector<u8> mask(batch * n, 1);
      const bool masked = random.chance(30);
      if (masked)
        for (u8& m : mask) m = random.chance(70);
      for (std::size_t s = 0; s < batch * routes; ++s) {
        const auto [qs, ks] = draw(random.below(kFamilies), n, alphabet, random);
        for (std::size_t i = 0; i < n; ++i) {
          q[s * n + i] = static_cast<i32>(qs[i]);
          k[s * n + i] = static_cast<i32>(ks[i]);
        }
      }
      t.memory.extend(Chunk<i32>{q.data(), k.data(), masked ? mask.data() : nullptr,
                                 position.data(), length.data(), n, 0});
      for (std::size_t s = 0; s < batch * routes; ++s) {
        std::vector<std::size_t> fresh;
        for (std::size_t i = 0; i < n; ++i) {
          if (!mask[s / routes * n + i]) {
            REQUIRE(position[s * n + i] == kNull);
            REQUIRE(length[s * n + i] == 0);
            continue;
          }
          fresh.push_back(i);
          t.fed[s][0].push_back(static_cast<u32>(q[s * n + i]));
          t.fed[s][1].push_back(static_cast<u32>(k[s * n + i]));
        }
        if (!random.chance(25)) continue;  // the definition is slow
        const auto want = reference::match(t.fed[s][0], t.fed[s][1], options.rule);
        for (std::size_t f = 0; f < fresh.size(); ++f) {
          const std::size_t at = want.position.size() - fresh.size() + f;
          REQUIRE(position[s * n + fresh[f]] == want.position[at]);
          REQUIRE(length[s * n + fresh[f]] == want.length[at]);
        }
      }
    } else if (choice < 80) {
      const std::size_t row = random.below(batch);
      const i64 now = t.memory.lengths()[row];
      const i64 to = random.chance(70) ? std::max<i64>(0, now - random.below(20))
                                       : random.below(static_cast<u64>(now) + 1);
      t.memory.truncate(row, to);
      for (std::size_t r = 0; r < routes; ++r)
        for (Symbols& x : t.fed[row * routes + r]) x.resize(static_cast<std::size_t>(to));
    } else if (choice < 95) {
      std::vector<i64> rows(1 + random.below(3));
      for (i64& r : rows) r = random.below(batch);
      Twin other{t.memory.index_select(rows), {}};
      for (i64 r : rows)
        for (std::size_t route = 0; route < routes; ++route)
          other.fed.push_back(t.fed[static_cast<std::size_t>(r) * routes + route]);
      if (twins.size() < 4) twins.push_back(std::move(other));
      else twins[random.below(twins.size())] = std::move(other);
    } else {
      const std::string bytes = t.memory.serialize();
      t.memory = SuffixMemory::deserialize({bytes.data(), bytes.size()});
    }
  }
}

}  // namespace

TEST_CASE("random operations on a memory") {
  // ROSAKIT_SOAK=n: n times 60 operations, of streams not seen by default.
  const char* soak = std::getenv("ROSAKIT_SOAK");
  const u64 first = soak ? 1000 : 0, count = soak ? std::strtoull(soak, nullptr, 10) : 150;
  for (u64 seed = first; seed < first + count; ++seed) {
    CAPTURE(seed);
    exercise(seed, 60);
  }
}

TEST_CASE("a budget is kept, and matches stay exact within what is remembered") {
  Random random(8);
  const std::size_t routes = 2, n = 6000;
  MemoryOptions options{1, routes, 4, {}};
  options.max_bytes = 400000;
  SuffixMemory memory(options);
  std::vector<u8> q(routes * n), k = q;
  for (std::size_t s = 0; s < routes; ++s) {
    const auto [qs, ks] = draw(8, n, 16, random);
    for (std::size_t i = 0; i < n; ++i) {
      q[s * n + i] = static_cast<u8>(qs[i]);
      k[s * n + i] = static_cast<u8>(ks[i]);
    }
  }
  std::vector<i32> position(routes), length(routes);
  std::vector<u8> one_q(routes), one_k(routes);
  i64 evictions = 0, start = 0;
  for (std::size_t i = 0; i < n; ++i) {
    for (std::size_t s = 0; s < routes; ++s) one_q[s] = q[s * n + i], one_k[s] = k[s * n + i];
    memory.extend(
        Chunk<u8>{one_q.data(), one_k.data(), nullptr, position.data(), length.data(), 1, 0});
    REQUIRE(memory.reserved_bytes() <= options.max_bytes);
    evictions += memory.starts()[0] > start;
    start = memory.starts()[0];
    if (i % 97 == 0 || start + 5 > static_cast<i64>(i))
      for (std::size_t s = 0; s < routes; ++s) {
        const auto first = static_cast<std::ptrdiff_t>(s * n) + start,
                   last = static_cast<std::ptrdiff_t>(s * n + i + 1);
        const auto want = reference::match({q.begin() + first, q.begin() + last},
                                           {k.begin() + first, k.begin() + last}, {});
        REQUIRE(length[s] == want.length.back());
        REQUIRE(position[s] == (length[s] ? want.position.back() + start : kNull));
      }
  }
  CHECK(evictions > 0);
  const std::string bytes = memory.serialize();
  SuffixMemory twin = SuffixMemory::deserialize({bytes.data(), bytes.size()});
  CHECK(twin.starts()[0] == start);
  std::vector<i32> position2(routes), length2(routes);
  memory.extend(
      Chunk<u8>{one_q.data(), one_k.data(), nullptr, position.data(), length.data(), 1, 0});
  twin.extend(
      Chunk<u8>{one_q.data(), one_k.data(), nullptr, position2.data(), length2.data(), 1, 0});
  CHECK(position == position2);
  twin.truncate(0, 3);
  CHECK(twin.lengths()[0] == 3);
  CHECK(twin.starts()[0] == 3);
  options.max_bytes = 1000;
  CHECK_THROWS_AS(SuffixMemory{options}, std::invalid_argument);
}

TEST_CASE("pages are given back") {
  const std::size_t before = pool_bytes();
  {
    SuffixMemory memory({.batch = 1, .routes = 64, .bits = 4, .rule = {}});
    std::vector<u8> x(64 * 1000);
    Random random(3);
    for (u8& s : x) s = static_cast<u8>(random.below(16));
    std::vector<i32> position(x.size()), length(x.size());
    memory.extend(Chunk<u8>{x.data(), x.data(), nullptr, position.data(), length.data(), 1000, 0});
    CHECK(pool_bytes() > before);
    const SuffixMemory fork = memory.index_select(std::array<i64, 2>{0, 0});
    CHECK(fork.live_bytes() == 2 * memory.live_bytes());
  }
  CHECK(pool_bytes() <= before + 16 * kSlabBytes);
}

TEST_CASE("damaged bytes are refused") {
  SuffixMemory memory({.batch = 2, .routes = 2, .bits = 4, .rule = {}});
  std::vector<u8> x(2 * 2 * 20, 3);
  std::vector<i32> position(x.size()), length(x.size());
  memory.extend(Chunk<u8>{x.data(), x.data(), nullptr, position.data(), length.data(), 20, 0});
  const std::string good = memory.serialize();
  for (std::size_t n = 0; n < good.size(); ++n)
    CHECK_THROWS_AS(SuffixMemory::deserialize({good.data(), n}), std::runtime_error);
  for (std::size_t at = 0; at < good.size(); ++at) {
    std::string bad = good;
    bad[at] = static_cast<char>(bad[at] ^ 0x10);
    CHECK_THROWS_AS(SuffixMemory::deserialize({bad.data(), bad.size()}), std::runtime_error);
  }
}

TEST_CASE("symbols out of range change nothing") {
  SuffixMemory memory({.batch = 1, .routes = 1, .bits = 3, .rule = {}});
  const std::array<i32, 3> x{1, 2, 8}, negative{1, -2, 0};
  std::array<i32, 3> position, length;
  CHECK_THROWS_AS(
      memory.extend(Chunk<i32>{x.data(), x.data(), nullptr, position.data(), length.data(), 3, 0}),
      std::invalid_argument);
  CHECK_THROWS_AS(memory.extend(Chunk<i32>{negative.data(), negative.data(), nullptr,
                                           position.data(), length.data(), 3, 0}),
                  std::invalid_argument);
  CHECK(memory.lengths()[0] == 0);
}
