"""The cache: an entry appears whole or not at all, whoever else tries and whatever fails."""

from __future__ import annotations

import errno
import multiprocessing
import os
import shutil
import time
from pathlib import Path

import pytest

from barista.cache import cache_root, new_directory, require_space, size
from barista.errors import CacheError


def test_the_root_follows_the_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BARISTA_CACHE", "/somewhere")
    assert cache_root() == Path("/somewhere")
    monkeypatch.delenv("BARISTA_CACHE")
    assert cache_root() == Path.home() / ".cache" / "barista"


def test_too_little_space_names_what_is_needed_what_is_free_and_the_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 0, 5_000_000))
    with pytest.raises(CacheError, match=r"needs 6\.0 MB and its disk has 5\.0 MB free\. .*BARISTA_CACHE"):
        require_space(tmp_path / "not" / "yet", 6_000_000)


def test_a_new_directory_appears_under_its_name_only_when_it_is_complete(tmp_path: Path) -> None:
    final = tmp_path / "deep" / "model"
    with new_directory(final, 0) as folder:
        assert folder is not None
        (folder / "weights").write_text("w")
        assert not final.exists()
    assert (final / "weights").read_text() == "w"
    with new_directory(final, 0) as again:
        assert again is None


def fail_half_way(final: Path, resume: bool) -> None:
    with new_directory(final, 0, resume=resume) as folder:
        assert folder is not None
        (folder / "part").write_text("p")
        raise ZeroDivisionError


@pytest.mark.parametrize("resume", [False, True])
def test_a_failed_attempt_leaves_nothing_under_the_name(tmp_path: Path, resume: bool) -> None:
    final = tmp_path / "model"
    with pytest.raises(ZeroDivisionError):
        fail_half_way(final, resume)
    assert not final.exists()
    with new_directory(final, 0, resume=resume) as folder:
        assert folder is not None
        assert (folder / "part").exists() == resume


def test_a_directory_that_will_not_do_is_made_again(tmp_path: Path) -> None:
    final = tmp_path / "model"
    for text in ("old", "new"):
        with new_directory(final, 0, usable=lambda folder: (folder / "weights").read_text() == "new") as folder:
            assert folder is not None
            (folder / "weights").write_text(text)
    with new_directory(final, 0, usable=lambda folder: (folder / "weights").read_text() == "new") as folder:
        assert folder is None


def test_what_is_left_to_resume_counts_as_space_that_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    final = tmp_path / "model"
    with pytest.raises(ZeroDivisionError):
        fail_half_way(final, resume=True)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 0, 9))
    with new_directory(final, 10, resume=True) as folder:
        assert folder is not None


def test_a_full_disk_is_an_error_with_a_remedy(tmp_path: Path) -> None:
    with pytest.raises(CacheError, match="BARISTA_CACHE"), new_directory(tmp_path / "model", 0):
        raise OSError(errno.ENOSPC, "No space left on device")


def test_a_cache_below_a_file_is_an_error_with_a_remedy(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(CacheError, match="BARISTA_CACHE"), new_directory(tmp_path / "file" / "model", 0):
        pass


def make(final: str) -> None:
    with new_directory(Path(final), 0) as folder:
        if folder is not None:
            (folder / str(os.getpid())).touch()
            time.sleep(0.5)  # so that the others come meanwhile


def test_of_several_processes_one_makes_the_directory(tmp_path: Path) -> None:
    final = tmp_path / "model"
    context = multiprocessing.get_context("spawn")
    makers = [context.Process(target=make, args=(str(final),)) for _ in range(3)]
    for maker in makers:
        maker.start()
    for maker in makers:
        maker.join(30)
    assert [maker.exitcode for maker in makers] == [0, 0, 0]
    assert len(list(final.iterdir())) == 1


@pytest.mark.parametrize(
    ("num_bytes", "text"), [(999, "999 B"), (98_362_432, "98.4 MB"), (671e9, "671.0 GB"), (2e12, "2.0 TB")]
)
def test_sizes_are_decimal(num_bytes: float, text: str) -> None:
    assert size(num_bytes) == text
