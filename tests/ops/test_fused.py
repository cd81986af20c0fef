"""The fused kernels against the dense naive form, outputs and gradients.

On a machine without a GPU the kernels run in Triton's interpreter, in a process of its own (Triton
decides when it is imported); with a GPU they run for real.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from rosakit.errors import BackendError
from rosakit.ops import rosa
from rosakit.ops.estimators.pairwise import Form, attend_naive
from rosakit.ops.triton.engine import TritonEngine, engine_for, unavailable_reason

BITS = {"gate": "sigmoid", "slope": 2.0, "bias": -1.5}
HAMMING = {"gate": "exp", "slope": 0.4, "bias": -1.0}
LENGTH = {"score": "length", "sharpness": 1.5}
UTILITY = {"score": "utility", "sharpness": 1.2}

# name: (form, T, routes, symbol width, value width, packed, with null values)
CASES = {
    "scan-T17": ({**BITS, **LENGTH, "recurrence": "scan"}, 17, 1, 3, 2, False, False),
    "scan-packed-T24": ({**BITS, **LENGTH, "recurrence": "scan"}, 24, 1, 2, 2, True, True),
    "dp-onehot-T1": (
        {"gate": "identity", "slope": 1.0, "bias": 0.0, **LENGTH, "recurrence": "dp"},
        *(1, 2, 3, 3, False, True),
    ),
    "dp-capped-T18": (
        {**BITS, **LENGTH, "recurrence": "dp", "cap": 2, "min_length": 2},
        *(18, 1, 2, 1, False, False),
    ),
    "self-scan-packed-T17": (
        {**BITS, **LENGTH, "recurrence": "scan", "offset": 0},
        *(17, 1, 2, 2, True, False),
    ),
    "suffix-T50": ({**HAMMING, **UTILITY, "recurrence": "dp"}, 50, 1, 4, 3, False, False),
    "window3-T41": (
        {**HAMMING, **UTILITY, "recurrence": "dp", "window": 3},
        *(41, 1, 4, 3, False, False),
    ),
    "window4-packed-T50": (
        {**HAMMING, **UTILITY, "recurrence": "dp", "window": 4, "dropout": 0.2},
        *(50, 1, 2, 2, True, True),
    ),
    "suffix-dropout-T9": (
        {**HAMMING, **UTILITY, "recurrence": "dp", "dropout": 0.3},
        *(9, 2, 1, 1, False, True),
    ),
}


def problem(case, device: str, fused, naive=attend_naive) -> dict[str, float]:
    """Relative errors of y, dq, dk, dw (and dnull) of `fused`, the naive form as truth."""
    options, length, routes, width, values, packed, with_null = case
    form = Form(**options)
    g = torch.Generator().manual_seed(length)

    def draw(channels):
        return torch.randn(2, routes, length, channels, generator=g, dtype=torch.float64)

    q, k = draw(width).tanh(), draw(width).tanh()
    if form.window:  # symbols are signs, and evidence needs some that agree
        q, k = q.sign(), torch.where(k > -0.7, q, k).sign()
    if form.gate == "identity":
        q, k = q.softmax(-1), k.softmax(-1)
    leaves = [q, k, draw(values)] + ([draw(values)] if with_null else [])
    leaves = [x.to(device).requires_grad_() for x in leaves]
    null = leaves[3] if with_null else None
    starts = None
    if packed:
        starts = torch.zeros(2, length, dtype=torch.int32, device=device)
        starts[:, length // 3 :] = length // 3
        starts[:, -2:] = -1
    seed = torch.tensor([7], device=device) if form.dropout else None
    expected = naive(*leaves[:3], null, starts, form, seed)
    got = fused(*leaves[:3], null, starts, form, seed)
    grad = draw(values).to(device)
    pairs = [(got, expected)]
    for x, y in zip(
        torch.autograd.grad(got, leaves, grad, allow_unused=True),
        torch.autograd.grad(expected, leaves, grad, allow_unused=True),
        strict=True,
    ):
        zero = torch.zeros(1, dtype=torch.float64, device=device)
        pairs.append((zero if x is None else x, zero if y is None else y))
    errors = [float((x - y).detach().norm() / y.detach().norm().clamp(min=1e-6)) for x, y in pairs]
    return dict(zip(("y", "dq", "dk", "dw", "dnull"), errors, strict=False))


def compare(name: str, device: str) -> dict[str, float]:
    from rosakit.ops.triton import attend_fused

    return problem(CASES[name], device, attend_fused)


@pytest.fixture(scope="module")
def errors() -> dict[str, dict[str, float]]:
    """Errors of every case of the Triton kernels, on the GPU or in one interpreter process."""
    pytest.importorskip("triton", reason="triton is not installed")
    if torch.cuda.is_available():
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("rosakit.ops.triton.pairwise.engine_for", lambda device: TritonEngine())
            found = {name: compare(name, "cuda") for name in CASES}
            opcheck("cuda")
        return found | {"opcheck": {}}
    root = Path(__file__).parents[2]
    paths = os.pathsep.join([str(root), str(root / "src"), os.environ.get("PYTHONPATH", "")])
    result = subprocess.run(
        [sys.executable, "-m", "tests.ops.test_fused"],
        env={**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": paths},
        cwd=root,
        capture_output=True,
        text=True,
        check=False,
    )
    if "only 0-dimensional arrays can be converted" in result.stderr:
        pytest.skip("this version of triton's interpreter does not run with this numpy")
    assert result.returncode == 0, result.stderr[-2000:]
    found: dict[str, dict[str, float]] = json.loads(result.stdout.splitlines()[-1])
    return found


@pytest.mark.parametrize("name", CASES)
def test_fused_is_naive(errors, name):
    for what, error in errors[name].items():
        assert error < 1e-4, what


def test_opcheck_passes(errors):
    assert errors["opcheck"] == {}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", CASES)
def test_cuda_kernels_are_naive(name):
    for what, error in compare(name, "cuda").items():
        assert error < 1e-4, what


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_opcheck_passes_with_the_cuda_kernels():
    assert isinstance(engine_for(torch.device("cuda")), ModuleType)  # CUDA C++, not Triton
    opcheck("cuda", (*UTILITIES, "test_aot_dispatch_static", "test_aot_dispatch_dynamic"))


def test_asking_for_the_kernels_where_they_cannot_run_is_an_error(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    q, k, v = torch.randn(3, 1, 8, 4)
    with pytest.raises(BackendError, match="fused=True, but the fused kernels run on CUDA"):
        rosa(
            *(q.requires_grad_(), k, v, torch.zeros(4), torch.ones(4)),
            bits=4,
            estimator="suffix_attention",
            fused=True,
        )


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("length", [63, 1000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("estimator", "more"),
    [
        ("soft_dp", {}),
        ("soft_scan", {}),
        ("suffix_attention", {}),
        ("suffix_attention", {"window": 1}),
        ("suffix_attention", {"window": 32, "unmatched": "self"}),
    ],
)
def test_estimators_on_the_gpu(length, dtype, estimator, more):
    inputs = [x.to(dtype) for x in torch.randn(3, 2, length, 8, device="cuda")]
    levels = [x.to(dtype) for x in torch.randn(2, 8, device="cuda")]
    results = []
    for cast, fused in ((dtype, True), (torch.float64, False)):
        leaves = [x.to(cast).requires_grad_() for x in inputs]
        options = {"bits": 4, "estimator": estimator, "fused": fused, **more}
        y = rosa(*leaves, *(x.to(cast) for x in levels), **options)
        results.append((y, *torch.autograd.grad(y, leaves, torch.ones_like(y))))
    ratio = {torch.float32: 1e-3, torch.bfloat16: 2e-2, torch.float16: 4e-3}[dtype]
    for name, got, expected in zip(("y", "dq", "dk", "dv"), *results, strict=True):
        assert (got.double() - expected).norm() / expected.norm() < ratio, name


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(
    "options",
    [{"estimator": "soft_scan"}, {"estimator": "suffix_attention", "window": 32}],
    ids=["scan", "window"],
)
def test_memory_grows_linearly(options):
    peaks = []
    for length in (1024, 2048, 4096):
        leaves = [x.requires_grad_() for x in torch.randn(3, 1, length, 2048, device="cuda")]
        levels = torch.randn(2, 2048, device="cuda")
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        rosa(*leaves, *levels, bits=4, **options).sum().backward()
        peaks.append(torch.cuda.max_memory_allocated() - before)
    assert peaks[2] < 2.5 * peaks[1]
    assert peaks[1] < 2.5 * peaks[0]


UTILITIES = ("test_schema", "test_autograd_registration", "test_faketensor")


def opcheck(device: str, utilities: tuple[str, ...] = UTILITIES) -> None:
    """The operator's schema, fake kernel and autograd: whole suffixes, and a window."""
    q, k, w = torch.randn(3, 2, 16, 2, device=device)  # [H, T, M]
    starts = torch.zeros(1, 16, dtype=torch.int32, device=device)
    starts[:, 4:] = 4
    starts[:, 9:] = -1
    seed = torch.tensor([7], device=device)
    leaves = [x.requires_grad_() for x in (q, k, w)]
    for tensors, gate, rest in (
        ((w.new_empty(0), None, None), ("sigmoid", 2.0, -1.5, True, False), (1, 0, 1, 0, 0.0)),
        (
            (torch.randn_like(w).requires_grad_(), starts, seed),
            ("exp", 0.75, -1.5, False, True),
            (1, 0, 1, 3, 0.2),
        ),
    ):
        torch.library.opcheck(
            torch.ops.rosakit.attend.default,
            (*leaves, *tensors, 9, 2, *gate, 1.5, *rest),
            test_utils=utilities,
        )


def _small_strips(dense: bool) -> None:
    """Launch sizes that make a short stream span several strips and workers."""
    from rosakit.ops.triton import engine

    plan = engine.Plan(strip=32, workers=2, dense=dense)
    engine.forward_plan = engine.backward_plan = lambda streams, length: plan


if __name__ == "__main__":
    measured = {}
    for number, case in enumerate(CASES):
        _small_strips(dense=number % 2 == 0)
        measured[case] = compare(case, "cpu")
    opcheck("cpu")
    print(json.dumps({**measured, "opcheck": {}}))


def test_the_choice_of_an_engine_is_traced_into_a_graph():
    """Looking for the CUDA bindings imports C code, which no graph can hold: found on a GPU."""
    form = Form(**HAMMING, **UTILITY, recurrence="dp")
    device = torch.device("cuda")  # chosen by name: no tensor has to be there

    def chosen(x):
        return x if unavailable_reason(device, form, 2, 2) is None else -x

    x = torch.ones(2)
    assert torch.equal(torch.compile(chosen, fullgraph=True, backend="eager")(x), chosen(x))
