// Fixed work for counting instructions (cpp/isa.py): cost CASE [repeats]; prints a checksum and the
// CPU seconds of the repeated call.
#include <cstdio>
#include <cstdlib>
#include <ctime>
#include <string>

#include "rosakit/bitflip.hpp"
#include "rosakit/bitflip_tied.hpp"
#include "rosakit/matcher.hpp"
#include "rosakit/memory.hpp"
#include "rosakit/pool.hpp"
#include "streams.hpp"

using namespace rosakit;

int main(int argc, char** argv) {
  const std::string name = argc > 1 ? argv[1] : "match";
  const int repeats = argc > 2 ? std::atoi(argv[2]) : 1;
  set_num_threads(1);
  const unsigned bits = 4;
  const bool sweep = name == "bitflip" || name == "tied";
  const std::size_t routes = name == "step" ? 128 : 8, n = sweep            ? 512
                                                           : name == "step" ? 1088
                                                                            : 4096;
  testing::Random random(3);
  std::vector<u8> q(routes * n), k(routes * n);
  for (std::size_t i = 0; i < k.size(); ++i) {
    k[i] = static_cast<u8>(i % n > 300 && random.chance(90) ? k[i - 257] : random.below(16));
    q[i] = static_cast<u8>(random.chance(95) ? k[i] : random.below(16));
  }
  std::vector<i32> position(k.size()), length(k.size()), flipped(k.size() * bits);
  u64 sum = 0;
  double seconds = 0;
  for (int r = 0; r < repeats; ++r) {
    const std::clock_t start = std::clock();
    if (name == "match" || name == "flips") {
      const unsigned flips = name == "flips" ? bits : 0;
      match(MatchCall<u8>{q.data(),
                          k.data(),
                          nullptr,
                          position.data(),
                          length.data(),
                          flips ? flipped.data() : nullptr,
                          flips,
                          {1, routes, n},
                          {}});
    } else if (name == "step" || name == "prefill") {
      SuffixMemory memory({.batch = 1, .routes = routes, .bits = bits, .rule = {}});
      const std::size_t chunk = name == "step" ? 1 : n;
      std::vector<u8> a(routes * chunk), b(a.size());
      for (std::size_t i = 0; i < n; i += chunk) {
        for (std::size_t s = 0; s < routes; ++s)
          for (std::size_t c = 0; c < chunk; ++c) {
            a[s * chunk + c] = q[s * n + i + c];
            b[s * chunk + c] = k[s * n + i + c];
          }
        memory.extend(
            Chunk<u8>{a.data(), b.data(), nullptr, position.data(), length.data(), chunk, 0});
      }
    } else if (sweep) {
      std::vector<double> grad(k.size() * bits), e(routes * bits, 1.0), zero(routes * bits, 0.0),
          credit_q(grad.size()), credit_k(grad.size());
      for (std::size_t i = 0; i < grad.size(); ++i) grad[i] = static_cast<double>(i % 17) - 8;
      BitflipCall<u8> call;
      call.q = q.data(), call.k = k.data(), call.v = k.data(), call.grad = grad.data();
      call.e0 = zero.data(), call.e1 = e.data();
      call.credit_q = credit_q.data(), call.credit_k = credit_k.data();
      call.batch = 1, call.routes = routes, call.time = n, call.bits = bits;
      TiedBitflipCall<u8> tied;
      tied.x = k.data(), tied.v = k.data(), tied.grad = grad.data(), tied.credit = credit_k.data();
      tied.e0 = zero.data(), tied.e1 = e.data();
      tied.batch = 1, tied.routes = routes, tied.time = n, tied.bits = bits;
      if (name == "tied") bitflip_tied(tied);
      else bitflip(call);
      for (double c : credit_k) sum += static_cast<u64>(static_cast<i64>(c));
    } else {
      std::fprintf(stderr, "unknown case %s: match, flips, prefill, step, bitflip or tied\n",
                   name.c_str());
      return 2;
    }
    seconds += static_cast<double>(std::clock() - start) / CLOCKS_PER_SEC;
  }
  for (i32 p : position) sum += static_cast<u64>(static_cast<i64>(p));
  std::printf("%llu %.6f\n", static_cast<unsigned long long>(sum), seconds / repeats);
}
