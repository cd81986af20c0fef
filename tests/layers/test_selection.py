"""Learned selection among exact matches: what is read, and who teaches it."""

import pytest
import torch

from rosakit.errors import InvalidInputError
from rosakit.layers import RosaAdapter, RosaContext
from rosakit.layers.selection import Selection, selection_loss
from rosakit.layers.token_match import best_successors
from rosakit.types import Match


def context_of(ids, candidates):
    found = best_successors(ids, candidates)
    match = Match(*(x.transpose(1, 2).contiguous() for x in (found.position, found.length)))
    return RosaContext(input_ids=ids, token_match=match)


def adapter_of(candidates=3, **options):
    torch.manual_seed(0)
    adapter = RosaAdapter(
        16, bits=2, routes=4, address="token", candidates=candidates, select=5, **options
    )
    torch.nn.init.normal_(adapter.o_proj.weight, std=0.3)
    return adapter


def text(length=60, kinds=4, batch=2):
    return torch.randint(kinds, (batch, length), generator=torch.Generator().manual_seed(1))


def test_starts_at_the_first_candidate():
    ids = text()
    context = context_of(ids, 3)
    adapter = adapter_of()
    _, match = adapter._read(torch.randn(2, 60, 16), torch.randn(2, 60, 8), context, None)
    torch.testing.assert_close(
        match.position, context.token_match.position[:, :1].expand(-1, 4, -1)
    )


def test_shares_follow_the_formula():
    ids = text(batch=1)
    adapter = adapter_of()
    chosen = adapter.selection
    for p in chosen.parameters():
        torch.nn.init.normal_(p)
    u = torch.randn(1, 60, 16)
    context = context_of(ids, 3)
    share, found = adapter.selection_shares(u, context)
    query, key = chosen.query.weight @ u[0].T, chosen.key.weight @ u[0].T
    w = chosen.width
    for i in (1, 17, 42, 59):
        scores = []
        for c in range(3):
            p, length = int(found.position[0, c, i]), int(found.length[0, c, i])
            if p < 0:
                scores.append(torch.tensor(-torch.inf))
                continue
            dot = query[:w, i] @ key[:w, p] + query[w:, i] @ key[w:, p - 1]
            bucket = int(2 * torch.log2(torch.tensor(float(length))) + 1e-4)
            octave = int(torch.log2(torch.tensor(float(max(i - p, 1)))))
            scores.append(
                dot / w**0.5
                + chosen.length_score[bucket]
                + chosen.distance_score[octave]
                + chosen.rank_score[c]
            )
        scores.append(chosen.null.weight[0] @ u[0, i] + chosen.null_score[0])
        torch.testing.assert_close(share[0, i], torch.stack(scores).log_softmax(0))


def test_tiers_refuse_small_shares():
    ids = text()
    adapter = adapter_of(select_tiers=(0.0, 0.3, 0.6, 0.99))
    torch.nn.init.normal_(adapter.selection.query.weight)
    u = torch.randn(2, 60, 16)
    share, found = adapter.selection_shares(u, context_of(ids, 3))
    match = adapter.selection.choose(share, found, 4)
    best = share[..., :-1].exp().max(-1).values
    there = found.position[:, 0] >= 0
    for route, tier in enumerate((0.0, 0.3, 0.6, 0.99)):
        read = match.position[:, route] >= 0
        assert torch.equal(read, there & (best >= tier))
        assert read.sum() > 0 or tier == 0.99
    assert torch.equal(match.position >= 0, match.length > 0)


def test_candidates_of_one_token_are_trusted_together():
    position = torch.tensor([[[5], [3], [-1], [1]]], dtype=torch.int32)
    found = Match(position, torch.tensor([[[2], [2], [0], [1]]], dtype=torch.int32))
    share = torch.tensor([[[0.4, 0.3, 0.0, 0.2, 0.1]]]).log()
    chosen = Selection(8, 2, 4, (0.0, 0.39, 0.45, 0.6))
    apart = chosen.choose(share, found, 4)
    assert apart.position[0, :, 0].tolist() == [5, 5, -1, -1]
    together = chosen.choose(share, found, 4, torch.tensor([[[7], [8], [8], [8]]]))
    assert together.position[0, :, 0].tolist() == [3, 3, 3, -1]
    none = Match(torch.full_like(position, -1), torch.zeros_like(position))
    nothing = torch.tensor([[[-torch.inf] * 4 + [0.0]]])
    assert (chosen.choose(nothing, none, 4, torch.zeros(1, 4, 1)).position < 0).all()


def test_both_teachers_reach_the_selection_and_nothing_else():
    ids = text()
    u = torch.randn(2, 60, 16)
    for credit in (True, False):
        adapter = adapter_of(select_credit=credit)
        context = context_of(ids, 3)
        (adapter(u, context) * torch.randn(2, 60, 16)).sum().backward()
        assert (adapter.selection.query.weight.grad is not None) == credit
        assert adapter.v_proj.weight.grad is not None
        adapter.zero_grad()
        share, found = adapter.selection_shares(u, context)
        selection_loss(share, found.position, ids).backward()
        assert float(adapter.selection.query.weight.grad.abs().sum()) > 0
        assert adapter.v_proj.weight.grad is None


def test_credit_is_the_gradient_of_the_expected_read():
    """Backward is that of ``sum_c share_c value_c``; forward is the hard read."""
    ids = text(batch=1)
    u, weight = torch.randn(1, 60, 16), torch.randn(1, 60, 16)
    adapter = adapter_of()
    torch.nn.init.normal_(adapter.selection.query.weight, std=0.3)
    context = context_of(ids, 3)
    (adapter(u, context) * weight).sum().backward()
    got = adapter.selection.query.weight.grad.clone()
    adapter.zero_grad()
    share, found = adapter.selection_shares(u, context)
    bit = torch.where(adapter.v_proj(u) > 0, adapter.e1, adapter.e0).detach()
    value = torch.stack(
        [
            torch.where(p[0, :, None] >= 0, bit[0, p[0].clamp(min=0).long()], 0.0)
            for p in found.position.unbind(1)
        ]
    )  # [K, T, C]
    soft = torch.einsum("tk,ktc->tc", share[0, :, :-1].exp(), value)
    (adapter.o_proj(soft) * weight[0]).sum().backward()
    torch.testing.assert_close(got, adapter.selection.query.weight.grad, atol=1e-5, rtol=1e-4)


def test_loss_asks_for_nothing_where_no_candidate_is_right():
    ids = torch.tensor([[1, 2, 1, 3, 1, 2]])
    context = context_of(ids, 2)
    found = context.token_match
    share = torch.full((1, 6, 3), -20.0)
    share[0, 2, 2] = 0.0  # after "1" came 2, now 3 follows: nothing is right
    share[0, 4, int(found.position[0, 1, 4] == 1)] = 0.0  # the older 2 is right
    loss = selection_loss(share, found.position, ids)
    assert float(loss) < 1e-6
    share[0, 4] = share[0, 4].roll(1)
    assert float(selection_loss(share, found.position, ids)) > 1


def test_learns_which_candidate_is_right():
    """Hidden states that know the next token teach the choice to find it, rank notwithstanding."""
    torch.manual_seed(0)
    ids = text(400, kinds=6, batch=1)
    code = torch.randn(6, 16)
    u = code[ids]
    u[:, :-1] += code.roll(1, 0)[ids[:, 1:]]
    context = context_of(ids, 4)
    adapter = adapter_of(candidates=4)
    optimizer = torch.optim.Adam(adapter.selection.parameters(), lr=0.03)

    def right():
        share, found = adapter.selection_shares(u, context)
        match = adapter.selection.choose(share, found, 1)
        asked = (match.position[0, 0] >= 0)[:-1]
        read = ids[0, match.position[0, 0].clamp(min=0).long()][:-1]
        return float((read == ids[0, 1:])[asked].float().mean())

    before = right()
    for _ in range(150):
        share, found = adapter.selection_shares(u, context)
        selection_loss(share, found.position, ids).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert right() > before + 0.3


def test_lens_adds_the_logits_of_the_candidates():
    ids = text(batch=2)
    table = torch.randn(4, 16)
    context = context_of(ids, 3)
    context.output_rows = table
    adapter = adapter_of(select_lens=True)
    lens = adapter.selection.lens
    torch.nn.init.normal_(lens.gain)
    for p in lens.shift.parameters():
        torch.nn.init.normal_(p)
    u = torch.randn(2, 60, 16)
    share, found = adapter.selection_shares(u, context)
    logits = (u + u * lens.gain + lens.shift(u)) @ table.T
    place = found.position.clamp(min=0).long()
    token = ids.gather(1, place.flatten(1)).view_as(place)
    expected = logits.gather(2, token.transpose(1, 2)).transpose(1, 2)
    rows = table[token]
    torch.testing.assert_close(lens(u, rows), expected, atol=1e-4, rtol=1e-4)
    # Between two candidates, ranks (one apart), lengths and distances (no score yet) aside.
    both = found.position[:, 1] >= 0
    got = (share[..., 0] - share[..., 1])[both] - 1.0
    torch.testing.assert_close(got, (expected[:, 0] - expected[:, 1])[both], atol=1e-3, rtol=1e-3)


def test_lens_without_a_whole_output_embedding_is_refused():
    adapter = adapter_of(select_lens=True)
    context = context_of(text(), 3)
    for table in (None, torch.empty(0), torch.empty(4, 16, device="meta")):
        context.output_rows = table
        with pytest.raises(InvalidInputError, match="output embedding"):
            adapter(torch.randn(2, 60, 16), context)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"address": "learned", "select": 4}, "select=4"),
        ({"address": "token", "select_lens": True}, "select_lens"),
        ({"address": "token", "select_tiers": (0.5,)}, "select_tiers"),
        ({"address": "token", "select": 4, "select_tiers": (1.0,)}, "select_tiers"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(InvalidInputError, match=message):
        RosaAdapter(16, **options)
    with pytest.raises(InvalidInputError, match="width"):
        Selection(16, 0, 2)
