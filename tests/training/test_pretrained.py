"""A network that ships with the package is the one that was trained, up to rounding, and says where it is from."""

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
from cifar_fast.errors import RunError, UserError
from cifar_fast.training import pretrained as module
from cifar_fast.training.evaluate import evaluate, predict_logits
from cifar_fast.training.loop import train
from cifar_fast.training.pretrained import CHECKED_IMAGES, names, pretrained
from cifar_fast.training.result import RunResult, load_run, save_run

RECIPE = replace(
    recipes.smoke(),
    n_shards=1,
    epochs=1.0,
    widths=(8, 8, 8),
    precision="float32",
    convolution="direct",
    fuse_norm=False,
)


@pytest.fixture(scope="module")
def trained(tiny_data: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a small run."""
    folder = tmp_path_factory.mktemp("runs") / "small"
    save_run(train(RECIPE, tiny_data, device="cpu", progress=False), folder)
    return folder


@pytest.fixture
def shipped(trained: Path, tiny_data: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of weights, to which the script has added those of the run."""
    monkeypatch.setattr(module, "WEIGHTS", tmp_path / "weights")
    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parents[2] / "benchmarks"))
    script: Any = importlib.import_module("ship_weights")
    monkeypatch.setattr(script, "commit", lambda: "of a test")
    script.ship_run(trained, "small", tiny_data)
    with pytest.raises(UserError, match="was trained on synthetic, from another source"):
        script.ship_run(trained, "other", replace(tiny_data, fingerprint="other"))
    return tmp_path / "weights"


def test_the_shipped_network_is_the_trained_one_up_to_rounding(shipped, trained, tiny_data):
    assert names() == ["small"]
    found, run = pretrained("small"), load_run(trained)
    assert found.recipe == RECIPE and found.dataset == run.dataset and found.commit == "of a test"
    ours, theirs = (predict_logits(model, tiny_data.test_images) for model in (found.model, run.model))
    torch.testing.assert_close(ours, theirs, rtol=0.02, atol=0.02)
    assert not torch.equal(ours, theirs) and all(p.dtype == torch.float32 for p in found.model.parameters())
    images, labels = tiny_data.test_images, tiny_data.test_labels
    assert found.accuracy == evaluate(found.model, images, labels, tta=RECIPE.tta).accuracy
    assert found.checked_accuracy == evaluate(found.model, images, labels).accuracy
    assert found.run.to_dict() == run.to_dict() and found.classes == list(tiny_data.classes)
    assert f"small    {100 * found.accuracy:.2f} %" in str(found) and "data set: synthetic" in str(found)
    assert f"<td>{100 * found.accuracy:.2f} %</td>" in found._repr_html_()


def test_damaged_or_missing_weights_are_told(shipped):
    path = shipped / "small.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(RunError, match="small.safetensors is damaged: its SHA-256 is"):
        pretrained("small")
    path.unlink()
    with pytest.raises(RunError, match="'small' cannot be read.*install the package again"):
        pretrained("small")


def test_a_name_that_is_not_there_is_told_which_are(shipped, monkeypatch, tmp_path):
    with pytest.raises(UserError, match="no pretrained network 'large'; there are small"):
        pretrained("large")
    monkeypatch.setattr(module, "WEIGHTS", tmp_path / "none")
    with pytest.raises(UserError, match="no pretrained network 'large'; none ships with this version"):
        pretrained("large")


def test_a_network_of_the_readers_own_cannot_ship(shipped, trained):
    run: RunResult = replace(load_run(trained), tricks={"name": "mine"})
    with pytest.raises(UserError, match="used tricks of its own"):
        module.ship(run, "mine", commit="", accuracy=lambda model: (0.0, 0.0))


def test_every_network_that_ships_reaches_what_its_file_says(real_data):
    for name in names():
        found = pretrained(name)
        assert found.dataset["fingerprint"] == real_data.fingerprint
        images, labels = real_data.test_images[:CHECKED_IMAGES], real_data.test_labels[:CHECKED_IMAGES]
        assert evaluate(found.model, images, labels).accuracy == pytest.approx(found.checked_accuracy, abs=0.0015)
        values = json.loads((module.WEIGHTS / f"{name}.json").read_text())
        assert abs(values["accuracy"] - values["run"]["accuracy"]) < 0.003


def test_the_networks_of_the_lessons_ship_and_reach_94_per_cent_together_in_12_mb():
    smoothed, hard = pretrained("laptop"), pretrained("laptop_hard")
    assert smoothed.recipe == recipes.laptop()
    assert replace(hard.recipe, name="laptop", label_smoothing=smoothed.recipe.label_smoothing) == smoothed.recipe
    assert hard.recipe.label_smoothing == 0
    assert all(found.accuracy >= 0.939 and found.run.dataset["n_test"] == 10_000 for found in (smoothed, hard))
    assert sum(path.stat().st_size for path in module.WEIGHTS.iterdir()) < 12e6
