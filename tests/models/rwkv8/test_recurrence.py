"""The recurrence: chunked form and kernel wrapper against the loop, outputs and gradients."""

from __future__ import annotations

import importlib.util
import sys
import types

import pytest
import torch

from rosakit.errors import BackendError, InvalidInputError
from rosakit.models.rwkv8 import wkv7
from rosakit.models.rwkv8.recurrence import wkv7_chunked, wkv7_fla, wkv7_reference

NAMES = ("r", "log_w", "k", "v", "a", "b", "state")


def inputs(batch, length, heads, size, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    r, k, v, kk = (normal(batch, length, heads, size) for _ in range(4))
    kk = torch.nn.functional.normalize(kk, dim=-1)
    rate = normal(batch, length, heads, size).sigmoid()
    log_w = -(-0.5 - torch.nn.functional.softplus(-3 * normal(batch, length, heads, size))).exp()
    state = normal(batch, heads, size, size)
    return [x.to(dtype) for x in (r, log_w, k, v, -kk, kk * rate, state)]


SHAPES = [(1, 1, 1, 4), (2, 2, 2, 8), (2, 63, 2, 16), (1, 200, 3, 5)]


@pytest.mark.parametrize("shape", SHAPES, ids="B{0[0]}-T{0[1]}-H{0[2]}-N{0[3]}".format)
@pytest.mark.parametrize("chunk", [1, 16, 32])
def test_chunked_equals_reference(shape, chunk):
    arguments = [x.requires_grad_() for x in inputs(*shape)]
    expected, last = wkv7_reference(*arguments)
    weight = torch.randn_like(expected), torch.randn_like(last)
    wanted = torch.autograd.grad((expected * weight[0]).sum() + (last * weight[1]).sum(), arguments)
    y, state = wkv7_chunked(*arguments, chunk=chunk)
    torch.testing.assert_close(y, expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(state, last, rtol=1e-9, atol=1e-9)
    grads = torch.autograd.grad((y * weight[0]).sum() + (state * weight[1]).sum(), arguments)
    for name, got, want in zip(NAMES, grads, wanted, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-7, atol=1e-8, msg=f"d{name}")


def test_chunked_float32_is_as_precise_as_the_loop():
    """At the strongest decay that RWKV-7 allows, for 500 positions."""
    exact = inputs(1, 500, 2, 16)
    exact[1].fill_(-(torch.tensor(-0.5).exp()))
    single = [x.float() for x in exact]
    truth = wkv7_reference(*exact)[0]
    loop = (wkv7_reference(*single)[0] - truth).abs().max()
    chunked = (wkv7_chunked(*single)[0] - truth).abs().max()
    assert chunked < 3 * loop + 1e-6


def test_state_carries_over():
    arguments = inputs(2, 40, 2, 8)
    whole, last = wkv7(*arguments)
    first, state = wkv7(*(x[:, :17] for x in arguments[:6]), arguments[6])
    second, state = wkv7(*(x[:, 17:] for x in arguments[:6]), state)
    torch.testing.assert_close(torch.cat([first, second], 1), whole)
    torch.testing.assert_close(state, last)


def test_fla_gets_its_layout(monkeypatch):
    """A stand-in with the kernel's published signature and state layout [B, H, K, V]."""

    def chunk_rwkv7(r, w, k, v, a, b, scale, initial_state, output_final_state):
        assert scale == 1.0
        assert output_final_state
        assert initial_state.is_contiguous()
        s, out = initial_state, []
        for t in range(r.shape[1]):
            removed = torch.einsum("bhkv,bhk->bhv", s, a[:, t])
            s = s * w[:, t].exp()[..., None] + torch.einsum("bhk,bhv->bhkv", b[:, t], removed)
            s = s + torch.einsum("bhk,bhv->bhkv", k[:, t], v[:, t])
            out.append(torch.einsum("bhkv,bhk->bhv", s, r[:, t]))
        return torch.stack(out, 1), s

    module = types.ModuleType("fla.ops.rwkv7")
    module.chunk_rwkv7 = chunk_rwkv7
    for name in ("fla", "fla.ops"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, "fla.ops.rwkv7", module)
    arguments = inputs(2, 9, 2, 8, dtype=torch.float32)

    class OnGpu(torch.Tensor):
        is_cuda = True

    y, state = wkv7_fla(arguments[0].as_subclass(OnGpu), *arguments[1:])
    expected, last = wkv7_reference(*arguments)
    torch.testing.assert_close(y.as_subclass(torch.Tensor), expected)
    torch.testing.assert_close(state.as_subclass(torch.Tensor), last)


@pytest.mark.gpu
@pytest.mark.skipif(
    not torch.cuda.is_available() or importlib.util.find_spec("fla") is None,
    reason="needs a CUDA device and flash-linear-attention",
)
@pytest.mark.parametrize(
    "dtype, tolerance", [(torch.bfloat16, 3e-2), (torch.float16, 5e-3)], ids=["bf16", "fp16"]
)
@pytest.mark.parametrize("length", [5, 129, 256])
def test_fla_equals_the_loop_on_a_gpu(length, dtype, tolerance):
    """flash-linear-attention's kernel: outputs, last state and every gradient."""
    exact = [x.cuda() for x in inputs(2, length, 2, 16)]
    narrow = [x.to(dtype) if n != "state" else x.float() for n, x in zip(NAMES, exact, strict=True)]
    weight = torch.randn_like(exact[3]), torch.randn_like(exact[6])
    results = []
    for backend, leaves in (
        ("reference", [x.double().requires_grad_() for x in narrow]),
        ("fla", [x.requires_grad_() for x in narrow]),
    ):
        y, last = wkv7(*leaves, backend=backend)
        loss = (y.double() * weight[0]).sum() + (last.double() * weight[1]).sum()
        results.append((y, last, *torch.autograd.grad(loss, leaves)))
    names = ("y", "last", *(f"d{name}" for name in NAMES))
    for name, expected, got in zip(names, *results, strict=True):
        error = (got.double() - expected).norm() / expected.norm()
        assert error < tolerance, f"{name}: {error:.1e}"


def test_fla_needs_a_gpu():
    with pytest.raises(BackendError, match="CUDA tensors"):
        wkv7(*inputs(1, 3, 1, 4), backend="fla")


def test_wrong_arguments():
    arguments = inputs(1, 3, 1, 4)
    with pytest.raises(InvalidInputError, match=r"one shape \[B, T, H, N\]"):
        wkv7(arguments[0][:, :2], *arguments[1:])
    with pytest.raises(InvalidInputError, match="'triton'"):
        wkv7(*arguments, backend="triton")
