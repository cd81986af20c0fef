"""What public ROSA code gets wrong, one test a fault; faults 6 and 7 concern training files.

`test_published_faults_training.py` has the two others.
"""

from __future__ import annotations

import time

import numpy as np
import pytest
import torch

from rosakit import native
from rosakit.layers import RosaAdapter, RosaContext, RosaStates
from rosakit.layers.health import find_faults
from rosakit.ops import rosa, segments, suffix_match
from rosakit.ops.oracle import suffix_match_oracle
from tests.tuning.tiny import attached, tokens

pytestmark = pytest.mark.skipif(not native.available(), reason="compiled core missing")


def adapter_of(**options):
    """An adapter whose output is not silent, and states that repeat."""
    torch.manual_seed(0)
    adapter = RosaAdapter(24, bits=3, routes=4, **options)
    torch.nn.init.normal_(adapter.o_proj.weight)
    return adapter, torch.randn(4, 24)[torch.randint(0, 4, (2, 60))]


def streams(length, *, rows=1, routes=3, kinds=3, seed=0):
    """Symbols ``[B, R, T]`` from a small alphabet."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, kinds, (rows, routes, length), generator=generator, dtype=torch.uint8)


@torch.no_grad()
def test_fault_1_train_prefill_and_decode_compute_different_functions():
    """Dead routes after one miss, transposed channels, only the last prompt token indexed."""
    adapter, u = adapter_of()
    whole = adapter.train()(u, RosaContext())
    for sizes in ([60], [1] * 60, [59, 1], [7, 1, 1, 30, 21]):
        states = RosaStates()
        parts = [adapter.eval()(x, RosaContext(states=states)) for x in u.split(sizes, dim=1)]
        torch.testing.assert_close(torch.cat(parts, 1), whole)

    # A route that missed once matches again.
    memory = native.SuffixMemory(1, 1, bits=2)
    stream = np.array([[[0, 1, 0, 3, 0, 1]]], np.uint8)  # 3 has never been seen before
    found = np.concatenate(
        [memory.extend(x, x).position for x in np.split(stream, 6, axis=2)], axis=2
    )
    assert found[0, 0].tolist() == [-1, -1, 1, -1, 3, 2]

    # Each channel keeps its place: changing one route's values changes that route alone.
    q = k = torch.randn(4, 12)[torch.randint(0, 4, (1, 40))]
    v, e = torch.randn(1, 40, 12), torch.ones(12)
    changed = v.clone()
    changed[..., 3:6] *= -1
    one, other = (rosa(q, k, x, -e, e, bits=3) for x in (v, changed))
    moved = (one != other).any(1)[0]
    assert moved[3:6].all()
    assert not moved[:3].any()
    assert not moved[6:].any()


@pytest.mark.parametrize("kind", ["constant", "period 2", "period 7"])
def test_fault_2_quadratic_on_periodic_or_constant_streams(kind):
    """Latest-occurrence updates that walk the whole chain: 15 times slower a token at 16k."""
    period = {"constant": 1, "period 2": 2, "period 7": 7}[kind]

    def cost(length, work):
        stream = np.tile(np.arange(length) % period, (1, 1, 1)).astype(np.uint8)
        best = float("inf")
        for _ in range(3):
            begin = time.process_time()
            work(stream)
            best = min(best, time.process_time() - begin)
        return best / length

    def online(stream):
        native.SuffixMemory(1, 1, bits=3).extend(stream, stream)

    def offline(stream):
        native.match(
            stream,
            stream,
            granularity="token",
            successor="available",
            max_length=None,
            min_length=1,
            segment_starts=None,
            counterfactual_bits=0,
        )

    for work in (online, offline):
        # Sixteen times the length: 16 times the time a symbol if it were quadratic.
        assert cost(65536, work) < 5 * cost(4096, work)


@pytest.mark.parametrize("granularity", ["token", "run"])
def test_fault_3_the_current_run_matches_itself(granularity):
    """A self-match hides every older occurrence: with q = k everything would be null."""
    stream = torch.tensor([[[1, 1, 2, 2, 2, 1, 1, 2, 2, 3, 1, 1]]], dtype=torch.uint8)
    found = suffix_match(stream, stream, granularity=granularity)
    steps = torch.arange(stream.shape[2])
    assert bool((found.position <= steps).all())
    assert bool((found.position[0, 0, 5:9] >= 0).all())
    wanted = suffix_match_oracle(stream, stream, granularity=granularity)
    assert torch.equal(found.position, wanted.position)
    if granularity == "run":
        strict = suffix_match(stream, stream, granularity="run", successor="strict")
        assert bool((strict.position == -1).all())  # the published rule, kept by name


@pytest.mark.parametrize("granularity", ["token", "run"])
def test_fault_4_the_match_length_is_forgotten_after_a_clone(granularity):
    """Streams whose automaton clones states at nearly every step: exact lengths throughout."""
    fibonacci = ["a", "ab"]
    while len(fibonacci[-1]) < 120:
        fibonacci.append(fibonacci[-1] + fibonacci[-2])
    made = [[ord(c) - ord("a") for c in fibonacci[-1][:120]], [0, 1, 1] * 40]
    stream = torch.tensor(made, dtype=torch.uint8)[:, None]
    query = stream.clone()
    query[:, :, 50::17] ^= 1  # breaks, after which the cursor falls back
    wanted = suffix_match_oracle(query, stream, granularity=granularity)
    memory = native.SuffixMemory(2, 1, bits=1, granularity=granularity)
    steps = [
        memory.extend(query[:, :, i : i + 1].contiguous(), stream[:, :, i : i + 1].contiguous())
        for i in range(120)
    ]
    batch = suffix_match(query, stream, granularity=granularity)
    for name in ("length", "position"):
        online = torch.cat([getattr(step, name) for step in steps], dim=2)
        assert torch.equal(online, getattr(wanted, name))
        assert torch.equal(getattr(batch, name), getattr(wanted, name))


@torch.no_grad()
def test_fault_5_padding_and_document_boundaries_are_ignored():
    stream = streams(40, rows=2)
    starts = torch.zeros(2, 40, dtype=torch.int32)
    starts[0, 15:] = 15  # a second document
    starts[1, :9], starts[1, 9:] = -1, 9  # left padding
    found = suffix_match(stream, stream, segment_starts=starts)
    alone = suffix_match(stream[:1, :, 15:], stream[:1, :, 15:])
    moved = torch.where(alone.position[0] >= 0, alone.position[0] + 15, -1)
    assert torch.equal(found.position[0, :, 15:], moved)
    assert torch.equal(found.length[0, :, 15:], alone.length[0])
    assert bool((found.position[1, :, :9] == -1).all())
    mask = torch.ones(1, 40, dtype=torch.bool)
    mask[:, :9] = False
    assert torch.equal(segments.from_attention_mask(mask)[0], starts[1])

    model = attached(token_route=True)  # and the same through a whole model
    rows = [tokens(1, n, seed=n) for n in (25, 11)]
    packed = torch.cat(rows, 1)
    position = torch.cat([torch.arange(25), torch.arange(11)])[None]
    got = model(packed, position_ids=position, use_cache=False).logits
    wanted = torch.cat([model(row, use_cache=False).logits for row in rows], 1)
    torch.testing.assert_close(got, wanted, atol=3e-5, rtol=1e-4)


def test_fault_8_equal_values_give_q_k_and_v_no_gradient():
    """With e0 = e1 = 0 nothing that is retrieved can matter, so q, k and v do not learn."""

    def gradients(e0, e1):
        torch.manual_seed(0)
        q, k, v = (
            torch.randn(4, 12)[torch.randint(0, 4, (1, 60))].requires_grad_() for _ in range(3)
        )
        y = rosa(q, k, v, e0, e1, bits=3)
        weight = torch.randn(y.shape, generator=torch.Generator().manual_seed(1))
        return torch.autograd.grad((y * weight).sum(), (q, k, v))

    zero = torch.zeros(12)
    assert all(float(g.abs().sum()) == 0 for g in gradients(zero, zero))  # the fault is real
    adapter = RosaAdapter(24, bits=3, routes=4)
    assert bool((adapter.e0 != adapter.e1).all())
    assert all(float(g.abs().sum()) > 0 for g in gradients(adapter.e0, adapter.e1))

    # The silent start lies in the output projection alone, which wakes up in one step.
    u = torch.randn(4, 24)[torch.randint(0, 4, (2, 60))]
    target = torch.randn(2, 60, 24)
    optimizer = torch.optim.SGD(adapter.parameters(), lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        (adapter(u, RosaContext()) - target).square().mean().backward()
        optimizer.step()
    for name, parameter in adapter.named_parameters():
        assert parameter.grad is not None, name
        assert float(parameter.grad.abs().sum()) > 0, name


@torch.no_grad()
def test_fault_9_untied_addresses_make_matches_meaningless_and_nobody_shows_it():
    """The default start is tied, so that repetitions find each other, and detectors speak up."""
    torch.manual_seed(0)
    ids = torch.randint(0, 40, (2, 300))
    u = torch.randn(40, 96)[ids] + 0.05 * torch.randn(2, 300, 96)
    agreement, faults = {}, {}
    for tied in (True, False):
        torch.manual_seed(1)
        adapter = RosaAdapter(96, bits=4, tied_start=tied)
        assert adapter.q_proj is not None
        assert adapter.k_proj is not None
        q, k = adapter.q_proj(u), adapter.k_proj(u)
        context = RosaContext(record=True)
        adapter(u, context)
        match = context.matches[0]
        there = match.position > 0
        before = (match.position.long() - 1).clamp(min=0)
        rows = ids[:, None].expand(-1, adapter.routes, -1)
        same = rows.gather(2, before) == rows
        agreement[tied] = float(same[there].float().mean())
        found = find_faults(q, k, match, adapter.e0, adapter.e1, bits=4)
        faults[tied] = {fault.name for fault in found}
    assert agreement[True] > 0.2  # chance is one in 40
    assert agreement[False] < 0.05
    assert faults[True] == set()
    assert "drifting" in faults[False]
    assert RosaAdapter(24).tied_start
    collapsed = torch.ones_like(q)
    match = suffix_match(
        torch.zeros(2, 24, 300, dtype=torch.uint8), torch.zeros(2, 24, 300, dtype=torch.uint8)
    )
    named = find_faults(collapsed, collapsed, match, adapter.e0, adapter.e1, bits=4)
    assert {"collapsed_q", "collapsed_k"} <= {fault.name for fault in named}
