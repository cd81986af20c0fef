"""An inspection as one self-contained HTML page."""

from __future__ import annotations

import os
from pathlib import Path

from rosakit.evaluate.inspection import Inspection
from rosakit.report.page import render_page, write_page

__all__ = ["inspection_page", "write_inspection"]


def inspection_page(inspection: Inspection, title: str = "What was recalled") -> str:
    """The page: the text with every match to look at, a map of distances, route health.

    A link may name what to show first: ``#reader=0&token=12``.
    """
    values = inspection.to_dict()
    # Five digits are more than a page shows, and half the size.
    for name in ("log_prob", "base_log_prob"):
        values[name] = [None if x is None else round(x, 5) for x in values[name]]
    return render_page("inspect", title, values)


def write_inspection(
    inspection: Inspection, path: str | os.PathLike[str], title: str = "What was recalled"
) -> Path:
    """Write the page.

    Raises:
        InvalidInputError: the file cannot be written.
    """
    return write_page(path, inspection_page(inspection, title))
