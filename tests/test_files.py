"""A file is written completely or not at all, and everything the package keeps is in one folder."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import platformdirs
import pytest

from cifar_fast import files
from cifar_fast.files import cache_folder, file_size, write_text, written_whole


@pytest.fixture
def target(tmp_path: Path) -> Path:
    path = tmp_path / "report.json"
    path.write_text("old")
    return path


def assert_untouched(target: Path) -> None:
    assert target.read_text() == "old"
    assert list(target.parent.iterdir()) == [target]


def test_text_replaces_what_was_there_or_makes_the_file(target: Path) -> None:
    write_text(target, "new and longer")
    assert target.read_text() == "new and longer"
    write_text(target.with_name("other"), "first")
    assert sorted(path.name for path in target.parent.iterdir()) == ["other", "report.json"]


def test_reader_sees_the_old_file_until_the_new_one_is_complete(target: Path) -> None:
    with written_whole(target) as temporary, temporary.open("w") as file:
        file.write("half")
        file.flush()
        assert target.read_text() == "old"
        file.write(" and half")
    assert target.read_text() == "half and half"


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError("disk full")])
def test_interrupted_writing_leaves_the_old_file_and_nothing_else(target: Path, error: BaseException) -> None:
    with pytest.raises((KeyboardInterrupt, OSError)), written_whole(target) as temporary:
        temporary.write_text("half")
        raise error
    assert_untouched(target)


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_system_that_refuses_leaves_the_old_file_and_the_next_try_works(
    target: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError("another program has the file open")

    with monkeypatch.context() as patch, pytest.raises(PermissionError, match="another program"):
        patch.setattr(files.os, step, refuse)
        write_text(target, "new")
    assert_untouched(target)
    write_text(target, "new")
    assert target.read_text() == "new"


def test_data_reaches_the_disk_before_the_file_gets_its_name(target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    steps = []
    for step in ("fsync", "replace"):
        real = getattr(os, step)
        monkeypatch.setattr(files.os, step, lambda *args, step=step, real=real: (steps.append(step), real(*args)))
    write_text(target, "new")
    assert steps == ["fsync", "replace"]


def test_size_of_a_file_and_of_none(target: Path) -> None:
    assert file_size(target) == 3
    assert file_size(target.with_name("none")) == 0


# --- the cache folder ---


def test_default_cache_folder_is_the_users(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CIFAR_FAST_CACHE")
    assert cache_folder() == Path(platformdirs.user_cache_dir("cifar_fast", appauthor=False))


def test_data_and_kernels_go_to_the_same_folder_in_the_users_home(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from cifar_fast.data.load import load_cifar10
    from cifar_fast.kernels import compile as native

    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    monkeypatch.setenv("CIFAR_FAST_CACHE", "~/zz")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CC", sys.executable)  # needs no compiler: what it would write is written for it
    monkeypatch.setattr(native, "_openmp_runtime", lambda: "libgomp.so")
    monkeypatch.setattr(native, "_run", lambda *command: Path(command[command.index("-o") + 1]).touch())
    decoded = load_cifar10(pictures).decoded
    assert decoded is not None and decoded.is_relative_to(tmp_path / "zz")
    assert native._compiled("fused.c").parent == tmp_path / "zz"
    assert [path.name for path in tmp_path.iterdir()] == ["zz"]
