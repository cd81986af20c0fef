#include <doctest/doctest.h>

#include <cmath>
#include <tuple>

#include "rosakit/bitflip.hpp"
#include "rosakit/bitflip_tied.hpp"
#include "streams.hpp"

using namespace rosakit;
using namespace rosakit::testing;
using reference::Symbols;

namespace {

/// One stream with everything that a call reads.
struct Case {
  std::size_t n;
  unsigned bits;
  Symbols q, k, v;
  std::vector<double> grad, e0, e1, null;
  Rule rule;
  bool unmatched_self;

  /// <grad, y> of the definition.
  double loss(const Symbols& queries, const Symbols& keys, const Symbols& values) const {
    const reference::Result found = reference::match(queries, keys, rule);
    double sum = 0;
    for (std::size_t i = 0; i < n; ++i) {
      const i32 at = found.position[i] >= 0 ? found.position[i]
                     : unmatched_self       ? static_cast<i32>(i)
                                            : kNull;
      for (unsigned m = 0; m < bits; ++m) {
        const double level = at < 0 ? null[m]
                             : values[static_cast<std::size_t>(at)] >> m & 1u ? e1[m]
                                                                              : e0[m];
        sum += grad[i * bits + m] * level;
      }
    }
    return sum;
  }
};

Case make(Random& random) {
  Case c;
  c.n = 1 + random.below(40);
  c.bits = 1 + random.below(4);
  std::tie(c.q, c.k) = draw(random.below(kFamilies), c.n, u32{1} << c.bits, random);
  for (std::size_t i = 0; i < c.n; ++i) c.v.push_back(random.below(u32{1} << c.bits));
  const auto real = [&] { return (static_cast<double>(random.below(2001)) - 1000) / 500; };
  for (std::size_t i = 0; i < c.n * c.bits; ++i) c.grad.push_back(real());
  for (unsigned m = 0; m < c.bits; ++m) {
    c.e0.push_back(real());
    c.e1.push_back(real());
    c.null.push_back(real());
  }
  if (random.chance(30)) c.rule.max_length = 1 + random.below(5);
  if (random.chance(30)) c.rule.min_length = 1 + random.below(3);
  c.unmatched_self = random.chance(40);
  return c;
}

void check(const std::vector<double>& got, const std::vector<double>& want) {
  for (std::size_t i = 0; i < want.size(); ++i) REQUIRE(std::abs(got[i] - want[i]) < 1e-9);
}

std::vector<u8> narrow(const Symbols& x) { return {x.begin(), x.end()}; }

template <class Call>
void fill(Call& call, const Case& c) {
  call.grad = c.grad.data();
  call.e0 = c.e0.data();
  call.e1 = c.e1.data();
  call.e_null = c.null.data();
  call.unmatched_self = c.unmatched_self;
  call.batch = call.routes = 1;
  call.time = c.n;
  call.bits = c.bits;
  call.max_length = c.rule.max_length;
  call.min_length = c.rule.min_length;
}

}  // namespace

TEST_CASE("a flipped bit of q or k changes the output as the definition says") {
  Random random(7);
  for (int trial = 0; trial < 400; ++trial) {
    const Case c = make(random);
    const auto q = narrow(c.q), k = narrow(c.k), v = narrow(c.v);
    std::vector<double> got_q(c.n * c.bits, NAN), got_k(c.n * c.bits, NAN), want_q, want_k;
    BitflipCall<u8> call;
    fill(call, c);
    call.q = q.data();
    call.k = k.data();
    call.v = v.data();
    call.credit_q = got_q.data();
    call.credit_k = got_k.data();
    bitflip(call);
    const double base = c.loss(c.q, c.k, c.v);
    for (std::size_t i = 0; i < c.n; ++i)
      for (unsigned m = 0; m < c.bits; ++m) {
        Symbols flipped = c.q;
        flipped[i] ^= u32{1} << m;
        want_q.push_back(c.loss(flipped, c.k, c.v) - base);
        flipped = c.k;
        flipped[i] ^= u32{1} << m;
        want_k.push_back(c.loss(c.q, flipped, c.v) - base);
      }
    check(got_q, want_q);
    check(got_k, want_k);
  }
}

TEST_CASE("a flipped bit of a stream that is query and key at once") {
  Random random(8);
  for (int trial = 0; trial < 400; ++trial) {
    const Case c = make(random);
    const bool flip_values = random.chance(50);
    const Symbols& values = flip_values ? c.k : c.v;
    const auto x = narrow(c.k), v = narrow(values);
    std::vector<double> got(c.n * c.bits, NAN), want;
    TiedBitflipCall<u8> call;
    fill(call, c);
    call.x = x.data();
    call.v = v.data();
    call.flip_values = flip_values;
    call.credit = got.data();
    bitflip_tied(call);
    const double base = c.loss(c.k, c.k, values);
    for (std::size_t i = 0; i < c.n; ++i)
      for (unsigned m = 0; m < c.bits; ++m) {
        Symbols flipped = c.k;
        flipped[i] ^= u32{1} << m;
        want.push_back(c.loss(flipped, flipped, flip_values ? flipped : c.v) - base);
      }
    check(got, want);
  }
}
