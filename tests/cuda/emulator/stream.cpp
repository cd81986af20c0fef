// Streaming by diagonals under emulation, with a C face for ctypes.
#include "emulator.hpp"
#include "stream.cu"

extern "C" void emulate_extend(const u8* q, const u8* k, const u8* mask, u8* queries, u8* keys,
                               u32* runs, const long long* lengths, int* position, int* length,
                               unsigned streams, unsigned routes, unsigned n, unsigned capacity,
                               unsigned max_length, unsigned min_length) {
  emu::launch({streams, 1, 1}, 64, sizeof(Best), [&] {
    extend_streams(q, k, mask, queries, keys, runs, lengths, position, length, routes, n, capacity,
                   max_length, min_length);
  });
}

extern "C" void emulate_rebuild(const u8* queries, const u8* keys, u32* runs,
                                const long long* lengths, unsigned streams, unsigned routes,
                                unsigned capacity, unsigned max_length) {
  emu::launch({streams, 1, 1}, 64, sizeof(Best), [&] {
    rebuild_runs(queries, keys, runs, lengths, routes, capacity, max_length);
  });
}
