// Streaming by diagonals under emulation, with a C face for ctypes.
#include "emulator.hpp"
#include "format.cuh"
#include "stream.cu"

extern "C" void emulate_extend(const u8* q, const u8* k, const u8* mask, u8* queries, u8* keys,
                               u16* runs, const long long* lengths, int* position, int* length,
                               unsigned streams, unsigned start, unsigned routes, unsigned n,
                               unsigned capacity, unsigned max_length, unsigned min_length) {
  emu::launch({streams, 1, 1}, 64, sizeof(Best), [&] {
    extend_streams(q, k, mask, queries, keys, runs, lengths, position, length, start, routes, n,
                   capacity, max_length, min_length);
  });
}

extern "C" void emulate_step(const Scalar* q, const Scalar* k, const Scalar* v, const EScalar* e0,
                             const EScalar* e1, const EScalar* e_null, const u8* mask, u8* queries,
                             u8* keys, u8* values, u16* runs, const long long* lengths, Scalar* y,
                             int* position, int* length, unsigned streams, unsigned start,
                             unsigned routes, unsigned n, unsigned capacity, unsigned max_length,
                             unsigned min_length, unsigned stride, unsigned unmatched) {
  emu::launch({streams, 1, 1}, 64, sizeof(Best), [&] {
    step_streams(q, k, v, e0, e1, e_null, mask, queries, keys, values, runs, lengths, y, position,
                 length, start, routes, n, capacity, max_length, min_length, stride, unmatched);
  });
}

extern "C" void emulate_rebuild(u8* queries, u8* keys, u16* runs, const long long* lengths,
                                unsigned streams, unsigned start, unsigned routes,
                                unsigned capacity) {
  emu::launch({streams, 1, 1}, 64, sizeof(Best),
              [&] { rebuild_runs(queries, keys, runs, lengths, start, routes, capacity); });
}
