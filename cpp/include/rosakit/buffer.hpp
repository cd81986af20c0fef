// A growable array of trivially copyable elements, 64-byte aligned so that a 64-byte transition row
// never straddles cache lines. Unlike std::vector it never value-initialises what it grows by, and
// it grows by a smaller factor once it is large, because a process holds thousands of them.
#pragma once

#include <cstdlib>
#include <cstring>
#include <new>
#include <type_traits>
#include <utility>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "rosakit/types.hpp"

namespace rosakit {

template <class T>
class Buffer {
  static_assert(std::is_trivially_copyable_v<T>);

 public:
  Buffer() = default;
  Buffer(const Buffer& other) { assign(other.data_, other.size_); }
  Buffer(Buffer&& other) noexcept { swap(other); }
  Buffer& operator=(const Buffer& other) {
    if (this != &other) assign(other.data_, other.size_);
    return *this;
  }
  Buffer& operator=(Buffer&& other) noexcept {
    swap(other);
    return *this;
  }
  ~Buffer() { std::free(data_); }

  T* data() noexcept { return data_; }
  const T* data() const noexcept { return data_; }
  std::size_t size() const noexcept { return size_; }
  std::size_t capacity() const noexcept { return capacity_; }
  T& operator[](std::size_t i) noexcept { return data_[i]; }
  const T& operator[](std::size_t i) const noexcept { return data_[i]; }
  const T* begin() const noexcept { return data_; }
  const T* end() const noexcept { return data_ + size_; }

  void clear() noexcept { size_ = 0; }
  void push_back(T value) {
    if (size_ == capacity_) grow(size_ + 1);
    data_[size_++] = value;
  }
  /// Sets the size; new elements are uninitialised.
  void resize(std::size_t n) {
    if (n > capacity_) grow(n);
    size_ = n;
  }
  /// Makes room for `n` elements in all without further allocation.
  void reserve(std::size_t n) {
    if (n > capacity_) reallocate(n);
  }
  void fill(std::size_t n, T value) {
    resize(n);
    for (std::size_t i = 0; i < n; ++i) data_[i] = value;
  }
  void assign(const T* source, std::size_t n) {
    resize(n);
    if (n) std::memcpy(data_, source, n * sizeof(T));
  }
  void release() noexcept {
    std::free(data_);
    data_ = nullptr;
    size_ = capacity_ = 0;
  }
  void swap(Buffer& other) noexcept {
    std::swap(data_, other.data_);
    std::swap(size_, other.size_);
    std::swap(capacity_, other.capacity_);
  }

 private:
  static constexpr std::size_t kAlign = 64;
  static constexpr std::size_t kHuge = std::size_t{2} << 20;

  void grow(std::size_t needed) {
    const std::size_t bytes = capacity_ * sizeof(T);
    const std::size_t step = bytes < (std::size_t{1} << 16) ? capacity_ : capacity_ / 8;
    reallocate(needed > capacity_ + step ? needed : capacity_ + step);
  }
  void reallocate(std::size_t n) {
    if (n > std::numeric_limits<std::size_t>::max() / sizeof(T) / 2) throw std::bad_alloc();
    std::size_t bytes = (n * sizeof(T) + kAlign - 1) / kAlign * kAlign;
    const std::size_t align = bytes >= kHuge ? kHuge : kAlign;
    T* fresh = static_cast<T*>(std::aligned_alloc(align, (bytes + align - 1) / align * align));
    if (!fresh) throw std::bad_alloc();
#if defined(__linux__) && defined(MADV_HUGEPAGE)
    if (bytes >= kHuge) madvise(fresh, bytes, MADV_HUGEPAGE);
#endif
    if (size_) std::memcpy(static_cast<void*>(fresh), data_, size_ * sizeof(T));
    std::free(data_);
    data_ = fresh;
    capacity_ = bytes / sizeof(T);
  }

  T* data_ = nullptr;
  std::size_t size_ = 0;
  std::size_t capacity_ = 0;
};

}  // namespace rosakit
