#include "rosakit/blocks.hpp"

#include <algorithm>
#include <cstdlib>
#include <mutex>
#include <new>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace rosakit {
namespace {

constexpr std::size_t kMostHeld = std::size_t{256} << 20;

struct Block {
  void* at;
  std::size_t bytes;
};
constexpr std::size_t kPlaces = 32;

// Used under try_lock only: a forked child may have inherited the lock held.
std::mutex g_mutex;
Block g_held[kPlaces];  // oldest first
std::size_t g_count = 0, g_bytes = 0;

Block remove(std::size_t place) {
  const Block b = g_held[place];
  std::copy(g_held + place + 1, g_held + g_count--, g_held + place);
  g_bytes -= b.bytes;
  return b;
}

std::size_t round_up(std::size_t bytes) {
  return (bytes + kBlockBytes - 1) / kBlockBytes * kBlockBytes;
}

}  // namespace

void* take_block(std::size_t bytes) {
  bytes = round_up(bytes);
  if (const std::unique_lock lock(g_mutex, std::try_to_lock); lock)
    for (std::size_t place = g_count; place-- > 0;)
      if (g_held[place].bytes == bytes) return remove(place).at;
  void* block = std::aligned_alloc(kBlockBytes, bytes);
  if (!block) throw std::bad_alloc();
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  madvise(block, bytes, MADV_HUGEPAGE);
#endif
  return block;
}

void give_block(void* block, std::size_t bytes) noexcept {
#if defined(__linux__) && defined(MADV_FREE)
  bytes = round_up(bytes);
  if (const std::unique_lock lock(g_mutex, std::try_to_lock);
      lock && bytes <= kMostHeld && !madvise(block, bytes, MADV_FREE)) {
    while (g_count == kPlaces || g_bytes + bytes > kMostHeld) std::free(remove(0).at);
    g_held[g_count++] = {block, bytes};
    g_bytes += bytes;
    return;
  }
#endif
  std::free(block);
}

}  // namespace rosakit
