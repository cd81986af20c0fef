#include "rosakit/memory.hpp"

#include <algorithm>
#include <stdexcept>

#include "rosakit/lane.hpp"
#include "rosakit/pool.hpp"

namespace rosakit {
namespace {

std::shared_ptr<Lane> make_lane(const MemoryOptions& o) {
  if (o.bits && o.bits <= 8) return std::make_shared<TypedLane<false>>(o.rule, o.bits);
  return std::make_shared<TypedLane<true>>(o.rule, o.bits);
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
void SuffixMemory::extend(const Chunk<T>& chunk) {
  const std::size_t n = chunk.n;
  check_symbols(chunk.q, "q", options_, chunk);
  if (chunk.k != chunk.q) check_symbols(chunk.k, "k", options_, chunk);
  parallel_for(lanes_.size(), [&](std::size_t s, unsigned) {
    if (lanes_[s].use_count() > 1) lanes_[s] = lanes_[s]->clone();
    Lane& lane = *lanes_[s];
    const u8* mask = chunk.mask ? chunk.mask + s / options_.routes * n : nullptr;
    const std::size_t width = chunk.candidates ? chunk.candidates : 1;
    for (std::size_t i = 0; i < n; ++i) {
      const std::size_t at = s * n + i;
      i32* position = chunk.position + at * width;
      i32* length = chunk.length + at * width;
      if (mask && !mask[i]) {
        std::fill(position, position + width, kNull);
        std::fill(length, length + width, 0);
      } else if (chunk.candidates) {
        lane.step_candidates(static_cast<u32>(chunk.q[at]), chunk.candidates, position, length);
      } else {
        lane.step(static_cast<u32>(chunk.q[at]), static_cast<u32>(chunk.k[at]), position, length);
      }
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
    auto& lane = lanes_[row * options_.routes + r];
    if (lane.use_count() > 1) lane = lane->clone();
    lane->truncate(static_cast<u32>(length));
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
