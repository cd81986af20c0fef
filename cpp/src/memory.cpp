#include "rosakit/memory.hpp"

#include <algorithm>
#include <atomic>
#include <stdexcept>

#include "rosakit/lane.hpp"
#include "rosakit/pool.hpp"

namespace rosakit {
namespace {

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
  i32 position, length;
  for (u32 i = 0; i < lane.length(); ++i)
    wide->step(lane.query(i), lane.key(i), i + Lane::kUndoDepth >= lane.length(), &position, &length);
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
    : options_(options), lengths_(options.batch, 0) {
  if (options.bits > 16) throw std::invalid_argument("bits must be between 1 and 16, or 0 for token ids");
  lanes_.resize(options.batch * options.routes);
  for (auto& lane : lanes_) lane = make_lane(options_);
}
SuffixMemory::SuffixMemory(SuffixMemory&&) noexcept = default;
SuffixMemory& SuffixMemory::operator=(SuffixMemory&&) noexcept = default;
SuffixMemory::~SuffixMemory() = default;

template <class T>
void SuffixMemory::feed(std::size_t s, const Chunk<T>& chunk) {
  const std::size_t n = chunk.n, width = chunk.candidates ? chunk.candidates : 1;
  const u8* mask = chunk.mask ? chunk.mask + s / options_.routes * n : nullptr;
  if (!lanes_[s]->has_room(n)) [[unlikely]] lanes_[s] = widen(*lanes_[s], options_);
  Lane& lane = own(lanes_[s]);
  std::size_t left = mask ? n - static_cast<std::size_t>(std::count(mask, mask + n, u8{0})) : n;
  for (std::size_t i = 0; i < n; ++i) {
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
      lane.step_candidates(static_cast<u32>(chunk.q[at]), chunk.candidates, undoable, position, length);
    else
      lane.step(static_cast<u32>(chunk.q[at]), static_cast<u32>(chunk.k[at]), undoable, position, length);
  }
}

template <class T>
void SuffixMemory::extend(const Chunk<T>& chunk) {
  const std::size_t n = chunk.n;
  if (!n || lanes_.empty()) return;
  check_symbols(chunk.q, "q", options_, chunk);
  if (chunk.k != chunk.q) check_symbols(chunk.k, "k", options_, chunk);
  // Lanes are fed in blocks. Within a block of short chunks, lanes ahead are brought into cache stage
  // by stage while this one takes its step: their accesses depend on each other, ours do not.
  const std::size_t block = std::max<std::size_t>(1, std::min<std::size_t>(64, 4096 / (n + 1)));
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
            lanes_[ahead]->approach(stage, static_cast<u32>(chunk.q[ahead * n]),
                                    static_cast<u32>(chunk.k[ahead * n]), chain[ahead - first]);
        }
      }
      if (s >= first + kLead) feed(s - kLead, chunk);
    }
  });
  for (std::size_t b = 0; b < options_.batch; ++b) {
    const u8* mask = chunk.mask ? chunk.mask + b * n : nullptr;
    lengths_[b] += mask ? static_cast<i64>(n) - std::count(mask, mask + n, u8{0}) : static_cast<i64>(n);
  }
}
template void SuffixMemory::extend<u8>(const Chunk<u8>&);
template void SuffixMemory::extend<u16>(const Chunk<u16>&);
template void SuffixMemory::extend<i32>(const Chunk<i32>&);

SuffixMemory SuffixMemory::index_select(std::span<const i64> rows) const {
  MemoryOptions options = options_;
  options.batch = 0;
  SuffixMemory out(options);
  out.options_.batch = rows.size();
  for (const i64 row : rows) {
    if (row < 0 || row >= static_cast<i64>(options_.batch))
      throw std::out_of_range("row " + std::to_string(row) + " of a memory of " +
                              std::to_string(options_.batch) + " rows");
    out.lengths_.push_back(lengths_[static_cast<std::size_t>(row)]);
    const auto first = lanes_.begin() + row * static_cast<i64>(options_.routes);
    out.lanes_.insert(out.lanes_.end(), first, first + static_cast<i64>(options_.routes));
  }
  return out;
}

void SuffixMemory::truncate(std::size_t row, i64 length) {
  if (row >= options_.batch) throw std::out_of_range("no row " + std::to_string(row));
  if (length < 0) throw std::invalid_argument("a length must be >= 0, got " + std::to_string(length));
  if (length >= lengths_[row]) return;
  parallel_for(options_.routes, [&](std::size_t r, unsigned) {
    own(lanes_[row * options_.routes + r]).truncate(static_cast<u32>(length));
  });
  lengths_[row] = length;
}

i64 SuffixMemory::symbol(std::size_t row, std::size_t route, i64 position) const {
  if (row >= options_.batch || route >= options_.routes || position < 0 || position >= lengths_[row])
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
