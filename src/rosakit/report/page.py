"""Self-contained HTML pages: one file, no network, data and scripts inside."""

from __future__ import annotations

import html
import json
import os
from importlib import resources
from pathlib import Path
from typing import Any

from rosakit.errors import InvalidInputError
from rosakit.files import atomic_write

__all__ = ["render_page", "write_page"]


def render_page(name: str, title: str, data: Any) -> str:
    """A page from its script and the shared style.

    Args:
        name: of the script and the body in the package's assets, "inspect" or "compare".
        title: of the page.
        data: what the script shows; plain values.
    """
    # "</" would end the script element, and U+2028 a line of a script.
    values = json.dumps(data, allow_nan=False, separators=(",", ":"), ensure_ascii=True)
    values = values.replace("</", "<\\/").replace("<!--", "<\\!--")
    parts = {
        "@TITLE@": html.escape(title),
        "@STYLE@": _asset("style.css"),
        "@BODY@": _asset(f"{name}.html"),
        "@SCRIPT@": _asset(f"{name}.js"),
        "@DATA@": values,
    }
    page = _asset("page.html")
    for mark, text in parts.items():
        page = page.replace(mark, text)
    return page


def write_page(path: str | os.PathLike[str], text: str) -> Path:
    """Write a page; the file appears complete or not at all.

    Raises:
        InvalidInputError: the file cannot be written (the message names the reason).
    """
    target = Path(path)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        atomic_write(target, text)
    except OSError as error:
        raise InvalidInputError(
            f"cannot write {target}: {error.strerror or error}; free some space or name another "
            "file"
        ) from error
    return target


def _asset(name: str) -> str:
    return resources.files("rosakit.report").joinpath("assets", name).read_text(encoding="utf-8")
