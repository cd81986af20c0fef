"""A headless Chromium that opens a page and gives back what it became."""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
        done = subprocess.run(command, capture_output=True, text=True, timeout=90, check=True)
    return done.stdout


def opened(page: Path, link: str = "") -> str:
    """The page's elements after its script ran."""
    dom = run(page, "--virtual-time-budget=4000", "--dump-dom", link=link)
    assert 'data-ready="yes"' in dom, "the page's script did not run to its end"
    return dom


def picture(page: Path, target: Path) -> bytes:
    """The page as a PNG."""
    run(page, "--window-size=1200,900", f"--screenshot={target}")
    return target.read_bytes()
