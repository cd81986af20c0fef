"""`soft_dp` and `soft_scan`: definition, gradients, limits, masks, contracts."""

from __future__ import annotations

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from rosakit.errors import InvalidInputError
from rosakit.ops import rosa
from rosakit.ops.estimators.pairwise import Form, attend_naive, recur

ESTIMATORS = ["soft_dp", "soft_scan"]


def example(length=14, routes=2, bits=2, batch=1, seed=0, dtype=torch.float64):
    """q, k, v, e0, e1 with |q|, |k|, |v| >= 0.5 and frequent matches."""
    g = torch.Generator().manual_seed(seed)
    shape = (batch, length, routes * bits)
    q, k, v = (torch.randn(shape, generator=g).to(dtype) for _ in range(3))
    k = torch.where(torch.rand(shape, generator=g) < 0.7, q, k)
    q, k, v = (x + 0.5 * torch.where(x > 0, 1, -1) for x in (q, k, v))
    e0, e1 = torch.randn(2, routes * bits, generator=g).to(dtype)
    return q, k, v, e0, e1


def definition(recurrence, q, k, v, e0, e1, bits, tau, mode):
    """Semantics 3.2 for ``[1, T, M]`` and one route, a pair at a time."""
    length = q.shape[1]
    q, k, v = q[0], k[0], v[0]
    if mode == "bits":
        product = (q / tau).tanh() @ (k / tau).tanh().T
        a = ((product - (bits - 1) * (1 - tau)) / tau).sigmoid()
        value = e0 + (e1 - e0) * (v / tau).sigmoid()
    else:
        a = (q / tau).softmax(-1) @ (k / tau).softmax(-1).T
        value = e0 + (e1 - e0) * (v / tau).softmax(-1)
    x = {}
    for i in range(length):
        for j in range(i):
            if recurrence == "dp":
                x[i, j] = a[i, j] * (x.get((i - 1, j - 1), 0.0) + 1)
            else:
                path = [a[i - j + n, n] for n in range(j + 1)]
                t = torch.stack(path).cumsum(0)
                x[i, j] = t[-1] - (t * (1 - torch.stack(path))).max()
    out = []
    for i in range(length):
        z = torch.stack(
            [(x[i, j] + j / (i + 1)) / tau for j in range(i)] + [v.new_tensor(i / (i + 1) / tau)]
        )
        weights = z.softmax(0)
        out.append(weights[:-1] @ value[1 : i + 1] if i else torch.zeros_like(value[0]))
    return torch.stack(out)[None]


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("mode", ["bits", "onehot"])
def test_forward_is_the_definition(estimator, mode):
    for length, bits, seed in ((1, 2, 0), (2, 1, 1), (13, 3, 2)):
        q, k, v, e0, e1 = example(length, 1, bits, seed=seed)
        got = rosa(q, k, v, e0, e1, bits=bits, estimator=estimator, tau=0.7, mode=mode)
        expected = definition(estimator[5:], q, k, v, e0, e1, bits, 0.7, mode)
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("mode", ["bits", "onehot"])
@pytest.mark.parametrize("unmatched", ["zero", "self", "null"])
def test_gradcheck(estimator, mode, unmatched):
    q, k, v, e0, e1 = example(5, 1, 2)
    leaves = [x.requires_grad_() for x in (q, k, v, e0, e1)]
    options = {"bits": 2, "estimator": estimator, "tau": 0.8, "mode": mode, "unmatched": unmatched}
    if unmatched == "null":
        options["e_null"] = torch.randn(2, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda *x: rosa(*x, **options), leaves, fast_mode=True)


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("mode", ["bits", "onehot"])
@pytest.mark.parametrize("align", ["successor", "self"])
def test_converges_to_the_hard_forward(estimator, mode, align):
    """Within 1e-6 at tau = 2e-3: at 24 positions scores differ by 1 / 25, that is 20 tau."""
    for seed in range(3):
        q, k, v, e0, e1 = example(24, 2, 3, seed=seed)
        if mode == "onehot":  # a clear winner in each route
            q, k, v = (
                x + 4 * (x == x.unflatten(-1, (-1, 3)).amax(-1).repeat_interleave(3, -1))
                for x in (q, k, v)
            )
        options = {"bits": 3, "estimator": estimator, "mode": mode, "align": align}
        if align == "self":
            options["unmatched"] = "self"
        hard = rosa(q, k, v, e0, e1, tau=None, **options)
        error = [
            (rosa(q, k, v, e0, e1, tau=tau, **options) - hard).abs().max() for tau in (0.5, 2e-3)
        ]
        assert error[1] < 1e-6
        assert error[0] > error[1]


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("length", [24, 100, 250])
def test_the_temperature_that_convergence_takes(estimator, length):
    """tau = 1 / (20 (T + 1)): scores are 20 apart, outputs within 1e-6 (docs: soft.md)."""
    inputs = example(length, 2, 3, seed=length)
    hard = rosa(*inputs, bits=3)
    soft = rosa(*inputs, bits=3, estimator=estimator, tau=1 / (20 * (length + 1)))
    assert (soft - hard).abs().max() < 1e-6
    loose = rosa(*inputs, bits=3, estimator=estimator, tau=1 / (length + 1))
    assert (loose - hard).abs().max() > 1e-6


@pytest.mark.parametrize("unmatched", ["zero", "self"])
def test_hard_mode_is_the_hard_operator(unmatched):
    q, k, v, e0, e1 = (x.requires_grad_() for x in example(40, 2, 2))
    expected = rosa(q, k, v, e0, e1, bits=2, unmatched=unmatched)
    got = rosa(q, k, v, e0, e1, bits=2, unmatched=unmatched, estimator="soft_scan", tau=None)
    assert torch.equal(got, expected)
    grads = torch.autograd.grad(got.square().sum(), (v, e0, e1))
    torch.testing.assert_close(grads, torch.autograd.grad(expected.square().sum(), (v, e0, e1)))


def test_self_alignment_hard_mode_reads_the_compared_key():
    q, k, v, e0, e1 = example(20, 1, 2, seed=3)
    _, match = rosa(
        q,
        k,
        v,
        e0,
        e1,
        bits=2,
        estimator="soft_dp",
        tau=None,
        align="self",
        unmatched="self",
        return_match=True,
    )
    from rosakit.symbols import pack
    from tests.ops import brute

    qs, ks = (pack(x, 2)[0, 0].tolist() for x in (q, k))
    for i in range(20):
        j, size = brute.best(qs, ks, i, range(i + 1))
        assert int(match.length[0, 0, i]) == size
        assert int(match.position[0, 0, i]) == (-1 if j is None else j)


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("align", ["successor", "self"])
def test_packed_and_padded_rows_equal_rows_alone(estimator, align):
    parts = [example(n, seed=n) for n in (9, 6)]
    e0, e1 = parts[0][3:]
    options = {"bits": 2, "estimator": estimator, "tau": 0.6, "align": align, "unmatched": "self"}
    alone = []
    for q, k, v, _, _ in parts:
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        y = rosa(*leaves, e0, e1, **options)
        alone.append((y, torch.autograd.grad(y.square().sum(), leaves)))
    pad = torch.full_like(parts[0][0][:, :2], 3.0)
    leaves = [torch.cat([parts[0][n], parts[1][n], pad], dim=1).requires_grad_() for n in range(3)]
    ids = torch.tensor([[0] * 9 + [1] * 6 + [-1] * 2])
    y = rosa(*leaves, e0, e1, document_ids=ids, **options)
    torch.testing.assert_close(y[:, :15], torch.cat([a[0] for a in alone], dim=1))
    assert (y[:, 15:] == 0).all()
    for n, grad in enumerate(torch.autograd.grad(y.square().sum(), leaves)):
        expected = torch.cat([a[1][n] for a in alone] + [torch.zeros_like(pad)], dim=1)
        torch.testing.assert_close(grad, expected)


def test_length_options_move_the_soft_forward_like_the_hard_one():
    q, k, v, e0, e1 = example(24, 2, 2, seed=5)
    for options in ({"max_length": 2}, {"min_length": 3}):
        hard = rosa(q, k, v, e0, e1, bits=2, **options)
        for estimator in ESTIMATORS:
            soft = rosa(q, k, v, e0, e1, bits=2, estimator=estimator, tau=2e-3, **options)
            torch.testing.assert_close(soft, hard, rtol=0, atol=1e-6)


def test_scan_is_run_length_on_hard_symbols():
    a = (torch.rand(2, 30, 30) < 0.7).double().tril(-1)
    allowed = torch.ones(30, 30, dtype=torch.bool).tril(-1)
    assert torch.equal(recur(a, allowed, "scan"), recur(a, allowed, "dp"))


def test_straight_through_is_hard_forward_soft_backward():
    q, k, v, e0, e1 = (x.requires_grad_() for x in example(20))
    options = {"bits": 2, "estimator": "soft_dp", "tau": 0.5}
    y = rosa(q, k, v, e0, e1, straight_through=True, **options)
    assert torch.equal(y, rosa(q, k, v, e0, e1, bits=2))
    grad = torch.randn_like(y)
    got = torch.autograd.grad(y, (q, k, v, e0, e1), grad)
    expected = torch.autograd.grad(rosa(q, k, v, e0, e1, **options), (q, k, v, e0, e1), grad)
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_low_precision_accumulates_in_float32(estimator, dtype):
    inputs = [x.to(dtype) for x in example(30, 2, 4)]
    results = []
    for cast in (dtype, torch.float64):
        leaves = [x.to(cast).requires_grad_() for x in inputs]
        y = rosa(*leaves, bits=4, estimator=estimator, tau=0.5)
        assert y.dtype == cast
        results.append(torch.autograd.grad(y, leaves, torch.ones_like(y)))
    ratio = {torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 4e-3}[dtype]
    for name, low, high in zip(("dq", "dk", "dv", "de0", "de1"), *results, strict=True):
        assert (low.double() - high).norm() / high.norm() < ratio, name


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_checkpointing_autocast_and_compile(estimator):
    q, k, v, e0, e1 = (x.float().requires_grad_() for x in example(12))

    def call(*x):
        return rosa(*x, bits=2, estimator=estimator, tau=0.5)

    def grads(f):
        return torch.autograd.grad(f(q, k, v, e0, e1).square().sum(), (q, k, v, e0, e1))

    expected = grads(call)
    again = grads(lambda *x: checkpoint(call, *x, use_reentrant=False))
    compiled = grads(torch.compile(call, fullgraph=True, backend="aot_eager"))
    for a, b, c in zip(expected, again, compiled, strict=True):
        torch.testing.assert_close(a, b)
        torch.testing.assert_close(a, c)
    with torch.autocast("cpu", dtype=torch.bfloat16):  # as inside an autocast model
        project = torch.nn.Linear(4, 4)
        y = call(project(q), k.bfloat16(), v.bfloat16(), e0, e1)
    y.square().sum().backward()
    assert project.weight.grad.isfinite().all()
    assert project.weight.grad.abs().sum() > 0


def test_grad_scaler_scales_exactly():
    q, k, v, e0, e1 = (x.float() for x in example(16))
    grads = []
    for scale in (1.0, 2.0**12):
        leaf = q.clone().requires_grad_()
        scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        optimizer = torch.optim.SGD([leaf], lr=0.0)
        scaler.scale(
            rosa(leaf, k, v, e0, e1, bits=2, estimator="soft_dp", tau=0.5).sum()
        ).backward()
        scaler.unscale_(optimizer)
        grads.append(leaf.grad)
    torch.testing.assert_close(*grads)


def test_dropout_needs_one_seed_only():
    q, k, w = torch.randn(3, 1, 2, 12, 3, dtype=torch.float64)
    form = Form("sigmoid", 1.0, 0.0, "dp", "length", 1.0, dropout=0.5)
    seeds = [torch.tensor([s]) for s in (1, 1, 2)]
    y = [attend_naive(q, k, w, None, None, form, seed) for seed in seeds]
    assert torch.equal(y[0], y[1])
    assert not torch.equal(y[0], y[2])
    many = [attend_naive(q, k, w, None, None, form, torch.tensor([s])) for s in range(300)]
    whole = attend_naive(q, k, w, None, None, form._replace(dropout=0.0))
    assert (torch.stack(many).mean(0) - whole).abs().max() < 0.25


def test_bad_options_are_refused():
    q, k, v, e0, e1 = example()
    for options, message in (
        ({"tau": 0.0}, "tau must be positive"),
        ({"mode": "bytes"}, "mode must be"),
        ({"align": "left"}, "align must be"),
        ({"align": "self"}, "needs unmatched='self'"),
        ({"granularity": "run"}, "compare symbols, not runs"),
    ):
        with pytest.raises(InvalidInputError, match=message):
            rosa(q, k, v, e0, e1, bits=2, estimator="soft_dp", **options)
