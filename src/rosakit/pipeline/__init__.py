"""Matching on the CPU while the GPU goes on: the asynchronous CPU-GPU pipeline.

`Pipeline.submit` hands symbols to the C++ core and returns at once; `Ticket.result` gives the
match, on the device of the symbols. On CPU tensors the same path runs with plain copies.
"""

from __future__ import annotations

from rosakit.pipeline.engine import Pipeline, Ticket, shared

__all__ = ["Pipeline", "Ticket", "shared"]
