// Which lane a stream gets, and how it passes from one kind to the other.
#pragma once

#include "rosakit/lane.hpp"
#include "rosakit/memory.hpp"

namespace rosakit {

/// An empty lane for the memory's options. Under a byte budget only general lanes are used: the
/// change from one kind to the other would need room for both at once.
std::shared_ptr<Lane> make_lane(const MemoryOptions& o);

/// A general lane in the place of one that refuses to go on, with room for `more` symbols;
/// `ordered` (or if `lane` is): one that keeps successors in order.
std::shared_ptr<Lane> generalise(const Lane& lane, std::size_t more, const MemoryOptions& o,
                                 bool ordered = false);

/// Feeds the symbols first..last of `from` to the empty lane `to`, as a stream that starts there;
/// returns the lane that took them.
std::shared_ptr<Lane> replay(const Lane& from, u32 first, u32 last, std::shared_ptr<Lane> to,
                             const MemoryOptions& o);

}  // namespace rosakit
