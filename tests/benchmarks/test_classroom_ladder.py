"""benchmarks/classroom_ladder.py trains each rung once, and does not mix the runs of two ladders."""

from __future__ import annotations

import importlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cifar_fast import recipes
from cifar_fast.data.dataset import Dataset
from cifar_fast.errors import UserError


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The script as a module, with a ladder of two narrow rungs and those that add test-time augmentation."""
    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parents[2] / "benchmarks"))
    module = importlib.import_module("classroom_ladder")
    monkeypatch.setattr(importlib.import_module("ablation"), "commit", lambda: "of a test")
    whole = recipes.classroom_ladder

    def narrow(epochs: float = 2.0) -> tuple[recipes.Rung, ...]:
        small = {"widths": (4, 4, 4), "global_batch_size": 64, "ghost_batch_size": 0, "micro_batch_size": 0}
        return tuple(
            replace(rung, recipe=replace(rung.recipe, **small)) for rung in (whole(epochs)[0], *whole(epochs)[-3:])
        )

    monkeypatch.setattr(recipes, "classroom_ladder", narrow)
    monkeypatch.setattr(recipes, "beside_classroom_ladder", lambda epochs=2.0: {})
    return module


def test_each_rung_is_trained_once_and_mixed_results_are_refused(script, tiny_data: Dataset, tmp_path, monkeypatch):
    results, trained = tmp_path / "results.jsonl", []
    train = script.train
    monkeypatch.setattr(
        script, "train", lambda recipe, *args, **kw: trained.append(recipe.name) or train(recipe, *args, **kw)
    )
    for _ in range(2):
        script.train_rungs(2.0, 0, tiny_data, results, False)
    assert trained == ["plain", "small_images"]
    runs = [json.loads(text) for text in results.read_text().splitlines()]
    assert [run["arm"] for run in runs] == ["plain", "small_images", "tta_flip", "tta"]
    assert [run["recipe"]["tta"] for run in runs] == ["none", "none", "flip", "flip_shift"]
    assert all(run["train_flop"] > 0 and run["train_seconds"] is None for run in runs)

    script.show(results)
    assert "small_images" in (tmp_path / "table.txt").read_text()
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")

    with pytest.raises(UserError, match="has runs on other data"):
        script.done(results, replace(tiny_data, fingerprint="other"))
    runs[0]["recipe"]["peak_lr"] = 0.3
    results.write_text("".join(json.dumps(run) + "\n" for run in runs))
    with pytest.raises(UserError, match="a run of 'plain' with another recipe"):
        script.train_rungs(2.0, 1, tiny_data, results, False)
