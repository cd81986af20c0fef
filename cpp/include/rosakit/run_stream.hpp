// Run granularity, one position at a time (semantics 2.1).
//
// F(rho, E) is the longest suffix of query runs 0..rho that occurs in key runs 0..E, latest on
// ties. Every position takes a step of a staircase: a new key run raises E, a new query run raises
// rho. With E fixed, or raised together with rho, this is the automaton's own step. When only E
// rises, the match changes only if the new key run ends a string at least as long (growth.hpp).
#pragma once

#include "rosakit/growth.hpp"
#include "rosakit/stream.hpp"

namespace rosakit {

template <class Stream, class Storage>
struct RunStream {
  using Symbol = typename Stream::Tree::Symbol;

  Stream stream;
  Growth growth;
  typename Storage::template Array<Symbol> query_run, key_run;
  typename Storage::template Array<i32> key_start;
  u32 positions = 0;
  i32 newest = -1;  // rcap: the last key run that has started
  i32 known = -1;   // E: the last key run in the automaton
  u64 walked = 0;

  explicit RunStream(unsigned bits = 8) : stream(bits) {}
  void reset(unsigned bits) {
    stream.reset(bits);
    growth.reset();
    query_run.clear();
    key_run.clear();
    key_start.clear();
    positions = 0;
    newest = known = -1;
    walked = 0;
  }

  /// One position. With flip_bits > 0 and `q` starting a run, fills `flips`. Returns whether `q`
  /// started a run.
  bool step(Symbol q, Symbol k, const Rule& rule, unsigned flip_bits, Hit* flips) {
    const bool rose = see_key(k, rule.successor) && append_known();
    const bool fresh = see_query(q);
    if (fresh) {
      if (flip_bits) {
        const bool lengths = rule.min_length > 1 || rule.max_length != kUnlimited;
        walked += stream.flips(q, flip_bits, rule.max_length, flips, lengths);
        for (unsigned m = 0; m < flip_bits; ++m) flips[m] = successor(flips[m]);
      }
      stream.advance(q, rule.max_length);
    } else if (rose) {
      walked += growth.update(stream, query_run, key_run, static_cast<i32>(query_run.size()) - 1,
                              known, rule.max_length);
    }
    return fresh;
  }
  Hit hit() { return successor(stream.hit()); }

  /// A run's hit as a position's: one before the start of the next run; null if there is none yet.
  Hit successor(Hit h) const {
    if (!h.length || h.end >= newest) return {};
    return {key_start[static_cast<u32>(h.end) + 1] - 1, h.length};
  }

  /// Records the key of the next position; whether `known` rose.
  bool see_key(Symbol k, Successor rule) {
    const u32 i = positions++;
    if (!key_run.size() || key_run[key_run.size() - 1] != k) {
      key_run.push_back(k);
      key_start.push_back(static_cast<i32>(i));
      ++newest;
      const i32 e = rule == Successor::strict ? newest : newest - 1;
      if (e >= 0) {
        known = e;
        return true;
      }
    }
    return false;
  }
  bool see_query(Symbol q) {
    if (query_run.size() && query_run[query_run.size() - 1] == q) return false;
    query_run.push_back(q);
    return true;
  }

 private:
  bool append_known() {
    stream.append(key_run[static_cast<u32>(known)]);
    return true;
  }
};

}  // namespace rosakit
