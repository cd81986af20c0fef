#include <doctest/doctest.h>

#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <stdexcept>
#include <thread>
#include <vector>

#include "rosakit/matcher.hpp"
#include "rosakit/offline.hpp"
#include "rosakit/pool.hpp"
#include "rosakit/storage.hpp"
#include "streams.hpp"

using namespace rosakit;

TEST_CASE("recency tree answers interval maxima") {
  testing::Random random(5);
  for (u32 slots : {1u, 63u, 64u, 65u, 4096u, 5000u}) {
    RecencyTree tree;
    tree.reset(slots);
    std::vector<i32> plain(slots, kNull);
    for (i32 value = 0; value < 300; ++value) {
      const u32 at = random.below(slots);
      tree.put(at, value);
      plain[at] = value;
      const u32 a = random.below(slots), b = a + random.below(slots - a + 1);
      REQUIRE(tree.max(a, b) ==
              (a == b ? kNull : *std::max_element(plain.begin() + a, plain.begin() + b)));
    }
  }
}

#if defined(__linux__)
TEST_CASE("large blocks are lent again, and not held for ever") {
  void* first = take_block(5 * kBlockBytes - 1);
  CHECK(reinterpret_cast<std::uintptr_t>(first) % kBlockBytes == 0);
  give_block(first, 5 * kBlockBytes - 1);
  void* other = take_block(7 * kBlockBytes);
  CHECK(other != first);
  CHECK(take_block(5 * kBlockBytes) == first);
  give_block(first, 5 * kBlockBytes);
  give_block(other, 7 * kBlockBytes);
  // Sizes that nobody asks for again make room for newer ones: by number, and by bytes.
  for (std::size_t n = 1; n <= 40; ++n) give_block(take_block(n * kBlockBytes), n * kBlockBytes);
  std::vector<void*> taken;
  for (int i = 0; i < 40; ++i) taken.push_back(take_block(kBlockBytes));
  for (void* block : taken) give_block(block, kBlockBytes);
  void* large = take_block(200 * kBlockBytes);  // more than is ever held
  give_block(large, 200 * kBlockBytes);
  void* last = take_block(kBlockBytes);
  CHECK(std::find(taken.begin(), taken.end(), last) != taken.end());
  give_block(last, kBlockBytes);
}
#endif

TEST_CASE("paged arrays share until written") {
  PagedArray<u32> a;
  for (u32 i = 0; i < 5000; ++i) a.push_back(i);
  PagedArray<u32> b = a;
  CHECK(b.ptr(100) == a.ptr(100));
  b.mut(100) = 7;
  CHECK(a[100] == 100);
  CHECK(b[100] == 7);
  CHECK(b.ptr(3000) == a.ptr(3000));
  a.resize(10);
  CHECK(b[4999] == 4999);
  const PagedArray<u32> c = std::move(b);
  CHECK(c[100] == 7);
}

TEST_CASE("the pool runs everything once, and passes on errors") {
  set_num_threads(4);
  std::vector<std::atomic<int>> seen(1000);
  parallel_for(seen.size(), [&](std::size_t i, unsigned worker) {
    REQUIRE(worker < 4);
    ++seen[i];
  });
  for (const auto& s : seen) REQUIRE(s == 1);
  CHECK_THROWS_AS(parallel_for(100,
                               [](std::size_t i, unsigned) {
                                 if (i == 50) throw std::runtime_error("fifty");
                               }),
                  std::runtime_error);
  std::vector<std::thread> callers;
  std::atomic<int> total = 0;
  for (int c = 0; c < 4; ++c)
    callers.emplace_back([&] {
      for (int r = 0; r < 50; ++r) parallel_for(20, [&](std::size_t, unsigned) { ++total; });
    });
  for (std::thread& t : callers) t.join();
  CHECK(total == 4 * 50 * 20);
  CHECK_THROWS_AS(set_num_threads(0), std::invalid_argument);
}

#if !defined(__SANITIZE_THREAD__)
TEST_CASE("the pool survives fork()") {
  set_num_threads(3);
  std::atomic<int> total = 0;
  const auto count = [&] { parallel_for(30, [&](std::size_t, unsigned) { ++total; }); };
  count();
  const pid_t child = fork();
  if (child == 0) {
    total = 0;
    count();
    _exit(total == 30 && num_threads() == 3 ? 0 : 1);
  }
  int status = -1;
  waitpid(child, &status, 0);
  CHECK(status == 0);
  count();
  CHECK(total == 60);
}
#endif

TEST_CASE("segments are separate streams") {
  const std::vector<u8> x{1, 2, 1, 2, 9, 1, 2, 1};
  const std::vector<i32> starts{0, 0, 0, 0, -1, 5, 5, 5};
  std::vector<i32> position(8, -7), length(8, -7), flipped(16, -7);
  match(MatchCall<u8>{x.data(),
                      x.data(),
                      starts.data(),
                      position.data(),
                      length.data(),
                      flipped.data(),
                      2,
                      {1, 1, 8},
                      {}});
  CHECK(position == std::vector<i32>{-1, -1, 1, 2, -1, -1, -1, 6});
  CHECK(length == std::vector<i32>{0, 0, 1, 2, 0, 0, 0, 1});
  CHECK(flipped[8] == kNull);
}

TEST_CASE("streams that positions cannot count are refused") {
  CHECK_THROWS_AS(match(MatchCall<u8>{nullptr,
                                      nullptr,
                                      nullptr,
                                      nullptr,
                                      nullptr,
                                      nullptr,
                                      0,
                                      {1, 1, std::size_t{1} << 31},
                                      {}}),
                  std::length_error);
}
