"""A script that is killed while it saves a run leaves a file that the next call can read and add to."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType

import pytest

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture
def runs_file(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(FOLDER))
    return importlib.import_module("runs_file")


def test_what_is_appended_is_read(runs_file: ModuleType, tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    assert runs_file.read(path) == []
    runs_file.append(path, [{"arm": "a"}, {"arm": "b"}])
    runs_file.append(path, [{"arm": "é"}])
    assert runs_file.read(path) == [{"arm": "a"}, {"arm": "b"}, {"arm": "é"}]


@pytest.mark.parametrize("left", ["", "{", '{"arm": "b"', '{"arm": "b"}'])
def test_a_line_that_a_kill_has_cut_short_is_left_out_and_replaced(
    runs_file: ModuleType, tmp_path: Path, left: str
) -> None:
    path = tmp_path / "results.jsonl"
    path.write_text('{"arm": "a"}\n' + left)
    assert runs_file.read(path) == [{"arm": "a"}]
    runs_file.append(path, [{"arm": "c"}])
    assert path.read_text() == '{"arm": "a"}\n{"arm": "c"}\n'
