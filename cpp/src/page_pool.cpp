#include "rosakit/page_pool.hpp"

#include <pthread.h>

#include <cstdlib>
#include <cstring>
#include <mutex>
#include <new>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace rosakit {
namespace {

constexpr std::size_t kPages = kSlabBytes / kPageBytes;  // the first one holds counts and links

constexpr u32 kSpareSlabs = 16;

/// Beside the counts (4 bytes a page): the slab's place in the list of slabs with free pages.
struct Slab {
  std::atomic<u32> references[kPages];
  void* free;  // its free pages, linked through their first word
  u32 used;    // pages handed out
  u32 cut;     // pages ever handed out, the first included
  Slab *before, *after;
};
static_assert(sizeof(Slab) <= kPageBytes);

std::mutex g_mutex;
Slab* g_open = nullptr;  // slabs with room
u32 g_empty = 0;         // of which wholly free
std::size_t g_bytes = 0;
std::atomic<u64> g_copied{0};

/// The pool's lock is held across fork() so that a child never inherits it taken by another thread.
const int g_registered =
    pthread_atfork([] { g_mutex.lock(); }, [] { g_mutex.unlock(); }, [] { g_mutex.unlock(); });

Slab* slab_of(void* page) {
  return reinterpret_cast<Slab*>(reinterpret_cast<std::uintptr_t>(page) & ~(kSlabBytes - 1));
}
bool full(const Slab* s) {
  return !s->free && s->cut == kPages;
}

void open(Slab* s) {
  s->before = nullptr;
  s->after = g_open;
  if (g_open) g_open->before = s;
  g_open = s;
}
void close(Slab* s) {
  if (s->before) s->before->after = s->after;
  else g_open = s->after;
  if (s->after) s->after->before = s->before;
}

Slab* make_slab() {
  void* memory = std::aligned_alloc(kSlabBytes, kSlabBytes);
  if (!memory) throw std::bad_alloc();
#if defined(MADV_HUGEPAGE)
  madvise(memory, kSlabBytes, MADV_HUGEPAGE);
#endif
  Slab* s = new (memory) Slab;
  s->free = nullptr;
  s->used = 0;
  s->cut = 1;
  g_bytes += kSlabBytes;
  return s;
}

}  // namespace

void* new_page() {
  std::lock_guard lock(g_mutex);
  if (!g_open) {
    open(make_slab());
    ++g_empty;
  }
  Slab* s = g_open;
  if (s->used++ == 0) --g_empty;
  void* page;
  if (s->free) {
    page = s->free;
    s->free = *static_cast<void**>(page);
  } else {
    page = reinterpret_cast<char*>(s) + kPageBytes * s->cut++;
  }
  if (full(s)) close(s);
  page_references(page).store(1, std::memory_order_relaxed);
  return page;
}

void recycle_page(void* page) noexcept {
  std::lock_guard lock(g_mutex);
  Slab* s = slab_of(page);
  if (full(s)) open(s);
  *static_cast<void**>(page) = s->free;
  s->free = page;
  if (--s->used) return;
  if (g_empty < kSpareSlabs) {  // fresh memory costs as much as the work done in it
    ++g_empty;
    return;
  }
  close(s);
  std::free(s);
  g_bytes -= kSlabBytes;
}

void* copy_page(void* page) {
  void* copy = new_page();
  std::memcpy(copy, page, kPageBytes);
  release_page(page);
  g_copied.fetch_add(1, std::memory_order_relaxed);
  return copy;
}

u64 pages_copied() {
  return g_copied.load(std::memory_order_relaxed);
}

std::size_t pool_bytes() {
  std::lock_guard lock(g_mutex);
  return g_bytes;
}

}  // namespace rosakit
