// Large blocks of memory, lent again rather than given back to the system at once: clearing fresh
// ones costs a long stream a tenth of its time.
#pragma once

#include <cstddef>

namespace rosakit {

/// Blocks are of a multiple of this size, and aligned to it.
inline constexpr std::size_t kBlockBytes = std::size_t{2} << 20;

/// A block of at least `bytes` with unspecified contents. Throws std::bad_alloc.
void* take_block(std::size_t bytes);
/// Takes back a block of that size. The last 256 MiB are held for whoever takes that size next,
/// marked so that the system may use their pages meanwhile (MADV_FREE; where there is no such
/// thing, none are held).
void give_block(void* block, std::size_t bytes) noexcept;

}  // namespace rosakit
