"""Maps of a few tokens: the products of single operators, rounded as a chain of them is."""

from __future__ import annotations

import pytest
import torch

from rosakit.cuda import compile
from rosakit.cuda import project as launcher
from tests.cuda import emulated
from tests.cuda.gpu import GPU


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=GPU)])
def device(request, monkeypatch):
    if request.param == "cpu":
        emulated.project_kernels(monkeypatch)
    return request.param


def run(x, weights, onto, y, **sizes):
    """y of the kernel, on whichever device."""
    index = y.device.index
    made = launcher.prepare(
        *(x.data_ptr(), [w.data_ptr() for w in weights], y.data_ptr()),
        formats=tuple(launcher.FORMATS[t.dtype] for t in (x, weights[0], y)),
        index=index,
        onto=0 if onto is None else onto.data_ptr(),
        **sizes,
    )
    made.queue(0 if index is None else compile.stream_of(index))
    return y


F, B, H = torch.float32, torch.bfloat16, torch.float16
MIXES = [(F, F, F), (B, B, B), (B, F, F), (F, F, B), (B, F, B)]


@pytest.mark.parametrize(
    "kinds", [*MIXES, *(pytest.param(kinds, marks=GPU) for kinds in [(H, H, H), (H, F, H)])]
)
@pytest.mark.parametrize("inputs,outputs", [(1, 1), (5, 3), (64, 9), (520, 17), (33, 4)])
@pytest.mark.parametrize("parts,tokens", [(1, 1), (2, 1), (3, 3)])
def test_products(device, kinds, inputs, outputs, parts, tokens):
    if device == "cpu" and H in kinds:
        pytest.skip("the emulator knows no float16")
    torch.manual_seed(inputs)
    x_type, w_type, y_type = kinds
    # All parts read the same, then each its own.
    for own in (False, True):
        x = torch.randn(tokens, parts if own else 1, inputs, device=device, dtype=x_type)
        weights = [torch.randn(outputs, inputs, device=device, dtype=w_type) for _ in range(parts)]
        y = torch.full((tokens, parts, outputs), float("nan"), device=device, dtype=y_type)
        sizes = {"inputs": inputs, "outputs": outputs, "tokens": tokens}
        run(x, weights, None, y, **sizes, apart=own)
        wanted = torch.einsum("tpi,poi->tpo", x.double().expand(-1, parts, -1), stacked(weights))
        assert_rounded(y, wanted.to(w_type).to(y_type), wanted)


def stacked(weights):
    return torch.stack(weights).double()


def assert_rounded(got, wanted, exact):
    """Equal but for sums in another order, which may round to a neighbour."""
    coarse = min((t.dtype for t in (got, wanted)), key=lambda d: torch.finfo(d).bits)
    step = max(torch.finfo(coarse).eps, 1e-5)
    if coarse != torch.float32:
        assert (got == wanted).float().mean() > 0.8
    scale = exact.abs().mean().clamp(min=1.0).item()
    torch.testing.assert_close(got.double(), exact, atol=2 * step * scale, rtol=2 * step)


@pytest.mark.parametrize("kinds", MIXES)
def test_sums(device, kinds):
    """What is added to has the dtype of the result, and is rounded after the product is."""
    torch.manual_seed(0)
    x_type, w_type, y_type = kinds
    tokens, inputs, outputs = 2, 24, 13
    x = torch.randint(-3, 4, (tokens, inputs), device=device).to(x_type)
    w = torch.randint(-3, 4, (outputs, inputs), device=device).to(w_type) / 8
    onto = torch.randn(tokens, outputs, device=device).to(y_type)
    y = torch.full_like(onto, float("nan"))
    run(x, [w], onto, y, inputs=inputs, outputs=outputs, tokens=tokens)
    # Products and sums of these numbers are exact in float32.
    product = (x.float() @ w.float().t()).to(w_type).to(y_type)
    assert torch.equal(y, onto + product)


def test_rows_that_begin_anywhere(device):
    """Without the wide loads, where an address does not allow them."""
    torch.manual_seed(1)
    x, w = torch.randn(24, device=device)[1:17], torch.randn(5 * 16 + 3, device=device)[3:]
    y = torch.full((1, 5), float("nan"), device=device)
    run(x, [w.view(5, 16)], None, y, inputs=16, outputs=5, tokens=1)
    torch.testing.assert_close(y[0], w.view(5, 16) @ x)
