"""The pairwise kernels under emulation against the dense naive form, outputs and gradients."""

from __future__ import annotations

import ctypes

import pytest
import torch

from rosakit.cuda import attend
from rosakit.ops.estimators.pairwise import Form, attend_naive
from rosakit.ops.triton import attend_fused, engine, pairwise
from tests.cuda import emulated
from tests.ops.test_fused import BITS, CASES, HAMMING, LENGTH, UTILITY, problem

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

    def workers(self, q, w, length, *, backward):
        return self.count

    def forward(self, q, k, w, starts, seed, top, total, out, form):
        self._call(False, (q, k, w), (starts, seed, top, total, out), form)

    def backward(self, grad, q, k, w, lse, delta, starts, seed, gradients, form):
        marks = torch.full((attend.marks_size(q, w, self.count, form),), float("nan"))
        rest = (grad, lse.contiguous(), delta.contiguous(), starts, seed, *gradients, marks)
        self._call(True, (q, k, w), rest, form)

    def _call(self, backward, tables, rest, form):
        q, k, w = tables
        sizes = q.shape[2], w.shape[2]
        per_lane = attend.diagonals(*sizes, backward=backward)
        library = emulated.build("attend", **attend.macros(*sizes, form, backward=backward))
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
