"""Learned lengths: they start as the fixed match with tiers, and what they learn from."""

import pytest
import torch

from rosakit.errors import InvalidInputError
from rosakit.layers import RosaAdapter, RosaContext
from rosakit.layers.learned_length import LengthSelection
from rosakit.layers.selection import selection_loss
from rosakit.layers.token_match import best_successors, distant_match, further_matches
from rosakit.types import Match

TIERS = (1, 2, 4, 8)
FAR = 9


def context_of(ids, near, far):
    found = best_successors(ids, 16)
    best = Match(*(x.transpose(1, 2).contiguous() for x in (found.position, found.length)))
    parts = [Match(best.position[:, :near], best.length[:, :near])]
    if far:
        parts.append(distant_match(ids, FAR))
        back = torch.arange(ids.shape[1]) - best.position
        parts.append(further_matches(best, parts[-1], back, FAR, far - 1))
    match = Match(*(torch.cat([part[i] for part in parts], 1) for i in (0, 1)))
    return RosaContext(input_ids=ids, token_match=match)


def adapter_of(near=2, far=3, routes=12, **options):
    torch.manual_seed(0)
    adapter = RosaAdapter(
        24,
        bits=2,
        routes=routes,
        address="token",
        candidates=near + far,
        far_candidates=far,
        length_tiers=TIERS,
        **options,
    )
    torch.nn.init.normal_(adapter.o_proj.weight, std=0.3)
    return adapter


def text(length=90, kinds=4, batch=2):
    return torch.randint(kinds, (batch, length), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("near, far", [(1, 1), (1, 4), (3, 2), (4, 0)])
@pytest.mark.parametrize("routes, least", [(12, 1), (7, 1), (7, 3)])
@pytest.mark.parametrize("trust", [True, False])
def test_starts_as_the_fixed_match_with_tiers(near, far, routes, least, trust):
    """Whatever else there is to choose, at the start the first of each group is read."""
    ids = text()
    chosen = adapter_of(near, far, routes, select=5, select_trust=trust, min_length=least)
    fixed = adapter_of(1, 1 if far else 0, routes, min_length=least)
    fixed.load_state_dict(chosen.state_dict(), strict=False)
    u = torch.randn(2, 90, 24)
    context, plain = context_of(ids, near, far), context_of(ids, 1, 1 if far else 0)
    for each in (context, plain):
        each.record = True
    assert torch.equal(chosen(u, context), fixed(u, plain))
    assert torch.equal(context.matches[0].position, plain.matches[0].position)
    assert torch.equal(context.matches[0].length, plain.matches[0].length)
    length = plain.matches[0].length
    assert int(length[length > 0].min()) >= least


def test_further_matches_are_distant_and_say_something_else():
    ids = text(200, kinds=7)
    found = best_successors(ids, 16)
    best = Match(*(x.transpose(1, 2) for x in (found.position, found.length)))
    far = distant_match(ids, FAR)
    own = torch.arange(200)
    more = further_matches(best, far, own - best.position, FAR, 3)
    assert more.position.shape == (2, 3, 200)
    there = more.position >= 0
    assert there[:, 0].any()
    assert not (there[:, 1] & ~there[:, 0]).any()
    assert (own - more.position)[there].min() >= FAR
    assert torch.equal(there, more.length > 0)
    token = ids.gather(1, more.position.clamp(min=0).long().flatten(1)).view_as(more.position)
    first = ids.gather(1, far.position[:, 0].clamp(min=0).long())[:, None]
    assert ((token != first) | ~there).all()
    assert ((token[:, 0] != token[:, 1]) | ~there[:, 1]).all()
    assert (more.length[:, 0] <= far.length[:, 0]).all()
    assert ((more.length[:, 1] <= more.length[:, 0]) | ~there[:, 1]).all()


def learned(**options):
    adapter = adapter_of(select=5, **options)
    for p in adapter.selection.parameters():
        torch.nn.init.normal_(p, std=0.2)
    return adapter


@pytest.mark.parametrize("trust", [True, False])
def test_lengths_and_reads_follow_the_formula(trust):
    ids = text(batch=1)
    adapter = learned(select_trust=trust)
    chosen = adapter.selection
    u = torch.randn(1, 90, 24)
    context = context_of(ids, 2, 3)
    octaves, found = adapter.selection_shares(u, context)
    match = chosen.choose(octaves, found, 12)
    query, key = chosen.query.weight @ u[0].T, chosen.key.weight @ u[0].T
    w, seen = chosen.width, set()
    for i in range(90):
        e = []
        for c in range(5):
            p, length = int(found.position[0, c, i]), int(found.length[0, c, i])
            if p < 0:
                e.append(-torch.inf)
                continue
            dot = query[:w, i] @ key[:w, p] + query[w:, i] @ key[w:, p - 1]
            bucket = int(2 * torch.log2(torch.tensor(float(length))) + 1e-4)
            octave = int(torch.log2(torch.tensor(float(max(i - p, 1)))))
            tables = chosen.length_score[bucket] + chosen.distance_score[octave]
            shared = chosen.null.weight[int(c >= 2)] @ u[0, i] / 24**0.5
            delta = dot / w**0.5 + 10 * (tables + chosen.rank_score[c]) + shared
            e.append(float(torch.log2(torch.tensor(float(length))) + delta.detach()))
        torch.testing.assert_close(octaves[0, i], torch.tensor(e), atol=1e-4, rtol=1e-4)
        for r in range(12):
            group = [0, 1] if r % 2 == 0 else [2, 3, 4]
            tier = TIERS[r // 2 % 4]
            best = max(group, key=lambda c: e[c])
            read = e[best] >= torch.log2(torch.tensor(tier - 0.5))
            if not trust:
                read = int(found.length[0, best, i]) >= tier
            expected = int(found.position[0, best, i]) if read else -1
            assert int(match.position[0, r, i]) == expected
            seen.add((best, bool(read)))
    assert {(c, True) for c in range(5)} < seen
    assert torch.equal(match.position >= 0, match.length > 0)


@pytest.mark.parametrize("unmatched", ["zero", "self", "null"])
@pytest.mark.parametrize("trust", [True, False])
def test_credit_is_the_gradient_of_the_expected_read(trust, unmatched):
    """With trust each tier competes as reading nothing; forward is the hard read."""
    ids = text(batch=1)
    u, weight = torch.randn(1, 90, 24), torch.randn(1, 90, 24)
    adapter = learned(routes=7, select_trust=trust, unmatched=unmatched)
    if adapter.e_null is not None:
        torch.nn.init.normal_(adapter.e_null)
    context = context_of(ids, 2, 3)
    (adapter(u, context) * weight).sum().backward()
    names = dict(adapter.selection.named_parameters())
    got = {name: p.grad.clone() for name, p in names.items() if name != "null_score"}
    assert names["null_score"].grad is None  # the tiers say what nothing is worth
    adapter.zero_grad()
    octaves, found = adapter.selection_shares(u, context)
    bit = torch.where(adapter.v_proj(u) > 0, adapter.e1, adapter.e0).detach()
    soft = []
    for r in range(7):
        own = slice(2 * r, 2 * r + 2)
        nothing = {"self": bit[0, :, own], "zero": torch.zeros(2)}.get(unmatched)
        if nothing is None:
            nothing = adapter.e_null[own].detach()
        group = [0, 1] if r % 2 == 0 else [2, 3, 4]
        least = torch.full_like(octaves[0, :, :1], TIERS[r // 2 % 4] - 0.5).log2()
        share = torch.cat([octaves[0][:, group], least], 1)
        share = (share if trust else share[:, :-1]).softmax(1).nan_to_num()
        part = share[:, -1:] * nothing if trust else 0
        for place, c in enumerate(group):
            p = found.position[0, c]
            if not trust:
                p = p.masked_fill(found.length[0, c] < TIERS[r // 2 % 4], -1)
            value = torch.where(p[:, None] >= 0, bit[0, p.clamp(min=0).long(), own], nothing)
            part = part + share[:, place, None] * value
        soft.append(part)
    (adapter.o_proj(torch.cat(soft, 1)[None]) * weight).sum().backward()
    for name, grad in got.items():
        torch.testing.assert_close(names[name].grad, grad, atol=2e-4, rtol=1e-3)
        # What all candidates of a group share cannot change which of them is read.
        assert (grad.abs().sum() > 1e-3) == (trust or name != "null.weight")


@pytest.mark.parametrize("trust", [True, False])
def test_compiles_into_one_graph(trust):
    adapter, context = learned(select_trust=trust), context_of(text(), 2, 3)
    compiled = torch.compile(lambda u: adapter(u, context), fullgraph=True, backend="aot_eager")
    u, names = torch.randn(2, 90, 24), dict(adapter.selection.named_parameters())
    found = []
    for call in (compiled, lambda u: adapter(u, context)):
        context.shared.clear()
        adapter.zero_grad()
        y = call(u)
        y.square().sum().backward()
        found.append((y.detach(), *(names[n].grad.clone() for n in ("query.weight", "key.weight"))))
    for got, expected in zip(*found, strict=True):
        torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)
    assert found[0][1].any()


def test_a_lens_starts_silent_and_learns():
    ids = text(kinds=6)
    context = context_of(ids, 2, 3)
    context.output_rows = torch.randn(6, 24)
    plain, lens = adapter_of(select=5), adapter_of(select=5, select_lens=True)
    lens.load_state_dict(plain.state_dict(), strict=False)
    u = torch.randn(2, 90, 24)
    assert torch.equal(lens(u, context), plain(u, context))
    (lens(u, context) * torch.randn(2, 90, 24)).sum().backward()
    assert float(lens.selection.lens_weight.grad.abs()) > 0
    with torch.no_grad():
        lens.selection.lens_weight.fill_(0.1)
    octaves, found = lens.selection_shares(u, context)
    without, _ = plain.selection_shares(u, context)
    there = (found.position >= 0).transpose(1, 2)
    rows = context.output_rows[
        ids.gather(1, found.position.clamp(min=0).long().flatten(1)).view_as(found.position)
    ]
    logits = torch.einsum("bth,bkth->btk", u, rows)
    torch.testing.assert_close((octaves - without)[there], logits[there], atol=1e-4, rtol=1e-4)


def test_surplus_counts_what_the_model_lacks():
    ids = torch.tensor([[1, 2, 1, 2]])
    position = torch.tensor([[[-1, -1, 1, 2]]])  # at 2 the candidate says "2", and "2" follows
    share = torch.tensor([[[0.5, 0.5], [0.5, 0.5], [0.25, 0.75], [0.5, 0.5]]]).log()
    for p in (0.001, 0.4, 1.0):
        known = torch.full((1, 4), p).log()
        got = selection_loss(share, position, ids, known=known)
        torch.testing.assert_close(got, -torch.tensor(0.25 + 0.75 * p).log())
    wrong = torch.tensor([[[-1, -1, 0, 2]]])
    got = selection_loss(share, wrong, ids, known=torch.full((1, 4), 0.4).log())
    torch.testing.assert_close(got, -torch.tensor(0.75 * 0.4).log())


def test_teaching_is_the_mean_over_groups():
    ids = text()
    adapter = learned()
    octaves, found = adapter.selection_shares(torch.randn(2, 90, 24), context_of(ids, 2, 3))
    known = torch.randn(2, 90).abs().neg()
    got = adapter.selection.loss(octaves, found.position, ids, known=known)
    parts = []
    for group, part in enumerate((slice(0, 2), slice(2, 5))):
        nothing = (10 * adapter.selection.null_score[group]).expand(2, 90, 1)
        share = torch.cat([octaves[..., part], nothing], -1).log_softmax(-1)
        parts.append(selection_loss(share, found.position[:, part], ids, known=known))
    torch.testing.assert_close(got, sum(parts) / 2)
    got.backward()
    assert adapter.selection.null_score.grad.abs().sum() > 0


def test_learns_to_read_a_shorter_match_that_is_right():
    """Hidden states that know the next token find it among candidates of any length."""
    torch.manual_seed(0)
    ids = text(400, kinds=6, batch=1)
    code = torch.randn(6, 24)
    u = code[ids]
    u[:, :-1] += code.roll(1, 0)[ids[:, 1:]]
    context = context_of(ids, 1, 4)
    adapter = adapter_of(1, 4, select=5)
    optimizer = torch.optim.Adam(adapter.selection.parameters(), lr=0.01)

    def right():
        octaves, found = adapter.selection_shares(u, context)
        position = adapter.selection.choose(octaves, found, 2).position[0, 1]  # far, tier 1
        asked = (position >= 0)[:-1]
        read = ids[0, position.clamp(min=0).long()][:-1]
        return float((read == ids[0, 1:])[asked].float().mean())

    before = right()
    for _ in range(150):
        octaves, found = adapter.selection_shares(u, context)
        adapter.selection.loss(octaves, found.position, ids).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert right() > before + 0.3


@pytest.mark.parametrize(
    "options, message",
    [
        ({"select": 4, "select_tiers": (0.5,), "length_tiers": (1, 2)}, "one of them"),
        ({"select": 4, "length_tiers": (0, 2)}, "minimal lengths"),
        ({"select": 4, "select_trust": False}, "select_trust=False"),
        ({"candidates": 2, "far_candidates": 3}, "far_candidates=3"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(InvalidInputError, match=message):
        RosaAdapter(16, address="token", **options)
    with pytest.raises(InvalidInputError, match="at least one candidate"):
        LengthSelection(16, 4, (2, 0), (1, 2))
