#include "rosakit/memory.hpp"

#include <algorithm>
#include <atomic>
#include <stdexcept>
#include <string>

#include "rosakit/lane.hpp"
#include "rosakit/pool.hpp"

namespace rosakit {
namespace {

/// Least bytes of a lane: the first pages of its arrays and its undo log.
constexpr std::size_t kLeastLane = 64 * 1024;

template <bool kWide>
std::shared_ptr<Lane> make_lane_of(const MemoryOptions& o) {
  const Budget budget{o.walk_per_symbol, o.walk_base};
  if (o.rule.granularity == Granularity::run)
    return std::make_shared<TypedLane<kWide, true>>(o.rule, o.bits, budget);
  return std::make_shared<TypedLane<kWide, false>>(o.rule, o.bits, budget);
}
std::shared_ptr<Lane> make_lane(const MemoryOptions& o) {
  return o.bits && o.bits <= 8 ? make_lane_of<false>(o) : make_lane_of<true>(o);
}

void prefetch_object(const Lane* lane) {
  for (int line = 0; line < 6; ++line)
    __builtin_prefetch(reinterpret_cast<const char*>(lane) + line * 64);
}

/// A lane that takes longer streams, fed with what `lane` was fed with.
std::shared_ptr<Lane> widen(const Lane& lane, const MemoryOptions& o) {
  auto wide = make_lane_of<true>(o);
  wide->skip(lane.start());
  i32 position, length;
  for (u32 i = lane.start(); i < lane.length(); ++i)
    wide->step(lane.query(i), lane.key(i), i + Lane::kUndoDepth >= lane.length(), &position,
               &length);
  return wide;
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
    lanes_[s] = widen(*lanes_[s], options_);
  Lane& lane = own(lanes_[s]);
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
    if (chunk.candidates)
      lane.step_candidates(static_cast<u32>(chunk.q[at]), chunk.candidates, undoable, position,
                           length);
    else
      lane.step(static_cast<u32>(chunk.q[at]), static_cast<u32>(chunk.k[at]), undoable, position,
                length);
  }
}

void SuffixMemory::make_room(std::size_t symbols) {
  const auto needed = [&] {
    std::size_t total = 0;
    for (const auto& lane : lanes_) total += lane->reserved_after(symbols);
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
  parallel_for(options_.routes, [&](std::size_t r, unsigned) {
    own(lanes_[row * options_.routes + r]).evict(static_cast<u32>(keep));
  });
  starts_[row] = lengths_[row] - keep;
}

template <class T>
void SuffixMemory::extend(const Chunk<T>& chunk) {
  const std::size_t n = chunk.n;
  if (!n || lanes_.empty()) return;
  const Use use(*this);
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
    make_room(end - at);
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
  parallel_for(blocks, [&](std::size_t b, unsigned) {
    const std::size_t first = b * block, last = std::min(lanes_.size(), first + block);
    constexpr std::size_t kDistance = 2, kLead = Lane::kStages * kDistance;
    u32 chain[64];
    for (std::size_t s = first; s < last + kLead; ++s) {
      if (block > 1) {
        if (s + kDistance < last) prefetch_object(lanes_[s + kDistance].get());
        for (unsigned stage = 0; stage < Lane::kStages; ++stage) {
          const std::size_t ahead = s - stage * kDistance;
          if (s >= first + stage * kDistance && ahead < last)
            lanes_[ahead]->approach(stage, static_cast<u32>(chunk.q[ahead * chunk.n + begin]),
                                    static_cast<u32>(chunk.k[ahead * chunk.n + begin]),
                                    chain[ahead - first]);
        }
      }
      if (s >= first + kLead) feed(s - kLead, chunk, begin, end);
    }
  });
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
    own(lanes_[row * options_.routes + r]).truncate(static_cast<u32>(length));
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
