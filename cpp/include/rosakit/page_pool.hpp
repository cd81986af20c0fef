// Reference-counted 4 KiB pages, cut from 2 MiB slabs that the kernel may back with huge pages.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>

#include "rosakit/types.hpp"

namespace rosakit {

inline constexpr std::size_t kPageBytes = 4096;
inline constexpr std::size_t kSlabBytes = std::size_t{2} << 20;

/// The first page of a slab holds the reference counts of all of them.
inline std::atomic<u32>& page_references(void* page) {
  const auto at = reinterpret_cast<std::uintptr_t>(page);
  auto* counts = reinterpret_cast<std::atomic<u32>*>(at & ~(kSlabBytes - 1));
  return counts[(at & (kSlabBytes - 1)) / kPageBytes];
}

/// A page with one reference and unspecified contents. Throws std::bad_alloc.
void* new_page();
/// Gives a page without references back to the pool.
void recycle_page(void* page) noexcept;

inline void share_page(void* page) {
  page_references(page).fetch_add(1, std::memory_order_relaxed);
}
inline bool page_is_unique(void* page) {
  return page_references(page).load(std::memory_order_acquire) == 1;
}
inline void release_page(void* page) {
  if (page_references(page).fetch_sub(1, std::memory_order_acq_rel) == 1) recycle_page(page);
}

/// A unique page with the contents of a shared one, which loses a reference.
void* copy_page(void* page);
/// Pages copied so far, by all memories of the process: what forks cost after the fact.
u64 pages_copied();

/// Bytes of slabs held from the system, by all memories of the process.
std::size_t pool_bytes();

}  // namespace rosakit
