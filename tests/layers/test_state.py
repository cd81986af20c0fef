"""Streaming states give the numbers of a whole sequence, at every width of symbols."""

from __future__ import annotations

import pytest
import torch

from rosakit import native
from rosakit.layers import RosaAdapter, RosaContext, RosaStates

pytestmark = pytest.mark.skipif(not native.available(), reason="compiled core missing")


@pytest.mark.parametrize("bits", [1, 4, 8, 9, 12])
@pytest.mark.parametrize("unmatched", ["zero", "self", "null"])
def test_chunks_equal_the_whole(bits, unmatched):
    torch.manual_seed(bits)
    adapter = RosaAdapter(24, bits=bits, routes=3, unmatched=unmatched)
    torch.nn.init.normal_(adapter.o_proj.weight)
    if adapter.e_null is not None:
        torch.nn.init.normal_(adapter.e_null)
    u = torch.randn(3, 24)[torch.randint(0, 3, (2, 20))]
    states = RosaStates()
    with torch.no_grad():
        whole = adapter(u, RosaContext())
        parts = [adapter(part, RosaContext(states=states)) for part in u.split([7, 1, 12], dim=1)]
    torch.testing.assert_close(torch.cat(parts, 1), whole)
