"""Counterfactual flips at a sample of positions: unbiased, pure, and everywhere the same sample."""

from __future__ import annotations

import pytest
import torch

from rosakit import native
from rosakit.errors import InvalidInputError
from rosakit.ops import ahead, rosa, suffix_match
from rosakit.ops.estimators.sampling import sample_positions, sampled_mask
from rosakit.tuning import RosaConfig, attach, rosa_parameters
from tests.tuning.tiny import build, tokens

BITS = 4
core = pytest.mark.skipif(not native.available(), reason="the compiled core is missing")


def leaves(length=63, dtype=torch.float32):
    torch.manual_seed(3)
    shapes = [(2, length, 3 * BITS)] * 3 + [(3 * BITS,)] * 2
    return [torch.randn(shape, dtype=dtype).requires_grad_() for shape in shapes]


def gradients(given=False, dtype=torch.float32, **options):
    inputs = leaves(dtype=dtype)
    q, k = inputs[:2]
    if given:
        names = ("granularity", "stride", "seed")
        begin = {name: options[name] for name in names if name in options}
        options["given"] = ahead.begin(q, k, bits=BITS, **begin)
    y, match = rosa(*inputs, bits=BITS, return_match=True, **options)
    (y * torch.linspace(-1, 1, y.numel()).view_as(y)).sum().backward()
    return [y, match.cf_position, *(x.grad for x in inputs)]


@pytest.mark.parametrize("length", [1, 2, 63, 1000])
@pytest.mark.parametrize("stride", [2, 3, 7])
def test_one_position_of_each_stride_is_drawn_and_all_alike(length, stride):
    torch.manual_seed(0)
    q = torch.randn(2, length, 8)
    counts = torch.zeros(2, length)
    for seed in range(400):
        sampled = sample_positions(q, stride, seed)
        assert (sampled // stride == torch.arange(-(-length // stride))).all()
        counts += sampled_mask(sampled, length)
    # Five standard deviations of a binomial count.
    expected = 400 / stride
    assert (counts - expected).abs().max() < 5.5 * (expected * (1 - 1 / stride)) ** 0.5


def test_the_draw_is_pure_and_changes_with_bits_and_seed():
    q = torch.randn(1, 200, 8)
    first = sample_positions(q, 4, 0)
    assert torch.equal(first, sample_positions(q * 3, 4, 0))  # only bits matter
    assert not torch.equal(first, sample_positions(q, 4, 1))
    flipped = q.clone()
    flipped[0, 7, 3] *= -1
    assert not torch.equal(first, sample_positions(flipped, 4, 0))


@pytest.mark.parametrize("granularity", ["token", "run"])
@pytest.mark.parametrize("backend", ["oracle", pytest.param("cpu", marks=core)])
def test_stride_one_is_the_full_estimator_bit_for_bit(granularity, backend):
    options = {"granularity": granularity, "backend": backend}
    for a, b in zip(gradients(**options), gradients(stride=1, seed=5, **options), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("key_credit", ["matched", "successor"])
@pytest.mark.parametrize("granularity", ["token", "run"])
def test_sampled_gradients_are_the_full_ones_on_average(granularity, key_credit):
    options = {"granularity": granularity, "key_credit": key_credit}
    full = gradients(**options)
    count, mean, square = 300, [0, 0], [0, 0]
    for seed in range(count):
        found = gradients(stride=4, seed=seed, **options)
        assert torch.equal(found[0], full[0])  # the forward pass knows nothing of it
        for a, b in zip(found[4:], full[4:], strict=True):
            assert torch.allclose(a, b, atol=1e-6)
        for i in range(2):
            mean[i] = mean[i] + found[2 + i].double() / count
            square[i] = square[i] + found[2 + i].double() ** 2 / count
    for i in range(2):
        error = (square[i] - mean[i] ** 2).clamp(min=1e-12).div(count).sqrt()
        assert ((mean[i] - full[2 + i]).abs() < 5.5 * error + 1e-6).all()


@core
@pytest.mark.parametrize("granularity", ["token", "run"])
@pytest.mark.parametrize("length", [1, 63, 1000])
@pytest.mark.parametrize("stream", ["random", "constant", "periodic"])
def test_flips_at_a_sample_are_those_of_the_full_match(granularity, length, stream):
    torch.manual_seed(length)
    q = torch.randint(4, (2, 3, length), dtype=torch.uint8)
    k = torch.randint(4, (2, 3, length), dtype=torch.uint8)
    if stream == "constant":
        q, k = torch.ones_like(q), torch.ones_like(k)
    elif stream == "periodic":
        q = k = (torch.arange(length) % 3).to(torch.uint8).expand(2, 3, -1)
    starts = torch.zeros(2, length, dtype=torch.int32)
    starts[:, length // 2 :] = length // 2
    starts[1, : length // 4] = -1
    starts[1, length // 4 : length // 2] = length // 4
    at = torch.rand(2, length) < 0.3
    options = {"granularity": granularity, "segment_starts": starts, "counterfactual_bits": 2}
    full = suffix_match(q, k, backend="cpu", **options)
    wanted = torch.where(at[:, None, :, None], full.cf_position, full.position[..., None])
    for backend in ("cpu", "oracle", "pipeline") if length < 100 else ("cpu", "pipeline"):
        got = suffix_match(q, k, counterfactual_at=at, backend=backend, **options)
        assert torch.equal(got.position, full.position)
        assert torch.equal(got.cf_position, wanted), backend


@core
@pytest.mark.parametrize("granularity", ["token", "run"])
def test_a_match_begun_ahead_draws_the_same_sample(granularity):
    options = {"granularity": granularity, "stride": 3, "seed": 2}
    for a, b in zip(gradients(given=True, **options), gradients(**options), strict=True):
        assert torch.equal(a, b)


def test_half_precision_takes_the_gradients_of_single_precision():
    for stride in (1, 3):
        inputs = leaves(dtype=torch.float16)
        wide = [x.detach().float().requires_grad_() for x in inputs]
        for q, k, v, e0, e1 in (inputs, wide):
            y = rosa(q, k, v, e0, e1, bits=BITS, stride=stride)
            assert y.dtype == v.dtype
            (y * torch.linspace(-1, 1, y.numel()).view_as(y).to(y.dtype)).sum().backward()
        for half, single in zip(inputs, wide, strict=True):
            assert half.grad.dtype == torch.float16
            torch.testing.assert_close(half.grad.float(), single.grad, rtol=5e-3, atol=5e-3)


def test_operators_pass_opcheck_and_compile():
    inputs = leaves(length=12)
    torch.library.opcheck(
        torch.ops.rosakit.counterfactual.default,
        (
            *(*inputs, None, None, BITS, "token", "available", 0, 1, "auto", "zero", True),
            *("matched", True, 1.0, sample_positions(inputs[0], 3, 0), 3),
        ),
    )
    compiled = torch.compile(
        lambda *x: rosa(*x, bits=BITS, stride=3), fullgraph=True, backend="aot_eager"
    )
    other = leaves(length=12)
    compiled(*other).square().sum().backward()
    rosa(*inputs, bits=BITS, stride=3).square().sum().backward()
    for a, b in zip(other, inputs, strict=True):
        torch.testing.assert_close(a.grad, b.grad)


@pytest.mark.parametrize("reentrant", [None, False, True])
def test_checkpointed_layers_draw_the_same_sample(reentrant):
    def run(mode):
        model = build("llama", depth=2)
        attach(model, RosaConfig(window=9, counterfactual_stride=3))
        torch.manual_seed(0)
        with torch.no_grad():
            for parameter in rosa_parameters(model).values():
                parameter.add_(0.1 * torch.randn_like(parameter))
        model.train()
        if mode is not None:
            model.gradient_checkpointing_enable({"use_reentrant": mode})
            model.enable_input_require_grads()
        ids = tokens(2, 40)
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        return {n: p.grad for n, p in rosa_parameters(model).items()}

    plain, found = run(None), run(reentrant)
    assert any("w_q" in name for name in plain)
    for name, grad in plain.items():
        torch.testing.assert_close(found[name], grad, msg=name)


def test_what_cannot_be_sampled_is_refused():
    with pytest.raises(InvalidInputError, match="stride must be at least 1"):
        gradients(stride=0)
    x = torch.zeros(1, 1, 4, dtype=torch.uint8)
    with pytest.raises(InvalidInputError, match="counterfactual_at must be bool"):
        suffix_match(x, x, counterfactual_bits=1, counterfactual_at=torch.zeros(1, 3))
    with pytest.raises(InvalidInputError, match="counterfactual_stride"):
        RosaConfig(estimator="bitflip", counterfactual_stride=2)
    with pytest.raises(InvalidInputError, match="give one"):
        RosaConfig(counterfactual_stride=2, estimator_options={"stride": 2})


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("granularity", ["token", "run"])
def test_the_gpu_draws_and_credits_as_the_cpu_does(granularity):
    grads = []
    for device in ("cpu", "cuda"):
        inputs = [x.detach().to(device).requires_grad_() for x in leaves(length=1000)]
        y = rosa(*inputs, bits=BITS, stride=4, granularity=granularity)
        (y * torch.linspace(-1, 1, y.numel(), device=device).view_as(y)).sum().backward()
        grads.append([x.grad.cpu() for x in inputs])
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
