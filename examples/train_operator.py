"""Train the operator itself: can q, k and v learn to recall what followed a repeated key?

A stream of random keys, each followed by its own random value; every key comes back later and its
value has to be recalled. Retrieval is the only way to know it.

Run: python examples/train_operator.py
"""

import torch
from torch import nn

from rosakit.layers import RosaAdapter, RosaContext

torch.manual_seed(0)
KEYS, VALUES, PAIRS, WIDTH = 16, 8, 12, 64


def batch(size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens [B, T] and targets [B, T]; -100 where nothing can be known."""
    keys = torch.stack([torch.randperm(KEYS)[:PAIRS] for _ in range(size)])
    values = torch.randint(KEYS, KEYS + VALUES, (size, PAIRS))
    pairs = torch.stack([keys, values], -1).flatten(1)
    order = torch.stack([torch.randperm(PAIRS) for _ in range(size)])
    again = torch.stack([keys.gather(1, order), values.gather(1, order)], -1).flatten(1)
    tokens = torch.cat([pairs, again], 1)
    targets = torch.full_like(tokens, -100)
    targets[:, 2 * PAIRS : -1 : 2] = tokens[:, 2 * PAIRS + 1 :: 2]
    return tokens, targets


def train(retrieve: bool) -> float:
    """Accuracy on fresh streams after 300 steps; `retrieve=False` is the control."""
    torch.manual_seed(1)
    embed = nn.Embedding(KEYS + VALUES, WIDTH)
    adapter = RosaAdapter(WIDTH, bits=4, retrieve=retrieve)
    head = nn.Linear(WIDTH, KEYS + VALUES)
    modules = nn.ModuleList([embed, adapter, head])
    optimizer = torch.optim.Adam(modules.parameters(), lr=3e-3)

    def logits(tokens: torch.Tensor) -> torch.Tensor:
        hidden = embed(tokens)
        return head(hidden + adapter(nn.functional.rms_norm(hidden, (WIDTH,)), RosaContext()))

    for _ in range(300):
        tokens, targets = batch(32)
        loss = nn.functional.cross_entropy(logits(tokens).flatten(0, 1), targets.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    tokens, targets = batch(256)
    asked = targets >= 0
    return float((logits(tokens).argmax(-1) == targets)[asked].float().mean())


print(f"chance               {1 / VALUES:.3f}")
print(f"control, own value   {train(retrieve=False):.3f}")
print(f"ROSA                 {train(retrieve=True):.3f}")
