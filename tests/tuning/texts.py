"""A word tokenizer, texts that repeat themselves, and a model for them."""

from __future__ import annotations

import random

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from rosakit.tuning.data import Document, Documents
from tests.tuning.tiny import VOCABULARY, build

WORDS = [f"w{i}" for i in range(VOCABULARY - 3)]


def tokenizer() -> PreTrainedTokenizerFast:
    """Words w0, w1, … are tokens 3, 4, …; documents end with <eos>."""
    names = {word: i for i, word in enumerate(["<pad>", "<unk>", "<eos>", *WORDS])}
    inner = Tokenizer(models.WordLevel(names, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, unk_token="<unk>", eos_token="<eos>", pad_token="<pad>"
    )


def model():
    """Wide enough for every token, narrow enough for a test."""
    return build("llama", depth=2)


def passage(generator: random.Random, words: int) -> str:
    return " ".join(generator.choice(WORDS) for _ in range(words))


def repeating(count: int, words: int = 40, times: int = 4, seed: int = 0) -> list[Document]:
    """Random passages, each repeated: predictable from far back and by nothing else."""
    generator = random.Random(seed)
    return [
        Document(f"document {i}", " ".join([passage(generator, words)] * times))
        for i in range(count)
    ]


def corpus() -> Documents:
    documents = repeating(16)
    return Documents(documents[3:], documents[:3], 0)
