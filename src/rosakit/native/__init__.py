"""The C++ core: exact suffix matching on CPU and the streaming `SuffixMemory`.

Importing this package never fails: where the compiled extension is missing, `available()` is
False and every call raises `BackendError` with the reason.
"""

from __future__ import annotations

from rosakit.native._load import available, num_threads, pages_copied, set_num_threads
from rosakit.native.matcher import best_successors, match, match_into
from rosakit.native.memory import SuffixMemory

__all__ = [
    "SuffixMemory",
    "available",
    "best_successors",
    "match",
    "match_into",
    "num_threads",
    "pages_copied",
    "set_num_threads",
]
