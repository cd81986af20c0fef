#include "rosakit/lanes.hpp"

#include "rosakit/compact_lane.hpp"
#include "rosakit/typed_lane.hpp"

namespace rosakit {
namespace {

template <bool kWide>
std::shared_ptr<Lane> make_general_of(const MemoryOptions& o) {
  const Budget budget{o.walk_per_symbol, o.walk_base};
  if (o.rule.granularity == Granularity::run)
    return std::make_shared<TypedLane<kWide, true>>(o.rule, o.bits, budget);
  return std::make_shared<TypedLane<kWide, false>>(o.rule, o.bits, budget);
}
bool narrow(const MemoryOptions& o) {
  return o.bits && o.bits <= 8;
}
std::shared_ptr<Lane> make_general(const MemoryOptions& o) {
  return narrow(o) ? make_general_of<false>(o) : make_general_of<true>(o);
}
}  // namespace

std::shared_ptr<Lane> make_lane(const MemoryOptions& o) {
  if (o.bits && o.bits <= CompactLane::kMaxBits && o.rule.granularity == Granularity::token &&
      !o.max_bytes)
    return std::make_shared<CompactLane>(o.rule, Budget{o.walk_per_symbol, o.walk_base});
  return make_general(o);
}

std::shared_ptr<Lane> generalise(const Lane& lane, std::size_t more, const MemoryOptions& o,
                                 bool ordered) {
  const std::size_t symbols = lane.length() - lane.start() + more;
  const bool fits = narrow(o) && symbols <= Automaton<false>::kMaxSymbols;
  auto general = fits ? make_general_of<false>(o) : make_general_of<true>(o);
  if (ordered) general->keep_order();
  return replay(lane, lane.start(), lane.length(), std::move(general), o);
}

std::shared_ptr<Lane> replay(const Lane& from, u32 first, u32 last, std::shared_ptr<Lane> to,
                             const MemoryOptions& o) {
  to->skip(first);
  if (from.ordered()) to->keep_order();
  i32 position, length;
  for (u32 i = first; i < last; ++i) {
    const bool undoable = i + Lane::kUndoDepth >= last;
    if (to->step(from.query(i), from.key(i), undoable, &position, &length)) continue;
    to = generalise(*to, last - i, o);
    to->step(from.query(i), from.key(i), undoable, &position, &length);
  }
  return to;
}

}  // namespace rosakit
