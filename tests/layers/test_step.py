"""The short way through a decoding step: the numbers of the long one, and when it is not taken."""

from __future__ import annotations

import copy

import pytest
import torch

from rosakit import native
from rosakit.cuda.stream import StreamMemory
from rosakit.layers import RosaAdapter, RosaContext, RosaStates
from rosakit.layers import state as state_module
from rosakit.layers.step import TOKENS, Weights, step
from tests.cuda.gpu import GPU

pytestmark = pytest.mark.skipif(not native.available(), reason="compiled core missing")


def made(device, *, dtype=torch.float32, hidden=24, **options):
    """An adapter away from its start, whose symbols recur."""
    torch.manual_seed(3)
    options = {"bits": 4, "routes": 3, "backend": "cuda", **options}
    adapter = RosaAdapter(hidden, dtype=dtype, **options).to(device)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return adapter


def states_after(adapter, u, mask=None):
    states = RosaStates()
    adapter(u, RosaContext(states=states, mask=mask))
    return states


def recurring(device, batch=2, length=40, hidden=24, dtype=torch.float32):
    torch.manual_seed(4)
    return torch.randn(4, hidden)[torch.randint(0, 4, (batch, length))].to(device, dtype)


OPTIONS = [
    {},
    {"rank": 8},
    {"rank": 5, "hidden": 27, "unmatched": "self"},
    {"rank": 3, "shared_qk": True, "unmatched": "null"},
    {"shared_qk": True, "bits": 6, "unmatched": "self"},
    {"unmatched": "null", "bits": 3, "max_length": 2},
    {"min_length": 2, "routes": 5, "hidden": 23},
    {"tied_start": False, "credit_margin": 0.5},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("masked", [False, True])
@torch.no_grad()
def test_steps_equal_the_long_way(device, options, masked):
    adapter = made(device, **options)
    u = recurring(device, hidden=adapter.hidden_size)
    onto = torch.randn_like(u)
    mask = None
    if masked:
        mask = torch.ones(u.shape[:2], dtype=torch.bool, device=device)
        mask[0, :5] = mask[1, 22] = mask[0, 30:32] = False

    def part(at, n):
        return None if mask is None else mask[:, at : at + n]

    long = states_after(adapter, u[:, :20], part(0, 20))
    short = copy.deepcopy(long)
    at = 20
    for n in (1, 1, 3, 1, 8, 1, 1, 4):
        piece, rest = u[:, at : at + n], onto[:, at : at + n].contiguous()
        wanted = rest + adapter(piece, RosaContext(states=long, mask=part(at, n)))
        context = RosaContext(states=short, mask=part(at, n))
        got = step(adapter, piece.contiguous(), context, rest)
        assert got is not None
        kept = slice(None) if mask is None else part(at, n)
        torch.testing.assert_close(got[kept], wanted[kept])
        at += n
    assert at == 40
    for one, other in zip(short.adapters[0].history(), long.adapters[0].history(), strict=True):
        same = torch.equal if isinstance(one, torch.Tensor) else lambda a, b: all_equal(a, b)
        assert same(one, other)


def all_equal(some, others):
    return all(torch.equal(a, b) for a, b in zip(some, others, strict=True))


@pytest.mark.parametrize(
    "kinds",
    [
        ("bfloat16", "bfloat16", "bfloat16"),
        ("bfloat16", "float32", "bfloat16"),
        ("float32", "bfloat16", "float32"),
        pytest.param(("float16", "float16", "float16"), marks=GPU),
    ],
)
@pytest.mark.parametrize("rank", [None, 4])
@torch.no_grad()
def test_dtypes_of_states_and_model(device, kinds, rank):
    """Hidden states, adapter and what is added to may differ."""
    if device == "cpu" and "float16" in kinds:
        pytest.skip("the emulator knows no float16")
    u_type, own, out = (getattr(torch, kind) for kind in kinds)
    adapter = made(device, dtype=own, rank=rank)
    u = recurring(device, dtype=u_type)
    onto = torch.randn_like(u).to(out)
    long = states_after(adapter, u[:, :25].to(own))
    short = copy.deepcopy(long)
    for at in range(25, 40):
        piece, rest = u[:, at : at + 1].contiguous(), onto[:, at : at + 1].contiguous()
        wanted = rest + adapter(piece.to(own), RosaContext(states=long)).to(out)
        got = step(adapter, piece, RosaContext(states=short), rest)
        assert got is not None
        assert got.dtype == out
        loose = {} if out == own == torch.float32 else {"atol": 0.06, "rtol": 0.02}
        torch.testing.assert_close(got, wanted, **loose)


@torch.no_grad()
def test_states_that_move_and_change(device):
    """Crops, beams, copies, growth, and weights that are written to or replaced."""
    adapter = made(device, rank=4)
    u = recurring(device, length=300)
    long = states_after(adapter, u[:, :250])
    short = copy.deepcopy(long)

    def compare(at, rows=None):
        piece = (u if rows is None else u[rows])[:, at : at + 1].contiguous()
        rest = torch.zeros_like(piece)
        wanted = rest + adapter(piece, RosaContext(states=long))
        got = step(adapter, piece, RosaContext(states=short), rest)
        assert got is not None
        torch.testing.assert_close(got, wanted)

    for at in range(250, 262):  # the tables grow at 256
        compare(at)
    for states in (long, short):
        states.truncate(torch.tensor([255, 251]))
    compare(251)
    beams = torch.tensor([1, 1, 0])
    for states in (long, short):
        states.select(beams)
    compare(252, beams)
    kept = copy.deepcopy(short)
    assert not kept.adapters[0].recipes
    compare(253, beams)
    assert kept.adapters[0].length == short.adapters[0].length - 1
    with torch.no_grad():
        adapter.q_proj.up.mul_(-1.5)
        adapter.e1.data = adapter.e1.data * 2
        adapter.o_proj.down = torch.nn.Parameter(adapter.o_proj.down.flip(0).contiguous())
    compare(254, beams)
    long.settle([adapter])
    short.settle([adapter])
    assert not taken(adapter, u[beams, :1].contiguous(), short)


@torch.no_grad()
@pytest.mark.parametrize("name", ["o_proj.down", "e0"])
def test_weights_of_another_format_at_the_old_address_are_others(name):
    adapter = made("cpu", rank=4)
    held, parameter = Weights(adapter), adapter.get_parameter(name)
    assert held.same(adapter)
    before = parameter.data
    parameter.data = before.view(torch.bfloat16)[..., : before.shape[-1]]
    assert parameter.data_ptr() == before.data_ptr()
    assert not held.same(adapter)
    parameter.data = before
    assert held.same(adapter)


@torch.no_grad()
def test_another_adapter_with_the_same_maps(device):
    """A layer's adapter that takes another's place brings its own levels."""
    first = made(device, rank=4)
    second = RosaAdapter(
        24, bits=4, routes=3, backend="cuda", rank=4, projections=first.projections
    ).to(device)
    u = recurring(device)
    states = states_after(first, u[:, :20])
    assert taken(first, u[:, 20:21].contiguous(), states)
    long, piece = copy.deepcopy(states), u[:, 21:22].contiguous()
    wanted = piece + second(piece, RosaContext(states=long))
    got = step(second, piece, RosaContext(states=states), piece)
    assert got is not None
    torch.testing.assert_close(got, wanted)


@torch.no_grad()
def test_two_adapters_share_the_room(device):
    """Layers of different widths take turns with one buffer."""
    first, second = made(device, rank=4), made(device, routes=6, layer_index=1)
    u = recurring(device)
    long = RosaStates()
    for adapter in (first, second):
        adapter(u[:, :10], RosaContext(states=long))
    short = copy.deepcopy(long)
    for at in range(10, 20):
        piece = u[:, at : at + 1].contiguous()
        for adapter in (first, second):
            wanted = piece + adapter(piece, RosaContext(states=long))
            got = step(adapter, piece, RosaContext(states=short), piece)
            torch.testing.assert_close(got, wanted)


def taken(adapter, u, states, **facts):
    return step(adapter, u, RosaContext(states=states, **facts), u.clone()) is not None


@torch.no_grad()
def test_where_the_long_way_is_taken(device):
    adapter = made(device)
    u = recurring(device)
    one = u[:, :1].contiguous()
    assert not taken(adapter, one, None)
    assert not taken(adapter, one, RosaStates())  # the first chunk makes the state
    states = states_after(adapter, u[:, :10])
    length = states.adapters[0].length
    with torch.enable_grad():
        assert not taken(adapter, one, states)
    assert not taken(adapter, one, states, record=True)
    assert not taken(adapter, one, states, keep_inputs=True)
    assert not taken(adapter, u[:, :9].contiguous(), states)
    assert not taken(adapter, u[:, :2].transpose(0, 1).contiguous().transpose(0, 1), states)
    assert not taken(adapter, one.double(), states)
    for watched in (adapter, adapter.v_proj):
        handle = watched.register_forward_hook(lambda *_: None)
        assert not taken(adapter, one, states)
        handle.remove()
    adapter.backend = "cpu"
    assert not taken(adapter, one, states)
    adapter.backend = "cuda"
    with torch.autocast(device, dtype=torch.bfloat16):
        assert not taken(adapter, one, states)
    assert states.adapters[0].length == length
    assert taken(adapter, one, states)
    many = recurring(device, batch=TOKENS + 1)
    states = states_after(adapter, many[:, :10])
    assert not taken(adapter, many[:, :1].contiguous(), states)
    for options in ({"own_value": True}, {"retrieve": False}):
        other = made(device, **options)
        states = states_after(other, u[:, :10])
        assert not taken(other, one, states)


@torch.no_grad()
def test_auto_leaves_the_device_in_time(device):
    """The limit of "auto" is kept by short steps, too."""
    adapter = made(device, backend="auto")
    u = recurring(device)
    states = states_after(adapter, u[:, :12])
    for at in range(12, 16):
        assert taken(adapter, u[:, at : at + 1].contiguous(), states)
    assert not taken(adapter, u[:, 16:17].contiguous(), states)
    adapter(u[:, 16:17], RosaContext(states=states))
    assert isinstance(states.adapters[0], state_module.AdapterState)


@torch.no_grad()
def test_the_limit_of_auto_follows_the_rows(device, monkeypatch):
    """Beams that multiply the rows leave room for fewer positions."""
    monkeypatch.setattr(state_module, "positions_on_device", lambda a, batch: 32 // batch)
    adapter = made(device, backend="auto")
    u = recurring(device)
    states = states_after(adapter, u[:, :12])
    assert taken(adapter, u[:, 12:13].contiguous(), states)
    states.select(torch.tensor([1, 0]))  # as many as before
    assert taken(adapter, u[:, 13:14].contiguous(), states)
    rows = torch.tensor([0, 0, 1, 1])
    states.select(rows)
    assert not taken(adapter, u[rows, 14:15].contiguous(), states)
    adapter(u[rows, 14:15], RosaContext(states=states))
    assert isinstance(states.adapters[0], state_module.AdapterState)


@torch.no_grad()
def test_no_launch_is_traced(device, monkeypatch):
    """Compiled decoding reads the same, and launches stay out of its graphs."""
    launch, traced = StreamMemory._launch, []

    def watched(*args, **kwargs):
        traced.append(torch.compiler.is_compiling())
        launch(*args, **kwargs)

    adapter = made(device, rank=4)
    u = recurring(device)
    states = states_after(adapter, u[:, :20])
    long = copy.deepcopy(states)
    monkeypatch.setattr(StreamMemory, "_launch", watched)
    compiled = torch.compile(lambda x, at: adapter(x, RosaContext(states=at)), backend="eager")
    got = compiled(u[:, 20:21], states)
    assert traced == [False]
    torch.testing.assert_close(got, adapter(u[:, 20:21], RosaContext(states=long)))
