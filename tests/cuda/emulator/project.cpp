// Linear maps of single tokens under emulation, with a C face for ctypes.
#include "emulator.hpp"
#include "format.cuh"
#include "project.cu"

extern "C" void emulate_project(const XReal::type* x, const WReal::type* w0, const WReal::type* w1,
                                const WReal::type* w2, const YReal::type* onto, YReal::type* y,
                                unsigned inputs, unsigned outputs, unsigned parts,
                                unsigned x_token, unsigned x_part, unsigned wide,
                                unsigned tokens) {
  emu::launch({(outputs + 1) / 2, parts, tokens}, 64, 0, [&] {
    project(x, w0, w1, w2, onto, y, inputs, outputs, parts, x_token, x_part, wide);
  });
}
