#include "rosakit/memory.hpp"

#include <algorithm>
#include <atomic>
#include <functional>
#include <stdexcept>
#include <string>

#include "rosakit/compact_lane.hpp"
#include "rosakit/lanes.hpp"
#include "rosakit/pool.hpp"

namespace rosakit {
namespace {

/// Least bytes of a lane: the first pages of its arrays and its undo log.
constexpr std::size_t kLeastLane = 64 * 1024;
/// Lanes between the stages of a block (feed_all).
constexpr std::size_t kAhead = 4;

[[gnu::always_inline]] inline void prefetch_object(const Lane* lane) {
  for (int line = -1; line < 6; ++line)  // the reference count precedes the object
    __builtin_prefetch(reinterpret_cast<const char*>(lane) + line * 64, 1);
}

/// A lane that only this memory holds.
Lane& own(std::shared_ptr<Lane>& lane) {
  if (lane.use_count() > 1) lane = lane->clone();
  // Other holders dropped the lane after they copied it; what they read precedes what we write.
  std::atomic_thread_fence(std::memory_order_acquire);
  return *lane;
}

/// Throws unless every unmasked symbol is below 2^bits.
template <class T>
void check_symbols(const T* x, const char* name, const MemoryOptions& o, const Chunk<T>& chunk) {
  const u32 limit = u32{1} << (o.bits ? o.bits : 31);
  if (!chunk.mask) {  // the usual case, in a loop that vectorises
    u32 all = 0;
    for (std::size_t i = 0; i < o.batch * o.routes * chunk.n; ++i) all |= static_cast<u32>(x[i]);
    if (all < limit) return;
  }
  for (std::size_t s = 0; s < o.batch * o.routes; ++s)
    for (std::size_t i = 0; i < chunk.n; ++i) {
      if (chunk.mask && !chunk.mask[s / o.routes * chunk.n + i]) continue;
      const u32 v = static_cast<u32>(x[s * chunk.n + i]);
      if (v >= limit)
        throw std::invalid_argument(std::string(name) + " holds the symbol " +
                                    std::to_string(static_cast<i64>(x[s * chunk.n + i])) +
                                    ", but symbols of this memory lie in [0, " +
                                    std::to_string(limit) + ")");
    }
}

}  // namespace

SuffixMemory::SuffixMemory(const MemoryOptions& options)
    : options_(options), lengths_(options.batch, 0), starts_(options.batch, 0) {
  if (options.max_bytes && options.max_bytes < 2 * kLeastLane * options.batch * options.routes)
    throw std::invalid_argument(
        "max_bytes=" + std::to_string(options.max_bytes) + " is too small for " +
        std::to_string(options.batch * options.routes) + " streams; they need " +
        std::to_string(2 * kLeastLane * options.batch * options.routes));
  if (options.bits > 16)
    throw std::invalid_argument("bits must be between 1 and 16, or 0 for token ids");
  lanes_.resize(options.batch * options.routes);
  for (auto& lane : lanes_) lane = make_lane(options_);
}
/// Held by a call that works on a memory.
class SuffixMemory::Use {
 public:
  explicit Use(const SuffixMemory& memory) : state_(*memory.state_) {
    if (state_.busy.test_and_set(std::memory_order_acquire))
      throw std::runtime_error(
          "this memory is in use by another thread; give each thread its own fork");
    if (state_.broken) {
      state_.busy.clear();
      throw std::runtime_error(
          "this memory was left incomplete by an earlier failure; load or make another");
    }
  }
  ~Use() { state_.busy.clear(std::memory_order_release); }
  Use(const Use&) = delete;
  Use& operator=(const Use&) = delete;

 private:
  State& state_;
};

SuffixMemory::SuffixMemory(SuffixMemory&&) noexcept = default;
SuffixMemory& SuffixMemory::operator=(SuffixMemory&&) noexcept = default;
SuffixMemory::~SuffixMemory() = default;

template <class T>
void SuffixMemory::feed(std::size_t s, const Chunk<T>& chunk, std::size_t begin, std::size_t end) {
  const std::size_t n = chunk.n, width = chunk.candidates ? chunk.candidates : 1;
  const u8* mask = chunk.mask ? chunk.mask + s / options_.routes * n : nullptr;
  if (!lanes_[s]->has_room(end - begin)) [[unlikely]]
    lanes_[s] = generalise(*lanes_[s], end - begin, options_, chunk.candidates != 0);
  Lane* lane = &own(lanes_[s]);
  std::size_t left = end - begin;
  if (mask) left -= static_cast<std::size_t>(std::count(mask + begin, mask + end, u8{0}));
  for (std::size_t i = begin; i < end; ++i) {
    const std::size_t at = s * n + i;
    i32* position = chunk.position + at * width;
    i32* length = chunk.length + at * width;
    if (mask && !mask[i]) {
      std::fill(position, position + width, kNull);
      std::fill(length, length + width, 0);
      continue;
    }
    const bool undoable = left-- <= Lane::kUndoDepth;
    const auto step = [&] {
      const auto q = static_cast<u32>(chunk.q[at]), k = static_cast<u32>(chunk.k[at]);
      if (chunk.candidates)
        return lane->step_candidates(q, chunk.candidates, undoable, position, length);
      if (lane->compact)
        return static_cast<CompactLane*>(lane)->step(q, k, undoable, position, length);
      return lane->step(q, k, undoable, position, length);
    };
    if (step()) continue;
    lanes_[s] = generalise(*lane, end - i, options_, chunk.candidates != 0);
    lane = lanes_[s].get();
    step();
  }
}

void SuffixMemory::make_room(std::size_t symbols, bool ordering) {
  const auto needed = [&] {
    std::size_t total = 0;
    for (const auto& lane : lanes_) total += lane->reserved_after(symbols, ordering);
    return total;
  };
  const auto kept = [this](std::size_t row) { return lengths_[row] - starts_[row]; };
  while (needed() > options_.max_bytes) {
    std::size_t longest = 0;
    for (std::size_t b = 1; b < options_.batch; ++b)
      if (kept(b) > kept(longest)) longest = b;
    if (kept(longest) == 0) return;
    evict(longest, kept(longest) / 2);
  }
}

void SuffixMemory::evict(std::size_t row, i64 keep) {
  const auto last = static_cast<u32>(lengths_[row]), first = last - static_cast<u32>(keep);
  parallel_for(options_.routes, [&](std::size_t r, unsigned) {
    auto& lane = lanes_[row * options_.routes + r];
    lane = replay(*lane, first, last, make_lane(options_), options_);
  });
  starts_[row] = first;
}

template <class T>
void SuffixMemory::extend(const Chunk<T>& chunk) {
  const std::size_t n = chunk.n;
  if (!n || lanes_.empty()) return;
  const Use use(*this);
  for (const i64 length : lengths_)
    if (length + static_cast<i64>(n) >= (i64{1} << 31) - 1)
      throw std::length_error("a stream of " + std::to_string(length + static_cast<i64>(n)) +
                              " symbols is too long: positions are int32, fewer than 2^31 - 1 fit");
  check_symbols(chunk.q, "q", options_, chunk);
  if (chunk.k != chunk.q) check_symbols(chunk.k, "k", options_, chunk);
  state_->broken = true;  // should memory run out on the way
  if (!options_.max_bytes) {
    feed_all(chunk, 0, n);
    state_->broken = false;
    return;
  }
  // Under a budget: in slices, so that room can be made before each.
  const std::size_t slice =
      std::max<std::size_t>(1, (options_.max_bytes / lanes_.size() - kLeastLane) / 1024);
  for (std::size_t at = 0; at < n; at += slice) {
    const std::size_t end = std::min(n, at + slice);
    make_room(end - at, chunk.candidates != 0);
    feed_all(chunk, at, end);
  }
  state_->broken = false;
}

template <class T>
void SuffixMemory::feed_all(const Chunk<T>& chunk, std::size_t begin, std::size_t end) {
  // Lanes are fed in blocks. Within a block of short chunks, lanes ahead are brought into cache
  // stage by stage while this one takes its step: their accesses depend on each other, ours do not.
  const std::size_t block =
      std::max<std::size_t>(1, std::min<std::size_t>(64, 4096 / (end - begin + 1)));
  const std::size_t blocks = (lanes_.size() + block - 1) / block;
  const auto feed_block = [&](std::size_t b, unsigned) {
    const std::size_t first = b * block, last = std::min(lanes_.size(), first + block);
    if (block == 1) return feed(first, chunk, begin, end);
    const auto compact = [&](std::size_t s) {
      return lanes_[s]->compact ? static_cast<const CompactLane*>(lanes_[s].get()) : nullptr;
    };
    for (std::size_t s = first; s < last + 3 * kAhead; ++s) {
      if (s < last) prefetch_object(lanes_[s].get());
      if (const std::size_t a = s - kAhead; s >= first + kAhead && a < last)
        if (const auto* lane = compact(a)) lane->approach();
      if (const std::size_t a = s - 2 * kAhead; s >= first + 2 * kAhead && a < last)
        if (const auto* lane = compact(a))
          lane->approach(static_cast<u32>(chunk.q[a * chunk.n + begin]) & 15u,
                         static_cast<u32>(chunk.k[a * chunk.n + begin]) & 15u);
      if (s >= first + 3 * kAhead) feed(s - 3 * kAhead, chunk, begin, end);
    }
  };
  parallel_for(blocks, std::ref(feed_block));  // by reference: a step allocates nothing
  for (std::size_t b = 0; b < options_.batch; ++b) {
    const u8* mask = chunk.mask ? chunk.mask + b * chunk.n : nullptr;
    lengths_[b] += static_cast<i64>(end - begin);
    if (mask) lengths_[b] -= std::count(mask + begin, mask + end, u8{0});
  }
}
template void SuffixMemory::extend<u8>(const Chunk<u8>&);
template void SuffixMemory::extend<u16>(const Chunk<u16>&);
template void SuffixMemory::extend<i32>(const Chunk<i32>&);

SuffixMemory SuffixMemory::index_select(std::span<const i64> rows) const {
  const Use use(*this);
  MemoryOptions options = options_;
  options.batch = 0;
  SuffixMemory out(options);
  out.options_.batch = rows.size();
  for (const i64 row : rows) {
    if (row < 0 || row >= static_cast<i64>(options_.batch))
      throw std::out_of_range("row " + std::to_string(row) + " of a memory of " +
                              std::to_string(options_.batch) + " rows");
    out.lengths_.push_back(lengths_[static_cast<std::size_t>(row)]);
    out.starts_.push_back(starts_[static_cast<std::size_t>(row)]);
    const auto first = lanes_.begin() + row * static_cast<i64>(options_.routes);
    out.lanes_.insert(out.lanes_.end(), first, first + static_cast<i64>(options_.routes));
  }
  return out;
}

void SuffixMemory::truncate(std::size_t row, i64 length) {
  const Use use(*this);
  if (row >= options_.batch) throw std::out_of_range("no row " + std::to_string(row));
  if (length < 0)
    throw std::invalid_argument("a length must be >= 0, got " + std::to_string(length));
  if (length >= lengths_[row]) return;
  parallel_for(options_.routes, [&](std::size_t r, unsigned) {
    auto& lane = lanes_[row * options_.routes + r];
    const auto to = static_cast<u32>(length);
    if (to > lane->start() && own(lane).undo_to(to)) return;
    const u32 first = std::min(lane->start(), to);  // below it, an empty lane of that length
    lane = replay(*lane, first, to, make_lane(options_), options_);
  });
  lengths_[row] = length;
  starts_[row] = std::min(starts_[row], length);
}

i64 SuffixMemory::symbol(std::size_t row, std::size_t route, i64 position) const {
  if (row >= options_.batch || route >= options_.routes || position >= lengths_[row] ||
      position < starts_[row])
    throw std::out_of_range("row " + std::to_string(row) + ", route " + std::to_string(route) +
                            ", position " + std::to_string(position) + " is outside the memory");
  return lanes_[row * options_.routes + route]->key(static_cast<u32>(position));
}

std::size_t SuffixMemory::live_bytes() const {
  std::size_t total = 0;
  for (const auto& lane : lanes_) total += lane->live_bytes();
  return total;
}
std::size_t SuffixMemory::reserved_bytes() const {
  std::size_t total = 0;
  for (const auto& lane : lanes_) total += lane->reserved_bytes();
  return total;
}

}  // namespace rosakit
