"""Blocks: nothing lost, nothing mixed, the same every time."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from rosakit.errors import DataError
from rosakit.ops import segments
from rosakit.tuning import RosaConfig, attach
from rosakit.tuning.data import DataConfig, Document
from rosakit.tuning.loss import LossModel, find_head
from rosakit.tuning.packing import (
    IGNORE,
    PackedBlocks,
    Piece,
    collate,
    cut_pieces,
    repeat_passages,
    tokenize,
)
from tests.tuning.texts import model, repeating, tokenizer


def blocks(documents, length=32, **options):
    names = ("isolate", "repeat", "repeat_length")
    data = DataConfig(sources="x", **{n: options.pop(n) for n in names if n in options})
    return PackedBlocks(documents, tokenizer(), length, data, **options)


def test_long_documents_keep_their_blocks_and_the_rest_is_shared():
    documents = [np.arange(n, dtype=np.int32) for n in (25, 3, 10, 9)]
    found = list(cut_pieces(documents, 10))
    assert [[(p.document, len(p.tokens)) for p in block] for block in found] == [
        [(0, 10)],
        [(0, 10)],
        [(2, 10)],
        [(0, 5), (1, 3), (3, 2)],
    ]
    # In their order, and only the incomplete last block is missing.
    seen = np.concatenate([p.tokens for block in found for p in block if p.document == 0])
    assert seen.tolist() == list(range(25))


def test_positions_and_labels_restart_with_each_document():
    item = blocks([Document("a", "w1 w2 w3"), Document("b", "w4 w5 w6")], 8, shuffle=False)[0]
    assert item["position_ids"].tolist() == [0, 1, 2, 3, 0, 1, 2, 3]
    assert item["labels"].tolist() == [IGNORE, 5, 6, 2, IGNORE, 8, 9, 2]
    starts = segments.from_position_ids(item["position_ids"][None])
    assert starts.tolist() == [[0, 0, 0, 0, 4, 4, 4, 4]]
    one = blocks([Document("a", "w1 w2 w3"), Document("b", "w4 w5 w6")], 8, isolate=False)[0]
    assert one["position_ids"].tolist() == list(range(8))
    assert (one["labels"] == IGNORE).sum() == 1


def test_documents_of_a_block_do_not_see_each_other():
    """The loss of a document does not depend on what shares its block."""
    documents = repeating(2, words=15, times=2)
    tokens = tokenize(documents, tokenizer())
    net = model()
    head = find_head(net)
    attach(
        net, RosaConfig(window=8, sink_tokens=2, adapters=True, own_value=True, token_route=True)
    )
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in net.rosa.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    loss = LossModel(net, head).eval()
    packed = blocks(documents, length=sum(map(len, tokens)), shuffle=False)
    with torch.no_grad():
        together = loss(**collate([packed[0]]))
        alone = [
            loss(**collate([blocks([d], length=len(t))[0]]))
            for d, t in zip(documents, tokens, strict=True)
        ]
    total = sum(a["loss"] * a["tokens"] for a in alone)
    assert together["tokens"] == sum(a["tokens"] for a in alone)
    torch.testing.assert_close(together["loss"] * together["tokens"], total)


@pytest.mark.parametrize(("isolate", "packed"), [(True, True), (False, False)])
def test_a_batch_says_whether_a_document_begins_inside_a_row(isolate, packed):
    documents = [Document("a", "w1 w2 w3"), Document("b", "w4 w5 w6")]
    item = blocks(documents, 8, isolate=isolate)[0]
    assert collate([item, item])["packed"] is packed


def test_blocks_are_a_function_of_seed_and_index():
    documents = repeating(9)
    options = {"seed": 3, "count": 40, "repeat": 0.3, "repeat_length": 5}
    first, second = blocks(documents, **options), blocks(documents, **options)
    backwards = [second[i] for i in reversed(range(40))][::-1]
    for one, other in zip(first, backwards, strict=True):
        for name in one:
            assert torch.equal(one[name], other[name])
    other = blocks(documents, **{**options, "seed": 4})
    assert not torch.equal(first[0]["input_ids"], other[0]["input_ids"])


def test_every_block_is_used_once_a_pass_and_in_another_order_in_the_next():
    found = blocks(repeating(9), length=20)
    count = len(found.blocks)
    twice = blocks(repeating(9), length=20, count=2 * count)
    rows = [tuple(item["input_ids"].tolist()) for item in twice]
    assert len(twice.blocks) == count
    assert sorted(rows[:count]) == sorted(rows[count:])
    assert rows[:count] != rows[count:]


def test_few_blocks_need_few_documents():
    class Counting:
        eos_token_id = 2
        texts = 0

        def __call__(self, texts, **options):
            Counting.texts += len(texts)
            return {"input_ids": [[5] * 50 for _ in texts]}

    documents = [Document(str(i), str(i)) for i in range(1000)]
    PackedBlocks(documents, Counting(), 32, DataConfig(sources="x"), count=4)
    assert Counting.texts <= 64


def test_repeats_are_copies_of_earlier_passages_of_the_same_document():
    generator = np.random.default_rng(0)
    block = [Piece(0, np.arange(0, 40)), Piece(1, np.arange(100, 120))]
    out = repeat_passages(block, 100, 8, generator)
    assert sum(len(p.tokens) for p in out) == 100
    for piece, old in zip(out, block, strict=True):
        first = list(dict.fromkeys(piece.tokens.tolist()))
        # Every token is the document's own, and is first seen in the old order.
        assert first == old.tokens.tolist()
    assert [len(p.tokens) for p in out] != [40, 20]
    item = blocks(repeating(9, times=1), length=64, repeat=0.5)[0]
    assert len(item["input_ids"]) == 64


def test_too_little_data():
    with pytest.raises(DataError, match="fewer than one block of 1000"):
        blocks(repeating(1), length=1000)
    assert blocks(repeating(1), length=1000, shrink=True).length == 161
    with pytest.raises(IndexError):
        blocks(repeating(3))[10_000]
