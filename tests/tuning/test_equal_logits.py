"""One function, however it is called: every architecture of the support matrix.

Logits of a whole sequence, of chunked prefill, of single steps, of a padded batch, and of a session
that was saved and loaded, within float32 rounding of each other.
"""

from __future__ import annotations

import inspect

import pytest
import torch

from rosakit.errors import UnsupportedModelError
from rosakit.tuning import RosaConfig, attach, load_session, rosa_parameters, save_session
from tests.tuning.architectures import ARCHITECTURES, build_architecture
from tests.tuning.tiny import pad_rows, positions_of, tokens

ROUNDING = 5e-5
"""Largest difference allowed; logits are of order one."""

UNWINDOWED = ("falcon", "bloom", "mpt")
"""Architectures whose attention cannot be windowed: adapters alone."""

STATELESS = ("mamba",)
"""Architectures without an attention to stand beside."""


def model_of(name):
    model = build_architecture(name)
    window = None if name in UNWINDOWED else 9
    config = RosaConfig(window=window, sink_tokens=2, own_value=True, unmatched="null")
    attach(model, config)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in rosa_parameters(model).values():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def difference(got, wanted):
    return float((got - wanted).abs().max())


@pytest.mark.parametrize("name", [n for n in ARCHITECTURES if n not in STATELESS])
@torch.no_grad()
def test_every_way_of_calling_gives_the_same_logits(name, tmp_path):
    model = model_of(name)
    rows = [tokens(1, n, seed=n)[0] for n in (40, 23)]
    alone = [model(row[None], use_cache=False).logits[0] for row in rows]
    assert difference(alone[0][:20], alone[1][:20]) > 0.1  # not all the same anyway

    found = {}
    for kind, sizes in {"chunked": [17, 1, 22], "token by token": [1] * 40}.items():
        parts, cache = [], None
        for part in rows[0][None].split(sizes, dim=1):
            out = model(part, past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            parts.append(out.logits[0])
        found[kind] = difference(torch.cat(parts), alone[0])

    for side in ("left", "right"):
        ids, mask = pad_rows(rows, side)
        options = {"attention_mask": mask}
        if "position_ids" in inspect.signature(model.forward).parameters:
            options["position_ids"] = positions_of(mask)
        for cached in (False, True):
            logits = model(ids, use_cache=cached, **options).logits
            for i, wanted in enumerate(alone):
                got = logits[i][mask[i] != 0]
                found[f"{side} padding, cache {cached}, row {i}"] = difference(got, wanted)

    out = model(rows[0][None, :25], use_cache=True)
    save_session(tmp_path / "session", model, out.past_key_values)
    loaded = load_session(tmp_path / "session", model).cache
    rest = model(rows[0][None, 25:], past_key_values=loaded).logits[0]
    found["saved and loaded"] = difference(rest, alone[0][25:])

    assert max(found.values()) < ROUNDING, found


@pytest.mark.parametrize("name", [*UNWINDOWED, *STATELESS])
def test_what_cannot_be_windowed_says_so_at_attach(name):
    with pytest.raises(UnsupportedModelError, match=r"cannot be windowed|no attention modules"):
        attach(build_architecture(name), RosaConfig(window=9))
