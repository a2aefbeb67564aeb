"""benchmarks/search.py scores candidates on held-out training images, and never reads the test set."""

from __future__ import annotations

import importlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from cifar_fast import recipes
from cifar_fast.data.dataset import Dataset
from cifar_fast.errors import RecipeError, UserError
from cifar_fast.experiments.arithmetic import train_flop
from cifar_fast.recipe import changed_fields

RECIPE = replace(recipes.smoke(), widths=(4, 4, 4), n_shards=1, global_batch_size=64, epochs=1.0)


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The script as a module; the runs that it saves name no real commit."""
    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parents[2] / "benchmarks"))
    module = importlib.import_module("search")
    monkeypatch.setattr(importlib.import_module("ablation"), "commit", lambda: "of a test")
    return module


def test_held_out_images_are_not_trained_on_and_the_test_set_is_gone(script, tiny_data: Dataset):
    n = len(tiny_data.train_labels)
    part = script.hold_out(tiny_data, 30)
    assert torch.equal(torch.cat([part.train_images, part.test_images]), tiny_data.train_images)
    assert torch.equal(torch.cat([part.train_labels, part.test_labels]), tiny_data.train_labels)
    assert len(part.test_labels) == 30 and "held-out" in part.name
    assert part.fingerprint not in (tiny_data.fingerprint, script.hold_out(tiny_data, 31).fingerprint)
    for count in (0, -1, n):
        with pytest.raises(UserError, match=f"--hold-out {count}: hold out at least 1 of"):
            script.hold_out(tiny_data, count)


def test_a_candidate_changes_what_it_names_and_nothing_else(script):
    laptop = recipes.laptop()
    changed = script.candidate(laptop, "activation=relu epochs=8 widths=[64,192,256] freeze_bn_scale=False")
    assert {name: new for name, (_, new) in changed_fields(laptop, changed).items()} == {
        "activation": "relu", "epochs": 8.0, "widths": (64, 192, 256), "freeze_bn_scale": False,
    }  # fmt: skip
    assert isinstance(changed.epochs, float)
    with pytest.raises(UserError, match="'relu' is not field=value"):
        script.candidate(laptop, "relu")
    with pytest.raises(UserError, match="'activation=silu' changes nothing of 'laptop'"):
        script.candidate(laptop, "activation=silu")
    with pytest.raises(RecipeError, match="unknown recipe field colour"):
        script.candidate(laptop, "colour=red")
    with pytest.raises(RecipeError, match="resolutions=18 must be a list of whole numbers of at least 16"):
        script.candidate(laptop, "resolutions=18")


def test_the_command_trains_each_candidate_once_and_draws_the_table(script, tiny_data, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(script, "load_cifar10", lambda: tiny_data)
    monkeypatch.setattr(script.recipes, "named", lambda name: RECIPE)
    out = tmp_path / "search"

    def search(*options: str) -> None:
        monkeypatch.setattr("sys.argv", ["search.py", *options, "--seeds", "0", "--out", str(out)])
        script.main()

    search("activation=relu", "--hold-out", "40", "--busy")
    tflop = train_flop(RECIPE, len(tiny_data.train_labels) - 40) / 1e12
    assert capsys.readouterr().out.count(f" s, {tflop:.3g} TFLOP") == 2  # an activation changes no arithmetic
    runs = [json.loads(text) for text in (out / "results.jsonl").read_text().splitlines()]
    assert [run["arm"] for run in runs] == ["as it is", "activation=relu"]
    assert {run["dataset"]["n_test"] for run in runs} == {40} and runs[0]["train_seconds"] is None
    assert runs[1]["recipe"]["activation"] == "relu" and runs[1]["commit"] == "of a test"
    assert "activation=relu" in (out / "table.txt").read_text() and "held-out" in (out / "table.txt").read_text()
    narrow = tmp_path / "narrow"
    options = ["flip=random", "--all", "widths=[8,4,4]", "--hold-out", "40", "--out", str(narrow)]
    monkeypatch.setattr("sys.argv", ["search.py", *options])
    script.main()
    runs = [json.loads(text) for text in (narrow / "results.jsonl").read_text().splitlines()]
    assert {tuple(run["recipe"]["widths"]) for run in runs} == {(8, 4, 4)} and len(runs) == 6
    assert [run["recipe"]["flip"] for run in runs[:2]] == [RECIPE.flip, "random"]
    capsys.readouterr()
    search("activation=relu", "--hold-out", "40", "--busy")
    assert capsys.readouterr().out == ""  # both are there
    for wrong, message in (
        (["activation=relu", "--hold-out", "30"], "error: .*results.jsonl was scored on other images"),
        (["activation=swish"], "error: .*swish"),
    ):
        with pytest.raises(SystemExit, match=message):
            search(*wrong)
