"""Run folders: what is saved comes back, and nothing is half-written or written over."""

from __future__ import annotations

import errno
import json
from dataclasses import asdict, replace
from pathlib import Path
from types import ModuleType

import pytest
import torch
from safetensors.torch import save_file

from cifar_fast.data.dataset import Dataset
from cifar_fast.errors import RunError
from cifar_fast.kernels import amx, winograd
from cifar_fast.recipes import smoke
from cifar_fast.training import result as result_module
from cifar_fast.training.evaluate import predict_logits
from cifar_fast.training.layers import Block
from cifar_fast.training.loop import train
from cifar_fast.training.result import RunFolder, RunResult, halved, load_run, run_from_dict, save_run
from cifar_fast.training.seeds import Seeds

CLOCKS = ("train_seconds", "evaluate_seconds", "total_seconds")
RECIPE = replace(smoke(), n_shards=1, epochs=2.0, widths=(8, 8, 8), precision="float32", convolution="direct")


@pytest.fixture(scope="module")
def trained(tiny_data: Dataset) -> RunResult:
    return train(RECIPE, tiny_data, device="cpu", progress=False)


@pytest.fixture(scope="module")
def part(tiny_data: Dataset) -> Dataset:
    """300 of the 640 training images."""
    return tiny_data.subset(range(0, 600, 2))


@pytest.fixture(scope="module")
def separate(part: Dataset, tmp_path_factory: pytest.TempPathFactory) -> tuple[RunResult, Path]:
    """A run with separate seeds on a part of the training set that has kept its logits, and its folder."""
    out, seeds = tmp_path_factory.mktemp("runs") / "run", Seeds(start=1, order=2, augmentation=3)
    recipe = replace(RECIPE, global_batch_size=150, epochs=1.0)
    return train(recipe, part, device="cpu", progress=False, seed=seeds, out=out, save_logits=True), out


@pytest.fixture
def folder(trained: RunResult, tmp_path: Path) -> Path:
    save_run(trained, tmp_path / "run")
    return tmp_path / "run"


def test_a_run_prints_its_result_its_clocks_and_where_it_ran(trained):
    head, values, *notes = str(trained).splitlines()
    assert head.split("  ")[0] == "test accuracy" and head.split()[-3:] == list(CLOCKS)
    assert values.split()[:3] == [f"{100 * trained.accuracy:.2f}", "%", f"{trained.loss:.3f}"]
    assert values.split()[3:5] == [f"{trained.train_seconds:.1f}", "s"]
    assert notes[0] == "n = 1 run, seed 0; recipe 'smoke', 2 epochs; TTA: flip"
    assert notes[1].startswith("data set: synthetic (640 training") and notes[2].startswith("hardware: ")
    page = trained._repr_html_()
    assert f"<td>{100 * trained.accuracy:.2f} %</td>" in page and "<small>n = 1 run" in page
    assert repr(trained) == str(trained)
    assert "start 1, order 2, augmentation 3" in str(replace(trained, seed=Seeds(start=1, order=2, augmentation=3)))


def test_kept_logits_say_what_the_result_says(separate, part):
    result, _ = separate
    assert result.logits.dtype == torch.float16 and result.logits.shape == (200, 10)
    assert torch.equal(result.test_labels, part.test_labels)
    assert (result.logits.argmax(1) == result.test_labels).double().mean().item() == result.accuracy
    logits = predict_logits(result.model, part.test_images, tta=result.recipe.tta)
    torch.testing.assert_close(result.logits.float().softmax(1), logits.softmax(1), rtol=1e-3, atol=1e-3)


def test_logits_in_half_precision_keep_the_likeliest_class_and_stay_finite():
    close, far = torch.tensor([8.001, 8.0, 0.0]), torch.tensor([0.0, 1e6, -1e6])
    assert close.half()[0] == close.half()[1], "a tie, without the shift"
    half = halved(torch.stack([close, far]))
    assert half.dtype == torch.float16 and half.isfinite().all()
    assert half.argmax(1).tolist() == [0, 1] and half[0, 0] > half[0, 1]
    torch.testing.assert_close(half[0].float().softmax(0), close.softmax(0), rtol=1e-3, atol=1e-4)


def test_logits_indices_and_seeds_come_back_from_the_folder_and_from_a_copy(separate, part, tmp_path):
    result, folder = separate
    save_run(result, tmp_path / "copy")
    for loaded in (load_run(folder), load_run(tmp_path / "copy")):
        assert loaded.seed == result.seed == Seeds(start=1, order=2, augmentation=3)
        assert loaded.to_dict() == result.to_dict()
        for name in ("logits", "test_labels", "train_indices"):
            assert torch.equal(getattr(loaded, name), getattr(result, name)), name
    assert loaded.train_indices.tolist() == list(range(0, 600, 2))
    assert loaded.dataset["subset"] == part.selection.describe()


def test_without_asking_no_logits_or_indices_are_kept(trained, folder):
    assert trained.logits is None and trained.train_indices is None and "subset" not in trained.dataset
    assert {path.name for path in folder.iterdir()} == {
        "recipe.json", "environment.json", "epochs.jsonl", "timing_log.tsv", "result.json", "weights.safetensors",
    }  # fmt: skip


@pytest.mark.parametrize("name", ["logits.safetensors", "train_indices.npy"])
def test_kept_tensors_that_are_cut_short(separate, tmp_path, name):
    save_run(separate[0], tmp_path / "run")
    path = tmp_path / "run" / name
    path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(RunError, match="cannot be read"):
        load_run(tmp_path / "run")


def no_space(*_: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_saved_run_comes_back_with_identical_logits(trained, folder, tiny_data):
    loaded = load_run(folder)
    expected = predict_logits(trained.model, tiny_data.test_images, tta="flip")
    assert torch.equal(predict_logits(loaded.model, tiny_data.test_images, tta="flip"), expected)
    assert loaded.to_dict() == trained.to_dict()
    assert not loaded.model.training


@pytest.mark.parametrize(("gpu", "fused"), [(None, True), ("Some GPU", False)])
def test_a_network_from_a_gpu_is_not_fused_on_a_cpu(trained: RunResult, gpu: str | None, fused: bool) -> None:
    values = trained.to_dict()
    values["environment"] = values["environment"] | {"gpu": gpu, "fused_norm": True}
    model = run_from_dict(values, trained.model.state_dict()).model
    assert {block.fuse for block in model.modules() if isinstance(block, Block)} == {fused}


@pytest.mark.parametrize(("loops", "precision"), [(winograd, "float32"), (amx, "bfloat16")], ids=["winograd", "amx"])
def test_so_does_one_that_was_trained_with_compiled_loops(
    loops: ModuleType, precision: str, tiny_data: Dataset, tmp_path: Path
) -> None:
    usable, why_not = loops.available()
    if not usable:
        pytest.skip(why_not)
    convolution = loops.__name__.removeprefix("cifar_fast.kernels.")
    recipe = replace(RECIPE, widths=(16, 16, 16), precision=precision, convolution=convolution)
    trained = train(recipe, tiny_data, device="cpu", progress=False)
    assert trained.environment["convolution"] == convolution
    save_run(trained, tmp_path / "run")
    loaded = load_run(tmp_path / "run")
    assert loaded.model.layers.block1a.conv.convolution == convolution
    for dtype in (torch.float32, torch.bfloat16):
        logits = [predict_logits(each.model, tiny_data.test_images, dtype=dtype) for each in (trained, loaded)]
        assert torch.equal(*logits)


def test_the_logs_say_what_the_result_says(trained, folder):
    epochs = [json.loads(line) for line in (folder / "epochs.jsonl").read_text().splitlines()]
    assert epochs == [asdict(epoch) for epoch in trained.epochs]
    header, *lines = [line.split("\t") for line in (folder / "timing_log.tsv").read_text().splitlines()]
    assert header == ["epoch", "hours", "top1Accuracy"]
    assert [int(line[0]) for line in lines] == [1, 2]
    assert float(lines[-1][1]) == pytest.approx(trained.train_seconds / 3600, abs=1e-8)
    assert float(lines[-1][2]) == pytest.approx(100 * trained.accuracy, abs=0.005)
    assert json.loads((folder / "environment.json").read_text())["dataset"]["name"] == "synthetic"


def test_a_folder_that_exists_is_left_alone(trained, folder):
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(RunError, match="exists already"):
        save_run(trained, folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_a_folder_that_cannot_be_written(trained, tmp_path):
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(RunError, match="cannot be written.*--out"):
        save_run(trained, tmp_path / "file" / "run")
    assert (tmp_path / "file").read_text() == "not a folder"


def test_a_disk_that_fills_up_while_logging(trained, tmp_path, monkeypatch):
    folder = RunFolder(tmp_path / "run", RECIPE, trained.dataset, trained.environment, {})
    folder.log(trained.epochs[0])
    monkeypatch.setattr(result_module.os, "fsync", no_space)
    with pytest.raises(RunError, match="No space left on device"):
        folder.log(trained.epochs[1])
    monkeypatch.undo()
    assert json.loads((tmp_path / "run" / "epochs.jsonl").read_text().splitlines()[0]) == asdict(trained.epochs[0])


@pytest.mark.parametrize("function", ["save_file", "write_json"])
def test_a_disk_that_fills_up_at_the_end_keeps_the_logs_and_no_half_result(trained, tmp_path, monkeypatch, function):
    folder = RunFolder(tmp_path / "run", RECIPE, trained.dataset, trained.environment, {})
    folder.log(trained.epochs[0])
    monkeypatch.setattr(result_module, function, no_space)
    with pytest.raises(RunError, match="No space left on device.*logs are there"):
        folder.finish(trained)
    names = {path.name for path in (tmp_path / "run").iterdir()}
    assert {"epochs.jsonl", "timing_log.tsv"} <= names
    assert "result.json" not in names and not any(name.endswith(".part") for name in names)
    with pytest.raises(RunError, match="not a finished run"):
        load_run(tmp_path / "run")


def test_json_that_cannot_be_written_leaves_what_was_there(tmp_path, monkeypatch):
    path = tmp_path / "result.json"
    result_module.write_json(path, {"accuracy": 0.94})

    def fills_up(self: Path, text: str) -> None:
        self.write_bytes(text[:5].encode())
        no_space()

    monkeypatch.setattr(Path, "write_text", fills_up)
    with pytest.raises(OSError):
        result_module.write_json(path, {"accuracy": 0.95})
    assert json.loads(path.read_text()) == {"accuracy": 0.94}
    assert list(tmp_path.iterdir()) == [path]


def test_weights_of_another_recipe(trained, folder):
    values = json.loads((folder / "result.json").read_text())
    values["recipe"]["widths"] = [8, 16, 8]
    (folder / "result.json").write_text(json.dumps(values))
    with pytest.raises(RunError, match="do not fit its recipe 'smoke'"):
        load_run(folder)


def test_weights_that_lack_a_tensor(trained, folder):
    weights = {name: value.contiguous() for name, value in trained.model.state_dict().items()}
    weights.pop("layers.linear.weight")
    save_file(weights, folder / "weights.safetensors")
    with pytest.raises(RunError, match="layers.linear.weight"):
        load_run(folder)


@pytest.mark.parametrize("name", ["result.json", "weights.safetensors"])
def test_a_file_that_is_missing(folder, name):
    (folder / name).unlink()
    with pytest.raises(RunError, match=f"not a finished run.*{name}"):
        load_run(folder)


@pytest.mark.parametrize("name", ["result.json", "weights.safetensors"])
@pytest.mark.parametrize("share", [0.0, 0.5])
def test_a_file_that_is_cut_short(folder, name, share):
    content = (folder / name).read_bytes()
    (folder / name).write_bytes(content[: int(share * len(content))])
    with pytest.raises(RunError, match="cannot be read"):
        load_run(folder)


@pytest.mark.parametrize("edit", [lambda v: v.pop("seed"), lambda v: v["epochs"][0].update(odd=1), lambda v: v.clear()])
def test_a_result_of_another_version(folder, edit):
    values = json.loads((folder / "result.json").read_text())
    edit(values)
    (folder / "result.json").write_text(json.dumps(values))
    with pytest.raises(RunError, match="written by another version"):
        load_run(folder)


def test_a_result_that_is_no_object(folder):
    (folder / "result.json").write_text("[1, 2]")
    with pytest.raises(RunError):
        load_run(folder)


def test_a_recipe_with_an_unknown_field(folder):
    values = json.loads((folder / "result.json").read_text())
    values["recipe"]["warp"] = 9
    (folder / "result.json").write_text(json.dumps(values))
    with pytest.raises(ValueError, match="unknown recipe field warp"):
        load_run(folder)


def test_a_run_from_before_warm_up_was_counted_can_be_read(folder):
    values = json.loads((folder / "result.json").read_text())
    assert values.pop("warm_up_seconds") >= 0
    (folder / "result.json").write_text(json.dumps(values))
    assert load_run(folder).warm_up_seconds == 0
