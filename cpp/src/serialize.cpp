// The file form of a SuffixMemory (docs/memory-format.md). It holds the symbols, not the automata:
// a file cannot describe an inconsistent structure, does not depend on the version of the matcher,
// and is an order of magnitude smaller; loading replays the symbols.
#include <array>
#include <bit>
#include <cstring>
#include <stdexcept>

#include "rosakit/lanes.hpp"
#include "rosakit/memory.hpp"
#include "rosakit/pool.hpp"

static_assert(std::endian::native == std::endian::little, "the file form is little endian");

namespace rosakit {
namespace {

constexpr char kMagic[8] = {'R', 'O', 'S', 'A', 'M', 'E', 'M', '\0'};
constexpr u32 kVersion = 1;

struct Header {
  char magic[8];
  u32 version;
  u32 header_bytes;
  u64 batch, routes;
  u32 bits;
  u8 granularity, successor;
  u16 symbol_bytes;
  u32 max_length, min_length;
  u64 payload_bytes;
  u64 max_bytes;
};
static_assert(sizeof(Header) == 64);

/// CRC-32 (IEEE 802.3, as zlib.crc32), eight bytes at a time.
u32 crc32(const char* data, std::size_t n) {
  static const auto tables = [] {
    std::array<std::array<u32, 256>, 8> t{};
    for (u32 i = 0; i < 256; ++i) {
      u32 c = i;
      for (int b = 0; b < 8; ++b) c = c & 1 ? c >> 1 ^ 0xEDB88320u : c >> 1;
      t[0][i] = c;
    }
    for (std::size_t s = 1; s < 8; ++s)
      for (u32 i = 0; i < 256; ++i) t[s][i] = t[s - 1][i] >> 8 ^ t[0][t[s - 1][i] & 255u];
    return t;
  }();
  u32 c = ~u32{0};
  for (; n >= 8; n -= 8, data += 8) {
    u64 w;
    std::memcpy(&w, data, 8);
    w ^= c;
    c = 0;
    for (unsigned s = 0; s < 8; ++s) c ^= tables[7 - s][w >> (8 * s) & 255u];
  }
  for (; n; --n, ++data) c = c >> 8 ^ tables[0][(c ^ static_cast<u8>(*data)) & 255u];
  return ~c;
}

u16 symbol_bytes(unsigned bits) {
  return bits == 0 ? 4 : bits <= 8 ? 1 : 2;
}

void put(std::string& out, u32 symbol, u16 width) {
  out.append(reinterpret_cast<const char*>(&symbol), width);
}

class Reader {
 public:
  explicit Reader(std::span<const char> bytes) : bytes_(bytes) {}
  const char* take(u64 n) {
    if (n > bytes_.size() - at_)
      throw std::runtime_error("memory file: the data end too early (truncated?)");
    const char* p = bytes_.data() + at_;
    at_ += n;
    return p;
  }
  std::size_t left() const { return bytes_.size() - at_; }

 private:
  std::span<const char> bytes_;
  std::size_t at_ = 0;
};

u32 get(const char* p, u16 width) {
  u32 v = 0;
  std::memcpy(&v, p, width);
  return v;
}

}  // namespace

std::string SuffixMemory::serialize() const {
  const u16 width = symbol_bytes(options_.bits);
  std::string out(sizeof(Header), '\0');
  out.append(reinterpret_cast<const char*>(lengths_.data()), lengths_.size() * sizeof(i64));
  out.append(reinterpret_cast<const char*>(starts_.data()), starts_.size() * sizeof(i64));
  for (const auto& lane : lanes_) out.push_back(lane->self() ? 1 : 0);
  for (const auto& lane : lanes_) {
    const u32 n = lane->length();
    for (u32 i = lane->start(); i < n; ++i) put(out, lane->key(i), width);
    if (!lane->self())
      for (u32 i = lane->start(); i < n; ++i) put(out, lane->query(i), width);
  }
  Header h{};
  std::memcpy(h.magic, kMagic, sizeof kMagic);
  h.version = kVersion;
  h.header_bytes = sizeof(Header);
  h.batch = options_.batch;
  h.routes = options_.routes;
  h.bits = options_.bits;
  h.granularity = static_cast<u8>(options_.rule.granularity);
  h.successor = static_cast<u8>(options_.rule.successor);
  h.symbol_bytes = width;
  h.max_length = options_.rule.max_length;
  h.min_length = options_.rule.min_length;
  h.max_bytes = options_.max_bytes;
  h.payload_bytes = out.size() - sizeof(Header);
  std::memcpy(out.data(), &h, sizeof h);
  put(out, crc32(out.data(), out.size()), 4);
  return out;
}

SuffixMemory SuffixMemory::deserialize(std::span<const char> bytes) {
  Reader in(bytes);
  Header h;
  std::memcpy(&h, in.take(sizeof h), sizeof h);
  if (std::memcmp(h.magic, kMagic, sizeof kMagic) != 0)
    throw std::runtime_error("memory file: not a rosakit memory (wrong magic bytes)");
  if (h.version > kVersion)
    throw std::runtime_error("memory file: version " + std::to_string(h.version) +
                             " is newer than this rosakit reads (" + std::to_string(kVersion) +
                             "); upgrade rosakit");
  if (h.payload_bytes > in.left() || in.left() - h.payload_bytes != 4)
    throw std::runtime_error(
        "memory file: " + std::to_string(bytes.size()) + " bytes where the header announces " +
        std::to_string(sizeof h + h.payload_bytes + 4) + " (truncated or damaged)");
  if (get(bytes.data() + bytes.size() - 4, 4) != crc32(bytes.data(), bytes.size() - 4))
    throw std::runtime_error("memory file: the checksum does not agree (damaged)");
  if (h.version < 1 || h.header_bytes != sizeof h || h.bits > 16 || h.granularity > 1 ||
      h.successor > 1 || h.symbol_bytes != symbol_bytes(h.bits) || h.max_length < 1 ||
      h.max_length > kUnlimited || h.min_length < 1 || h.min_length > kUnlimited ||
      h.batch > h.payload_bytes / sizeof(i64) ||
      (h.batch && h.routes > h.payload_bytes / h.batch) || h.routes > (u64{1} << 31))
    throw std::runtime_error("memory file: a header field is out of range (damaged)");

  MemoryOptions o;
  o.batch = h.batch;
  o.routes = h.routes;
  o.bits = h.bits;
  o.rule = {static_cast<Granularity>(h.granularity), static_cast<Successor>(h.successor),
            h.max_length, h.min_length};
  o.max_bytes = h.max_bytes;
  SuffixMemory memory(o);
  std::memcpy(memory.lengths_.data(), in.take(h.batch * sizeof(i64)), h.batch * sizeof(i64));
  std::memcpy(memory.starts_.data(), in.take(h.batch * sizeof(i64)), h.batch * sizeof(i64));
  const std::size_t lanes = h.batch * h.routes;
  const char* self = in.take(lanes);
  struct Symbols {
    const char* key;
    const char* query;
  };
  std::vector<Symbols> symbols(lanes);
  for (std::size_t s = 0; s < lanes; ++s) {
    const i64 first = memory.starts_[s / o.routes], n = memory.lengths_[s / o.routes] - first;
    if (first < 0 || n < 0 || first + n >= (i64{1} << 31))
      throw std::runtime_error("memory file: a length is out of range");
    symbols[s].key = in.take(static_cast<u64>(n) * h.symbol_bytes);
    symbols[s].query = self[s] ? symbols[s].key : in.take(static_cast<u64>(n) * h.symbol_bytes);
  }
  if (in.left() != 4) throw std::runtime_error("memory file: surplus data before the checksum");
  const u32 limit = u32{1} << (o.bits ? o.bits : 31);
  parallel_for(lanes, [&](std::size_t s, unsigned) {
    i32 position, length;
    const i64 first = memory.starts_[s / o.routes], n = memory.lengths_[s / o.routes] - first;
    auto& lane = memory.lanes_[s];
    lane->skip(static_cast<u32>(first));
    for (i64 i = 0; i < n; ++i) {
      const u32 q = get(symbols[s].query + i * h.symbol_bytes, h.symbol_bytes);
      const u32 k = get(symbols[s].key + i * h.symbol_bytes, h.symbol_bytes);
      if (q >= limit || k >= limit)
        throw std::runtime_error("memory file: a symbol is out of range");
      const bool undoable = i + static_cast<i64>(Lane::kUndoDepth) >= n;
      if (lane->step(q, k, undoable, &position, &length)) continue;
      lane = generalise(*lane, static_cast<std::size_t>(n - i), o);
      lane->step(q, k, undoable, &position, &length);
    }
  });
  return memory;
}

}  // namespace rosakit
