// Transition rows of branching states.
//
// A row of class c holds 2 << c entries, and grows class by class; outgrown rows are recycled. A
// row is aligned to its size, so a 64-byte row lies in one cache line and no row crosses a page.
//
// Narrow (symbols < 256): entries are target << 8 | symbol, filled from the front; from 32 entries
// on, or once as wide as the alphabet, a row is indexed by the symbol and holds bare targets.
// Wide: entries are {symbol, target}; from 16 entries on they are hashed with linear probing, and
// rows of a page and more are separate blocks ("big"). On request (`keep_order`) rows of 32 entries
// and more are lists as well: {next, previous} of each place follow the entries, and place 0 is no
// entry but both ends of the list.
// An absent entry has target 0, the root, which no transition leads to.
#pragma once

#include <algorithm>
#include <array>
#include <bit>
#include <memory>
#include <stdexcept>
#include <vector>

#include "rosakit/journal.hpp"
#include "rosakit/storage.hpp"

namespace rosakit {

/// Of the XOR of two symbols below 256: the bit they differ in, or 8 if it is not just one.
inline constexpr std::array<u8, 256> kFlippedBit = [] {
  std::array<u8, 256> table{};
  for (u32 x = 0; x < 256; ++x)
    table[x] = static_cast<u8>(std::has_single_bit(x) ? std::countr_zero(x) : 8);
  return table;
}();

/// How a state refers to its row; `used` counts entries (wide, hashed rows only).
struct RowRef {
  u32 cls, offset, used;
};

template <bool kWide, class Storage>
class Rows {
 public:
  // Areas of the journal.
  static constexpr u32 kAreaWord = 8, kAreaFree = 16, kAreaBig = u32{1} << 31;

  void reset(unsigned bits) {
    if constexpr (!kWide) {
      sigma_ = u32{1} << (bits < 1 ? 1 : bits);
      direct_ = static_cast<u32>(std::bit_width(sigma_)) - 2;
    }
    words_.clear();
    words_.resize(2);  // offset 0 marks an empty list of free rows
    free_.fill(0);
    big_.clear();
  }
  /// Wide, and before the first row: from now on long rows keep an order (see `to_front`).
  void keep_order() { ordered_ = true; }
  bool ordered() const { return ordered_; }
  bool listed(RowRef row) const { return listed(row.cls); }

  u32 find(RowRef row, u32 s) const {
    const u32* r = words(row);
    if constexpr (kWide) {
      if (hashed(row.cls)) return r[probe(r, row.cls, s)];
      for (u32 i = 0; i < capacity(row.cls); ++i)
        if (r[2 * i] == s) return r[2 * i + 1];  // absent entries are zero throughout
      return 0;
    } else {
      if (row.cls == direct_) return s < sigma_ ? r[s] : 0;
      u32 word = 0;  // at most one entry agrees, so an OR needs no branches
      if (row.cls == 0) {
        for (u32 i = 0; i < 2; ++i) word |= (r[i] & 255u) == s ? r[i] : 0u;
      } else {
        for (u32 j = 0; j < capacity(row.cls); j += 4)
          for (u32 i = j; i < j + 4; ++i) word |= (r[i] & 255u) == s ? r[i] : 0u;
      }
      return word >> 8;
    }
  }

  /// Narrow: where `s` with each of its lowest `bits` bits flipped leads to goes to found[m] if
  /// that is still 0. Entries are sorted by the bit they differ in, not looked for bit by bit.
  void flips(RowRef row, u32 s, unsigned bits, u32 (&found)[8]) const {
    const u32* r = words(row);
    u32 here[9] = {};  // the last one takes what differs otherwise
    if (row.cls == direct_) {
      for (unsigned m = 0; m < bits; ++m) here[m] = r[s ^ (u32{1} << m)];
    } else {
      for (u32 i = 0; i < capacity(row.cls); ++i)
        here[r[i] ? kFlippedBit[(r[i] ^ s) & 255u] : 8] = r[i] >> 8;
    }
    for (unsigned m = 0; m < 8; ++m) found[m] = found[m] ? found[m] : here[m];
  }

  template <class F>
  void for_each(RowRef row, F&& f) const {
    const u32* r = words(row);
    if constexpr (kWide) {
      for (u32 i = listed(row); i < capacity(row.cls); ++i)
        if (r[2 * i + 1]) f(r[2 * i], r[2 * i + 1]);
    } else if (row.cls == direct_) {
      for (u32 s = 0; s < sigma_; ++s)
        if (r[s]) f(s, r[s]);
    } else {
      for (u32 i = 0; i < capacity(row.cls) && r[i]; ++i) f(r[i] & 255u, r[i] >> 8);
    }
  }

  /// Entries in use.
  u32 used(RowRef row) const {
    if (kWide && hashed(row.cls)) return row.used;
    u32 n = 0;
    for_each(row, [&](u32, u32) { ++n; });
    return n;
  }

  /// A new row of two entries.
  RowRef make(u32 s0, u32 t0, u32 s1, u32 t1) {
    RowRef row = make_class(0);
    u32* r = mut_words(row);
    fill(r, row, s0, t0);
    fill(r, row, s1, t1);
    return row;
  }

  /// Points a present symbol to another target.
  void replace(RowRef row, u32 s, u32 target) {
    const u32* r = words(row);
    u32 at;
    if constexpr (kWide) {
      if (hashed(row.cls)) {
        at = probe(r, row.cls, s);
      } else {
        u32 i = 0;
        while (r[2 * i] != s || !r[2 * i + 1]) ++i;
        at = 2 * i + 1;
      }
    } else if (row.cls == direct_) {
      at = s;
    } else {
      at = 0;
      while ((r[at] & 255u) != s) ++at;
      target = target << 8 | s;
    }
    poke(row, at, target);
  }

  /// Adds an absent symbol; returns the row's new reference.
  RowRef insert(RowRef row, u32 s, u32 target) {
    if (put(row, s, target)) return row;
    RowRef grown = make_class(next_class(row.cls));
    mut_words(row);  // its page is ours before both rows are in use
    u32* r = mut_words(grown);
    if (listed(row)) {
      const u32 *old = words(row), *links = old + links_at(row);
      for (u32 i = links[1]; i; i = links[2 * i + 1]) fill(r, grown, old[2 * i], old[2 * i + 1]);
    } else {
      for_each(row, [&](u32 symbol, u32 t) { fill(r, grown, symbol, t); });
    }
    fill(r, grown, s, target);
    recycle(row);
    return grown;
  }

  RowRef copy(RowRef row) {
    RowRef twin = allocate(row.cls);
    twin.used = row.used;
    const u32* from = words(row);
    note_words(twin);
    u32* to = mut_words(twin);
    if constexpr (Storage::template Array<u32>::kShared) from = words(row);
    std::memcpy(to, from, std::size_t{word_count(row.cls)} * 4);
    return twin;
  }

  // --- order of listed rows -----------------------------------------------------------------
  // A symbol that is added comes first, except that a row which has just become a list has none
  // yet.

  /// The first symbol of a listed row.
  u32 first(RowRef row) const {
    const u32* r = words(row);
    return r[2 * r[links_at(row)]];
  }
  /// Makes `s` the first symbol of a listed row, if it is there.
  void to_front(RowRef row, u32 s) {
    const u32* r = words(row);
    const u32 links = links_at(row), at = probe(r, row.cls, s);
    if (!r[at]) return;
    const u32 i = at / 2, next = r[links + 2 * i], previous = r[links + 2 * i + 1];
    poke(row, links + 2 * previous, next);
    poke(row, links + 2 * next + 1, previous);
    link_first(words(row), row, i, [&](u32 word, u32 value) { poke(row, word, value); });
  }
  /// Calls f(symbol, target) in the order of a listed row until it returns false.
  template <class F>
  void for_each_in_order(RowRef row, F&& f) const {
    const u32 *r = words(row), *links = r + links_at(row);
    for (u32 i = links[0]; i; i = links[2 * i])
      if (!f(r[2 * i], r[2 * i + 1])) return;
  }
  /// Orders a listed row by key(target), greatest first.
  template <class F>
  void order(RowRef row, F&& key) {
    struct Place {
      i32 key;
      u32 place;
    };
    Buffer<Place> places;
    const u32* r = words(row);
    for (u32 i = 1; i < capacity(row.cls); ++i)
      if (r[2 * i + 1]) places.push_back({key(r[2 * i + 1]), i});
    std::sort(places.data(), places.data() + places.size(),
              [](const Place& a, const Place& b) { return a.key > b.key; });
    const u32 links = links_at(row);
    u32 previous = 0;
    for (const Place& p : places) {
      poke(row, links + 2 * previous, p.place);
      poke(row, links + 2 * p.place + 1, previous);
      previous = p.place;
    }
    poke(row, links + 2 * previous, 0);
    poke(row, links + 1, previous);
  }

  // --- journal ------------------------------------------------------------------------------
  void set_journal(Journal* journal) { journal_ = journal; }
  u32 size_in_units() const { return static_cast<u32>(words_.size() / 2); }
  void undo_size(u32 units) { words_.resize(std::size_t{units} * 2); }
  void undo(const Journal::Entry& e) {
    if (e.area & kAreaBig) big(e.index)[e.area & ~kAreaBig] = e.old;
    else if (e.area == kAreaFree) free_[e.index] = e.old;
    else words_.mut(std::size_t{e.index} * 2 + (e.area & 1)) = e.old;
  }

  const void* address(RowRef row) const { return words(row); }
  /// No less than all big rows grow by if each has to grow once.
  std::size_t growth_bytes() const { return big_bytes(); }
  std::size_t live_bytes() const { return words_.live_bytes() + big_bytes(); }
  std::size_t reserved_bytes() const { return words_.reserved_bytes() + big_bytes(); }

 private:
  static constexpr u32 kBigClass = 8;     // wide: lists of class 7 have 4096 bytes
  static constexpr u32 kListedClass = 4;  // wide: if ordered, the first class of lists
  static constexpr u32 kNoSymbol = ~u32{0};
  using Words = typename Storage::template Array<u32>;
  using Big = std::shared_ptr<Buffer<u32>>;

  static constexpr u32 capacity(u32 cls) { return u32{2} << cls; }
  static constexpr bool hashed(u32 cls) { return cls >= 3; }
  static constexpr bool is_big(u32 cls) { return kWide && cls >= kBigClass; }
  bool listed(u32 cls) const { return kWide && ordered_ && cls >= kListedClass; }
  u32 word_count(u32 cls) const { return capacity(cls) * (kWide ? 2 : 1) << listed(cls); }
  static constexpr u32 links_at(RowRef row) { return 2 * capacity(row.cls); }
  u32 next_class(u32 cls) const {
    if constexpr (kWide) return cls + 1;
    else return cls + 1 >= direct_ || cls >= 3 ? direct_ : cls + 1;
  }

  const u32* words(RowRef row) const {
    if (is_big(row.cls)) return big_[row.offset]->data();
    return words_.ptr(std::size_t{row.offset} * 2);
  }
  u32* mut_words(RowRef row) {
    if (is_big(row.cls)) return big(row.offset).data();
    return words_.mut_ptr(std::size_t{row.offset} * 2);
  }
  Buffer<u32>& big(u32 index) {
    Big& b = big_[index];
    if (b.use_count() > 1) b = std::make_shared<Buffer<u32>>(*b);
    return *b;
  }
  void poke(RowRef row, u32 at, u32 value) {
    u32* w = mut_words(row) + at;
    note(row, at, *w);
    *w = value;
  }
  void note(RowRef row, u32 at, u32 old) {
    if constexpr (Words::kShared) {
      if (is_big(row.cls)) {
        if (journal_->row_floor()) journal_->note(kAreaBig | at, row.offset, old);
      } else if (row.offset < journal_->row_floor()) {
        const std::size_t word = std::size_t{row.offset} * 2 + at;
        journal_->note(kAreaWord + static_cast<u32>(word & 1), static_cast<u32>(word / 2), old);
      }
    }
  }
  void note_words(RowRef row) {
    if constexpr (Words::kShared)
      if (row.offset < journal_->row_floor())
        for (u32 i = 0; i < word_count(row.cls); ++i) note(row, i, words(row)[i]);
  }
  void set_free(u32 cls, u32 offset) {
    if constexpr (Words::kShared)
      if (journal_->row_floor()) journal_->note(kAreaFree, cls, free_[cls]);
    free_[cls] = offset;
  }

  static u32 hash(u32 s) { return static_cast<u32>(s * u64{0x9E3779B97F4A7C15} >> 32); }
  /// Index of the word that holds, or would hold, the target of `s` in a hashed row.
  static u32 probe(const u32* r, u32 cls, u32 s) {
    const u32 mask = capacity(cls) - 1;
    for (u32 i = hash(s) & mask;; i = (i + 1) & mask)
      if (!r[2 * i + 1] || r[2 * i] == s) return 2 * i + 1;
  }

  /// Puts place `i` of a listed row, which is in no list, before all others.
  template <class Set>
  static void link_first(const u32* r, RowRef row, u32 i, Set&& set) {
    const u32 links = links_at(row), next = r[links];
    set(links + 2 * i, next);
    set(links + 2 * i + 1, 0u);
    set(links + 2 * next + 1, i);
    set(links, i);
  }
  /// Puts an absent symbol into a row with room whose former words have been noted.
  void fill(u32* r, RowRef& row, u32 s, u32 target) {
    if constexpr (kWide) {
      u32 at = 1;
      if (hashed(row.cls)) {
        ++row.used;
        at = probe(r, row.cls, s);
      } else {
        while (r[at]) at += 2;
      }
      r[at - 1] = s;
      r[at] = target;
      if (listed(row)) link_first(r, row, at / 2, [r](u32 word, u32 value) { r[word] = value; });
    } else if (row.cls == direct_) {
      r[s] = target;
    } else {
      while (*r) ++r;
      *r = target << 8 | s;
    }
  }
  /// Puts an absent symbol into the row if there is room.
  bool put(RowRef& row, u32 s, u32 target) {
    const u32* r = words(row);
    if constexpr (kWide) {
      u32 at;
      if (hashed(row.cls)) {
        if (row.used >= capacity(row.cls) / 4 * 3) return false;
        ++row.used;
        at = probe(r, row.cls, s);
      } else {
        u32 i = 0;
        while (i < capacity(row.cls) && r[2 * i + 1]) ++i;
        if (i == capacity(row.cls)) return false;
        at = 2 * i + 1;
      }
      poke(row, at - 1, s);
      poke(row, at, target);
      if (listed(row))
        link_first(words(row), row, at / 2, [&](u32 word, u32 value) { poke(row, word, value); });
    } else if (row.cls == direct_) {
      poke(row, s, target);
    } else {
      u32 i = 0;
      while (i < capacity(row.cls) && r[i]) ++i;
      if (i == capacity(row.cls)) return false;
      poke(row, i, target << 8 | s);
    }
    return true;
  }

  /// With lists, the words between those of the longest plain row and of the shortest list.
  u32 size_of_none() const { return ordered_ ? 2 * word_count(kListedClass - 1) : 0; }
  /// The class of rows of that many words.
  u32 class_of(u32 words) const {
    return static_cast<u32>(std::countr_zero(words / word_count(0))) -
           (ordered_ && words > size_of_none());
  }

  RowRef make_class(u32 cls) {
    const RowRef row = allocate(cls);
    if (!is_big(cls)) {
      note_words(row);
      std::memset(mut_words(row), 0, std::size_t{word_count(cls)} * 4);
    }
    if (listed(cls)) {  // taken by no symbol
      u32* r = mut_words(row);
      r[0] = r[1] = kNoSymbol;
    }
    return row;
  }

  RowRef allocate(u32 cls) {
    if (is_big(cls)) {
      if (journal_) journal_->forget();  // blocks come and go rarely: not worth undoing
      auto block = std::make_shared<Buffer<u32>>();
      block->fill(word_count(cls), 0);
      for (u32 i = 0; i < big_.size(); ++i)
        if (!big_[i]) {
          big_[i] = std::move(block);
          return {cls, i, 0};
        }
      big_.push_back(std::move(block));
      return {cls, static_cast<u32>(big_.size() - 1), 0};
    }
    if (const u32 offset = free_[cls]) {
      set_free(cls, words_[std::size_t{offset} * 2]);
      return {cls, offset, 0};
    }
    const u32 n = word_count(cls);
    std::size_t at = words_.size();
    while (at & (n - 1)) {  // the gap before an aligned row becomes smaller rows
      u32 gap = u32{1} << std::countr_zero(at);
      if (gap == size_of_none()) gap /= 2;
      words_.resize(at + gap);
      if (gap >= word_count(0)) recycle({class_of(gap), static_cast<u32>(at / 2), 0});
      at += gap;
    }
    if (at / 2 >= (kWide ? ~u32{0} : (u32{1} << 31) - 1))
      throw std::length_error("suffix automaton: too many transitions");
    words_.resize(at + n);
    return {cls, static_cast<u32>(at / 2), 0};
  }
  void recycle(RowRef row) {
    if (is_big(row.cls)) {
      if (journal_) journal_->forget();
      big_[row.offset] = nullptr;
      return;
    }
    poke(row, 0, free_[row.cls]);
    set_free(row.cls, row.offset);
  }
  std::size_t big_bytes() const {
    std::size_t total = 0;
    for (const Big& b : big_) total += b ? b->size() * 4 : 0;
    return total;
  }

  Words words_;
  std::array<u32, 32> free_{};
  std::vector<Big> big_;
  u32 sigma_ = 256;  // narrow: the alphabet
  u32 direct_ = 7;   // narrow: the class whose capacity is sigma_
  bool ordered_ = false;
  Journal* journal_ = nullptr;
};

}  // namespace rosakit
