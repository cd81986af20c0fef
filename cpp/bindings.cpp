// The Python face of the core: thin, checked by rosakit.native before it is called.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/vector.h>

#include "rosakit/bitflip.hpp"
#include "rosakit/bitflip_tied.hpp"
#include "rosakit/matcher.hpp"
#include "rosakit/memory.hpp"
#include "rosakit/page_pool.hpp"
#include "rosakit/pool.hpp"

namespace nb = nanobind;
using namespace rosakit;

namespace {

template <class T, int N>
using In = nb::ndarray<const T, nb::ndim<N>, nb::c_contig, nb::device::cpu>;
template <class T, int N>
using Out = nb::ndarray<T, nb::ndim<N>, nb::c_contig, nb::device::cpu>;
template <class T, int N>
using MaybeIn = std::optional<In<T, N>>;

Rule make_rule(bool run, bool strict, u32 max_length, u32 min_length) {
  return {run ? Granularity::run : Granularity::token,
          strict ? Successor::strict : Successor::available, max_length, min_length};
}

void expect(bool ok, const char* what) {
  if (!ok) throw nb::value_error(what);
}

template <class T>
void match_arrays(In<T, 3> q, In<T, 3> k, MaybeIn<i32, 2> starts, Out<i32, 3> position,
                  Out<i32, 3> length, std::optional<Out<i32, 4>> flipped, bool run, bool strict,
                  u32 max_length, u32 min_length, MaybeIn<u8, 2> flip_at) {
  MatchCall<T> call;
  call.shape = {q.shape(0), q.shape(1), q.shape(2)};
  const auto same = [&](const auto& a) {
    return a.shape(0) == q.shape(0) && a.shape(1) == q.shape(1) && a.shape(2) == q.shape(2);
  };
  expect(same(k) && same(position) && same(length) && (!flipped || same(*flipped)),
         "q, k and the results must have one shape [B, R, T]");
  expect(!starts || (starts->shape(0) == q.shape(0) && starts->shape(1) == q.shape(2)),
         "segment_starts must have shape [B, T]");
  expect(!flip_at || (flip_at->shape(0) == q.shape(0) && flip_at->shape(1) == q.shape(2)),
         "flip_at must have shape [B, T]");
  call.q = q.data();
  call.k = k.data();
  call.segment_starts = starts ? starts->data() : nullptr;
  call.flip_at = flip_at ? flip_at->data() : nullptr;
  call.position = position.data();
  call.length = length.data();
  call.flipped = flipped ? flipped->data() : nullptr;
  call.flip_bits = flipped ? static_cast<unsigned>(flipped->shape(3)) : 0;
  expect(call.flip_bits <= 16, "at most 16 bits can be flipped");
  call.rule = make_rule(run, strict, max_length, min_length);
  match(call);
}

template <class T>
void def_match(nb::module_& m) {
  m.def("match", &match_arrays<T>, nb::arg("q").noconvert(), nb::arg("k").noconvert(),
        nb::arg("segment_starts").noconvert().none(), nb::arg("position").noconvert(),
        nb::arg("length").noconvert(), nb::arg("flipped").noconvert().none(), nb::arg("run"),
        nb::arg("strict"), nb::arg("max_length"), nb::arg("min_length"),
        nb::arg("flip_at").noconvert().none() = nb::none(),
        nb::call_guard<nb::gil_scoped_release>());
}

template <class T>
void bitflip_arrays(In<T, 3> q, In<T, 3> k, In<T, 3> v, MaybeIn<i32, 2> starts, In<double, 4> grad,
                    In<double, 2> e0, In<double, 2> e1, MaybeIn<double, 2> e_null,
                    bool unmatched_self, Out<double, 4> credit_q, Out<double, 4> credit_k,
                    u32 max_length, u32 min_length) {
  BitflipCall<T> call;
  call.batch = q.shape(0), call.routes = q.shape(1), call.time = q.shape(2);
  call.bits = static_cast<unsigned>(grad.shape(3));
  const auto stream = [&](const auto& a) {
    return a.shape(0) == call.batch && a.shape(1) == call.routes && a.shape(2) == call.time;
  };
  const auto rows = [&](const auto& a) { return stream(a) && a.shape(3) == call.bits; };
  const auto level = [&](const auto& a) {
    return a.shape(0) == call.routes && a.shape(1) == call.bits;
  };
  expect(stream(k) && stream(v) && rows(grad) && rows(credit_q) && rows(credit_k),
         "q, k, v must have shape [B, R, T], grad and the results [B, R, T, M]");
  expect(level(e0) && level(e1) && (!e_null || level(*e_null)),
         "e0, e1, e_null must have shape [R, M]");
  expect(call.bits >= 1 && call.bits <= 16, "1 to 16 bits can be flipped");
  expect(!starts || (starts->shape(0) == call.batch && starts->shape(1) == call.time),
         "segment_starts must have shape [B, T]");
  call.q = q.data(), call.k = k.data(), call.v = v.data();
  call.segment_starts = starts ? starts->data() : nullptr;
  call.grad = grad.data(), call.e0 = e0.data(), call.e1 = e1.data();
  call.e_null = e_null ? e_null->data() : nullptr;
  call.unmatched_self = unmatched_self;
  call.credit_q = credit_q.data(), call.credit_k = credit_k.data();
  call.max_length = max_length, call.min_length = min_length;
  bitflip(call);
}

template <class T>
void def_bitflip(nb::module_& m) {
  m.def("bitflip", &bitflip_arrays<T>, nb::arg("q").noconvert(), nb::arg("k").noconvert(),
        nb::arg("v").noconvert(), nb::arg("segment_starts").noconvert().none(),
        nb::arg("grad").noconvert(), nb::arg("e0").noconvert(), nb::arg("e1").noconvert(),
        nb::arg("e_null").noconvert().none(), nb::arg("unmatched_self"),
        nb::arg("credit_q").noconvert(), nb::arg("credit_k").noconvert(), nb::arg("max_length"),
        nb::arg("min_length"), nb::call_guard<nb::gil_scoped_release>());
}

template <class T>
void bitflip_tied_arrays(In<T, 3> x, In<T, 3> v, bool flip_values, MaybeIn<i32, 2> starts,
                         In<double, 4> grad, In<double, 2> e0, In<double, 2> e1,
                         MaybeIn<double, 2> e_null, bool unmatched_self, Out<double, 4> credit,
                         u32 max_length, u32 min_length) {
  TiedBitflipCall<T> call;
  call.batch = x.shape(0), call.routes = x.shape(1), call.time = x.shape(2);
  call.bits = static_cast<unsigned>(grad.shape(3));
  const auto stream = [&](const auto& a) {
    return a.shape(0) == call.batch && a.shape(1) == call.routes && a.shape(2) == call.time;
  };
  const auto level = [&](const auto& a) {
    return a.shape(0) == call.routes && a.shape(1) == call.bits;
  };
  expect(stream(v) && stream(grad) && stream(credit) && credit.shape(3) == call.bits,
         "x, v must have shape [B, R, T], grad and the result [B, R, T, M]");
  expect(level(e0) && level(e1) && (!e_null || level(*e_null)),
         "e0, e1, e_null must have shape [R, M]");
  expect(call.bits >= 1 && call.bits <= 16, "1 to 16 bits can be flipped");
  expect(!starts || (starts->shape(0) == call.batch && starts->shape(1) == call.time),
         "segment_starts must have shape [B, T]");
  call.x = x.data(), call.v = v.data(), call.flip_values = flip_values;
  call.segment_starts = starts ? starts->data() : nullptr;
  call.grad = grad.data(), call.e0 = e0.data(), call.e1 = e1.data();
  call.e_null = e_null ? e_null->data() : nullptr;
  call.unmatched_self = unmatched_self;
  call.credit = credit.data();
  call.max_length = max_length, call.min_length = min_length;
  bitflip_tied(call);
}

template <class T>
void def_bitflip_tied(nb::module_& m) {
  m.def("bitflip_tied", &bitflip_tied_arrays<T>, nb::arg("x").noconvert(),
        nb::arg("v").noconvert(), nb::arg("flip_values"),
        nb::arg("segment_starts").noconvert().none(), nb::arg("grad").noconvert(),
        nb::arg("e0").noconvert(), nb::arg("e1").noconvert(), nb::arg("e_null").noconvert().none(),
        nb::arg("unmatched_self"), nb::arg("credit").noconvert(), nb::arg("max_length"),
        nb::arg("min_length"), nb::call_guard<nb::gil_scoped_release>());
}

void successors_arrays(In<i32, 2> tokens, MaybeIn<i32, 2> starts, Out<i32, 3> position,
                       Out<i32, 3> length, u32 max_length, u32 min_length) {
  SuccessorCall call;
  const auto same = [&](const auto& a) {
    return a.shape(0) == tokens.shape(0) && a.shape(1) == tokens.shape(1);
  };
  expect(same(position) && same(length) && position.shape(2) == length.shape(2) &&
             (!starts || same(*starts)),
         "tokens and segment_starts must have shape [B, T], the results [B, T, K]");
  call.tokens = tokens.data();
  call.segment_starts = starts ? starts->data() : nullptr;
  call.position = position.data();
  call.length = length.data();
  call.candidates = static_cast<unsigned>(position.shape(2));
  call.batch = tokens.shape(0);
  call.time = tokens.shape(1);
  call.max_length = max_length;
  call.min_length = min_length;
  best_successors(call);
}

template <class T>
void extend_arrays(SuffixMemory& memory, In<T, 3> q, In<T, 3> k, MaybeIn<u8, 2> mask,
                   Out<i32, 4> position, Out<i32, 4> length, bool candidates) {
  const MemoryOptions& o = memory.options();
  expect(q.shape(0) == o.batch && q.shape(1) == o.routes,
         "q must have shape [B, R, n] of the memory");
  const auto same = [&](const auto& a) {
    return a.shape(0) == q.shape(0) && a.shape(1) == q.shape(1) && a.shape(2) == q.shape(2);
  };
  expect(same(k) && same(position) && same(length) && position.shape(3) == length.shape(3),
         "q, k and the results must have one shape [B, R, n]");
  expect(!mask || (mask->shape(0) == q.shape(0) && mask->shape(1) == q.shape(2)),
         "mask must have shape [B, n]");
  expect(candidates || position.shape(3) == 1, "one result a position without candidates");
  memory.extend(Chunk<T>{q.data(), k.data(), mask ? mask->data() : nullptr, position.data(),
                         length.data(), q.shape(2),
                         candidates ? static_cast<unsigned>(position.shape(3)) : 0});
}

/// One position of every stream, into the caller's arrays: nothing is allocated on the way.
template <class T>
void step_arrays(SuffixMemory& memory, In<T, 2> q, In<T, 2> k, MaybeIn<u8, 1> mask,
                 Out<i32, 2> position, Out<i32, 2> length) {
  const MemoryOptions& o = memory.options();
  const auto fits = [&](const auto& a) { return a.shape(0) == o.batch && a.shape(1) == o.routes; };
  expect(fits(q) && fits(k) && fits(position) && fits(length),
         "q, k and the results of a step must have the shape [B, R] of the memory");
  expect(!mask || mask->shape(0) == o.batch, "the mask of a step must have shape [B]");
  memory.extend(Chunk<T>{q.data(), k.data(), mask ? mask->data() : nullptr, position.data(),
                         length.data(), 1, 0});
}

template <class T, class C>
void def_extend(C& cls) {
  cls.def("step", &step_arrays<T>, nb::arg("q").noconvert(), nb::arg("k").noconvert(),
          nb::arg("mask").noconvert().none(), nb::arg("position").noconvert(),
          nb::arg("length").noconvert(), nb::call_guard<nb::gil_scoped_release>());
  cls.def("extend", &extend_arrays<T>, nb::arg("q").noconvert(), nb::arg("k").noconvert(),
          nb::arg("mask").noconvert().none(), nb::arg("position").noconvert(),
          nb::arg("length").noconvert(), nb::arg("candidates"),
          nb::call_guard<nb::gil_scoped_release>());
}

}  // namespace

NB_MODULE(_core, m) {
  m.doc() = "C++ core of rosakit: exact suffix matching and streaming suffix memory.";
  m.def("num_threads", &num_threads);
  m.def("pages_copied", &pages_copied);
  m.def("set_num_threads", &set_num_threads, nb::call_guard<nb::gil_scoped_release>());
  def_match<u8>(m);
  def_match<u16>(m);
  def_match<i32>(m);
  def_bitflip<u8>(m);
  def_bitflip<u16>(m);
  def_bitflip_tied<u8>(m);
  def_bitflip_tied<u16>(m);
  m.def("best_successors", &successors_arrays, nb::arg("tokens").noconvert(),
        nb::arg("segment_starts").noconvert().none(), nb::arg("position").noconvert(),
        nb::arg("length").noconvert(), nb::arg("max_length"), nb::arg("min_length"),
        nb::call_guard<nb::gil_scoped_release>());

  nb::class_<SuffixMemory> memory(m, "SuffixMemory");
  memory.def(
      "__init__",
      [](SuffixMemory* self, std::size_t batch, std::size_t routes, unsigned bits, bool run,
         bool strict, u32 max_length, u32 min_length, u64 max_bytes) {
        MemoryOptions o{batch, routes, bits, make_rule(run, strict, max_length, min_length)};
        o.max_bytes = max_bytes;
        new (self) SuffixMemory(o);
      },
      nb::arg("batch"), nb::arg("routes"), nb::arg("bits"), nb::arg("run"), nb::arg("strict"),
      nb::arg("max_length"), nb::arg("min_length"), nb::arg("max_bytes"));
  def_extend<u8>(memory);
  def_extend<u16>(memory);
  def_extend<i32>(memory);
  memory
      .def("lengths",
           [](const SuffixMemory& self) {
             return std::vector<i64>(self.lengths().begin(), self.lengths().end());
           })
      .def("starts",
           [](const SuffixMemory& self) {
             return std::vector<i64>(self.starts().begin(), self.starts().end());
           })
      .def(
          "index_select",
          [](const SuffixMemory& self, const std::vector<i64>& rows) {
            return self.index_select(rows);
          },
          nb::call_guard<nb::gil_scoped_release>())
      .def("truncate", &SuffixMemory::truncate, nb::call_guard<nb::gil_scoped_release>())
      .def("symbol", &SuffixMemory::symbol)
      .def("live_bytes", &SuffixMemory::live_bytes)
      .def("reserved_bytes", &SuffixMemory::reserved_bytes)
      .def("options",
           [](const SuffixMemory& self) {
             const MemoryOptions& o = self.options();
             return nb::make_tuple(
                 o.batch, o.routes, o.bits, o.rule.granularity == Granularity::run,
                 o.rule.successor == Successor::strict, o.rule.max_length, o.rule.min_length);
           })
      .def("serialize",
           [](const SuffixMemory& self) {
             std::string bytes;
             {
               nb::gil_scoped_release released;
               bytes = self.serialize();
             }
             return nb::bytes(bytes.data(), bytes.size());
           })
      .def_static("deserialize", [](nb::bytes bytes) {
        const std::span<const char> view(bytes.c_str(), bytes.size());
        nb::gil_scoped_release released;
        return SuffixMemory::deserialize(view);
      });
}
