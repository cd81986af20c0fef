"""Hash codes: equal for equal contexts, different for others up to chance, the same for ever."""

from __future__ import annotations

import pytest
import torch

from rosakit.layers import RosaAdapter, RosaContext
from rosakit.layers.hashing import code_channels, context_codes, token_windows
from rosakit.ops import suffix_match
from rosakit.symbols import pack


def test_windows_stay_inside_their_segment():
    ids = torch.tensor([[5, 6, 7, 8, 9, 3], [4, 5, 6, 7, 0, 0]])
    starts = torch.tensor([[0, 0, 0, 3, 3, 3], [1, 1, 1, 1, -1, -1]], dtype=torch.int32)
    windows = token_windows(ids, 3, starts)
    assert windows[:, 0].T.tolist() == [
        *([6, 0, 0], [7, 6, 0], [8, 7, 6]),
        *([9, 0, 0], [10, 9, 0], [4, 10, 9]),
    ]
    assert windows[:, 1, 1:4].T.tolist() == [[6, 0, 0], [7, 6, 0], [8, 7, 6]]
    assert not windows[:, 1, 4:].any()
    assert not windows[1:, 1, 1].any()


@pytest.mark.parametrize("order", [1, 2, 5])
def test_equal_codes_mean_equal_contexts(order):
    """16 bits on 600 positions: what is equal by chance is rare, what is equal by right is not."""
    generator = torch.Generator().manual_seed(order)
    ids = torch.randint(0, 3, (1, 600), generator=generator)
    codes = context_codes(token_windows(ids, order), [order], routes=2, bits=16)[0].int()
    contexts = [tuple(ids[0, max(0, i - order + 1) : i + 1].tolist()) for i in range(600)]
    same = torch.tensor([[a == b for b in contexts] for a in contexts])
    for route in codes:
        agree = route[:, None] == route[None]
        assert agree[same].all()
        assert agree[~same].float().mean() < 1e-3
    assert not torch.equal(codes[0], codes[1])


def test_codes_fill_their_alphabet_and_never_change():
    ids = torch.arange(4096)[None]
    codes = context_codes(token_windows(ids, 1), [1], routes=3, bits=8)
    counts = torch.stack([torch.bincount(r.long(), minlength=256) for r in codes[0]])
    assert counts.min() > 2  # 16 expected
    assert counts.max() < 40
    # Adapters that are trained on these codes rely on them.
    assert codes[0, :, :4].tolist() == GOLDEN
    other = context_codes(token_windows(ids, 1), [1], routes=3, bits=8, seed=1)
    assert (other == codes).float().mean() < 0.02


GOLDEN = [[86, 181, 214, 96], [212, 141, 185, 109], [110, 135, 195, 106]]


def test_channels_pack_back_into_codes():
    ids = torch.randint(0, 50, (2, 30), generator=torch.Generator().manual_seed(0))
    for bits in (3, 8, 11):
        codes = context_codes(token_windows(ids, 2), [1, 2], routes=4, bits=bits)
        channels = code_channels(codes, bits, 0.7, torch.float32)
        assert torch.equal(channels.unique(), torch.tensor([-0.7, 0.7]))
        assert torch.equal(pack(channels, bits).int(), codes.int())


def test_the_adapter_reads_where_its_codes_match():
    torch.manual_seed(0)
    ids = torch.randint(0, 4, (2, 50))
    u = torch.randn(2, 50, 24)
    fixed = RosaAdapter(24, bits=8, address="hash", hash_orders=(1, 3), min_length=2)
    refined = RosaAdapter(
        24, bits=8, address="hash", hash_orders=(1, 3), min_length=2, hash_refine=True
    )
    refined.load_state_dict(fixed.state_dict(), strict=False)
    for adapter in (fixed, refined):
        torch.nn.init.normal_(adapter.o_proj.weight, generator=torch.Generator().manual_seed(1))
    a, b = (RosaContext(input_ids=ids, record=True) for _ in range(2))
    # An untrained refinement is the fixed code.
    torch.testing.assert_close(fixed(u, a), refined(u, b))
    codes = context_codes(token_windows(ids, 3), (1, 3), routes=3, bits=8)
    wanted = suffix_match(codes, codes, min_length=2, backend="oracle")
    assert torch.equal(a.matches[0].position, wanted.position)
    assert torch.equal(b.matches[0].position, wanted.position)
    assert (wanted.position >= 0).any()


def test_length_tiers_silence_short_matches():
    ids = torch.tensor([[1, 2, 3, 1, 2, 3, 9]])
    adapter = RosaAdapter(16, bits=8, address="hash", hash_orders=(1,), length_tiers=(1, 3))
    context = RosaContext(input_ids=ids, record=True)
    adapter(torch.randn(1, 7, 16), context)
    assert context.matches[0].position[0].tolist() == [
        [-1, -1, -1, 1, 2, 3, -1],
        [-1, -1, -1, -1, -1, 3, -1],
    ]
