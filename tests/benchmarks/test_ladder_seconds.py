"""benchmarks/ladder_seconds.py times each rung at each of its sizes, saves the seconds and draws the runs over them."""

from __future__ import annotations

import importlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from cifar_fast import recipes


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The script as a module, with a narrow ladder and few images."""
    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parents[2] / "benchmarks"))
    module = importlib.import_module("ladder_seconds")
    monkeypatch.setattr(module, "commit", lambda: "of a test")
    monkeypatch.setattr(module, "N_IMAGES", 128)
    whole = recipes.classroom_ladder

    def narrow(epochs: float = 2.0) -> tuple[recipes.Rung, ...]:
        small = {"widths": (4, 4, 4), "global_batch_size": 64}
        return tuple(
            replace(rung, recipe=replace(rung.recipe, **small)) for rung in (whole(epochs)[0], *whole(epochs)[-3:])
        )

    monkeypatch.setattr(recipes, "classroom_ladder", narrow)
    monkeypatch.setattr(recipes, "beside_classroom_ladder", lambda epochs=2.0: {})
    return module


def saved_run(rung: recipes.Rung, accuracy: float) -> dict:
    return {
        "arm": rung.recipe.name,
        "recipe": rung.recipe.to_dict(),
        "seed": 0,
        "accuracy": accuracy,
        "train_flop": 1e12,
        "dataset": {"name": "CIFAR-10", "n_train": 50_000, "n_test": 10_000},
        "environment": {"gpu": None, "cpu": "an abacus", "cpu_capability": "wood", "threads": 1},
    }


def test_each_size_is_timed_and_the_runs_are_drawn_over_seconds(script, tmp_path, monkeypatch, capsys):
    command = ["ladder_seconds.py", "--rounds", "2", "--out", str(tmp_path)]
    monkeypatch.setattr("sys.argv", command)
    with pytest.raises(SystemExit, match="has no results.jsonl; benchmarks/classroom_ladder.py trains the runs"):
        script.main()
    assert not (tmp_path / "step_seconds.json").exists()

    runs = [saved_run(rung, 0.6 + 0.1 * place) for place, rung in enumerate(recipes.classroom_ladder(2.0))]
    (tmp_path / "results.jsonl").write_text("".join(json.dumps(run) + "\n" for run in runs))
    script.main()
    saved = json.loads((tmp_path / "step_seconds.json").read_text())
    assert [(each["arm"], each["side"]) for each in saved["steps"]] == [
        ("plain", 32),
        *(("small_images", side) for side in (16, 24, 32)),
    ]
    assert all(len(each["seconds"]) == 2 and min(each["seconds"]) > 0 for each in saved["steps"])
    assert saved["commit"] == "of a test" and saved["environment"]["torch"] == torch.__version__
    assert (tmp_path / "seconds.png").read_bytes().startswith(b"\x89PNG")
    assert "small_images 16 pixels: " in capsys.readouterr().out


def test_a_step_is_timed_at_the_size_it_is_asked_for(script, monkeypatch):
    seen = []
    monkeypatch.setattr(script, "steady_step", lambda setup: lambda images, labels: seen.append(tuple(images.shape)))
    recipe = recipes.classroom_ladder(8.0)[1].recipe
    for side in script.sides(recipe):
        script.step(recipe, side, script.random_dataset(128), torch.device("cpu"))()
    assert seen == [(64, 3, side, side) for side in (16, 24, 32)]
