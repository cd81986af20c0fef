"""Streaming state on a GPU: chunks equal the whole sequence, as the core's memory does.

Without a GPU the kernels run in the emulator and the oracle stands in for the matcher.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

from rosakit import cuda, symbols
from rosakit.cuda.stream import StreamMemory
from rosakit.errors import InvalidInputError, InvalidTypeError
from rosakit.ops.oracle import suffix_match_oracle
from rosakit.ops.retrieve import retrieve_forward
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


@pytest.fixture
def saturating(monkeypatch):
    """Stored runs stop at 5, so that the history has to say which match is longest."""
    emulated.stream_memory(monkeypatch, saturated=5)


@pytest.mark.parametrize("bits", [1, 4, 8])
@pytest.mark.parametrize("rules", [{}, {"max_length": 9}, {"max_length": 3}, {"min_length": 7}])
def test_saturated_runs_are_settled_by_the_history(saturating, bits, rules):
    q, k = streams(130, bits, bits, "cpu")
    right = suffix_match_oracle(q, k, **rules)
    state = StreamMemory(1, ROUTES, bits=bits, device="cpu", **rules)
    at = 0
    for n in chunks(130, 7):
        got = state.extend(q[..., at : at + n], k[..., at : at + n])
        assert torch.equal(got.position, right.position[..., at : at + n]), (at, n)
        assert torch.equal(got.length, right.length[..., at : at + n]), (at, n)
        at += n


@pytest.mark.gpu
@pytest.mark.skipif(not cuda.available(), reason=f"no GPU engine: {cuda.unavailable_reason()}")
def test_runs_beyond_sixteen_bits():
    """A constant stream, a periodic one and one with a break: matches longer than 65535."""
    length = 70_000
    q = torch.zeros(1, 3, length + 12, dtype=torch.uint8, device="cuda")
    q[0, 1] = torch.arange(length + 12, device="cuda") % 3
    q[0, 2, 1000] = 1
    state = StreamMemory(1, 3, bits=4, device="cuda")
    state.extend(q[..., :length], q[..., :length])
    for i in range(length, length + 12):
        got = state.extend(q[..., i : i + 1], q[..., i : i + 1])
        assert got.position.flatten().tolist() == [i, i - 2, i]
        assert got.length.flatten().tolist() == [i, i - 2, i - 1001]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("unmatched", ["zero", "self", "null"])
@pytest.mark.parametrize("bits", [3, 4, 6])
@pytest.mark.parametrize("masked", [False, True])
def test_reading_equals_the_whole_sequence(device, dtype, unmatched, bits, masked):
    """From channels to values in one kernel, after a chunk that came as symbols."""
    torch.manual_seed(bits)
    routes, length = 5, 41
    few = torch.randn(6, routes * bits, device=device, dtype=dtype)
    q, k, v = (few[torch.randint(0, 6, (2, length), device=device)] for _ in range(3))
    e0, e1, null = torch.randn(3, routes * bits, device=device)
    null = null if unmatched == "null" else None
    mask = (
        torch.rand(2, length, device=device) < 0.7
        if masked
        else torch.ones(2, length, dtype=torch.bool, device=device)
    )
    state = StreamMemory(2, routes, bits=bits, device=device)
    packed = [symbols.pack(x, bits) for x in (q, k, v)]
    own = unmatched == "self"
    state.read_whole(*(x[..., :20] for x in packed), mask=mask[:, :20] if masked else None)
    ys, positions = [], []
    at = 20
    for n in (1, 1, 3, 1, 8, 1, 6):
        y, found = state.read(
            *(torch.cat([x[:, at : at + n]] * 2, -1)[..., : routes * bits] for x in (q, k, v)),
            *(e0, e1, null),
            mask=mask[:, at : at + n] if masked else None,
            own=own,
        )
        ys.append(y)
        positions.append(found.position)
        at += n
    assert at == length
    for row in range(2):
        real = mask[row]
        right = suffix_match_oracle(*(x[row : row + 1, :, real].cpu() for x in packed[:2]))
        wanted = retrieve_forward(
            *(v[row : row + 1, real].cpu(), right.position, e0.cpu(), e1.cpu()),
            *(None if null is None else null.cpu(), bits, unmatched),
        )
        first = int(real[:20].sum())
        kept = real[20:]
        assert torch.equal(
            torch.cat(positions, 2)[row, :, kept].cpu(), right.position[0, :, first:]
        )
        assert torch.equal(torch.cat(ys, 1)[row, kept].cpu(), wanted[0, first:])
