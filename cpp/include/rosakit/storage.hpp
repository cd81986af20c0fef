// Where automata keep their arrays: one flat block (whole-sequence calls) or shared pages
// (streaming state, where forks share what they have in common and growth never copies).
#pragma once

#include <bit>
#include <utility>

#include "rosakit/buffer.hpp"
#include "rosakit/page_pool.hpp"

namespace rosakit {

template <class T>
class FlatArray {
 public:
  static constexpr bool kShared = false;
  std::size_t size() const { return data_.size(); }
  const T& operator[](std::size_t i) const { return data_[i]; }
  T& mut(std::size_t i) { return data_[i]; }
  const T* ptr(std::size_t i) const { return data_.data() + i; }
  T* mut_ptr(std::size_t i) { return data_.data() + i; }
  void push_back(const T& value) { data_.push_back(value); }
  void resize(std::size_t n) { data_.resize(n); }
  void reserve(std::size_t n) { data_.reserve(n); }
  void clear() { data_.clear(); }
  const T* begin() const { return data_.begin(); }
  const T* end() const { return data_.end(); }
  std::size_t live_bytes() const { return data_.size() * sizeof(T); }
  std::size_t reserved_bytes() const { return data_.capacity() * sizeof(T); }

 private:
  Buffer<T> data_;
};

/// Pages of at most 4096 bytes, a power of two of elements each. Copies share pages; the first
/// write to a shared page copies it. Copying marks the source's pages as shared, so two threads may
/// copy one array at a time only under a lock of the owner's.
template <class T>
class PagedArray {
  static_assert(std::is_trivially_copyable_v<T>);

 public:
  static constexpr bool kShared = true;
  static constexpr std::size_t kShift = std::bit_width(kPageBytes / sizeof(T)) - 1;
  static constexpr std::size_t kItems = std::size_t{1} << kShift;

  PagedArray() = default;
  PagedArray(const PagedArray& other) : size_(other.size_) {
    const std::size_t used = (size_ + kItems - 1) >> kShift;
    pages_.resize(used);
    for (std::size_t p = 0; p < used; ++p) {
      std::uintptr_t& page = const_cast<std::uintptr_t&>(other.pages_[p]);
      page |= kSharedBit;
      share_page(address(page));
      pages_[p] = page;
    }
  }
  PagedArray(PagedArray&& other) noexcept { swap(other); }
  PagedArray& operator=(PagedArray other) noexcept {
    swap(other);
    return *this;
  }
  ~PagedArray() {
    for (std::uintptr_t page : pages_) release_page(address(page));
  }

  std::size_t size() const { return size_; }
  const T& operator[](std::size_t i) const { return *ptr(i); }
  T& mut(std::size_t i) { return *mut_ptr(i); }
  /// Contiguous up to the end of the page.
  const T* ptr(std::size_t i) const { return items(pages_[i >> kShift]) + (i & (kItems - 1)); }
  T* mut_ptr(std::size_t i) {
    std::uintptr_t& page = pages_[i >> kShift];
    if (page & kSharedBit) [[unlikely]]
      own(page);
    return items(page) + (i & (kItems - 1));
  }
  void push_back(const T& value) {
    if (size_ >> kShift == pages_.size()) pages_.push_back(fresh());
    *mut_ptr(size_++) = value;
  }
  /// `n` more elements, uninitialised and at most a page of them.
  void extend(std::size_t n) {
    size_ += n;
    if ((size_ - 1) >> kShift >= pages_.size()) [[unlikely]]
      pages_.push_back(fresh());
  }
  /// New elements are uninitialised; pages past a shrunk end are given back.
  void resize(std::size_t n) {
    const std::size_t used = (n + kItems - 1) >> kShift;
    while (pages_.size() < used) pages_.push_back(fresh());
    while (pages_.size() > used) {
      release_page(address(pages_[pages_.size() - 1]));
      pages_.resize(pages_.size() - 1);
    }
    size_ = n;
  }
  void reserve(std::size_t) {}
  void clear() { resize(0); }
  std::size_t live_bytes() const { return size_ * sizeof(T); }
  std::size_t reserved_bytes() const {
    return pages_.size() * kPageBytes + pages_.capacity() * sizeof(std::uintptr_t);
  }
  void swap(PagedArray& other) noexcept {
    pages_.swap(other.pages_);
    std::swap(size_, other.size_);
  }

 private:
  static constexpr std::uintptr_t kSharedBit = 1;
  static void* address(std::uintptr_t page) { return reinterpret_cast<void*>(page & ~kSharedBit); }
  static T* items(std::uintptr_t page) { return static_cast<T*>(address(page)); }
  static std::uintptr_t fresh() { return reinterpret_cast<std::uintptr_t>(new_page()); }
  static void own(std::uintptr_t& page) {
    if (!page_is_unique(address(page)))
      page = reinterpret_cast<std::uintptr_t>(copy_page(address(page)));
    page &= ~kSharedBit;
  }

  Buffer<std::uintptr_t> pages_;
  std::size_t size_ = 0;
};

struct Flat {
  template <class T>
  using Array = FlatArray<T>;
};
struct Paged {
  template <class T>
  using Array = PagedArray<T>;
};

}  // namespace rosakit
