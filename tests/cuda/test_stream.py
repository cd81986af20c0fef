"""Streaming state on a GPU: chunks equal the whole sequence, as the core's memory does.

Without a GPU the kernels run in the emulator and the oracle stands in for the matcher.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

from rosakit import cuda
from rosakit.cuda.stream import StreamMemory
from rosakit.errors import InvalidInputError, InvalidTypeError
from rosakit.ops.oracle import suffix_match_oracle
from tests.cuda import emulated
from tests.cuda.test_match_emulated import FAMILIES, pairs

DEVICES = [
    "cpu",
    pytest.param(
        "cuda",
        marks=[
            pytest.mark.gpu,
            pytest.mark.skipif(
                not cuda.available(), reason=f"no GPU engine: {cuda.unavailable_reason()}"
            ),
        ],
    ),
]
ROUTES = len(FAMILIES)


@pytest.fixture(params=DEVICES)
def device(request, monkeypatch):
    if request.param == "cpu":
        emulated.stream_memory(monkeypatch)
    return request.param


def memory(device, batch=1, **options):
    return StreamMemory(batch, ROUTES, bits=4, device=device, **options)


def streams(length, bits, seed, device):
    return [torch.from_numpy(x).to(device) for x in pairs(length, bits, seed)]


def chunks(total, seed):
    """Lengths that add up to `total`, some longer than a step takes."""
    rng = np.random.default_rng(seed)
    sizes = []
    while sum(sizes) < total:
        sizes.append(int(min(rng.choice([1, 1, 2, 7, 30]), total - sum(sizes))))
    return sizes


@pytest.mark.parametrize(
    "rules", [{}, {"max_length": 3}, {"min_length": 3}, {"min_length": 2, "max_length": 7}]
)
@pytest.mark.parametrize("bits", [1, 4])
def test_chunks_equal_the_whole_sequence(device, rules, bits):
    q, k = streams(140, bits, bits, device)
    right = suffix_match_oracle(q.cpu(), k.cpu(), **rules)
    state = memory(device, **rules)
    at = 0
    for n in chunks(140, bits):
        got = state.extend(q[..., at : at + n], k[..., at : at + n])
        assert torch.equal(got.position.cpu(), right.position[..., at : at + n]), (at, n)
        assert torch.equal(got.length.cpu(), right.length[..., at : at + n]), (at, n)
        at += n
    assert state.lengths.tolist() == [140]


def test_padding_leaves_no_trace(device):
    """Rows of a batch with their own masks equal the rows alone."""
    q, k = streams(90, 2, 3, device)
    masks = torch.rand(2, 90, generator=torch.Generator().manual_seed(0)) < 0.7
    state = memory(device, 2)
    parts, at = [], 0
    for n in chunks(90, 3):
        piece = [x[..., at : at + n].repeat(2, 1, 1) for x in (q, k)]
        parts.append(state.extend(*piece, mask=masks[:, at : at + n].to(device)))
        at += n
    position = torch.cat([p.position for p in parts], 2).cpu()
    length = torch.cat([p.length for p in parts], 2).cpu()
    for row, mask in enumerate(masks):
        right = suffix_match_oracle(q.cpu()[..., mask], k.cpu()[..., mask])
        assert torch.equal(position[row][:, mask], right.position[0])
        assert torch.equal(length[row][:, mask], right.length[0])
        assert (position[row][:, ~mask] == -1).all()
        assert not length[row][:, ~mask].any()
    assert torch.equal(state.lengths.cpu(), masks.sum(1))


def test_truncate_fork_and_reordering(device):
    q, k = streams(120, 1, 5, device)
    right = suffix_match_oracle(q.cpu(), k.cpu())
    state = memory(device, 2)
    both = [x.repeat(2, 1, 1) for x in (q, k)]
    state.extend(*(x[..., :70] for x in both))
    other = state.fork()
    state.extend(*(x[..., 70:73] for x in both))
    state.truncate(torch.tensor([60, 73]))
    assert state.lengths.tolist() == [60, 73]
    swapped = state.index_select(torch.tensor([1, 0]))
    step = [torch.cat([x[..., 73:74], x[..., 60:61]]) for x in (q, k)]
    got = swapped.extend(*step)
    assert torch.equal(got.position[0].cpu(), right.position[0, :, 73:74])
    assert torch.equal(got.position[1].cpu(), right.position[0, :, 60:61])
    got = other.extend(*(x[..., 70:120] for x in both))
    assert torch.equal(got.length[1].cpu(), right.length[0, :, 70:120])
    other.truncate(5)
    got = other.extend(*(x[..., 5:6] for x in both))
    assert torch.equal(got.position[0].cpu(), right.position[0, :, 5:6])
    other.reset()
    got = other.extend(*(x[..., :40] for x in both))
    assert torch.equal(got.position[1].cpu(), right.position[0, :, :40])


def test_steps_that_are_taken_back_take_no_room(device):
    """Speculative decoding: chunks are added and cropped again and again."""
    q, k = streams(60, 2, 4, device)
    right = suffix_match_oracle(q.cpu(), k.cpu())
    state = memory(device)
    state.extend(q[..., :20], k[..., :20])
    held = state.nbytes
    for _ in range(40):
        state.extend(q[..., 20:26], k[..., 20:26])
        state.truncate(torch.tensor([20]))
        assert state.most == 20
    assert state.nbytes == held
    got = state.extend(q[..., 20:60], k[..., 20:60])
    assert torch.equal(got.position.cpu(), right.position[..., 20:60])


def test_refusals():
    with pytest.raises(InvalidInputError, match="bits"):
        StreamMemory(1, 1, bits=9, device="cpu")
    state = StreamMemory(1, 2, bits=4, device="cpu")
    x = torch.zeros(1, 2, 3, dtype=torch.uint8)
    with pytest.raises(InvalidInputError, match=r"\[B, R\]"):
        state.extend(x[:, :1], x[:, :1])
    with pytest.raises(InvalidTypeError, match="uint8"):
        state.extend(x.int(), x.int())
    with pytest.raises(InvalidInputError, match="mask"):
        state.extend(x, x, mask=torch.ones(1, 2, dtype=torch.bool))
