"""The marks of a case that needs a GPU with the engine on it."""

from __future__ import annotations

import pytest

from rosakit import cuda

GPU = (
    pytest.mark.gpu,
    pytest.mark.skipif(not cuda.available(), reason=f"no GPU engine: {cuda.unavailable_reason()}"),
)
