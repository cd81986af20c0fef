"""Tasks draw the published sequences; accuracy is counted as the scripts count it."""

from __future__ import annotations

import itertools
import random

import pytest
import torch

from rosakit.errors import InvalidInputError
from rosakit.models import rwkv8
from rosakit.models.rwkv8 import accuracy, tasks
from tests.conftest import GOLDEN
from tests.models.rwkv8.small import random_model


def text_of(task, row):
    return "".join(task.symbols[t] for t in row.tolist())


def test_counting_sequences_are_the_published_ones(golden):
    data = golden("e2e_251016_1bitx2")
    batch = tasks.make("count").sample(random.Random(1234), 64)
    assert torch.equal(batch.tokens, torch.from_numpy(data["rand_tokens"]).long())
    demo = torch.cat([b.tokens for b in tasks.make("count").demo(random.Random(0))])
    assert torch.equal(demo, torch.from_numpy(data["tokens"]).long())


def test_reverse_sequences_are_the_published_ones(golden):
    data = golden("e2e_251105_rev")
    batches = list(tasks.make("reverse").demo(random.Random(42)))
    assert torch.equal(
        torch.cat([b.tokens for b in batches]), torch.from_numpy(data["tokens"]).long()
    )
    counted = torch.cat([b.counted.sum(1) for b in batches])
    assert counted.tolist() == data["total"].tolist()
    assert list(itertools.chain(*(b.sizes for b in batches))) == data["digit"].tolist()


def test_published_accuracy_of_the_reverse_checkpoint(golden):
    """395782 of 396500 on the SUM line: the published 99.8%."""
    data = golden("e2e_251105_rev")
    golden("weights_251105_reverse_L2")
    model = rwkv8.load(GOLDEN / "weights_251105_reverse_L2.npz")
    result = accuracy.evaluate(model, tasks.make("reverse"))
    assert result.running_total == tuple(data["official_sum"].tolist()) == (395782, 396500)
    assert result.tokens == (int(data["correct"].sum()), int(data["total"].sum()))


def test_reverse_texts():
    task = tasks.make("reverse", digits=7, length=20)
    batch = task.sample(random.Random(3), 50)
    for row, counted, size in zip(batch.tokens, batch.counted, batch.sizes, strict=True):
        text = text_of(task, row)
        number, rest = text.split(",")
        assert rest.rstrip("#") == number[::-1]
        assert len(number) == size
        answer = text_of(task, row[1:][counted])
        assert answer == number[::-1] + "#"


def test_arithmetic_texts():
    task = tasks.make("arithmetic", digits=6)
    demo = list(task.demo(random.Random(1)))
    assert [len(b.sizes) for b in demo] == [1, 3, 5, 7, 9, 11]
    for batch in [task.sample(random.Random(5), 60), *demo]:
        for row, counted, size in zip(batch.tokens, batch.counted, batch.sizes, strict=True):
            question, answer = text_of(task, row).rstrip("=").split("=")
            sign = "-" if "-" in question else "+"
            a, b = (int(n) for n in question.split(sign))
            assert int(answer) == (a - b if sign == "-" else a + b)
            assert max(len(n) for n in question.split(sign)) == size
            assert text_of(task, row[1:][counted]) == answer


def test_running_totals_weigh_short_sizes_most():
    result = accuracy.Accuracy("reverse", "digits", {1: (1, 2), 2: (0, 3), 3: (5, 5)})
    assert result.tokens == (6, 10)
    assert result.share == 0.6
    assert result.running_total == (1 + 1 + 6, 2 + 5 + 10)


def test_a_perfect_and_a_wrong_model():
    task = tasks.make("reverse", digits=4)

    class Oracle(rwkv8.RosaModel):
        vocabulary = 12

        def __init__(self, shift):
            super().__init__()
            self.anchor, self.shift = torch.nn.Parameter(torch.zeros(1)), shift
            self.known = {
                tuple(row[:-1].tolist()): row[1:]
                for batch in task.demo(random.Random(42))
                for row in batch.tokens
            }

        def _logits(self, tokens, state):
            target = torch.stack([self.known[tuple(row.tolist())] for row in tokens])
            return torch.nn.functional.one_hot((target + self.shift) % 12, 12).float()

    right = accuracy.evaluate(Oracle(0), task)
    assert right.share == 1.0
    assert right.by_size == {n: (10 * (n + 1), 10 * (n + 1)) for n in (1, 2, 3, 4)}
    assert accuracy.evaluate(Oracle(1), task).tokens[0] == 0


def test_the_model_of_another_task_is_refused():
    with pytest.raises(InvalidInputError, match=r"reverse has 12 symbols .* vocabulary of 11"):
        accuracy.evaluate(random_model("alone"), tasks.make("reverse"))


def test_sizes():
    assert tasks.make("reverse").length == tasks.make("arithmetic", 40).length == 129
    assert tasks.make("reverse", 120).length == 257
    assert tasks.make("count").length == 128
    assert tasks.for_vocabulary(13) == "arithmetic"
    assert tasks.for_vocabulary(65536) is None
    with pytest.raises(InvalidInputError, match="5 digits need sequences of 12 tokens"):
        tasks.make("reverse", 5, length=11)
    with pytest.raises(InvalidInputError, match="unknown task 'sort'"):
        tasks.make("sort")
