// Streaming state of B x R streams: any chunking gives the numbers of one whole-sequence call.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "rosakit/types.hpp"

namespace rosakit {

struct MemoryOptions {
  std::size_t batch = 1, routes = 1;
  unsigned bits = 4;  // 1..16 bits a symbol; 0: token ids below 2^31
  Rule rule;
  /// Link steps a stream may walk up to position i, walk_per_symbol * i + walk_base, before latest
  /// ends move to a link-cut tree. No result depends on it.
  u64 walk_per_symbol = 24, walk_base = 2048;
  /// Bytes the memory may reserve; 0: no bound. Before it would be passed, the row that remembers
  /// most forgets the older half of what it remembers, and goes on as if it had started there.
  u64 max_bytes = 0;
};

/// One chunk's arrays: q, k [B, R, n]; mask [B, n] or null (0: a padded position, which neither
/// extends the memory nor matches); position, length [B, R, n], or [B, 1, n, candidates].
template <class T>
struct Chunk {
  const T* q = nullptr;
  const T* k = nullptr;
  const u8* mask = nullptr;
  i32* position = nullptr;
  i32* length = nullptr;
  std::size_t n = 0;
  unsigned candidates = 0;  // 0: the match itself
};

class Lane;

/// One thread may work on a memory at a time: a second one gets std::runtime_error.
///
/// \example
///   SuffixMemory memory({.batch = 1, .routes = 512, .bits = 4});
///   memory.extend<u8>({.q = q, .k = k, .position = position, .length = length, .n = 1});
///   auto beams = memory.index_select(std::array<i64, 3>{0, 0, 0});
///   beams.truncate(0, 100);
class SuffixMemory {
 public:
  explicit SuffixMemory(const MemoryOptions& options);
  SuffixMemory(SuffixMemory&&) noexcept;
  SuffixMemory& operator=(SuffixMemory&&) noexcept;
  ~SuffixMemory();

  const MemoryOptions& options() const { return options_; }
  std::span<const i64> lengths() const { return lengths_; }
  /// Each row's first position that is still remembered (0 without a budget).
  std::span<const i64> starts() const { return starts_; }

  /// Appends a chunk. Throws std::invalid_argument for symbols out of range, before any change.
  template <class T>
  void extend(const Chunk<T>& chunk);

  /// A memory whose row i is (a copy of) row rows[i] of this one.
  SuffixMemory index_select(std::span<const i64> rows) const;
  /// Shortens a row to at most `length` symbols; below starts()[row], to an empty row of that
  /// length.
  void truncate(std::size_t row, i64 length);
  void reset(std::size_t row) { truncate(row, 0); }

  /// Key symbol at a position of a row's stream.
  i64 symbol(std::size_t row, std::size_t route, i64 position) const;

  std::size_t live_bytes() const;
  std::size_t reserved_bytes() const;

  /// The state as bytes (docs/memory-format.md), and back. Throws std::runtime_error for bytes that
  /// are truncated, corrupt or of a newer version.
  std::string serialize() const;
  static SuffixMemory deserialize(std::span<const char> bytes);

 private:
  template <class T>
  void feed(std::size_t stream, const Chunk<T>& chunk, std::size_t begin, std::size_t end);
  template <class T>
  void feed_all(const Chunk<T>& chunk, std::size_t begin, std::size_t end);
  void make_room(std::size_t symbols, bool ordering);
  void evict(std::size_t row, i64 keep);

  class Use;
  struct State {
    std::atomic_flag busy;
    bool broken = false;
  };

  MemoryOptions options_;
  std::unique_ptr<State> state_ = std::make_unique<State>();
  std::vector<i64> lengths_, starts_;
  std::vector<std::shared_ptr<Lane>> lanes_;  // [B * R]
};

}  // namespace rosakit
