"""Atomic writing: the old content or all of the new, and nothing left behind."""

from __future__ import annotations

import errno
import os

import pytest

from rosakit.files import atomic_write


@pytest.mark.parametrize("content", [b"new \xc3\xa9", "new é", lambda s: s.write(b"new \xc3\xa9")])
def test_content_of_every_kind(tmp_path, content):
    path = tmp_path / "x"
    path.write_text("old")
    atomic_write(path, content)
    assert path.read_bytes() == b"new \xc3\xa9"
    assert path.stat().st_mode & 0o777 == 0o644
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("fails", ["write", "fsync", "replace"])
def test_a_failure_leaves_the_old_file_alone(tmp_path, monkeypatch, fails):
    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    def half(stream):
        stream.write(b"half")
        if fails == "write":
            full()

    path = tmp_path / "x"
    path.write_text("old")
    if fails != "write":
        monkeypatch.setattr(os, fails, full)
    with pytest.raises(OSError, match="No space"):
        atomic_write(path, half)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]
