"""RWKV-7's recurrence: the reference, a chunked form, and flash-linear-attention's kernel.

For each head with state ``S [V, K]`` (here ``V = K = N``), per position::

    S_t = S_{t-1} diag(w_t) + (S_{t-1} a_t) b_t^T + v_t k_t^T,    y_t = S_t r_t

RWKV-7 uses ``a = -kk`` and ``b = kk * eta`` with the normalised removal key ``kk``. Source: RWKV-7
"Goose" (arXiv 2503.14456), section 4; the chunked form follows from unrolling it.

Chunked form. Inside a chunk let ``D_t = prod_{s <= t} w_s`` (elementwise, over the key channels)
and ``u_t = S_{t-1} a_t``. Unrolling from the chunk's first state ``S_0``::

    S_t = S_0 diag(D_t) + sum_{s <= t} (u_s b_s^T + v_s k_s^T) diag(D_t / D_s)
    u_t = S_0 (D_{t-1} a_t) + sum_{s < t} (u_s b_s + v_s k_s) . (a_t D_{t-1} / D_s)

so the ``u`` of a chunk solve a unit lower triangular system, and everything else is products of
small matrices. ``D_t / D_s`` is split as ``(D_t / D_m) (D_m / D_s)`` around the chunk's middle;
RWKV-7's decay is at least ``exp(-exp(-1/2))`` = 0.545, so a factor stays below ``0.545^(-L/2)``.
"""

from __future__ import annotations

import importlib.util
from typing import Literal

import torch
from torch import Tensor

from rosakit.errors import BackendError, InvalidInputError

Wkv7Backend = Literal["auto", "reference", "chunked", "fla"]
CHUNK = 32


def wkv7(
    r: Tensor,
    log_w: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    state: Tensor | None = None,
    *,
    backend: Wkv7Backend = "auto",
) -> tuple[Tensor, Tensor]:
    """Run the recurrence over ``[B, T, H, N]``.

    Args:
        r: receptance, what is read, ``[B, T, H, N]`` as all of them.
        log_w: natural logarithm of the decay, at most 0.
        k: keys.
        v: values.
        a: what is looked up for removal.
        b: what replaces it.
        state: ``[B, H, N, N]`` (value, key) to start from; zeros if None.
        backend: "reference" (a loop over positions), "chunked", "fla"
            (flash-linear-attention's kernel, CUDA only), or "auto": the reference for a few
            positions, fla for CUDA tensors in half precision where it is installed (it advises
            against float32), chunked otherwise.

    Returns:
        ``(y [B, T, H, N], state [B, H, N, N])``; the state is float32 where inputs are narrower.

    Raises:
        InvalidInputError: shapes differ, or the backend is unknown.
        BackendError: "fla" was asked for and cannot serve these tensors.
    """
    if r.dim() != 4 or any(x.shape != r.shape for x in (log_w, k, v, a, b)):
        shapes = ", ".join(str(list(x.shape)) for x in (r, log_w, k, v, a, b))
        raise InvalidInputError(f"wkv7 takes six tensors of one shape [B, T, H, N], got {shapes}")
    if backend not in ("auto", "reference", "chunked", "fla"):
        raise InvalidInputError(
            f"wkv7 backend must be auto, reference, chunked or fla; got {backend!r}"
        )
    if backend == "auto":
        half = r.dtype in (torch.bfloat16, torch.float16)
        if r.shape[1] <= 4:
            backend = "reference"
        elif r.is_cuda and half and importlib.util.find_spec("fla") is not None:
            backend = "fla"
        else:
            backend = "chunked"
    work = torch.promote_types(r.dtype, torch.float32)
    if state is None:
        batch, _, heads, size = r.shape
        state = r.new_zeros((batch, heads, size, size), dtype=work)
    if backend == "fla":
        return wkv7_fla(r, log_w, k, v, a, b, state)
    run = wkv7_reference if backend == "reference" else wkv7_chunked
    y, last = run(*(x.to(work) for x in (r, log_w, k, v, a, b, state)))
    return y.to(v.dtype), last


def wkv7_reference(
    r: Tensor, log_w: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    """The definition above, one position at a time; arguments as in `wkv7`."""
    w = log_w.exp()
    outputs = []
    for t in range(r.shape[1]):
        removed = state @ a[:, t].unsqueeze(-1)  # [B, H, V, 1]
        state = (
            state * w[:, t].unsqueeze(-2)
            + removed @ b[:, t].unsqueeze(-2)
            + v[:, t].unsqueeze(-1) @ k[:, t].unsqueeze(-2)
        )
        outputs.append((state @ r[:, t].unsqueeze(-1)).squeeze(-1))
    y = torch.stack(outputs, dim=1) if outputs else torch.zeros_like(v)
    return y, state


def wkv7_chunked(
    r: Tensor,
    log_w: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    state: Tensor,
    chunk: int = CHUNK,
) -> tuple[Tensor, Tensor]:
    """The chunked form of the module's text; arguments as in `wkv7`."""
    batch, length, heads, size = r.shape
    if length == 0:
        return torch.zeros_like(v), state
    chunk = min(chunk, length)
    pad = -length % chunk
    # Padding with zeros is harmless: log_w = 0 keeps the state, k = b = 0 adds nothing to it.
    r, log_w, k, v, a, b = (
        torch.nn.functional.pad(x, (0, 0, 0, 0, 0, pad))
        .view(batch, -1, chunk, heads, size)
        .permute(0, 3, 1, 2, 4)  # [B, H, chunks, L, N]
        for x in (r, log_w, k, v, a, b)
    )
    total = log_w.cumsum(-2)  # log D_t
    middle = total[..., chunk // 2, :].unsqueeze(-2)
    past = (middle - total).exp()  # D_m / D_s
    k_past, b_past = k * past, b * past
    r_now = r * (total - middle).exp()
    a_now = a * (total - log_w - middle).exp()  # a_t D_{t-1} / D_m
    strict = torch.ones(chunk, chunk, dtype=torch.bool, device=r.device).tril(-1)
    upto = strict | torch.eye(chunk, dtype=torch.bool, device=r.device)
    zero = r.new_zeros(())

    def products(left: Tensor, right: Tensor, mask: Tensor) -> Tensor:
        return torch.where(mask, left @ right.transpose(-1, -2), zero)

    # u = from_state @ S_0^T + from_values, after the triangular solve.
    start = middle.exp()
    right = torch.cat([a_now * start, products(a_now, k_past, strict) @ v], dim=-1)
    system = -products(a_now, b_past, strict)
    solved = torch.linalg.solve_triangular(system, right, upper=False, unitriangular=True)
    from_state, from_values = solved.split(size, dim=-1)

    last = total[..., -1:, :]
    keep = last.exp()
    to_end = (last - total).exp()
    b_end, k_end = (b * to_end).transpose(-1, -2), (k * to_end).transpose(-1, -2)
    added = k_end @ v  # [.., K, V]
    firsts, removed = [], []
    s = state.transpose(-1, -2)  # [B, H, K, V]
    for c in range(r.shape[2]):
        u = from_state[:, :, c] @ s + from_values[:, :, c]
        firsts.append(s)
        removed.append(u)
        s = s * keep[:, :, c].transpose(-1, -2) + b_end[:, :, c] @ u + added[:, :, c]
    y = (
        (r_now * start) @ torch.stack(firsts, 2)
        + products(r_now, b_past, upto) @ torch.stack(removed, 2)
        + products(r_now, k_past, upto) @ v
    )
    y = y.permute(0, 2, 3, 1, 4).reshape(batch, -1, heads, size)[:, :length]
    return y, s.transpose(-1, -2)


def wkv7_fla(
    r: Tensor, log_w: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    """flash-linear-attention's Triton kernel; arguments as in `wkv7`, CUDA tensors.

    Raises:
        BackendError: flash-linear-attention is missing, or the tensors are not on a GPU.
    """
    if not r.is_cuda:
        raise BackendError(
            f"backend='fla' needs CUDA tensors, got {r.device}; move the model to a GPU or use "
            "backend='chunked'"
        )
    try:
        from fla.ops.rwkv7 import chunk_rwkv7
    except ImportError as error:
        raise BackendError(
            "backend='fla' needs flash-linear-attention (pip install flash-linear-attention), "
            f"which cannot be imported ({error}); or use backend='chunked'"
        ) from None
    # Its state is [B, H, K, V]: ours transposed.
    y, last = chunk_rwkv7(
        r,
        log_w,
        k,
        v,
        a,
        b,
        scale=1.0,
        initial_state=state.transpose(-1, -2).contiguous().float(),
        output_final_state=True,
    )
    return y.to(v.dtype), last.transpose(-1, -2).to(state.dtype)
