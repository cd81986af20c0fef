"""The suffix memory alone: stream tokens in, get back what followed the last time.

Run: python examples/suffix_memory.py
"""

import numpy as np

from rosakit.native import SuffixMemory

TEXT = "the cat sat on the mat and the dog sat on the rug while the cat sat on the"

words = TEXT.split()
vocabulary = sorted(set(words))
ids = np.array([[[vocabulary.index(word) for word in words]]], dtype=np.int32)  # [B, R, T]

# One stream of token ids. Any chunking gives the same numbers: here a prompt, then word by word.
memory = SuffixMemory(batch=1, routes=1, symbols="int32")
memory.extend(ids[..., :10], ids[..., :10])
for t in range(10, len(words)):
    match = memory.extend(ids[..., t : t + 1], ids[..., t : t + 1])
    position, length = int(match.position[0, 0, 0]), int(match.length[0, 0, 0])
    if length:
        seen = " ".join(words[t - length + 1 : t + 1])
        print(f"{words[t]:>6}  '{seen}' was followed by '{words[position]}' at {position}")
    else:
        print(f"{words[t]:>6}  new")

# States fork for free and roll back exactly, as beam search and speculative decoding need.
beam = memory.fork()
beam.rollback(3)
print(
    f"\nfork rolled back to {int(beam.lengths[0])} words; original holds {int(memory.lengths[0])}"
)
