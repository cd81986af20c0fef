// A growable array of trivially copyable elements, 64-byte aligned so that a 64-byte transition row
// never straddles cache lines. Unlike std::vector it never value-initialises what it grows by, and
// it grows by a smaller factor once it is large, because a process holds thousands of them.
#pragma once

#include <cstdlib>
#include <cstring>
#include <new>
#include <type_traits>
#include <utility>

#include "rosakit/blocks.hpp"
#include "rosakit/types.hpp"

namespace rosakit {

template <class T>
class Buffer {
  static_assert(std::is_trivially_copyable_v<T>);
  static_assert(sizeof(T) <= 64, "the bytes of a block are told from its capacity");

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
  ~Buffer() { give_back(); }

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
    give_back();
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

  static constexpr std::size_t aligned(std::size_t n) {
    return (n * sizeof(T) + kAlign - 1) / kAlign * kAlign;
  }
  void give_back() noexcept {
    if (const std::size_t bytes = aligned(capacity_); bytes >= kBlockBytes)
      give_block(data_, bytes);
    else std::free(data_);
  }
  void grow(std::size_t needed) {
    const std::size_t bytes = capacity_ * sizeof(T);
    const std::size_t step = bytes < (std::size_t{1} << 16) ? capacity_ : capacity_ / 8;
    reallocate(needed > capacity_ + step ? needed : capacity_ + step);
  }
  void reallocate(std::size_t n) {
    if (n > std::numeric_limits<std::size_t>::max() / sizeof(T) / 2) throw std::bad_alloc();
    const std::size_t bytes = aligned(n);
    T* fresh = static_cast<T*>(bytes >= kBlockBytes ? take_block(bytes)
                                                    : std::aligned_alloc(kAlign, bytes));
    if (!fresh) throw std::bad_alloc();
    if (size_) std::memcpy(static_cast<void*>(fresh), data_, size_ * sizeof(T));
    give_back();
    data_ = fresh;
    capacity_ = bytes / sizeof(T);
  }

  T* data_ = nullptr;
  std::size_t size_ = 0;
  std::size_t capacity_ = 0;
};

}  // namespace rosakit
