"""Address supervision: the loss is its definition, targets are right, the teacher is the model."""

from __future__ import annotations

import pytest
import torch

from rosakit.errors import InvalidInputError
from rosakit.layers.credit import credit_margin
from rosakit.layers.supervision import (
    AddressTargets,
    AttentionTargets,
    address_loss,
    next_token_targets,
    sample_queries,
)


def packed(batch, length):
    """Two documents and padding at the end of the first row, one document in the others."""
    starts = torch.zeros(batch, length, dtype=torch.int32)
    starts[0, length // 2 :] = length // 2
    starts[0, -3:] = -1
    return starts


@pytest.mark.parametrize("groups", [1, 2, 3])
def test_loss_is_its_definition(groups):
    torch.manual_seed(groups)
    batch, length, routes, bits, asked, keys = 2, 20, 5, 3, 4, 6
    q, k = torch.randn(2, batch, length, routes * bits, dtype=torch.float64)
    seen = torch.rand(batch, groups, asked, keys) < 0.8
    targets = AddressTargets(
        torch.randint(0, length, (batch, asked)),
        torch.randint(0, length, (batch, groups, keys)),
        seen & (torch.rand(seen.shape) < 0.4),
        seen,
        torch.rand(batch, groups, asked),
    )
    total = torch.zeros(())
    for g in range(groups):
        losses, weights = [], []
        for r in range(g, routes, groups):
            for b in range(batch):
                for a in range(asked):
                    qs = q[b, targets.queries[b, a]].view(routes, bits)[r].tanh()
                    s = torch.stack(
                        [qs @ k[b, p].view(routes, bits)[r].tanh() for p in targets.keys[b, g]]
                    )
                    right, every = targets.right[b, g, a], targets.seen[b, g, a]
                    if right.any():
                        losses.append(s[every].logsumexp(0) - s[right].logsumexp(0))
                        weights.append(targets.weight[b, g, a])
        weights = torch.stack(weights)
        share = len(range(g, routes, groups)) / routes
        total = total + share * (weights * torch.stack(losses)).sum() / weights.sum()
    got = address_loss(q, k, targets, bits=bits)
    torch.testing.assert_close(got, total, check_dtype=False, rtol=1e-5, atol=1e-6)


def test_every_group_needs_a_route():
    targets = AddressTargets(
        torch.zeros(1, 1, dtype=torch.int64),
        torch.zeros(1, 3, 1, dtype=torch.int64),
        *(torch.ones(1, 3, 1, 1, dtype=torch.bool),) * 2,
        torch.ones(1, 3, 1),
    )
    q = torch.randn(1, 5, 8)
    with pytest.raises(InvalidInputError, match="use more routes"):
        address_loss(q, q, targets, bits=4)


def test_learning_the_loss_makes_agreeing_positions_share_symbols():
    torch.manual_seed(0)
    ids = torch.randint(0, 6, (2, 120))
    targets = next_token_targets(ids, 100)
    x = torch.randn(2, 120, 16, requires_grad=True)

    def agreement():
        q = (x > 0).view(2, 120, 4, 4)
        pick = torch.gather(q, 1, targets.queries[..., None, None].expand(-1, -1, 4, 4))
        other = torch.gather(q, 1, targets.keys[:, 0, :, None, None].expand(-1, -1, 4, 4))
        equal = (pick[:, :, None] == other[:, None]).all(-1).float().mean(-1)
        return equal[targets.right[:, 0]].mean(), equal[targets.seen[:, 0]].mean()

    before = agreement()
    optimizer = torch.optim.Adam([x], lr=0.1)
    for _ in range(100):
        optimizer.zero_grad()
        address_loss(x, x, targets, bits=4).backward()
        optimizer.step()
    after = agreement()
    assert after[0] > 0.7 > 0.3 > before[0]
    assert after[0] > after[1] + 0.4


def test_next_token_targets_tell_right_from_wrong():
    torch.manual_seed(1)
    ids, starts = torch.randint(0, 5, (3, 60)), packed(3, 60)
    found = next_token_targets(ids, 20, segment_starts=starts)
    compared = 0
    for b in range(3):
        for a, i in enumerate(found.queries[b].tolist()):
            for n, j in enumerate(found.keys[b, 0].tolist()):
                if not found.seen[b, 0, a, n]:
                    assert not found.right[b, 0, a, n]
                    continue
                compared += 1
                assert j < i
                assert starts[b, j] == starts[b, i] == starts[b, j + 1] >= 0
                assert found.right[b, 0, a, n] == (ids[b, j + 1] == ids[b, i + 1])
            if found.weight[b, 0, a]:
                assert starts[b, i] == starts[b, i + 1]
                assert found.right[b, 0, a].any()
    assert compared > 200
    assert found.right.sum() < found.seen.sum()


def test_text_without_repetition_teaches_nothing():
    ids = torch.arange(30)[None]
    targets = next_token_targets(ids, 10)
    assert not targets.weight.any()
    q = torch.randn(1, 30, 8, requires_grad=True)
    loss = address_loss(q, q, targets, bits=4)
    assert loss == 0
    loss.backward()
    assert not q.grad.any()


@pytest.mark.parametrize("documents", [False, True])
def test_attention_targets_are_what_attention_reads_beyond_the_window(documents):
    torch.manual_seed(2)
    batch, heads, length, width, window, sinks = 2, 4, 40, 8, 6, 2
    query = 2 * torch.randn(batch, heads, length, width)
    key = 2 * torch.randn(batch, heads // 2, length, width)
    starts = packed(batch, length) if documents else None
    ids = torch.zeros(batch, length, dtype=torch.int64)
    queries = sample_queries(ids, 12, segment_starts=starts, after=window)
    seen = AttentionTargets(queries, window, sinks, starts, (3,))
    seen.see(2, query, key, None)
    assert not seen.layers
    seen.see(3, query, key, None)
    found = seen.layers[3]
    for b in range(batch):
        for a, i in enumerate(queries[b].tolist()):
            begin = 0 if starts is None else int(starts[b, i])
            assert i - begin >= window
            for h in range(heads):
                scores = query[b, h, i] @ key[b, h // 2, begin : i + 1].T / width**0.5
                share = scores.softmax(0)
                reach = range(begin + sinks, i - window + 1)
                mass = sum(share[j - begin] for j in reach)
                torch.testing.assert_close(found.weight[b, h, a], torch.as_tensor(mass).float())
                if len(reach):
                    best = max(reach, key=lambda j: share[j - begin])
                    assert found.keys[b, h, a] == best - 1
                    assert found.right[b, h, a, a]


def test_credit_stops_beyond_the_margin():
    x = torch.tensor([-2.0, -0.5, 0.0, 0.9, 1.1], requires_grad=True)
    y = credit_margin(x, 1.0)
    assert torch.equal(y, x)
    (3 * y).sum().backward()
    assert x.grad.tolist() == [0, 3, 3, 3, 0]
    assert credit_margin(x, None) is x
