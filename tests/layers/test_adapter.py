"""`RosaAdapter`: function-preserving start, living gradients, the control, token addresses."""

from __future__ import annotations

import pytest
import torch

from rosakit import errors
from rosakit.errors import InvalidInputError
from rosakit.layers import RosaAdapter, RosaContext, RosaStates
from rosakit.layers.token_match import best_successors
from rosakit.ops import suffix_match
from rosakit.ops.oracle import retrieve_oracle
from rosakit.symbols import pack
from rosakit.types import Match


def token_context(ids):
    found = best_successors(ids, 1)
    return RosaContext(
        input_ids=ids,
        token_match=Match(found.position[:, None, :, 0], found.length[:, None, :, 0]),
    )


VARIANTS = {
    "default": {},
    "pre_attn": {"inject": "pre_attn"},
    "null": {"unmatched": "null"},
    "self": {"unmatched": "self"},
    "own_value": {"own_value": True},
    "run": {"granularity": "run"},
    "untied": {"tied_start": False},
    "token": {"address": "token"},
    "narrow": {"routes": 2},
    "grouped": {"value_groups": 2, "own_value": True},
    "shared": {"shared_qk": True},
    "margin": {"credit_margin": 1.0},
    "tiers": {"address": "token", "length_tiers": (1, 2)},
    "hash": {"address": "hash", "hash_orders": (1, 2)},
    "refined": {"address": "hash", "hash_orders": (1, 2), "hash_refine": True},
    "refined_shared": {"address": "hash", "hash_refine": True, "shared_qk": True},
}


@pytest.mark.parametrize("name", VARIANTS)
def test_starts_silent_and_no_parameter_is_stuck(name):
    """Fault 8 of public code: e0 = e1 gives q, k and v no gradient.

    Ours: zero output at the start, a gradient for W_o at once and for everything after one step.
    """
    torch.manual_seed(0)
    adapter = RosaAdapter(16, **VARIANTS[name])
    ids = torch.randint(0, 3, (2, 40))
    context = token_context(ids)
    embedding = torch.randn(3, 16)
    u = embedding[ids] + 0.1 * torch.randn(2, 40, 16)
    target = torch.randn(2, 40, 16)
    out = adapter(u, context)
    assert out.shape == u.shape
    assert not out.any()

    outputs = [adapter.o_proj, *([adapter.own_proj] if adapter.own_proj is not None else [])]
    (out - target).square().sum().backward()
    for projection in outputs:
        assert projection.weight.grad.abs().sum() > 0
    torch.optim.SGD(adapter.parameters(), lr=1e-2).step()
    adapter.zero_grad()
    (adapter(u, context) - target).square().sum().backward()
    for parameter_name, parameter in adapter.named_parameters():
        if parameter_name == "alpha":  # used by whoever mixes the injection in
            continue
        assert parameter.grad is not None, parameter_name
        assert parameter.grad.abs().sum() > 0, parameter_name


def test_forward_is_projections_match_and_read():
    torch.manual_seed(1)
    adapter = RosaAdapter(12, bits=3, routes=5)
    torch.nn.init.normal_(adapter.o_proj.weight)
    u = torch.randn(2, 30, 12)
    context = RosaContext(record=True)
    out = adapter(u, context)
    match = suffix_match(pack(adapter.q_proj(u), 3), pack(adapter.k_proj(u), 3), backend="oracle")
    y = retrieve_oracle(adapter.v_proj(u), match.position, adapter.e0, adapter.e1, bits=3)
    torch.testing.assert_close(out, adapter.o_proj(y))
    assert torch.equal(context.matches[0].position, match.position)


@pytest.mark.parametrize("estimator", ["counterfactual", "bitflip", "suffix_attention", "soft_dp"])
def test_grouped_values_are_repeated_heads(estimator):
    """Like an adapter whose value projection repeats each head's rows; gradients are their sum."""
    torch.manual_seed(3)
    options = {"bits": 2, "routes": 6, "estimator": estimator, "own_value": True}
    grouped = RosaAdapter(12, value_groups=3, dtype=torch.float64, **options)
    plain = RosaAdapter(12, dtype=torch.float64, **options)
    for projection in (grouped.o_proj, grouped.own_proj):
        torch.nn.init.normal_(projection.weight)
    state = grouped.state_dict()
    heads = state["projections.w_v.weight"]
    assert heads.shape == (4, 12)
    wide = heads.unflatten(0, (2, 1, 2)).expand(-1, 3, -1, -1).flatten(0, 2)
    plain.load_state_dict({**state, "projections.w_v.weight": wide})
    u = torch.randn(2, 30, 12, dtype=torch.float64)
    results = []
    for adapter in (grouped, plain):
        out = adapter(u, RosaContext())
        out.square().sum().backward()
        results.append((out, {n: p.grad for n, p in adapter.named_parameters()}))
    (got, grads), (expected, wanted) = results
    torch.testing.assert_close(got, expected)
    summed = wanted["projections.w_v.weight"].unflatten(0, (2, 3, 2)).sum(1).flatten(0, 1)
    for name, grad in {**wanted, "projections.w_v.weight": summed}.items():
        torch.testing.assert_close(grads[name], grad, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("estimator", ["soft_dp", "soft_scan"])
def test_what_is_evaluated_is_what_decodes(estimator):
    """A soft forward trains; without gradients, in evaluation mode, the read is hard."""
    torch.manual_seed(0)
    soft, plain = RosaAdapter(16, estimator=estimator), RosaAdapter(16)
    with torch.no_grad():
        soft.o_proj.weight.normal_()
    plain.load_state_dict(soft.state_dict())
    u = torch.randn(4, 16)[torch.randint(0, 4, (2, 30))]
    with torch.no_grad():
        trained = soft(u, RosaContext())
    soft.eval()
    assert torch.equal(soft(u, RosaContext()), trained)  # a gradient is asked for
    with torch.no_grad():
        evaluated = soft(u, RosaContext())
        assert torch.equal(evaluated, plain(u, RosaContext()))
        assert not torch.allclose(evaluated, trained, atol=1e-3)
        steps = RosaContext(states=RosaStates())
        steps.states.advance(2, 30, None)
        torch.testing.assert_close(soft(u, steps), evaluated)


def test_control_never_looks_back():
    """With retrieve=False no output depends on an earlier position."""
    torch.manual_seed(2)
    adapter = RosaAdapter(8, retrieve=False)
    torch.nn.init.normal_(adapter.o_proj.weight)
    u = torch.randn(1, 20, 8)
    changed = u.clone()
    changed[:, :10] = torch.randn(1, 10, 8)
    a, b = adapter(u, RosaContext()), adapter(changed, RosaContext())
    assert torch.equal(a[:, 10:], b[:, 10:])
    names = {name for name, _ in adapter.named_parameters()}
    assert names == {name for name, _ in RosaAdapter(8).named_parameters()}


def test_tied_start_gives_equal_symbols():
    adapter = RosaAdapter(16)
    assert torch.equal(adapter.q_proj.weight, adapter.k_proj.weight)
    assert adapter.q_proj.weight is not adapter.k_proj.weight
    assert not torch.equal(
        *(p.weight for p in (lambda a: (a.q_proj, a.k_proj))(RosaAdapter(16, tied_start=False)))
    )


def test_token_address_respects_min_length():
    ids = torch.tensor([[1, 2, 3, 1, 2, 9, 3]])
    adapter = RosaAdapter(8, address="token", min_length=2)
    context = token_context(ids)
    context.record = True
    adapter(torch.randn(1, 7, 8), context)
    assert context.matches[0].position[0, 0].tolist() == [-1, -1, -1, -1, 2, -1, -1]
    with pytest.raises(InvalidInputError, match="input_ids instead of inputs_embeds"):
        adapter(torch.randn(1, 7, 8), RosaContext())


@pytest.mark.parametrize(
    "options, message",
    [
        ({"bits": 5}, "choose bits that divide 16"),
        ({"bits": 0}, "1..16"),
        ({"routes": 0}, "at least 1"),
        ({"value_groups": 3}, r"divide the number of routes \(4\), got 3"),
        ({"value_groups": 0}, "divide the number of routes"),
        ({"inject": "middle"}, "inject must be one of"),
        ({"address": "psychic"}, "address must be one of"),
        ({"estimator": "none"}, "unknown estimator"),
        ({"estimator_options": {"tau": 2}}, "does not take tau"),
        ({"address": "token", "granularity": "run"}, "granularity='token'"),
        ({"address": "token", "max_length": 4}, "leave max_length at None"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(InvalidInputError, match=message):
        RosaAdapter(16, **options)


def test_runs_of_one_bit_say_nothing_but_the_last_symbol(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    q, k = torch.randint(0, 2, (2, 1, 1, 200), generator=generator, dtype=torch.uint8)
    found = suffix_match(q, k, granularity="run").position[0, 0].tolist()
    starts = [i for i in range(200) if i == 0 or k[0, 0, i] != k[0, 0, i - 1]]
    runs = 0  # of the query so far
    for i in range(200):
        runs += i == 0 or bool(q[0, 0, i] != q[0, 0, i - 1])
        # Runs alternate, so all that end alike agree as far back as there are runs.
        known = sum(start <= i for start in starts)
        alike = [e for e in range(known - 1) if k[0, 0, starts[e]] == q[0, 0, i]]
        longest = max((min(e + 1, runs) for e in alike), default=0)
        last = [e for e in alike if min(e + 1, runs) == longest]
        assert found[i] == (starts[last[-1] + 1] if last else -1)
    monkeypatch.setattr(errors, "_warned", set())
    with pytest.warns(RuntimeWarning, match="runs of one bit alternate"):
        RosaAdapter(8, bits=1, granularity="run")
