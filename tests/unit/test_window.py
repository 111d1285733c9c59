"""Where a window's regions lie, whose windows are opened, and what is left in /dev/shm."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import itertools
import os
import subprocess
import sys
from pathlib import Path

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from experts import kernels
from experts.kernels import library
from experts.transport import window as windows
from experts.transport.window import Window, WindowRefused, create_window, open_window

FOLDER = Path("/dev/shm")

pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or kernels.numerics_id() == "torch-reference", reason="windows need Linux and a compiler"
)


@pytest.fixture
def window():
    window = create_window(3, 2, 5, torch.float32)
    yield window
    window.unlink()


def refusal(window: Window, **other: object) -> str:
    """Why the window is refused, when something is given otherwise than it is."""
    true = {"name": window.name, "nonce": window.nonce, "size_bytes": window.size_bytes}
    with pytest.raises(WindowRefused) as refused:
        open_window(**true | other)
    return str(refused.value)


@given(
    num_sources=st.integers(1, 9),
    max_rows=st.integers(1, 5000),
    top_k=st.integers(1, 64),
    row_bytes=st.integers(1, 1 << 20),
)
@settings(max_examples=60, deadline=None)
def test_regions_are_aligned_and_apart(num_sources, max_rows, top_k, row_bytes):
    shape = windows.Shape(ctypes.sizeof(windows.Shape), num_sources, max_rows, top_k, row_bytes, 0)
    sizes = {
        "dispatch_cell": (64, 64),
        "combine_cell": (64, 64),
        "dispatch": (128, ctypes.sizeof(windows.Dispatch)),
        "ids": (128, max_rows * top_k * 4),
        "rows": (128, max_rows * row_bytes),
        "combine": (128, ctypes.sizeof(windows.Combine)),
        "out": (128, max_rows * top_k * row_bytes),
    }
    parts, total = [(0, 72)], 0
    for source in range(num_sources):
        total, at = windows._locate(windows._functions(), shape, source)
        for name, (alignment, size) in sizes.items():
            assert getattr(at, name) % alignment == 0
            parts.append((getattr(at, name), size))
    parts.sort()
    assert all(start + size <= after for (start, size), (after, _) in itertools.pairwise(parts))
    assert sum(parts[-1]) <= total < sum(parts[-1]) + 128


def test_both_ends_see_one_memory_and_the_name_is_gone(window):
    path = FOLDER / window.name
    assert path.stat().st_mode & 0o777 == 0o600
    assert path.stat().st_blocks * 512 >= window.size_bytes
    other = open_window(window.name, window.nonce, window.size_bytes)
    assert not path.exists()
    assert (other.max_rows, other.top_k, other.hidden_size, other.dtype) == (3, 2, 5, torch.float32)
    window.hidden_states.fill_(1.5)
    window.topk_ids.fill_(7)
    other.out.fill_(-2.0)
    assert other.hidden_states.eq(1.5).all()
    assert other.topk_ids.eq(7).all()
    assert window.out.eq(-2.0).all()
    assert window.out.shape == (6, 5)
    window.unlink()
    window.unlink()


def test_each_window_has_a_nonce_of_its_own(window):
    other = create_window(3, 2, 5, torch.bfloat16)
    other.unlink()
    assert other.nonce != window.nonce
    assert len(other.nonce) == 16
    assert other.hidden_states.dtype is torch.bfloat16


@pytest.mark.parametrize(
    "name", ["../etc/passwd", "barista-1-0123456789abcdeg", "barista-0-0123456789abcdef", "", "barista-1-x\0y", "/a"]
)
def test_only_windows_are_opened_by_name(window, name):
    assert "is not a window's name" in refusal(window, name=name)
    assert (FOLDER / window.name).exists()


def test_a_window_of_another_host_is_refused(window):
    assert "No such file" in refusal(window, name="barista-1-0123456789abcdef")
    assert "another nonce" in refusal(window, nonce=bytes(16))
    assert "another nonce" in refusal(window, nonce=b"")


def test_a_window_of_another_size_is_refused(window):
    path = FOLDER / window.name
    assert "bytes, not" in refusal(window, size_bytes=window.size_bytes + 1)
    assert "bytes, not" in refusal(window, size_bytes=0)
    os.truncate(path, window.size_bytes - 4096)
    assert "bytes, not" in refusal(window)
    assert "not laid out" in refusal(window, size_bytes=window.size_bytes - 4096)


def test_a_window_that_others_may_read_is_refused(window):
    (FOLDER / window.name).chmod(0o640)
    assert "mode is 640" in refusal(window)


def test_a_window_of_another_user_is_refused(window, monkeypatch):
    monkeypatch.setattr(windows.os, "geteuid", lambda: os.getuid() + 1)
    assert "our own user" in refusal(window)


def test_a_link_to_a_window_is_refused(window):
    link = FOLDER / "barista-1-0123456789abcdef"
    link.symlink_to(FOLDER / window.name)
    try:
        assert "cannot be opened" in refusal(window, name=link.name)
    finally:
        link.unlink()


@pytest.mark.parametrize(
    ("offset", "written", "reason"),
    [
        (0, b"\0", "does not begin"),
        (4, b"\2", "does not begin"),
        (8, b"\0", "does not begin"),
        (40, b"\2", "unknown type"),
        (48, b"\1", "no window holds"),
        (56, b"\4", "not laid out"),
        (56, b"\xff\xff\xff\xff", "no window holds"),
    ],
)
def test_a_window_with_another_header_is_refused(window, offset, written, reason):
    with (FOLDER / window.name).open("r+b") as file:
        file.seek(offset)
        file.write(written)
    assert reason in refusal(window)


def test_a_full_file_system_is_an_error_at_creation_and_leaves_nothing(monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    before = set(FOLDER.iterdir())
    monkeypatch.setattr(windows.os, "posix_fallocate", full)
    with pytest.raises(OSError, match="No space left"):
        create_window(3, 2, 5, torch.float32)
    assert set(FOLDER.iterdir()) == before


def test_a_window_larger_than_memory_cannot_be_made():
    with pytest.raises(OSError, match="No space left"):
        create_window(1 << 20, 64, 1 << 18, torch.float32)
    with pytest.raises(WindowRefused, match="no window holds"):
        create_window(1 << 21, 64, 1 << 18, torch.float32)
    with pytest.raises(WindowRefused, match="float16"):
        create_window(1, 1, 1, torch.float16)


def test_without_compiled_kernels_there_are_no_windows():
    used = library._library
    library.use(None)
    try:
        with pytest.raises(WindowRefused, match="no compiled kernels"):
            create_window(3, 2, 5, torch.float32)
        with pytest.raises(WindowRefused, match="no compiled kernels"):
            open_window("barista-1-0123456789abcdef", bytes(16), 4096)
    finally:
        library.use(used)


@pytest.fixture
def dead_pid():
    with subprocess.Popen([sys.executable, "-c", ""]) as process:
        process.wait()
    return process.pid


def test_only_what_a_dead_engine_left_is_swept_away(window, dead_pid):
    stale, foreign, locked = (
        FOLDER / name.format(dead_pid)
        for name in ("barista-{}-0123456789abcdef", "barista-{}-other", "barista-{}-fedcba9876543210")
    )
    for path in (stale, foreign, locked):
        path.touch()
    try:
        with locked.open() as alive_elsewhere:
            fcntl.flock(alive_elsewhere, fcntl.LOCK_EX)
            windows.sweep()
            assert not stale.exists()
            assert foreign.exists()
            assert locked.exists()
            assert (FOLDER / window.name).exists()
        windows.sweep()
        assert not locked.exists()
    finally:
        for path in (stale, foreign, locked):
            path.unlink(missing_ok=True)


def test_a_window_stays_locked_while_its_engine_maps_it(window):
    with (FOLDER / window.name).open() as file, pytest.raises(BlockingIOError):
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
