"""The pairwise kernels under emulation against the dense naive form, outputs and gradients."""

from __future__ import annotations

import ctypes

import pytest
import torch

from rosakit.cuda import attend
from rosakit.ops import rosa, triton
from rosakit.ops.estimators.pairwise import Form, attend_naive
from rosakit.ops.triton import attend_fused, engine, pairwise
from tests.cuda import emulated
from tests.ops.test_fused import BITS, CASES, HAMMING, LENGTH, UTILITIES, UTILITY, opcheck, problem

# Long enough for the fast path of rows whose cells are all candidates, and for several strips.
LONG = {
    "scan-T300": ({**BITS, **LENGTH, "recurrence": "scan"}, 300, 1, 4, 4, False, False),
    "suffix-T290": ({**HAMMING, **UTILITY, "recurrence": "dp"}, 290, 1, 8, 8, False, False),
    "scan-packed-T280": ({**BITS, **LENGTH, "recurrence": "scan"}, 280, 1, 4, 1, True, True),
    "wide-T90": ({**BITS, **LENGTH, "recurrence": "dp"}, 90, 1, 16, 9, False, True),
    "self-T290": (
        {**BITS, **LENGTH, "recurrence": "scan", "offset": 0},
        *(290, 1, 4, 4, False, False),
    ),
    "window32-T300": (
        {**HAMMING, **UTILITY, "recurrence": "dp", "window": 32},
        *(300, 1, 4, 4, False, False),
    ),
    "window5-packed-T290": (
        {**HAMMING, **UTILITY, "recurrence": "dp", "window": 5, "dropout": 0.2},
        *(290, 1, 4, 2, True, True),
    ),
    "window1-T90": (
        {**HAMMING, **UTILITY, "recurrence": "dp", "window": 1},
        *(90, 1, 16, 9, True, True),
    ),
    "steep-T280": (  # logits far above the first reference of a row
        {"gate": "sigmoid", "slope": 2.0, "bias": 3.0, "score": "length", "sharpness": 9.0}
        | {"recurrence": "dp"},
        *(280, 1, 4, 4, False, False),
    ),
}


class Emulated:
    """`rosakit.cuda.attend` on the CPU."""

    def __init__(self, workers):
        self.count = workers

    def workers(self, q, w, form, *, backward):
        return self.count

    def forward(self, q, k, w, starts, seed, top, total, out, form):
        self._call(False, (q, k, w), (starts, seed, top, total, out), form)

    def backward(self, grad, q, k, w, lse, delta, starts, seed, gradients, form):
        marks = torch.full((attend.marks_size(q, w, self.count, form),), float("nan"))
        ring = torch.full((attend.ring_size(q, w, self.count, form),), float("nan"))
        rest = (grad, lse.contiguous(), delta.contiguous(), starts, seed, *gradients, marks, ring)
        self._call(True, (q, k, w), rest, form)

    def _call(self, backward, tables, rest, form):
        q, k, w = tables
        per_lane = attend.diagonals(q, w, form, backward=backward)
        source = "attend_backward" if backward else "attend_forward"
        library = emulated.build(source, **attend.macros(q, w, form, backward=backward))
        kept = [q.contiguous(), attend.permuted(k, per_lane), attend.permuted(w, per_lane), *rest]
        assert all(x is None or x.is_contiguous() for x in kept)
        numbers = [kind(value) for value, kind in attend.numbers(form, self.count)]
        programs = ctypes.c_uint(q.shape[0] * self.count)
        call = library.emulate_backward if backward else library.emulate_forward
        call(*map(emulated._pointer, kept), programs, *numbers)


@pytest.mark.parametrize("name", [*CASES, *LONG])
def test_the_kernels_are_the_naive_form(name, monkeypatch):
    case = {**CASES, **LONG}[name]
    monkeypatch.setattr(pairwise, "engine_for", lambda device: Emulated(1 + case[1] % 2))
    for what, error in problem(case, "cpu", attend_fused, attend_naive).items():
        assert error < 3e-5, what


@pytest.mark.parametrize("n", [1, 2, 3, 5, 8, 16, 20, 32])
def test_sums_over_lanes_reach_the_lanes_that_are_named(n):
    """`spread_sum` and `slot_of`: every value has one owner, and it holds the whole sum."""
    library = emulated.build("attend_sums", SUM_COUNT=n)
    values = torch.randn(32, n)
    sums, slots = torch.zeros(32), torch.zeros(32, dtype=torch.int32)
    library.emulate_sums(*map(emulated._pointer, (values, sums, slots)))
    owned = slots[slots >= 0].tolist()
    assert sorted(owned) == list(range(n))
    torch.testing.assert_close(sums[slots >= 0], values.sum(0)[owned])


@pytest.mark.parametrize(
    ("streams", "strips", "resident"), [(512, 16, 1584), (1, 7, 1584), (5000, 4, 1584)]
)
def test_workers_fill_whole_waves(streams, strips, resident):
    each = attend.balanced(streams, strips, resident)
    assert 1 <= each <= strips
    programs = streams * each
    if streams * strips >= resident:
        assert programs / (-(-programs // resident) * resident) > 0.75


def test_refused_width_falls_to_the_dense_form():
    form = Form("sigmoid", 1.0, 0.0, "dp", "length", 1.0)
    assert "at most" in engine.unavailable_reason(torch.device("cuda"), form, 17, 4)


@pytest.fixture
def emulate(monkeypatch):
    """Lets every fused form run the CUDA kernels under emulation."""
    monkeypatch.setattr(pairwise, "engine_for", lambda device: Emulated(2))
    monkeypatch.setattr(triton, "unavailable_reason", lambda *_: None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("how", ["plain", "packed", "padded"])
def test_windowed_suffix_attention(emulate, dtype, how):
    """The estimator itself: the kernels in low precision against the dense form in float64."""
    g = torch.Generator().manual_seed(3)
    length, bits = 67, 2
    wide = torch.randn(2, length, 3, 8, generator=g).to(dtype)
    q, v = wide[:, :, 0], wide[:, :, 1, :4]  # not contiguous
    k = torch.where(torch.rand(q.shape, generator=g) < 0.7, q, wide[:, :, 2])
    e0, e1 = torch.randn(2, 8, generator=g).to(dtype)
    more = {
        "plain": {},
        "packed": {"document_ids": torch.arange(length).expand(2, -1) // 25},
        "padded": {"lengths": [length, 41]},
    }[how]
    seed = torch.tensor([5])
    results = []
    for cast, fused in ((dtype, True), (torch.float64, False)):
        leaves = [x.to(cast).requires_grad_() for x in (q, k, v)]
        y = rosa(
            *leaves,
            *(x.to(cast) for x in (e0, e1)),
            bits=bits,
            estimator="suffix_attention",
            unmatched="self",
            value_groups=2,
            window=6,
            dropout=0.1,
            seed=seed,
            fused=fused,
            **more,
        )
        results.append((y, *torch.autograd.grad(y.square().sum(), leaves)))
    limit = {torch.float32: 3e-5, torch.bfloat16: 2e-2, torch.float16: 4e-3}[dtype]
    for name, got, expected in zip(("y", "dq", "dk", "dv"), *results, strict=True):
        assert (got.double() - expected).norm() / expected.norm() < limit, name


def test_a_long_match_does_not_drift(monkeypatch):
    """A constant stream adds and takes away a whole window at each of its rows."""
    monkeypatch.setattr(pairwise, "engine_for", lambda device: Emulated(1))
    form = Form("exp", 0.375, -1.5, "dp", "utility", 1.0, window=16)
    q = torch.ones(1, 1, 700, 4, dtype=torch.float64).requires_grad_()
    w = torch.randn(1, 1, 700, 4, dtype=torch.float64)
    grad = torch.randn_like(w)
    found = []
    for attend_ in (attend_fused, attend_naive):
        y = attend_(q, q, w, None, None, form)
        found.append((y, *torch.autograd.grad(y, q, grad)))
    for got, expected in zip(*found, strict=True):
        assert (got - expected).norm() / expected.norm() < 3e-5


def test_opcheck_passes(monkeypatch):
    monkeypatch.setattr(pairwise, "engine_for", lambda device: Emulated(1))
    more = ("test_aot_dispatch_static", "test_aot_dispatch_dynamic")
    opcheck("cpu", (*UTILITIES, *more))
