// Latest ends with a worst-case bound: a link-cut tree over the suffix links (Sleator & Tarjan,
// 1983).
//
// Appending a key makes its position the latest end of every state on the path from the new state
// to the root. Walking the path costs its length, which periodic streams make linear. Here it is
// one `access`: the states of a solid path always share one latest end, kept at the root of the
// path's splay tree, so marking the whole path is O(log T) amortised, and so is reading one state's
// end. (Larsson, "Most recent match queries in on-line suffix trees", 2014, treats the same
// problem.)
#pragma once

#include "rosakit/journal.hpp"
#include "rosakit/storage.hpp"

namespace rosakit {

/// Nodes are states; 0, the root of the suffix links, stands for "none": its end is never asked
/// for.
template <class Storage>
class LinkCut {
 public:
  // Areas of the journal: a node's four words, and the groups of the last mark.
  static constexpr u32 kAreaFirst = 4, kAreaLast = 7, kAreaGroup = 24;
  static constexpr bool is_area(u32 area) {
    return (area >= kAreaFirst && area <= kAreaLast) || area == kAreaGroup;
  }

  void clear() {
    nodes_.clear();
    groups_.clear();
  }
  u32 size() const { return static_cast<u32>(nodes_.size()); }
  void resize(u32 n) { nodes_.resize(n); }
  void set_journal(Journal* journal) { journal_ = journal; }

  /// Adds state size() as a path of its own under `parent`.
  void add(u32 parent, i32 value) { nodes_.push_back({0, 0, parent, value}); }

  /// Adds state size() between `below` and its parent.
  void add_above(u32 below) {
    splay(below);
    const u32 fresh = size();
    const u32 upper = nodes_[below].left;
    nodes_.push_back({upper, 0, below, 0});
    if (upper) set(upper, &Node::parent, fresh);
    set(below, &Node::left, fresh);
  }

  /// Puts the path whose only state is `u` under `parent`.
  void hang(u32 u, u32 parent) { set(u, &Node::parent, parent); }

  /// Makes `value` the latest end of `u` and of everything above it.
  void mark(u32 u, i32 value) {
    forget_groups();
    splay(u);
    detach_lower(u);
    note_group(u);
    for (u32 w = u, p; (p = nodes_[w].parent) != 0; w = p) {
      ++steps_;
      splay(p);
      detach_lower(p);
      set(p, &Node::right, w);
      note_group(p);
    }
    splay(u);
    set(u, &Node::value, value);
  }

  /// From the next mark on, `groups` is kept.
  void keep_groups() { grouped_ = true; }
  /// The states last marked fall into groups of equal latest ends before: the lowest state of each
  /// group, downmost group first.
  const Buffer<u32>& groups() const { return groups_; }
  void resize_groups(u32 n) { groups_.resize(n); }

  i32 latest(u32 u) {
    splay(u);
    return nodes_[u].value;
  }

  /// The lowest state above `u` on its solid path that is `wide`, or 0. What is above a wide state
  /// must be wide as well. The states just marked form one solid path.
  template <class F>
  u32 lowest_above(u32 u, F&& wide) {
    splay(u);
    u32 best = 0, last = u;
    for (u32 w = nodes_[u].left; w; ++steps_) {
      last = w;
      if (wide(w)) best = w;
      w = best == w ? nodes_[w].right : nodes_[w].left;
    }
    splay(last);
    return best;
  }

  /// Rotations, changes of paths and steps of searches so far.
  u64 steps() const { return steps_; }

  void undo(const Journal::Entry& e) {
    if (e.area == kAreaGroup) {
      if (e.index >= groups_.size()) groups_.resize(e.index + 1);
      groups_[e.index] = e.old;
      return;
    }
    Node& n = nodes_.mut(e.index);
    if (e.area == kAreaFirst) n.left = e.old;
    else if (e.area == kAreaFirst + 1) n.right = e.old;
    else if (e.area == kAreaFirst + 2) n.parent = e.old;
    else n.value = static_cast<i32>(e.old);
  }

  std::size_t live_bytes() const { return nodes_.live_bytes() + groups_.size() * sizeof(u32); }
  std::size_t reserved_bytes() const {
    return nodes_.reserved_bytes() + groups_.capacity() * sizeof(u32);
  }

 private:
  /// In a splay tree, left is nearer the root of the suffix links. `parent` of a splay tree's root
  /// is the state above the path's top, which does not count it among its children.
  struct Node {
    u32 left, right, parent;
    i32 value;  // valid at the root of a splay tree
  };

  template <class Field, class Value>
  void set(u32 u, Field Node::* field, Value value) {
    Node& n = nodes_.mut(u);
    if constexpr (Storage::template Array<Node>::kShared)
      if (u < journal_->state_floor()) {
        const auto offset = static_cast<u32>(reinterpret_cast<const char*>(&(n.*field)) -
                                             reinterpret_cast<const char*>(&n));
        journal_->note(kAreaFirst + offset / 4, u, static_cast<u32>(n.*field));
      }
    n.*field = value;
  }
  void forget_groups() {
    if constexpr (Storage::template Array<Node>::kShared)
      if (journal_->state_floor())
        for (u32 i = 0; i < groups_.size(); ++i) journal_->note(kAreaGroup, i, groups_[i]);
    groups_.clear();
  }
  void note_group(u32 lowest) {
    if (grouped_) groups_.push_back(lowest);
  }
  bool is_top(u32 u) const {
    const u32 p = nodes_[u].parent;
    return !p || (nodes_[p].left != u && nodes_[p].right != u);
  }
  void detach_lower(u32 u) {
    if (const u32 r = nodes_[u].right) {
      set(r, &Node::value, nodes_[u].value);
      set(u, &Node::right, 0u);
    }
  }
  void rotate(u32 x) {
    ++steps_;
    const u32 y = nodes_[x].parent, z = nodes_[y].parent;
    if (is_top(y)) {
      set(x, &Node::value, nodes_[y].value);
    } else if (nodes_[z].left == y) {
      set(z, &Node::left, x);
    } else {
      set(z, &Node::right, x);
    }
    if (nodes_[y].left == x) {
      const u32 b = nodes_[x].right;
      set(y, &Node::left, b);
      if (b) set(b, &Node::parent, y);
      set(x, &Node::right, y);
    } else {
      const u32 b = nodes_[x].left;
      set(y, &Node::right, b);
      if (b) set(b, &Node::parent, y);
      set(x, &Node::left, y);
    }
    set(y, &Node::parent, x);
    set(x, &Node::parent, z);
  }
  void splay(u32 x) {
    while (!is_top(x)) {
      const u32 y = nodes_[x].parent;
      if (!is_top(y)) {
        const u32 z = nodes_[y].parent;
        rotate((nodes_[y].left == x) == (nodes_[z].left == y) ? y : x);
      }
      rotate(x);
    }
  }

  typename Storage::template Array<Node> nodes_;
  Buffer<u32> groups_;
  bool grouped_ = false;
  Journal* journal_ = nullptr;
  u64 steps_ = 0;
};

}  // namespace rosakit
