"""What training loops do to an operator, on a GPU: every estimator with its own kernels."""

from __future__ import annotations

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from rosakit.ops import rosa
from tests.ops.test_contracts import CASES, FIXED, RosaContext, adapter, gradients

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def call(case, *tensors, **more):
    return rosa(*tensors, bits=2, estimator=case.partition(",")[0], **CASES[case], **more)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_and_loss_scaling(case, dtype):
    layer = adapter(case).cuda()
    u = torch.randn(2, 40, 8, device="cuda")
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cuda", init_scale=2.0**8)
    with torch.autocast("cuda", dtype=dtype):
        out = layer(u, RosaContext())
    assert out.dtype == dtype
    scaler.scale(out.float().square().mean()).backward()
    scaler.unscale_(optimizer)
    for name, p in layer.named_parameters():
        assert p.grad.dtype == torch.float32, name
        assert p.grad.isfinite().all(), name
    assert layer.q_proj.weight.grad.abs().sum() > 0
    before = layer.q_proj.weight.detach().clone()
    scaler.step(optimizer)
    assert not torch.equal(layer.q_proj.weight, before)


@pytest.mark.parametrize("case", CASES)
def test_recomputation_changes_nothing(case):
    layer = adapter(case).cuda()
    u = torch.randn(2, 40, 8, device="cuda", requires_grad=True)

    def loss(wrap):
        torch.manual_seed(5)  # what samples and drops
        return wrap(lambda x: layer(x, RosaContext())).square().mean()

    plain = gradients(layer, lambda: loss(lambda f: f(u)))
    again = gradients(layer, lambda: loss(lambda f: checkpoint(f, u, use_reentrant=False)))
    for name in plain:
        torch.testing.assert_close(again[name], plain[name], msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("case", FIXED)
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_one_graph(case, backend):
    torch._dynamo.reset()
    leaves = [torch.randn(1, 24, 4, device="cuda").requires_grad_() for _ in range(3)]
    levels = -torch.ones(4, device="cuda"), torch.ones(4, device="cuda")
    slope = torch.randn(1, 24, 4, device="cuda")
    expected = torch.autograd.grad(call(case, *leaves, *levels), leaves, slope)
    compiled = torch.compile(lambda *x: call(case, *x, *levels), fullgraph=True, backend=backend)
    got = torch.autograd.grad(compiled(*leaves), leaves, slope)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("case", FIXED)
@pytest.mark.parametrize("how", ["packed", "padded"])
def test_packed_and_padded_rows_equal_rows_alone(case, how):
    """Outputs and gradients of the fused kernels, at lengths across a strip."""
    sizes = (37, 70)
    parts = [torch.randn(3, 1, n, 4, device="cuda") for n in sizes]
    levels = -torch.ones(4, device="cuda"), torch.ones(4, device="cuda")
    if how == "packed":
        joined = torch.cat(parts, 2)
        more = {"cu_seqlens": torch.tensor([0, 37, 107], device="cuda")}
    else:
        joined = torch.zeros(3, 2, 70, 4, device="cuda")
        for n, part in enumerate(parts):
            joined[:, n, : part.shape[2]] = part[:, 0]
        more = {"lengths": torch.tensor(sizes, device="cuda")}

    def both(tensors, **options):
        leaves = [x.clone().requires_grad_() for x in tensors]
        y = call(case, *leaves, *levels, **options)
        slope = torch.arange(4.0, device="cuda").expand_as(y)
        if how == "padded" and options:
            own = torch.arange(70, device="cuda") < more["lengths"][:, None]
            slope = slope * own[..., None]
        return torch.stack([y.detach(), *torch.autograd.grad(y, leaves, slope)])

    whole = both(joined, **more)
    for n, part in enumerate(parts):
        alone, size = both(part), sizes[n]
        at = (
            (0, slice(0, 37) if n == 0 else slice(37, 107)) if how == "packed" else (n, slice(size))
        )
        torch.testing.assert_close(whole[:, at[0], at[1]], alone[:, 0], rtol=1e-4, atol=1e-5)
