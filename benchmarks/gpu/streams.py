"""Symbol streams for the GPU measurements: `[routes, T]` uint8 pairs (q, k) on the device."""

from __future__ import annotations

import torch
from torch import Tensor

FAMILIES = (
    "random",
    "repeats",
    "constant",
    "shuffled_passages",
    "noisy_copy",
    "period2",
    "fibonacci",
    "thue_morse",
    "noisy_constant",
    "markov_binary",
    "skewed",
)


def make(
    name: str, routes: int, length: int, bits: int, seed: int, device: str = "cuda"
) -> tuple[Tensor, Tensor]:
    """Family `name`: q and k, ``[1, routes, length]`` uint8 on the device."""
    generator = torch.Generator(device).manual_seed(seed)
    alphabet = 1 << bits
    shape = (routes, length)

    def symbols(*size: int) -> Tensor:
        return torch.randint(
            0, alphabet, size, generator=generator, device=device, dtype=torch.uint8
        )

    def chance(*size: int) -> Tensor:
        return torch.rand(size, generator=generator, device=device)

    index = torch.arange(length, device=device)
    if name == "random":
        q, k = symbols(*shape), symbols(*shape)
    elif name == "repeats":  # one random passage, four times
        k = symbols(routes, -(-length // 4)).repeat(1, 4)[:, :length]
        q = k
    elif name == "constant":
        q = k = torch.ones(shape, dtype=torch.uint8, device=device)
    elif name == "shuffled_passages":  # 32 passages of 256 symbols in random order
        library = symbols(routes, 32, 256)
        count = -(-length // 256)
        order = torch.randint(0, 32, (routes, count), generator=generator, device=device)
        k = library.gather(1, order[..., None].expand(-1, -1, 256)).flatten(1)[:, :length]
        q = k
    elif name == "noisy_copy":  # repeats; 5% of the query's symbols differ
        k = symbols(routes, -(-length // 4)).repeat(1, 4)[:, :length]
        q = torch.where(chance(*shape) < 0.05, symbols(*shape), k)
    elif name == "period2":
        q = k = (index % 2).to(torch.uint8).expand(shape)
    elif name == "fibonacci":
        golden = (5**0.5 - 1) / 2
        k = (((index.double() + 2) * golden).floor() - ((index.double() + 1) * golden).floor()).to(
            torch.uint8
        )
        q = k = k.expand(shape)
    elif name == "thue_morse":
        parity = torch.zeros_like(index)
        for bit in range(32):
            parity ^= (index >> bit) & 1
        q = k = parity.to(torch.uint8).expand(shape)
    elif name == "noisy_constant":  # 1% of the symbols are 0
        q = k = (chance(*shape) > 0.01).to(torch.uint8)
    elif name == "markov_binary":  # a binary chain that stays with probability 0.9
        q = k = ((chance(*shape) < 0.1).int().cumsum(1) % 2).to(torch.uint8)
    elif name == "skewed":  # 70% one symbol, the rest uniform
        k = torch.where(chance(*shape) < 0.7, 0, symbols(*shape))
        q = torch.where(chance(*shape) < 0.5, k, symbols(*shape))
    else:
        raise ValueError(f"unknown family {name!r}; expected one of {', '.join(FAMILIES)}")
    return q.contiguous()[None], k.contiguous()[None]
