"""Arms are compared seed by seed, and kinds of TTA on the same networks."""

from __future__ import annotations

import importlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from cells import CELLS, tricks_of
from made_up import MACHINE

from cifar_fast import recipes
from cifar_fast.data.dataset import Dataset
from cifar_fast.errors import RecipeError, RunError, UserError
from cifar_fast.experiments.ablation import AS_IT_IS, Ablation, ablation, tta_ablation
from cifar_fast.experiments.saved import full_scale_tables, saved_ablation, saved_runs
from cifar_fast.recipe import changed_fields
from cifar_fast.training.evaluate import evaluate
from cifar_fast.training.loop import train

RECIPE = replace(
    recipes.smoke(), widths=(4, 4, 4), n_shards=1, global_batch_size=64, epochs=1.0, label_smoothing=0.2,
    precision="float32", convolution="direct",
)  # fmt: skip


def test_kinds_of_tta_are_compared_on_the_same_networks(tiny_data: Dataset):
    results = [train(RECIPE, tiny_data, device="cpu", seed=seed, progress=False) for seed in (0, 1)]
    runs = tta_ablation(results, tiny_data, progress=False)
    assert list(runs.arms) == ["tta=none", "tta=flip", "tta=flip_shift"]
    for tta in ("none", "flip", "flip_shift"):
        for run, result in zip(runs.arms[f"tta={tta}"], results, strict=True):
            dtype = getattr(torch, result.environment["precision"])
            found = evaluate(result.model, tiny_data.test_images, tiny_data.test_labels, tta=tta, dtype=dtype)
            assert (run["accuracy"], run["loss"]) == (found.accuracy, pytest.approx(found.loss))
            assert run["seed"] == result.seed and run["train_seconds"] == result.train_seconds
    # The recipe evaluates with flip itself.
    assert [run["loss"] for run in runs.arms["tta=flip"]] == pytest.approx([result.loss for result in results])
    assert runs.arms["tta=none"][0]["loss"] != runs.arms["tta=flip_shift"][0]["loss"]


def test_saved_runs_are_read_by_the_name_of_their_folder():
    runs = saved_runs("apple_8gpu")
    assert runs and {run["recipe"]["name"] for run in runs} == {"apple_8gpu"}
    assert all(0.9 < run["accuracy"] < 1 and run["epochs"] for run in runs)
    with pytest.raises(RunError, match="no saved runs named 'apple'; choose one of .*apple_8gpu, .*page_2019"):
        saved_runs("apple")


# --- an ablation ---

DATASET = {"name": "made up", "fingerprint": "0", "n_train": 50_000, "n_test": 10_000, "classes": ["a", "b"]}


def run(seed: int, accuracy: float, seconds: float | None = 10.0) -> dict[str, Any]:
    """A made-up run."""
    line = {"seed": seed, "accuracy": accuracy, "loss": 1 - accuracy, "train_seconds": seconds}
    return line | {"recipe": RECIPE.to_dict(), "dataset": DATASET, "environment": MACHINE, "epochs": []}


def made_up(**arms: list[float]) -> Ablation:
    """Runs of seeds 0, 1, ..., with these accuracies."""
    first = {AS_IT_IS: [run(seed, accuracy) for seed, accuracy in enumerate((0.90, 0.92, 0.94))]}
    return Ablation(first | {name: [run(seed, value) for seed, value in enumerate(arms[name])] for name in arms})


def test_each_arm_is_the_recipe_with_its_fields_and_trains_as_train_does(tiny_data):
    told: list[tuple] = []
    runs = ablation(
        RECIPE,
        tiny_data,
        {"hard labels": {"label_smoothing": 0.0}},
        seeds=(3, 5),
        device="cpu",
        progress=False,
        on_epoch=lambda arm, seed, epoch: told.append((arm, seed, epoch.epoch)),
        on_run=lambda arm, run: told.append((arm, run["seed"])),
    )
    turns = [(AS_IT_IS, 3), ("hard labels", 3), (AS_IT_IS, 5), ("hard labels", 5)]
    assert told == [event for turn in turns for event in ((*turn, 1), turn)]
    assert [[run["seed"] for run in arm] for arm in runs.arms.values()] == [[3, 5], [3, 5]]
    for name, recipe in ((AS_IT_IS, RECIPE), ("hard labels", replace(RECIPE, label_smoothing=0.0))):
        alone = train(recipe, tiny_data, device="cpu", seed=5, progress=False)
        assert runs.arms[name][1]["recipe"] == recipe.to_dict()
        assert (runs.arms[name][1]["accuracy"], runs.arms[name][1]["loss"]) == (alone.accuracy, alone.loss)
    assert runs.arms[AS_IT_IS][0]["loss"] != runs.arms["hard labels"][0]["loss"]


def test_an_arm_can_be_a_trick_of_ones_own(tiny_data):
    few = replace(tiny_data, train_images=tiny_data.train_images[:128], train_labels=tiny_data.train_labels[:128])
    arms: dict[str, Any] = {name: tricks_of(name) for name in CELLS}
    arms["both"] = {"widths": (8, 8, 8)}, tricks_of("AdamW")
    runs = ablation(RECIPE, few, arms, seeds=(0,), device="cpu", progress=False)
    assert [arm[0].get("tricks", {}).get("name") for arm in runs.arms.values()] == [
        None, "AdamW", "resnet18 made small", "mixup", "own Muon", "AdamW"
    ]  # fmt: skip
    assert len({arm[0]["loss"] for arm in runs.arms.values()}) == 6
    assert runs.arms["both"][0]["recipe"]["widths"] == [8, 8, 8] and "own Muon" not in runs.table()
    wide = {"wide": {"widths": (8, 8, 8)}}
    in_all = ablation(RECIPE, few, wide, tricks=tricks_of("AdamW"), seeds=(0,), device="cpu")
    assert in_all.arms["wide"][0]["loss"] == runs.arms["both"][0]["loss"]
    with pytest.raises(UserError, match="'again' changes nothing"):
        ablation(RECIPE, few, {"again": tricks_of("AdamW")}, tricks=tricks_of("AdamW"), seeds=(0,), device="cpu")


@pytest.mark.parametrize(
    "arms, seeds, error, words",
    [
        ({}, (0,), UserError, "at least one arm and one seed"),
        ({"none": {"label_smoothing": 0.0}}, (), UserError, "at least one arm and one seed"),
        ({"same": {"label_smoothing": 0.2}}, (0,), UserError, "'same' changes nothing: the recipe already has .*0.2"),
        ({"wrong": {"label_smothing": 0.0}}, (0,), RecipeError, "label_smothing"),
        ({"wrong": {"label_smoothing": 1.5}}, (0,), RecipeError, "label_smoothing=1.5"),
    ],
)
def test_an_impossible_ablation_is_refused_before_anything_is_trained(tiny_data, arms, seeds, error, words):
    trained: list[str] = []
    with pytest.raises(error, match=words):
        ablation(RECIPE, tiny_data, arms, seeds=seeds, progress=False, on_run=lambda arm, run: trained.append(arm))
    assert not trained


def test_arms_are_compared_seed_by_seed():
    # Seeds differ by 0.02, the arm by 0.01 to 0.03 from its own seed: mean 0.02, standard deviation 0.01, t = 4.3027.
    mean, (low, high) = made_up(arm=[0.91, 0.94, 0.97]).difference("arm")
    assert mean == pytest.approx(0.02)
    assert (low, high) == pytest.approx((0.02 - 4.3027 * 0.01 / 3**0.5, 0.02 + 4.3027 * 0.01 / 3**0.5), abs=1e-6)
    assert made_up(arm=[0.91, 0.94, 0.97]).difference("arm", "loss")[0] == pytest.approx(-0.02)
    # Only what both have is compared.
    two = made_up(arm=[0.91])
    assert two.difference("arm") == (pytest.approx(0.01), None)
    other = Ablation({AS_IT_IS: [run(0, 0.9)], "arm": [run(7, 0.9)]})
    with pytest.raises(UserError, match="no seed was trained both in 'as it is' and in 'arm'"):
        other.difference("arm")


@pytest.mark.parametrize(
    "accuracies, words",
    [
        ([0.92, 0.94, 0.961], "more accurate"),
        ([0.88, 0.90, 0.921], "less accurate"),
        ([0.88, 0.94, 0.94], "no clear difference"),
        ([0.95], "one seed: no interval"),
        ([0.91, 0.93], "two seeds: too few to tell"),
    ],
)
def test_a_verdict_follows_from_whether_the_interval_excludes_zero(accuracies, words):
    assert made_up(arm=accuracies).verdict("arm") == words


def test_the_table_names_arms_spreads_data_and_hardware():
    runs = made_up(arm=[0.92, 0.94, 0.961])
    lines = runs.table().splitlines()
    assert lines[0].split()[:4] == ["arm", "n", "accuracy", "train_seconds"]
    shown = {line.split("  ")[0]: line for line in lines}
    assert "92.00 +- 4.97 %" in shown[AS_IT_IS] and "10.00 +- 0.00 s" in shown[AS_IT_IS]
    assert "points" not in shown[AS_IT_IS]
    assert "+2.03 (+1.89 to +2.18) points: more accurate" in shown["arm"]
    assert "data set: made up (50,000 training and 10,000 test images); recipe 'smoke', 1 epoch\n" in runs.table()
    assert "Some Processor" in runs.table() and "torch 2.14.1" in runs.table()
    untimed = Ablation({AS_IT_IS: [run(0, 0.9, 5.0)], "arm": [run(0, 0.9, None)]}).table()
    assert "5.00 s" in untimed and "not timed" in untimed


def test_an_ablation_prints_with_as_many_digits_as_its_intervals_support():
    arms = {
        AS_IT_IS: [run(seed, 0.9 + 0.02 * seed, 10.0) for seed in range(3)],
        "arm <b>": [run(seed, 0.92 + 0.0201 * seed, 10.0 + seed) for seed in range(3)],
    }
    runs = Ablation(arms)
    head, first, second, _, *notes = str(runs).splitlines()
    cells = ["as it is", "3", "92.0 +- 5.0 %", "10.00 +- 0.00 s"]
    assert [cell for cell in first.split("  ") if cell] == cells
    assert second.split() == "arm <b> 3 94.0 +- 5.0 % 11.0 +- 2.5 s +2.01 (+1.99 to +2.03) points more accurate".split()
    assert notes[1:] == runs.notes() and notes[0] == "+- and brackets: 95 % intervals (Student's t) over the seeds"
    page = runs._repr_html_()
    for cell in ("<th>difference, paired by seed</th>", "<td>arm &lt;b&gt;</td>", "<td>92.0 \u00b1 5.0 %</td>"):
        assert cell in page
    assert "<small>" in page and "hardware: Some Processor" in page
    assert repr(runs) == str(runs)


def test_an_arm_can_be_a_whole_recipe(tiny_data):
    other = replace(RECIPE, name="other", tta="none")
    runs = ablation(RECIPE, tiny_data, {"other": other}, seeds=[0], device="cpu", progress=False)
    assert recipes.Recipe.from_dict(runs.arms["other"][0]["recipe"]) == other


def save_runs(folder: Path, arms: dict[str, list[dict]]) -> None:
    lines = [json.dumps({"arm": arm, "commit": "0", **each}) for arm, runs in arms.items() for each in runs]
    folder.mkdir()
    (folder / "results.jsonl").write_text("\n".join(lines) + "\n")


def test_a_saved_ablation_is_found_by_its_arms(tmp_path):
    folder = tmp_path / "ablation"
    assert saved_ablation("tta=none", folder=folder) is None
    save_runs(folder, {AS_IT_IS: [run(0, 0.9), run(1, 0.91)], "tta=none": [run(0, 0.8)]})
    found = saved_ablation("tta=none", folder=folder)
    assert found is not None and list(found.arms) == [AS_IT_IS, "tta=none"]
    assert [each["accuracy"] for each in found.arms[AS_IT_IS]] == [0.9, 0.91]
    assert saved_ablation("tta=none", "preload=False", folder=folder) is None


def test_full_runs_are_preferred_to_short_ones_and_what_is_missing_is_said(tmp_path):
    missing = "not measured yet for tta=none; benchmarks/ablation.py"
    assert full_scale_tables("tta=none", results=tmp_path).startswith(f"full runs: {missing}")
    save_runs(tmp_path / "ablation_2_epochs", {AS_IT_IS: [run(0, 0.9)], "tta=none": [run(0, 0.8)]})
    short = full_scale_tables("tta=none", results=tmp_path)
    assert "80.00" in short and f"\nfull runs: {missing}" in short
    save_runs(tmp_path / "ablation", {AS_IT_IS: [run(0, 0.95)], "tta=none": [run(0, 0.94)]})
    whole = full_scale_tables("tta=none", results=tmp_path)
    assert "94.00" in whole and "80.00" not in whole and missing not in whole and "machines" not in whole


def test_differences_of_two_machines_are_pooled_and_never_taken_between_them(tmp_path):
    save_runs(tmp_path / "ablation", {AS_IT_IS: [run(0, 0.95), run(1, 0.94)], "tta=none": [run(0, 0.94)]})
    other = {
        AS_IT_IS: [run(1, 0.80), run(2, 0.81)],
        "tta=none": [run(1, 0.78), run(2, 0.80)],
        "flip=random": [run(1, 0.7)],
    }
    save_runs(tmp_path / "ablation_without_tiles", other)
    shown = full_scale_tables("tta=none", results=tmp_path)
    assert shown.index("94.00") < shown.index("79.00")
    # -1, -2 and -1 points; against the other machine's seed 1 the second would be -16.
    assert shown.endswith("tta=none on 2 machines, n = 3: -1.33 (-2.77 to +0.10) points: no clear difference")
    alone = full_scale_tables("flip=random", results=tmp_path)
    assert "70.00" in alone and "94.50" not in alone and "machines" not in alone


# --- benchmarks/ablation.py ---


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The script as a module, with a made-up commit."""
    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parents[2] / "benchmarks"))
    module = importlib.import_module("ablation")
    monkeypatch.setattr(module, "commit", lambda: "of a test")
    return module


def test_every_arm_of_the_script_changes_what_its_name_says(script):
    laptop = recipes.laptop()
    for arm, changes in script.ARMS.items():
        changed = changed_fields(laptop, recipes.Recipe.from_dict(laptop.to_dict() | changes))
        assert list(changed)[0:1] == ([] if arm == AS_IT_IS else [arm.split("=")[0]])
        if arm != AS_IT_IS:
            assert str(changed[arm.split("=")[0]][1]) in (arm.split("=")[1], arm.split("=")[1] + ".0")


def test_leave_one_out_trains_the_top_of_the_ladder_without_each_trick(script, tmp_path, monkeypatch):
    class Data:
        def describe(self) -> dict[str, Any]:
            return run(0, 0.0)["dataset"]

    monkeypatch.setattr(script, "load_cifar10", Data)
    trained = []
    monkeypatch.setattr(script, "train", lambda recipe, data, seed: trained.append((recipe, seed)))
    monkeypatch.setattr(script, "save_run", lambda *run: None)
    *_, below, mirrored, top = (rung.recipe for rung in recipes.classroom_ladder(1.0))
    here = run(0, 0.0) | {"environment": script.environment(torch.device("cpu"))}
    saved = [
        here | {"arm": rung.name, "seed": 3, "accuracy": accuracy, "recipe": rung.to_dict()}
        for rung, accuracy in ((below, 0.7), (mirrored, 0.75), (top, 0.8))
    ]
    saved.append(saved[2] | {"dataset": here["dataset"] | {"name": "another"}, "accuracy": 0.1})
    saved.append(saved[2] | {"environment": here["environment"] | {"cpu": "another"}, "accuracy": 0.2})
    ladder, out = tmp_path / "ladder", tmp_path / "out"

    def leave_one_out(*options: str) -> None:
        command = ["ablation.py", "--leave-one-out", str(ladder), "--epochs", "1", *options, "--out", str(out)]
        monkeypatch.setattr("sys.argv", command)
        script.main()

    with pytest.raises(SystemExit, match=r"error: there is no .*results.jsonl; name a folder that .* has written"):
        leave_one_out()
    ladder.mkdir()
    (ladder / "results.jsonl").write_text("".join(json.dumps(line) + "\n" for line in saved))
    for _ in range(2):
        leave_one_out("--seeds", "3", "4")
        assert (out / "table.txt").read_text().startswith("arm ")
        lines = [json.loads(text) for text in (out / "results.jsonl").read_text().splitlines()]
        # The networks of the top are those of the last rung that is trained, evaluated with TTA.
        found = [(line["arm"], line["accuracy"]) for line in lines]
        assert found == [("tta=none", 0.7), ("tta=flip", 0.75), (AS_IT_IS, 0.8)]
        assert all(line["recipe"] == top.to_dict() for line in lines)
    without = [recipe for name, recipe in recipes.leave_one_out(1.0).items() if "tta" not in name]
    once = [*((recipe, 3) for recipe in without), (top, 4), *((recipe, 4) for recipe in without)]
    assert trained == 2 * once
    with pytest.raises(SystemExit, match="error: --arms no_muon: the arms are as it is, without schedule, without"):
        leave_one_out("--arms", "without muon", "no_muon")


def test_saved_runs_are_not_trained_again_and_another_recipe_is_refused(script, tmp_path):
    results = tmp_path / "results.jsonl"
    assert script.done(results, RECIPE) == set()
    lines = [{"arm": AS_IT_IS, **run(0, 0.9)}, {"arm": AS_IT_IS, **run(1, 0.9)}, {"arm": "tta=none", **run(0, 0.8)}]
    results.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert script.done(results, RECIPE) == {(AS_IT_IS, 0), (AS_IT_IS, 1), ("tta=none", 0)}
    with pytest.raises(SystemExit, match=r"another recipe .*epochs.*choose another --out"):
        script.done(results, replace(RECIPE, epochs=2.0))


def test_the_table_on_disk_begins_with_the_recipe_as_it_is(script, tmp_path):
    results = tmp_path / "results.jsonl"
    results.write_text(json.dumps({"arm": "tta=none", **run(0, 0.8)}) + "\n")
    script.write_table(results)
    assert not (tmp_path / "table.txt").exists()  # nothing to compare with yet
    with open(results, "a") as file:
        file.write(json.dumps({"arm": AS_IT_IS, **run(0, 0.9)}) + "\n")
    script.write_table(results)
    shown = Ablation({AS_IT_IS: [run(0, 0.9)], "tta=none": [run(0, 0.8)]}).table()
    assert (tmp_path / "table.txt").read_text() == shown + "\n"


def test_the_script_evaluates_a_network_with_each_other_tta_and_can_drop_the_clocks(script, tiny_data):
    result = train(RECIPE, tiny_data, device="cpu", progress=False)
    lines = script.tta_lines(result, tiny_data)
    assert {line["arm"] for line in lines} | {f"tta={RECIPE.tta}"} == {"tta=none", "tta=flip", "tta=flip_shift"}
    for line in lines:
        tta = line["arm"].removeprefix("tta=")
        dtype = getattr(torch, result.environment["precision"])
        found = evaluate(result.model, tiny_data.test_images, tiny_data.test_labels, tta=tta, dtype=dtype)
        assert (line["accuracy"], line["loss"]) == (found.accuracy, pytest.approx(found.loss))
        assert line["train_seconds"] == result.train_seconds and line["evaluate_seconds"] is None
    whole = script.line(AS_IT_IS, result)
    assert whole == {"arm": AS_IT_IS, "commit": "of a test", **result.to_dict()}
    untimed = script.without_clocks(whole)
    assert {name for name in whole if untimed[name] != whole[name]} == {*script.CLOCKS, "epochs"}
    assert all(untimed[name] is None for name in script.CLOCKS)
    assert untimed["epochs"] == [epoch | {"train_seconds": None} for epoch in whole["epochs"]]


def test_runs_trained_before_are_read_from_their_folders_if_they_fit(script, tiny_data, tmp_path, capsys):
    result = train(RECIPE, tiny_data, device="cpu", seed=3, progress=False, out=tmp_path / "run")
    (found,) = script.trained([tmp_path / "run"], RECIPE, tiny_data)
    assert found.to_dict() == result.to_dict()
    with pytest.raises(SystemExit, match=r"run was trained with another recipe .*epochs.*; leave it out"):
        script.trained([tmp_path / "run"], replace(RECIPE, epochs=2.0), tiny_data)
    with pytest.raises(SystemExit, match="run was trained on .*; leave it out"):
        script.trained([tmp_path / "run"], RECIPE, replace(tiny_data, fingerprint="another"))
    with pytest.raises(SystemExit, match="is not a finished run"):
        script.trained([tmp_path], RECIPE, tiny_data)
    results = tmp_path / "results.jsonl"
    script.save_run(results, AS_IT_IS, found, tiny_data, False)
    saved = [json.loads(text) for text in results.read_text().splitlines()]
    assert [run["arm"] for run in saved][0] == AS_IT_IS and len(saved) == 3
    assert saved[0]["train_seconds"] == result.train_seconds
    assert f"{AS_IT_IS}, seed 3: {100 * result.accuracy:.2f} %" in capsys.readouterr().out
