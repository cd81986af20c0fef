// All single-bit flips of a stream in one quadratic sweep.
//
// For query row i the sweep keeps, for every key j, l = lcs(i, j) and the length l1 that the match
// would have if its first mismatch (at depth l) were mended, with the bit that mends it. A flip
// changes each pair (i, j) in one of two ways: it breaks the match at the depth of the flipped
// symbol, or it mends the first mismatch. So the winner after a flip is the best of
//   - the winner among the broken matches (the `base` of that flip), and
//   - the best match that this flip mends (a `gain`).
#include "rosakit/bitflip.hpp"

#include <algorithm>
#include <bit>
#include <memory>
#include <vector>

#include "rosakit/pool.hpp"

namespace rosakit {
namespace {

/// A candidate: ordered by length, then by recency.
struct Best {
  i32 length = 0, end = kNull;
  bool operator<(const Best& o) const {
    return length != o.length ? length < o.length : end < o.end;
  }
};

constexpr u8 kNoBit = 255;

/// The best mended match of each (place, bit) of one row; clearing is O(1).
class Gains {
 public:
  void reset(std::size_t slots) {
    best_.assign(slots, Best{});
    row_.assign(slots, 0);
    now_ = 0;
  }
  void next_row() {
    ++now_;
    touched_.clear();
  }
  void offer(std::size_t slot, Best b) {
    if (row_[slot] != now_) {
      row_[slot] = now_;
      best_[slot] = b;
      touched_.push_back(slot);
    } else if (best_[slot] < b) {
      best_[slot] = b;
    }
  }
  Best at(std::size_t slot) const { return row_[slot] == now_ ? best_[slot] : Best{}; }
  const std::vector<std::size_t>& touched() const { return touched_; }

 private:
  std::vector<Best> best_;
  std::vector<u32> row_;
  std::vector<std::size_t> touched_;
  u32 now_ = 0;
};

template <class Symbol>
class Sweep {
 public:
  struct Stream {
    const Symbol *q, *k, *v;
    const double *grad, *e0, *e1, *e_null;
    double *credit_q, *credit_k;
    i32 n;
  };

  void run(const Stream& s, const BitflipCall<Symbol>& call) {
    s_ = s;
    bits_ = call.bits;
    self_ = call.unmatched_self;
    cap_ = static_cast<i32>(call.max_length);
    shortest_ = static_cast<i32>(call.min_length);
    const std::size_t n = static_cast<std::size_t>(s.n);
    for (auto* row : {&length_, &mended_, &latest_, &painted_, &paint_}) row->assign(n + 1, 0);
    bit_.assign(n, kNoBit);
    prefix_.resize(n + 1);
    by_start_.resize(n + 1);
    gains_q_.reset((n + 1) * bits_);
    gains_k_.reset(n * bits_);
    for (i32 i = 0; i < s.n; ++i) {
      extend(i);
      if (i) row(i);
    }
  }

 private:
  i32 capped(i32 l) const { return std::min(l, cap_); }

  /// lcs(i, j) and its mended form for every j, from row i - 1.
  void extend(i32 i) {
    const Symbol q = s_.q[i];
    for (i32 j = i - 1; j >= 0; --j) {
      const u32 d = static_cast<u32>(q ^ s_.k[j]);
      const i32 before = j ? length_[j - 1] : 0;
      if (d == 0) {
        length_[j] = before + 1;
        const bool mends = j && mended_[j - 1];
        mended_[j] = mends ? mended_[j - 1] + 1 : 0;
        bit_[j] = mends ? bit_[j - 1] : kNoBit;
      } else {
        length_[j] = 0;
        mended_[j] = before + 1;
        // Not has_single_bit: it counts bits, which baseline x86-64 does by a call.
        bit_[j] = (d & (d - 1)) == 0 ? static_cast<u8>(std::countr_zero(d)) : kNoBit;
      }
    }
  }

  void row(i32 i) {
    Best winner;
    i32 longest = 0;
    for (i32 j = 0; j < i; ++j) {
      prefix_[j] = winner;
      winner = std::max(winner, Best{capped(length_[j]), length_[j] ? j : kNull});
      longest = std::max(longest, length_[j]);
    }
    prepare_reads(i);
    const double now = read(i, winner);
    const i32 low = winner.end - winner.length + 1;  // the winner's keys: low..winner.end
    collect_gains(i, winner, low);
    queries(i, winner, longest, now);
    keys(i, winner, low, now);
  }

  void collect_gains(i32 i, Best winner, i32 low) {
    gains_q_.next_row();
    gains_k_.next_row();
    for (i32 j = 0; j < i; ++j) {
      if (bit_[j] >= bits_ || !mended_[j]) continue;
      const i32 depth = length_[j], u = j - depth;
      const Best gain{capped(mended_[j]), j};
      const bool wins = winner < gain;
      if (wins || depth < winner.length) gains_q_.offer(slot(depth, bit_[j]), gain);
      if (wins || (u >= low && u <= winner.end)) gains_k_.offer(slot(u, bit_[j]), gain);
    }
  }

  /// Flips of q[i - depth].
  void queries(i32 i, Best winner, i32 longest, double now) {
    if (winner.length) {
      // latest_[d]: the latest key with lcs >= d.
      std::fill(latest_.begin(), latest_.begin() + longest + 1, kNull);
      for (i32 j = 0; j < i; ++j) latest_[length_[j]] = j;
      for (i32 d = longest - 1; d >= 0; --d) latest_[d] = std::max(latest_[d], latest_[d + 1]);
    }
    for (i32 depth = 0; depth < winner.length; ++depth) {
      const Best base = depth ? Best{depth, latest_[depth]} : Best{};
      for (unsigned m = 0; m < bits_; ++m)
        settle(s_.credit_q, i - depth, m, std::max(base, gains_q_.at(slot(depth, m))), i, now);
    }
    for (std::size_t t : gains_q_.touched()) {
      const i32 depth = static_cast<i32>(t / bits_);
      if (depth >= winner.length)
        settle(s_.credit_q, i - depth, static_cast<unsigned>(t % bits_), gains_q_.at(t), i, now);
    }
  }

  /// Flips of k[u].
  void keys(i32 i, Best winner, i32 low, double now) {
    if (winner.length) {
      break_keys(i, winner, low);
      Best intact;  // matches that start after u
      for (i32 e = i - 1; e > winner.end; --e) intact = std::max(intact, by_start_[e]);
      for (i32 u = winner.end; u >= low; --u) {
        intact = std::max(intact, by_start_[u]);
        Best base = std::max(prefix_[u], intact);
        const i32 j = painted_[u];  // the latest match that runs through u: cut to its part after u
        if (j > u) base = std::max(base, Best{capped(j - u), j});
        for (unsigned m = 0; m < bits_; ++m)
          settle(s_.credit_k, u, m, std::max(base, gains_k_.at(slot(u, m))), i, now);
      }
    }
    for (std::size_t t : gains_k_.touched()) {
      const i32 u = static_cast<i32>(t / bits_);
      if (!winner.length || u < low || u > winner.end)
        settle(s_.credit_k, u, static_cast<unsigned>(t % bits_), gains_k_.at(t), i, now);
    }
  }

  /// by_start_[e]: the best match whose keys are e + 1..j, for e >= low; painted_[u]: the latest
  /// match whose keys contain u, for u in low..winner.end. Every u is painted once.
  void break_keys(i32 i, Best winner, i32 low) {
    std::fill(by_start_.begin() + low, by_start_.begin() + i, Best{});
    for (i32 u = low; u <= winner.end; ++u) painted_[u] = kNull, paint_[u] = u;
    const auto unpainted = [&](i32 u) {  // the largest unpainted place <= u, or below `low`
      while (u >= low && paint_[u] != u) {
        if (paint_[u] >= low) paint_[u] = paint_[paint_[u]];
        u = paint_[u];
      }
      return u;
    };
    for (i32 j = i - 1; j >= low; --j) {
      const i32 start = j - length_[j];
      if (start >= low && length_[j])
        by_start_[start] = std::max(by_start_[start], Best{capped(length_[j]), j});
      for (i32 u = unpainted(std::min(j, winner.end)); u > start && u >= low; u = unpainted(u)) {
        painted_[u] = j;
        paint_[u] = u - 1;
      }
    }
  }

  void settle(double* credit, i32 place, unsigned m, Best best, i32 i, double now) {
    credit[slot(place, m)] += read(i, best) - now;
  }

  /// <grad_i, y> if row i read `best`.
  void prepare_reads(i32 i) {
    const double* g = s_.grad + slot(i, 0);
    base_ = null_ = 0;
    for (unsigned m = 0; m < bits_; ++m) {
      base_ += g[m] * s_.e0[m];
      step_[m] = g[m] * (s_.e1[m] - s_.e0[m]);
      if (s_.e_null) null_ += g[m] * s_.e_null[m];
    }
    if (bits_ <= kTableBits) {
      table_[0] = base_;
      for (u32 x = 1; x < (u32{1} << bits_); ++x)
        table_[x] = table_[x & (x - 1)] + step_[std::countr_zero(x)];
    }
    if (self_) null_ = value(s_.v[i]);
  }
  double read(i32, Best best) const {
    return best.length >= shortest_ && best.length > 0 ? value(s_.v[best.end + 1]) : null_;
  }
  double value(Symbol x) const {
    if (bits_ <= kTableBits) return table_[x];
    double sum = base_;
    for (unsigned m = bits_; m-- > 0;)  // the order of the table's sums
      if (x >> m & 1) sum += step_[m];
    return sum;
  }
  std::size_t slot(i32 place, unsigned m) const {
    return static_cast<std::size_t>(place) * bits_ + m;
  }

  static constexpr unsigned kTableBits = 6;
  Stream s_{};
  unsigned bits_ = 0;
  bool self_ = false;
  i32 cap_ = 0, shortest_ = 1;
  std::vector<i32> length_, mended_, latest_, painted_, paint_;
  std::vector<u8> bit_;
  std::vector<Best> prefix_, by_start_;
  Gains gains_q_, gains_k_;
  double base_ = 0, null_ = 0, step_[16] = {}, table_[1 << kTableBits] = {};
};

}  // namespace

template <class Symbol>
void bitflip(const BitflipCall<Symbol>& call) {
  const std::size_t total = call.batch * call.routes * call.time * call.bits;
  std::fill(call.credit_q, call.credit_q + total, 0.0);
  std::fill(call.credit_k, call.credit_k + total, 0.0);
  std::vector<std::unique_ptr<Sweep<Symbol>>> sweeps(kMaxThreads);
  parallel_for(call.batch * call.routes, [&](std::size_t stream, unsigned worker) {
    if (!sweeps[worker]) sweeps[worker] = std::make_unique<Sweep<Symbol>>();
    const std::size_t route = stream % call.routes, n = call.time;
    const i32* starts =
        call.segment_starts ? call.segment_starts + stream / call.routes * n : nullptr;
    for (std::size_t begin = 0, end; begin < n; begin = end) {
      end = n;
      if (starts) {
        end = begin + 1;
        while (end < n && starts[end] == starts[begin]) ++end;
        if (starts[begin] < 0) continue;
      }
      const std::size_t at = stream * n + begin, e = route * call.bits;
      sweeps[worker]->run(
          {call.q + at, call.k + at, call.v + at, call.grad + at * call.bits, call.e0 + e,
           call.e1 + e, call.e_null ? call.e_null + e : nullptr, call.credit_q + at * call.bits,
           call.credit_k + at * call.bits, static_cast<i32>(end - begin)},
          call);
    }
  });
}

template void bitflip<u8>(const BitflipCall<u8>&);
template void bitflip<u16>(const BitflipCall<u16>&);

}  // namespace rosakit
