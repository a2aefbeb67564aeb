"""The C files are compiled once, all of them at once, whole or not at all, and what stands in the way is said."""

from __future__ import annotations

from pathlib import Path

import pytest

from cifar_fast.kernels import compile as native
from cifar_fast.kernels import fused

needs_compiler = pytest.mark.skipif(not fused.available()[0], reason=fused.available()[1])


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "cache"
    monkeypatch.setenv("CIFAR_FAST_CACHE", str(folder))
    return folder


@needs_compiler
def test_a_file_is_compiled_once(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = native.load("fused.c")
    assert [path.suffix for path in cache.iterdir()] == [".so"] * len(native.FILES)  # nothing else is left
    monkeypatch.setattr(native, "_run", lambda *command: pytest.fail(f"compiled again: {command}"))
    assert native.load("fused.c")._name == first._name
    native.load("winograd.c")


@needs_compiler
def test_another_compiler_compiles_anew(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = native.load("fused.c")._name
    other = tmp_path / "other"
    other.write_text('#!/bin/sh\ncase "$1" in --version) echo other ;; *) exec cc "$@" ;; esac\n')
    other.chmod(0o755)
    monkeypatch.setenv("CC", str(other))
    assert native.load("fused.c")._name != first
    assert len(list(cache.iterdir())) == 2 * len(native.FILES)


@needs_compiler
def test_what_the_compiler_says_is_passed_on_and_nothing_is_left(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = tmp_path / "broken"
    broken.write_text('#!/bin/sh\ncase "$1" in --version) echo 1 ;; *) echo "no room" >&2; exit 1 ;; esac\n')
    broken.chmod(0o755)
    monkeypatch.setenv("CC", str(broken))
    with pytest.raises(OSError, match=r"broken .* failed: no room"):
        native.load("fused.c")
    assert list(cache.iterdir()) == []


def test_every_c_file_of_the_package_is_compiled() -> None:
    assert sorted(path.name for path in Path(native.__file__).parent.glob("*.c")) == sorted(native.FILES)


def test_a_missing_compiler_is_named(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", "no-such-compiler")
    with pytest.raises(OSError, match="no C compiler `no-such-compiler` on the path: install gcc, or set CC"):
        native.load("fused.c")
    assert not cache.exists()
