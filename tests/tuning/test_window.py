"""Windows with sinks against masks built by hand, and the block form against the dense one."""

from __future__ import annotations

import pytest
import torch
from transformers import AttentionInterface, DynamicCache

from rosakit.errors import InvalidInputError
from rosakit.tuning import RosaConfig, attach, detach, rosa_parameters
from rosakit.tuning.window import (
    AttentionPlan,
    Positions,
    block_attention,
    positions,
    visible,
)
from tests.tuning.tiny import FAMILIES, build, pad_rows, positions_of, tokens


def by_hand(length, window, sinks, starts=None):
    """Who sees whom, position by position."""
    seen = torch.zeros(length, length, dtype=torch.bool)
    for i in range(length):
        begin = 0 if starts is None else starts[i]
        for j in range(begin, i + 1):
            seen[i, j] = i - j < window or j - begin < sinks
    return seen


def reference_logits(model, ids, seen, position_ids=None):
    """Logits of the untouched model under 4-D masks ``[layers or 1, T, T]``, one a layer."""
    decoder = model.get_decoder()
    masks = seen[:, None, None]

    def per_layer(module, query, key, value, attention_mask, **kwargs):
        mask = masks[module.layer_idx % len(masks)].expand(query.shape[0], -1, -1, -1)
        groups = query.shape[1] // key.shape[1]
        key, value = (x.repeat_interleave(groups, 1) for x in (key, value))
        out = torch.nn.functional.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, scale=kwargs["scaling"]
        )
        return out.transpose(1, 2), None

    AttentionInterface.register("by_hand", per_layer)
    before = decoder.config._attn_implementation
    decoder.config._attn_implementation = "by_hand"
    try:
        with torch.no_grad():
            return model(ids, position_ids=position_ids, use_cache=False).logits
    finally:
        decoder.config._attn_implementation = before


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("window,sinks", [(1, 0), (1, 2), (6, 0), (6, 3), (20, 4)])
@pytest.mark.parametrize("length", [1, 2, 13, 41])
def test_logits_equal_a_hand_built_mask(family, window, sinks, length):
    model = build(family)
    ids = tokens(2, length)
    wanted = reference_logits(model, ids, by_hand(length, window, sinks)[None])
    attach(model, RosaConfig(window=window, sink_tokens=sinks, adapters=False))
    with torch.no_grad():
        torch.testing.assert_close(model(ids, use_cache=False).logits, wanted, atol=2e-5, rtol=1e-4)
        torch.testing.assert_close(model(ids, use_cache=True).logits, wanted, atol=2e-5, rtol=1e-4)


def test_a_window_changes_the_logits_and_sinks_change_them_again():
    ids, found = tokens(1, 41), []
    for options in ({"window": 64}, {"window": 5, "sink_tokens": 0}, {"window": 5}):
        model = attach(build(), RosaConfig(adapters=False, **options))
        with torch.no_grad():
            found.append(model(ids).logits[:, -1])
    for i, j in ((0, 1), (1, 2), (0, 2)):
        assert (found[i] - found[j]).abs().max() > 1e-2


@pytest.mark.parametrize("family", FAMILIES)
def test_global_layers_stay_full(family):
    model = build(family)
    ids = tokens(2, 33)
    near, full = by_hand(33, 5, 2), by_hand(33, 99, 0)
    wanted = reference_logits(model, ids, torch.stack([full, near, full]))
    attach(model, RosaConfig(window=5, sink_tokens=2, global_layers=(0, -1), adapters=False))
    with torch.no_grad():
        for cached in (False, True):
            got = model(ids, use_cache=cached).logits
            torch.testing.assert_close(got, wanted, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("family", ["mistral", "qwen3"])
def test_a_layer_that_slides_by_itself_keeps_the_smaller_window(family):
    own = {"use_sliding_window": True, "max_window_layers": 0} if family == "qwen3" else {}
    model = build(family, sliding_window=4, **own)
    ids = tokens(1, 30)
    wanted = reference_logits(model, ids, by_hand(30, 4, 0)[None])
    attach(model, RosaConfig(window=10, sink_tokens=3, adapters=False))
    with torch.no_grad():
        torch.testing.assert_close(model(ids, use_cache=False).logits, wanted, atol=2e-5, rtol=1e-4)
        first = model(ids[:, :11], use_cache=True)
        rest = model(ids[:, 11:], past_key_values=first.past_key_values)
    got = torch.cat([first.logits, rest.logits], 1)
    torch.testing.assert_close(got, wanted, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("cached", [False, True])
def test_padding_leaves_no_trace(family, side, cached):
    model = attach(build(family), RosaConfig(window=6, sink_tokens=3, adapters=False))
    rows = [tokens(1, n, seed=n)[0] for n in (33, 2, 19)]
    ids, mask = pad_rows(rows, side)
    with torch.no_grad():
        got = model(
            ids, attention_mask=mask, position_ids=positions_of(mask), use_cache=cached
        ).logits
        for i, row in enumerate(rows):
            alone = model(row[None], use_cache=False).logits[0]
            torch.testing.assert_close(got[i][mask[i] != 0], alone, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("form", ["position_ids", "document_ids", "masked position_ids"])
def test_packed_documents_equal_separate_ones(family, form):
    model = attach(
        build(family), RosaConfig(window=6, sink_tokens=3, global_layers=(1,), adapters=False)
    )
    lengths = [17, 1, 23, 2]
    rows = [tokens(1, n, seed=n)[0] for n in lengths]
    ids = torch.cat(rows)[None]
    options = {"position_ids": torch.cat([torch.arange(n) for n in lengths])[None]}
    if form == "document_ids":
        options["document_ids"] = torch.repeat_interleave(torch.tensor(lengths))[None]
    if form == "masked position_ids":
        ids = torch.nn.functional.pad(ids, (0, 3))
        options["position_ids"] = torch.nn.functional.pad(options["position_ids"], (0, 3))
        options["attention_mask"] = torch.nn.functional.pad(torch.ones(1, sum(lengths)), (0, 3))
    with torch.no_grad():
        got = model(ids, use_cache=False, **options).logits[0, : sum(lengths)]
        alone = torch.cat([model(row[None], use_cache=False).logits[0] for row in rows])
    torch.testing.assert_close(got, alone, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("name", ["cu_seqlens", "cu_seq_lens_q"])
def test_packed_rows_described_by_cumulative_lengths(name):
    """Without position ids that restart, which rotary positions can do without."""
    model = attach(build("llama"), RosaConfig(window=6, sink_tokens=3, token_route=True))
    with torch.no_grad():
        for parameter in rosa_parameters(model).values():
            parameter.add_(0.1 * torch.randn_like(parameter))
    lengths = [17, 1, 23, 2]
    rows = [tokens(1, n, seed=n)[0] for n in lengths]
    bounds = {name: torch.tensor([0, 17, 18, 41, 43], dtype=torch.int32)}
    with torch.no_grad():
        ids = torch.cat(rows)[None]
        got = model(ids, **bounds).logits[0]
        alone = torch.cat([model(row[None], use_cache=False).logits[0] for row in rows])
    torch.testing.assert_close(got, alone, atol=2e-5, rtol=1e-4)
    with pytest.raises(InvalidInputError, match="one packed row, the batch has 2"):
        model(ids.expand(2, -1), **bounds)
    with pytest.raises(InvalidInputError, match="must rise from 0 to at most the packed length 43"):
        model(ids, **{name: torch.tensor([0, 44])})
    with pytest.raises(InvalidInputError, match="cannot be read through a cache"):
        model(ids, use_cache=True, past_key_values=DynamicCache(), **bounds)


def starts_of(kind: str, batch: int, length: int) -> torch.Tensor | None:
    """`segment_starts` of some layouts."""
    index = torch.arange(length, dtype=torch.int32).expand(batch, -1).clone()
    if kind == "plain":
        return None
    if kind == "left":
        edge = torch.tensor([[0], [length // 2], [length - 1]])[:batch].to(torch.int32)
        return torch.where(index >= edge, edge, -1)
    if kind == "right":
        edge = torch.tensor([[length], [length // 2], [1]])[:batch].to(torch.int32)
        return torch.where(index < edge, 0, -1)
    cuts = torch.rand(batch, length, generator=torch.Generator().manual_seed(3)) < 0.04
    return torch.where(cuts, index, 0).cummax(1).values


@pytest.mark.parametrize("kind", ["plain", "left", "right", "packed"])
@pytest.mark.parametrize("window,sinks", [(1, 0), (1, 4), (7, 3), (16, 0), (40, 50)])
@pytest.mark.parametrize("length", [2, 63, 130])
def test_block_form_equals_dense_form(kind, window, sinks, length):
    batch, heads, groups, width = 3, 4, 2, 8
    where = positions(length, starts_of(kind, batch, length), torch.device("cpu"))
    plan = AttentionPlan(where, lambda: where, lambda: where, plain=kind == "plain", whole=True)
    torch.manual_seed(length)
    shapes = [(batch, n, length, width) for n in (heads, groups, groups)]
    q, k, v = (torch.randn(s, dtype=torch.float64, requires_grad=True) for s in shapes)
    real = (where.segment >= 0).expand(batch, -1)[:, :, None, None]
    weight = torch.randn(batch, length, heads, width, dtype=torch.float64) * real

    mask = visible(where, where, window, sinks)[:, None]
    repeated = [x.repeat_interleave(heads // groups, 1) for x in (k, v)]
    dense = torch.nn.functional.scaled_dot_product_attention(
        q, *repeated, attn_mask=mask.expand(batch, -1, -1, -1), scale=0.3
    ).transpose(1, 2)
    wanted = torch.autograd.grad((dense * weight).sum(), (q, k, v))
    blocks = plan.blocks(window, sinks)

    def attend(q, k, v, mask):
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=0.3)

    block = block_attention(q, k, v, blocks, attend)
    got = torch.autograd.grad((block * weight).sum(), (q, k, v))

    assert bool(block.isfinite().all())
    torch.testing.assert_close(block * real, dense * real)
    for name, one, other in zip("qkv", got, wanted, strict=True):
        torch.testing.assert_close(one, other, msg=lambda m, n=name: f"d{n}: {m}")


def test_long_sequences_take_the_block_form_and_short_ones_do_not():
    where = positions(100, None, torch.device("cpu"))
    plan = AttentionPlan(where, lambda: where, lambda: where, plain=True, whole=True)
    assert plan.wants_blocks(49, 4)
    assert not plan.wants_blocks(50, 4)
    assert not plan.wants_blocks(None, 0)
    assert not plan.wants_blocks(10, 95)  # nearly everything is a sink


def test_the_block_form_never_holds_a_quadratic_mask():
    where = positions(4096, None, torch.device("cpu"))
    plan = AttentionPlan(where, lambda: where, lambda: where, plain=True, whole=True)
    assert plan.blocks(64, 4).mask.numel() < 4096 * 64 * 3


def test_visible_is_the_definition():
    starts = torch.tensor([[-1, -1, 2, 2, 2, 2, 6, 6, 6, 6, 6, -1]], dtype=torch.int32)
    where = positions(12, starts, torch.device("cpu"))
    seen = visible(where, where, 2, 1)[0]
    for i in range(2, 11):
        begin = int(starts[0, i])
        wanted = {j for j in range(begin, i + 1) if i - j < 2 or j == begin}
        assert set(seen[i].nonzero().flatten().tolist()) == wanted
    assert bool(seen.any(1).all())


def test_a_module_that_was_not_attached_refuses_to_run():
    model = build()
    other = type(model)(model.config).eval()  # shares the config object
    attach(model, RosaConfig(window=4, adapters=False))
    with pytest.raises(Exception, match="shares its config object"):
        other(tokens(1, 5))
    detach(model)
    other(tokens(1, 5))


def test_ready_made_masks_are_refused():
    model = attach(build(), RosaConfig(window=4, adapters=False))
    with pytest.raises(ValueError, match="must be 2-D"):
        model(tokens(1, 5), attention_mask=torch.ones(1, 1, 5, 5))
    with pytest.raises(ValueError, match="covers 7 positions"):
        model(tokens(1, 5), attention_mask=torch.ones(1, 7), use_cache=False)


def test_positions_of_one_row_serve_a_batch():
    where = positions(4, None, torch.device("cpu"))
    assert isinstance(where, Positions)
    assert where.rank.tolist() == [[0, 1, 2, 3]]
