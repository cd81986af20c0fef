// All single-bit flips of a stream that is its own key, in one quadratic sweep.
//
// A pair (i, j) compares x[i - r] with x[j - r]; at distance d = i - j a flip of x[u] touches two
// of these comparisons, r = i - u (as query) and r = j - u (as key). With l = lcs(i, j):
//   - u in (j - l, j]: the key side breaks the match, which becomes j - u long;
//   - u in (j, i] and u > i - l: the query side breaks it, i - u long;
//   - u = i - l > j: the query side of the first mismatch. The one bit that differs mends it;
//   - u = j - l: its key side. Mended, the match runs on until it meets x[u] again as query, at
//     depth l + d, where the flip breaks it - or mends a second mismatch, if that is where the
//     next one sits and it differs in the same bit.
// The lengths of both mends grow by one along a diagonal while symbols are equal, as l does, so
// each is set at a mismatch and carried. What a row reads after a flip is the best of the mended
// pairs (gains) and of the others (the base), as in bitflip.cpp.
#include "rosakit/bitflip_tied.hpp"

#include <algorithm>
#include <bit>
#include <limits>
#include <memory>
#include <vector>

#include "rosakit/pool.hpp"

namespace rosakit {
namespace {

/// A candidate as one number: longer is larger, then later. 0 is the null.
using Key = u64;
Key key(i32 length, i32 end) {
  return length > 0 ? static_cast<Key>(length) << 32 | static_cast<u32>(end + 1) : 0;
}
i32 length_of(Key k) {
  return static_cast<i32>(k >> 32);
}
i32 successor_of(Key k) {
  return static_cast<i32>(static_cast<u32>(k));
}

struct TiedStream {
  const double *grad, *e0, *e1, *e_null;
  double* credit;
  i32 n;
};

/// What one row reads, as the loss sees it.
class Reader {
 public:
  void row(const TiedStream& s, std::size_t i, unsigned bits) {
    const double* g = s.grad + i * bits;
    bits_ = bits;
    base_ = null_ = 0;
    for (unsigned m = 0; m < bits; ++m) {
      base_ += g[m] * s.e0[m];
      step_[m] = g[m] * (s.e1[m] - s.e0[m]);
      if (s.e_null) null_ += g[m] * s.e_null[m];
    }
    if (bits > kTableBits) return;
    table_[0] = base_;
    for (u32 x = 1; x < (u32{1} << bits); ++x)
      table_[x] = table_[x & (x - 1)] + step_[std::countr_zero(x)];
  }
  double null() const { return null_; }
  double value(u32 x) const {
    if (bits_ <= kTableBits) return table_[x];
    double sum = base_;
    for (unsigned m = bits_; m-- > 0;)
      if (x >> m & 1) sum += step_[m];
    return sum;
  }

 private:
  static constexpr unsigned kTableBits = 6;
  unsigned bits_ = 0;
  double base_ = 0, null_ = 0, step_[16] = {}, table_[1 << kTableBits] = {};
};

/// Index: i16 where streams are short enough, for twice the lanes of a vector register.
template <class Index>
class TiedSweep {
 public:
  template <class Symbol>
  void run(const TiedStream& s, const Symbol* x, const Symbol* v,
           const TiedBitflipCall<Symbol>& call) {
    s_ = s;
    bits_ = call.bits;
    self_ = call.unmatched_self, flip_values_ = call.flip_values;
    cap_ = static_cast<i32>(std::min<u32>(call.max_length, std::numeric_limits<i32>::max()));
    shortest_ = static_cast<i32>(std::min<u32>(call.min_length, std::numeric_limits<i32>::max()));
    const std::size_t n = static_cast<std::size_t>(s.n);
    symbols_.assign(x, x + n);
    values_.assign(v, v + n);
    for (auto* state : {&run_, &mended_key_, &mended_query_, &mend_}) state->assign(n, 0);
    prefix_.resize(n + 1);
    by_start_.assign(n + 1, 0);
    cover_.assign(n + 1, kNull);
    latest_.resize(n + 1);
    gains_.assign(n * bits_, 0);
    for (i32 i = 0; i < s.n; ++i) row(i);
  }

 private:
  void row(i32 i) {
    const i32 longest = extend(i);
    const i32 length = std::min(longest, cap_);
    const Index* run = run_.data() + (s_.n - 1 - i);
    i32 end = i - 1;
    while (length && run[end] < length) --end;
    const Key winner = key(length, end);
    reader_.row(s_, static_cast<std::size_t>(i), bits_);
    now_ = read(i, winner, kNull, 0);
    // Flips that can change what the winner reads: its keys and their successor, its queries.
    const i32 low = length ? end - length + 1 : i + 1, high = length ? end + 1 : i;
    const i32 queries = length ? i - length + 1 : self_ ? i : i + 1;
    const auto touches = [&](i32 u) { return u >= queries || (u >= low && u <= high); };
    collect(i, winner, touches);
    if (length) {
      bases(i, length, low, queries, touches);
    } else if (self_) {
      settle_all(i, i, 0);
    }
    for (const std::size_t slot : offered_) {
      const i32 u = static_cast<i32>(slot / bits_);
      if (!touches(u)) settle(i, u, static_cast<unsigned>(slot % bits_), gains_[slot]);
      gains_[slot] = 0;
    }
  }

  /// Moves every diagonal from row i - 1 to row i; returns the longest match.
  i32 extend(i32 i) {
    const std::size_t base = static_cast<std::size_t>(s_.n - 1 - i);
    const Index* __restrict symbol = symbols_.data();
    Index* __restrict run = run_.data() + base;
    Index* __restrict by_key = mended_key_.data() + base;
    Index* __restrict by_query = mended_query_.data() + base;
    Index* __restrict mend = mend_.data() + base;
    const Index now = symbol[i];
    Index longest = 0;
    for (i32 j = 0; j < i; ++j) {
      const Index differs = static_cast<Index>(symbol[j] ^ now);
      const bool equal = differs == 0;
      const Index one = (differs & static_cast<Index>(differs - 1)) ? Index{0} : differs;
      const Index before = run[j], distance = static_cast<Index>(i - j);
      const Index more = static_cast<Index>(before + 1), old = mend[j];
      const Index queried = static_cast<Index>(by_query[j] + 1);
      // The mended match ends at the next mismatch or where it meets x[u] again, unless that is
      // the next mismatch and the flip mends it as well.
      const bool twice = more == distance && one == old && one != 0;
      const Index stopped = twice ? queried : std::min(more, distance);
      const Index grown = static_cast<Index>(by_key[j] + 1);
      by_key[j] = equal ? grown : stopped;
      by_query[j] = equal ? queried : more;
      mend[j] = equal ? old : one;
      run[j] = equal ? more : Index{0};
      longest = std::max(longest, run[j]);
    }
    return longest;
  }

  /// The best mended pair of every flip for which it can matter.
  template <class Touches>
  void collect(i32 i, Key winner, const Touches& touches) {
    const std::size_t base = static_cast<std::size_t>(s_.n - 1 - i);
    offered_.clear();
    for (i32 j = 0; j < i; ++j) {
      const u32 mend = static_cast<std::make_unsigned_t<Index>>(mend_[base + j]);
      if (!mend) continue;
      const i32 length = run_[base + j];
      const unsigned m = static_cast<unsigned>(std::countr_zero(mend));
      if (m >= bits_) continue;
      const Key by_key = key(std::min<i32>(mended_key_[base + j], cap_), j);
      const i32 u = j - length;
      if (by_key > winner || touches(u)) offer(u, m, by_key);
      if (i - length <= j) continue;  // the flip also breaks this match, nearer to its end
      const Key by_query = key(std::min<i32>(mended_query_[base + j], cap_), j);
      if (by_query > winner || touches(i - length)) offer(i - length, m, by_query);
    }
  }
  void offer(i32 u, unsigned m, Key gain) {
    const std::size_t at = slot(u, m);
    if (!gains_[at]) offered_.push_back(at);
    gains_[at] = std::max(gains_[at], gain);
  }

  /// Flips that touch the winner: the best of what they leave, or of what they mend.
  template <class Touches>
  void bases(i32 i, i32 length, i32 low, i32 queries, const Touches& touches) {
    const Index* run = run_.data() + (s_.n - 1 - i);
    // latest_[s]: the latest key j with l >= s and j < i - s, which a flip of x[i - s] leaves at s.
    std::fill(latest_.begin(), latest_.begin() + length, kNull);
    Key best = 0;
    i32 covering = kNull;  // of the keys below `low`
    for (i32 j = 0; j < i; ++j) {
      if (j >= low) prefix_[j] = best;
      const i32 l = run[j];
      if (!l) continue;
      latest_[std::min({l, i - 1 - j, length - 1})] = j;
      const Key found = key(std::min(l, cap_), j);
      best = std::max(best, found);
      const i32 start = j - l;
      if (start < low) {
        covering = j;
      } else {
        by_start_[start] = std::max(by_start_[start], found);
        cover_[start] = j;
      }
    }
    for (i32 s = length - 2; s > 0; --s) latest_[s] = std::max(latest_[s], latest_[s + 1]);
    for (i32 u = low; u < i; ++u) {  // cover_[u]: from now on the latest match that starts before u
      std::swap(cover_[u], covering);
      covering = std::max(covering, cover_[u]);
    }
    settle_all(i, i, 0);
    Key intact = 0;  // matches that start at u or later
    for (i32 u = i - 1; u >= low; --u) {
      intact = std::max(intact, by_start_[u]);
      const i32 through = cover_[u];
      by_start_[u] = 0;
      cover_[u] = kNull;
      if (!touches(u)) continue;
      const i32 s = i - u;
      Key base = u >= queries && latest_[s] != kNull ? key(s, latest_[s]) : prefix_[u];
      base = std::max(base, intact);
      if (through > u) base = std::max(base, key(std::min(through - u, cap_), through));
      settle_all(i, u, base);
    }
  }

  void settle_all(i32 i, i32 u, Key base) {
    for (unsigned m = 0; m < bits_; ++m) settle(i, u, m, std::max(base, gains_[slot(u, m)]));
  }
  void settle(i32 i, i32 u, unsigned m, Key best) {
    s_.credit[slot(u, m)] += read(i, best, u, m) - now_;
  }

  /// <grad_i, y> if row i reads `best` while bit m of place u is flipped.
  double read(i32 i, Key best, i32 u, unsigned m) const {
    const bool found = best && length_of(best) >= shortest_;
    if (!found && !self_) return reader_.null();
    const i32 at = found ? successor_of(best) : i;
    const u32 x = values_[static_cast<std::size_t>(at)];
    return reader_.value(flip_values_ && at == u ? x ^ u32{1} << m : x);
  }
  std::size_t slot(i32 place, unsigned m) const {
    return static_cast<std::size_t>(place) * bits_ + m;
  }

  TiedStream s_{};
  unsigned bits_ = 0;
  bool self_ = false, flip_values_ = false;
  i32 cap_ = 0, shortest_ = 1;
  double now_ = 0;
  Reader reader_;
  std::vector<Index> symbols_;
  std::vector<u32> values_;
  // Of the diagonal i - j = n - 1 - c at row i: l, the lengths after its two mends, the mending bit.
  std::vector<Index> run_, mended_key_, mended_query_, mend_;
  std::vector<Key> prefix_, by_start_, gains_;
  std::vector<i32> cover_, latest_;
  std::vector<std::size_t> offered_;
};

struct Sweeps {
  TiedSweep<i16> narrow;
  TiedSweep<i32> wide;
};

}  // namespace

template <class Symbol>
void bitflip_tied(const TiedBitflipCall<Symbol>& call) {
  std::fill(call.credit, call.credit + call.batch * call.routes * call.time * call.bits, 0.0);
  std::vector<std::unique_ptr<Sweeps>> sweeps(kMaxThreads);
  parallel_for(call.batch * call.routes, [&](std::size_t stream, unsigned worker) {
    if (!sweeps[worker]) sweeps[worker] = std::make_unique<Sweeps>();
    const std::size_t route = stream % call.routes, n = call.time;
    const i32* starts =
        call.segment_starts ? call.segment_starts + stream / call.routes * n : nullptr;
    for (std::size_t begin = 0, end; begin < n; begin = end) {
      end = n;
      if (starts) {
        end = begin + 1;
        const bool padding = starts[begin] < 0;
        // Padding matches nothing: a position of it is a stream of its own, which reads itself.
        if (padding && !(call.unmatched_self && call.flip_values)) continue;
        while (!padding && end < n && starts[end] == starts[begin]) ++end;
      }
      const std::size_t at = stream * n + begin, e = route * call.bits;
      const TiedStream part{call.grad + at * call.bits,
                            call.e0 + e,
                            call.e1 + e,
                            call.e_null ? call.e_null + e : nullptr,
                            call.credit + at * call.bits,
                            static_cast<i32>(end - begin)};
      if (end - begin < std::numeric_limits<i16>::max() && call.bits < 16)
        sweeps[worker]->narrow.run(part, call.x + at, call.v + at, call);
      else
        sweeps[worker]->wide.run(part, call.x + at, call.v + at, call);
    }
  });
}

template void bitflip_tied<u8>(const TiedBitflipCall<u8>&);
template void bitflip_tied<u16>(const TiedBitflipCall<u16>&);

}  // namespace rosakit
