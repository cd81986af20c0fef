"""Modules: the adapter that injects retrieved values, and the token route on the output."""

from rosakit.layers.adapter import RosaAdapter
from rosakit.layers.context import RosaContext
from rosakit.layers.state import AdapterState, RosaStates, TokenState
from rosakit.layers.token_route import TokenCandidates, TokenRoute

__all__ = [
    "AdapterState",
    "RosaAdapter",
    "RosaContext",
    "RosaStates",
    "TokenCandidates",
    "TokenRoute",
    "TokenState",
]
