#include "rosakit/matcher.hpp"

#include <algorithm>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <string>
#include <vector>

#include "rosakit/candidates.hpp"
#include "rosakit/dense_automaton.hpp"
#include "rosakit/packed_automaton.hpp"
#include "rosakit/pool.hpp"
#include "rosakit/solver.hpp"

namespace rosakit {
namespace {

struct Segment {
  std::size_t begin, end;
};

/// Calls f for every segment of a row and g for every padded stretch.
template <class F, class G>
void for_each_segment(const i32* starts, std::size_t n, F&& f, G&& g) {
  if (!starts) {
    if (n) f(Segment{0, n});
    return;
  }
  for (std::size_t i = 0; i < n;) {
    std::size_t j = i + 1;
    while (j < n && starts[j] == starts[i]) ++j;
    if (starts[i] < 0) g(Segment{i, j});
    else f(Segment{i, j});
    i = j;
  }
}

void check_length(std::size_t n) {
  if (n >= (std::size_t{1} << 31) - 1)
    throw std::length_error(
        "a stream of " + std::to_string(n) +
        " symbols is too long: positions are int32, so fewer than 2^31 - 1 fit");
}

/// Longest stream for which a worker may spend the memory of full rows, 128 bytes a symbol.
constexpr std::size_t kLongDense = std::size_t{1} << 21;

/// What one worker needs; kept for the streams of a call.
struct Scratch {
  Solver<DenseAutomaton> dense;
  Solver<PackedAutomaton> packed;
  Solver<LongSmallAutomaton> long_small;
  Solver<Automaton<false>> narrow;
  std::unique_ptr<Solver<Automaton<true>>> wide;
  Buffer<u8> q8, k8;
  Buffer<u32> q32, k32;
};

/// Warm scratch between calls, so that a model's layers do not each pay for fresh memory. Taken and
/// given back under try_lock: a forked child may have inherited the lock held.
class Spares {
 public:
  std::unique_ptr<Scratch> take() {
    std::unique_lock lock(mutex_, std::try_to_lock);
    if (!lock || spares_.empty()) return std::make_unique<Scratch>();
    auto scratch = std::move(spares_.back());
    spares_.pop_back();
    return scratch;
  }
  void give(std::unique_ptr<Scratch> scratch) {
    std::unique_lock lock(mutex_, std::try_to_lock);
    if (lock && spares_.size() < num_threads()) spares_.push_back(std::move(scratch));
  }

 private:
  std::mutex mutex_;
  std::vector<std::unique_ptr<Scratch>> spares_;
};
Spares& spares() {
  static auto* held = new Spares;  // never destroyed: threads may outlive static destructors
  return *held;
}
constexpr std::size_t kSpareLength = std::size_t{1} << 16;  // longer streams keep no memory

template <class T>
const u8* as_bytes(const T* x, std::size_t n, Buffer<u8>& copy) {
  if constexpr (sizeof(T) == 1) {
    (void)n, (void)copy;
    return x;
  } else {
    copy.resize(n);
    for (std::size_t i = 0; i < n; ++i) copy[i] = static_cast<u8>(x[i]);
    return copy.data();
  }
}
template <class T>
const u32* as_words(const T* x, std::size_t n, Buffer<u32>& copy) {
  copy.resize(n);
  for (std::size_t i = 0; i < n; ++i) copy[i] = static_cast<u32>(x[i]);
  return copy.data();
}

template <class T>
void match_segment(Scratch& scratch, const T* q, const T* k, std::size_t n, const Rule& rule,
                   const Output& out) {
  u32 top = 1;
  for (std::size_t i = 0; i < n; ++i) top |= static_cast<u32>(q[i]) | static_cast<u32>(k[i]);
  if (top >> 31)
    throw std::invalid_argument("symbols must be >= 0; a negative one was found outside padding");
  const auto bits = static_cast<unsigned>(std::bit_width(top));
  if (bits <= DenseAutomaton::kMaxBits && n <= DenseAutomaton::kMaxSymbols) {
    scratch.dense.match(as_bytes(q, n, scratch.q8), as_bytes(k, n, scratch.k8), static_cast<u32>(n),
                        rule, bits, out);
  } else if (bits <= LongSmallAutomaton::kMaxBits && n <= kLongDense) {
    scratch.long_small.match(as_bytes(q, n, scratch.q8), as_bytes(k, n, scratch.k8),
                             static_cast<u32>(n), rule, bits, out);
  } else if (bits <= PackedAutomaton::kMaxBits && n <= kLongDense) {
    scratch.packed.match(as_bytes(q, n, scratch.q8), as_bytes(k, n, scratch.k8),
                         static_cast<u32>(n), rule, bits, out);
  } else if (bits <= 8 && n <= Automaton<false>::kMaxSymbols) {
    scratch.narrow.match(as_bytes(q, n, scratch.q8), as_bytes(k, n, scratch.k8),
                         static_cast<u32>(n), rule, bits, out);
  } else {
    if (!scratch.wide) scratch.wide = std::make_unique<Solver<Automaton<true>>>();
    scratch.wide->match(as_words(q, n, scratch.q32), as_words(k, n, scratch.k32),
                        static_cast<u32>(n), rule, 32, out);
  }
}

}  // namespace

template <class T>
void match(const MatchCall<T>& call) {
  const Shape& s = call.shape;
  check_length(s.length);
  const std::size_t streams = s.batch * s.routes;
  std::vector<std::unique_ptr<Scratch>> scratch(streams > 1 ? kMaxThreads : 1);  // else worker 0
  parallel_for(streams, [&](std::size_t stream, unsigned worker) {
    if (!scratch[worker]) scratch[worker] = spares().take();
    const std::size_t at = stream * s.length;
    const i32* starts =
        call.segment_starts ? call.segment_starts + stream / s.routes * s.length : nullptr;
    const u8* flip_at = call.flip_at ? call.flip_at + stream / s.routes * s.length : nullptr;
    for_each_segment(
        starts, s.length,
        [&](Segment g) {
          Output out{call.position + at + g.begin, call.length + at + g.begin, nullptr,
                     call.flip_bits, static_cast<i32>(g.begin)};
          if (call.flip_bits) out.flipped = call.flipped + (at + g.begin) * call.flip_bits;
          if (flip_at) out.flip_at = flip_at + g.begin;
          match_segment(*scratch[worker], call.q + at + g.begin, call.k + at + g.begin,
                        g.end - g.begin, call.rule, out);
        },
        [&](Segment g) {
          std::fill(call.position + at + g.begin, call.position + at + g.end, kNull);
          std::fill(call.length + at + g.begin, call.length + at + g.end, 0);
          if (call.flip_bits)
            std::fill(call.flipped + (at + g.begin) * call.flip_bits,
                      call.flipped + (at + g.end) * call.flip_bits, kNull);
        });
  });
  if (s.length <= kSpareLength)
    for (auto& used : scratch)
      if (used) spares().give(std::move(used));
}

template void match<u8>(const MatchCall<u8>&);
template void match<u16>(const MatchCall<u16>&);
template void match<i32>(const MatchCall<i32>&);

void best_successors(const SuccessorCall& call) {
  check_length(call.time);
  const std::size_t k = call.candidates;
  parallel_for(call.batch, [&](std::size_t row, unsigned) {
    Stream<Automaton<true>, LinkCut<Flat>> stream;
    stream.keep_order();
    Candidates candidates;
    const std::size_t at = row * call.time;
    const i32* starts = call.segment_starts ? call.segment_starts + at : nullptr;
    for_each_segment(
        starts, call.time,
        [&](Segment g) {
          stream.reset(32);
          for (std::size_t i = at + g.begin; i < at + g.end; ++i) {
            const i32 token = call.tokens[i];
            if (token < 0)
              throw std::invalid_argument(
                  "tokens must be >= 0; a negative one was found outside padding");
            stream.advance(static_cast<u32>(token), call.max_length);
            stream.append(static_cast<u32>(token));
            if (stream.over_budget()) stream.link_up();
            candidates.collect(stream, stream.at, call.candidates, call.min_length,
                               static_cast<i32>(g.begin), call.position + i * k,
                               call.length + i * k);
          }
        },
        [&](Segment g) {
          std::fill(call.position + (at + g.begin) * k, call.position + (at + g.end) * k, kNull);
          std::fill(call.length + (at + g.begin) * k, call.length + (at + g.end) * k, 0);
        });
  });
}

}  // namespace rosakit
