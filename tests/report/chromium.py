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


def run(page: Path, *flags: str, link: str = "") -> str:
    """Standard output of Chromium on a page; skips the test where there is none."""
    browser = next((found for name in NAMES if (found := shutil.which(name))), None)
    if browser is None:
        pytest.skip("no Chromium is installed, so pages cannot be opened")
    # Not pytest's own folder: Chromium's sockets want a short path.
    with tempfile.TemporaryDirectory() as profile:
        command = [browser, *FLAGS, f"--user-data-dir={profile}", *flags, page.as_uri() + link]
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
