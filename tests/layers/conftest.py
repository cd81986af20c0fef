"""What tests of states in GPU memory share."""

from __future__ import annotations

import pytest

from rosakit.cuda.stream import bytes_a_symbol
from rosakit.layers import device_state
from rosakit.layers import state as state_module
from tests.cuda import emulated
from tests.cuda.gpu import GPU


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=GPU)])
def device(request, monkeypatch):
    """A GPU, or the CPU with the kernels emulated and every state taken for one on a GPU."""
    if request.param == "cpu":
        emulated.stream_memory(monkeypatch)
        allowed = {"auto": 16, "cuda": None, "cpu": 0}
        monkeypatch.setattr(
            state_module, "positions_on_device", lambda a, batch: allowed[a.backend]
        )
    else:
        # 16 positions of two rows of three routes.
        monkeypatch.setattr(device_state, "AUTO_BYTES", int(16 * 2 * 3 * bytes_a_symbol(4)))
    return request.param
