// Vocabulary shared by the whole core.
#pragma once

#include <cstddef>
#include <cstdint>
#include <limits>

namespace rosakit {

using u8 = std::uint8_t;
using u16 = std::uint16_t;
using u32 = std::uint32_t;
using u64 = std::uint64_t;
using i16 = std::int16_t;
using i32 = std::int32_t;
using i64 = std::int64_t;

inline constexpr i32 kNull = -1;
inline constexpr u32 kUnlimited = std::numeric_limits<i32>::max();

enum class Granularity : u8 { token, run };
enum class Successor : u8 { available, strict };

/// What a match is: the options of the semantic contract that do not depend on the data.
struct Rule {
  Granularity granularity = Granularity::token;
  Successor successor = Successor::available;
  u32 max_length = kUnlimited;
  u32 min_length = 1;
};

}  // namespace rosakit
