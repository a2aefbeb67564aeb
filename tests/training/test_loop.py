"""A run can be repeated bit for bit, learns, reads the right clock, and fails with its log kept."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook

from cifar_fast import recipes
from cifar_fast.data.dataset import Dataset
from cifar_fast.errors import RecipeError, TrainingError, UserError
from cifar_fast.hardware import clock as timing
from cifar_fast.kernels import amx, winograd
from cifar_fast.recipe import Recipe
from cifar_fast.training import averaging, loop, setup, step
from cifar_fast.training.batches import TrainBatches
from cifar_fast.training.evaluate import Evaluation, evaluate
from cifar_fast.training.loop import train
from cifar_fast.training.model import Network, build_model, build_network
from cifar_fast.training.result import EpochResult, RunResult
from cifar_fast.training.step import forward_backward

CPU = torch.device("cpu")
BATCH = 40
SMOKE = replace(
    recipes.smoke(),
    n_shards=1,
    widths=(8, 8, 8),
    global_batch_size=BATCH,
    peak_lr=recipes.smoke().peak_lr * BATCH / 2000,  # as much as there for an image
    precision="float32",
    convolution="direct",
)
RESNET9 = replace(
    recipes.page_2019(),
    widths=(4, 4, 8, 8),
    ghost_batch_size=20,
    global_batch_size=BATCH,
    epochs=1.0,
    flat_epochs=0.2,
    precision="float32",
    convolution="direct",
)
# 100 steps of 32 images without augmentation: about half of the test images right, where chance is a tenth.
EASY = replace(
    SMOKE,
    widths=(16, 32, 32),
    logit_scale=1 / 16,
    global_batch_size=32,
    peak_lr=recipes.smoke().peak_lr * 32 / 2000,
    epochs=5.0,
    crop_padding=0,
    flip="none",
)


@pytest.fixture(autouse=True)
def only_direct_convolutions(monkeypatch: pytest.MonkeyPatch) -> None:
    """The recipes here ask for these, so nothing is measured and no other kernel needs compiling."""
    for module in (winograd, amx):
        monkeypatch.setattr(module, "available", lambda: (False, "not in this test"))


def run(recipe: Recipe, data: Dataset, **options: Any) -> RunResult:
    return train(recipe, data, device="cpu", progress=False, **options)


@pytest.fixture
def built(monkeypatch: pytest.MonkeyPatch) -> list[Network]:
    """The networks that `train` trains, which are not those it returns where it averages."""
    models: list[Network] = []

    def build_and_keep(*args: Any, **options: Any) -> Network:
        models.append(build_network(*args, **options))
        return models[-1]

    monkeypatch.setattr(setup, "build_network", build_and_keep)
    return models


def same_weights(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


# --- Repeatable ---


@pytest.mark.parametrize("recipe", [SMOKE, RESNET9], ids=["convnet6", "resnet9"])
def test_the_same_seed_gives_the_same_weights_bit_for_bit(recipe: Recipe, data: Dataset) -> None:
    a = run(recipe, data, seed=3)
    torch.manual_seed(99)  # torch's own generator has no part in it
    b, other = run(recipe, data, seed=3), run(recipe, data, seed=4)
    assert same_weights(a.model, b.model)
    assert [replace(epoch, train_seconds=0) for epoch in a.epochs] == [
        replace(epoch, train_seconds=0) for epoch in b.epochs
    ]
    assert not same_weights(a.model, other.model)


@pytest.mark.parametrize(
    "changes", [{"preload": False}, {"channels_last": False}, {"micro_batch_size": BATCH}], ids=str
)
def test_how_it_is_computed_does_not_change_what_is_computed(changes: dict[str, Any], data: Dataset) -> None:
    # Not with Muon: it brings even the faintest directions to length one, and rounding errors with them.
    recipe = replace(RESNET9, epochs=0.5, flat_epochs=0.0)
    a, b = run(recipe, data), run(replace(recipe, **changes), data)
    for x, y in zip(a.model.parameters(), b.model.parameters(), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-2, atol=1e-3)


# --- Learns, and reports ---


def test_it_learns(tiny_data: Dataset) -> None:
    result = run(EASY, tiny_data)
    assert result.accuracy > 0.3
    assert result.epochs[-1].train_loss < result.epochs[0].train_loss - 0.2


def test_a_result_says_what_was_trained_on_what_where(data: Dataset) -> None:
    seen: list[EpochResult] = []
    result = run(SMOKE, data, seed=7, on_epoch=seen.append)
    assert result.recipe == SMOKE and result.seed == 7
    assert result.dataset == {
        "name": data.name,
        "fingerprint": data.fingerprint,
        "n_train": 160,
        "n_test": 40,
        "classes": list(data.classes),
    }
    assert result.environment["device"] == "cpu" and result.environment["precision"] == "float32"
    assert result.environment["convolution"] == "direct"
    assert [epoch.epoch for epoch in result.epochs] == [1, 2] and result.epochs == seen
    assert [epoch.tta for epoch in result.epochs] == ["none", "flip"]  # test-time augmentation for the last only
    for epoch in result.epochs:
        assert 0 <= epoch.train_accuracy <= 1 and 0 <= epoch.test_accuracy <= 1
        assert math.isfinite(epoch.train_loss) and math.isfinite(epoch.test_loss)
    last = evaluate(result.model, data.test_images, data.test_labels, tta="flip")
    assert (result.accuracy, result.loss) == (last.accuracy, pytest.approx(last.loss, rel=1e-5))


def test_train_loss_and_accuracy_are_means_over_the_batches_as_trained(data: Dataset) -> None:
    recipe = replace(SMOKE, epochs=0.5, label_smoothing=0.2)  # two steps
    outputs: list[Tensor] = []
    with register_module_forward_hook(lambda module, _, output: _keep(module, output, outputs)):
        result = run(recipe, data)
    losses, correct = [], []
    batches = TrainBatches(data.train_images, data.train_labels, recipe, device=CPU)
    for logits, (_, labels) in zip(outputs, batches.epoch(0), strict=False):
        losses.append(F.cross_entropy(logits, labels, label_smoothing=0.2).item())
        correct.append((logits.argmax(1) == labels).float().mean().item())
    assert len(losses) == 2
    assert result.epochs[0].train_loss == pytest.approx(sum(losses) / 2, rel=1e-5)
    assert result.epochs[0].train_accuracy == pytest.approx(sum(correct) / 2)


def _keep(module: nn.Module, output: Tensor, outputs: list[Tensor]) -> None:
    if isinstance(module, Network) and module.training:
        outputs.append(output.detach())


@pytest.mark.parametrize(("epochs", "steps"), [(0.25, 1), (1.0, 4), (1.5, 6)])
def test_it_takes_as_many_steps_as_the_epochs_say(
    epochs: float, steps: int, data: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken = []
    monkeypatch.setattr(step, "set_learning_rates", lambda optimizers, schedule, epoch: taken.append(epoch))
    result = run(replace(SMOKE, epochs=epochs), data)
    assert taken == [step / 4 for step in range(steps)]
    assert len(result.epochs) == math.ceil(epochs)


def test_the_classes_are_the_data_sets(data: Dataset) -> None:
    three = replace(data, classes=("a", "b", "c"), train_labels=data.train_labels % 3, test_labels=data.test_labels % 3)
    result = run(replace(SMOKE, epochs=0.25), three)
    assert result.dataset["classes"] == ["a", "b", "c"]
    assert result.model(result.model.normalise(data.test_images)).shape == (40, 3)


@pytest.mark.parametrize(
    "changes",
    [
        {"resolutions": (16, 24)},
        {
            "optimizer": "sgd",
            "peak_lr": 0.1,
            "bias_lr_scale": 1.0,
            "weight_decay": 5e-4,
            "bias_weight_decay_scale": 1.0,
        },
        {"n_shards": 4, "ghost_batch_size": 5},
        {"cutout": 8, "color_jitter": 0.2, "lookahead_alpha": 0.5, "ema_decay": 0.9, "whitening_bias_epochs": 0.0},
        {"precision": "bfloat16"},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_other_recipes_run(changes: dict[str, Any], data: Dataset) -> None:
    result = run(replace(SMOKE, **changes), data)
    assert len(result.epochs) == 2 and math.isfinite(result.loss)


# --- Averaging ---


def test_an_ema_is_evaluated_and_never_written_back(data: Dataset, built: list[Network]) -> None:
    without, averaged = run(SMOKE, data), run(replace(SMOKE, ema_decay=0.9, ema_every=2), data)
    assert same_weights(built[0], built[1])
    assert without.model is built[0] and averaged.model is not built[1]
    assert not same_weights(averaged.model, built[1])


def test_at_the_end_the_weights_are_evaluated_without_their_average(data: Dataset, built: list[Network]) -> None:
    without, averaged = run(SMOKE, data), run(replace(SMOKE, ema_decay=0.9, ema_every=2), data)
    both = run(replace(SMOKE, ema_decay=0.9, ema_every=2, ema_off_epochs=1.0), data)
    assert both.model is built[2] and same_weights(built[2], built[0])
    assert both.epochs[0].test_loss == averaged.epochs[0].test_loss != without.epochs[0].test_loss
    assert both.epochs[1].test_loss == without.epochs[1].test_loss != averaged.epochs[1].test_loss


def test_the_average_in_training_is_taken_every_few_steps(
    data: Dataset, built: list[Network], monkeypatch: pytest.MonkeyPatch
) -> None:
    decays: list[float] = []
    updates: list[int] = []

    class Watched(averaging.EMA):
        def __init__(self, model: nn.Module, decay: float) -> None:
            super().__init__(model, decay)
            decays.append(decay)

        def update(self, model: nn.Module) -> None:
            updates.append(1)
            super().update(model)

    monkeypatch.setattr(setup, "EMA", Watched)
    run(replace(SMOKE, ema_decay=0.99, ema_every=3), data)  # 8 steps
    assert decays == [pytest.approx(0.99**3)] and len(updates) == 2


def test_lookahead_changes_what_is_trained(data: Dataset, built: list[Network]) -> None:
    run(SMOKE, data)
    run(replace(SMOKE, lookahead_alpha=0.5, lookahead_every=2), data)
    run(replace(SMOKE, lookahead_alpha=0.5, lookahead_every=100), data)  # never its turn
    assert not same_weights(built[0], built[1])
    assert same_weights(built[0], built[2])


def test_the_whitening_layer_stays_and_its_bias_stops_when_the_recipe_says(data: Dataset, built: list[Network]) -> None:
    run(replace(SMOKE, epochs=0.25, whitening_bias_epochs=1.0), data)
    run(replace(SMOKE, epochs=2.0, whitening_bias_epochs=1.0), data)
    run(replace(SMOKE, epochs=1.0, whitening_bias_epochs=0.0), data)
    weights = [model.state_dict()["layers.whiten.weight"] for model in built]
    assert torch.equal(weights[0], weights[1])
    biases = [model.state_dict()["layers.whiten.bias"] for model in built]
    start = build_model(SMOKE, 10, torch.zeros(3), torch.ones(3)).state_dict()["layers.whiten.bias"]
    assert not torch.equal(biases[0], start) and not torch.equal(biases[1], start)
    assert torch.equal(biases[2], start)


def test_the_whitening_bias_is_learned_for_its_part_of_an_epoch(data: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    learned = []

    def look(model: Network, *args: Any) -> tuple[Tensor, Tensor]:
        learned.append(model.layers.whiten.bias.requires_grad)
        return forward_backward(model, *args)

    monkeypatch.setattr(step, "forward_backward", look)
    run(replace(SMOKE, epochs=2.0, whitening_bias_epochs=0.6), data)
    n = len(learned) // 2
    assert learned == [step < 0.6 * n for step in range(2 * n)]


# --- What the device cannot do ---


def test_float16_on_a_cpu_falls_back_and_the_result_says_why(data: Dataset) -> None:
    with pytest.warns(UserWarning, match="precision=float16 is not used: .*float32 instead"):
        result = run(replace(SMOKE, epochs=0.25, precision="float16"), data)
    assert result.environment["precision"] == "float32"
    assert "float16" in result.environment["numerics_reason"]
    assert same_weights(result.model, run(replace(SMOKE, epochs=0.25), data).model)


# --- The clocks ---


@pytest.fixture
def hand(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time as all clocks read it, which only the test moves."""
    now = [1000.0]
    read = SimpleNamespace(perf_counter=lambda: now[0], time=lambda: now[0])
    monkeypatch.setattr(timing, "time", read)
    monkeypatch.setattr(loop, "time", read)
    return now


def test_train_seconds_leave_evaluation_out_and_everything_from_the_first_byte_in(
    data: Dataset, hand: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    def slowly(module: ModuleType, name: str, seconds: float) -> None:
        function = getattr(module, name)

        def slow(*args: Any, **options: Any) -> Any:
            hand[0] += seconds
            return function(*args, **options)

        monkeypatch.setattr(module, name, slow)

    class SlowBatches(TrainBatches):
        def epoch(self, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
            for batch in super().epoch(epoch):
                hand[0] += 1.0
                yield batch

    monkeypatch.setattr(setup, "TrainBatches", SlowBatches)
    slowly(setup, "environment", 5.0)  # after set-up, which the clock of training counts
    slowly(setup, "pixel_statistics", 10.0)
    slowly(setup, "whiten_first_layer", 20.0)
    slowly(loop, "evaluate", 10_000.0)
    result = run(SMOKE, data, started=900.0)
    assert result.epochs[0].train_seconds == 30 + 4
    assert result.train_seconds == result.epochs[1].train_seconds == 30 + 8
    assert result.evaluate_seconds == 20_000
    assert result.total_seconds == 100 + 5 + 30 + 8 + 20_000
    assert result.first_step_seconds == 100 + 5 + 30


def test_without_a_start_the_total_counts_from_the_call(
    data: Dataset, hand: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    def slow(*args: Any, **options: Any) -> Evaluation:
        hand[0] += 7.0
        return evaluate(*args, **options)

    monkeypatch.setattr(loop, "evaluate", slow)
    result = run(replace(SMOKE, epochs=0.25), data)
    assert (result.train_seconds, result.evaluate_seconds, result.total_seconds) == (0, 7, 7)


def test_peak_memory_is_the_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", {torch.device("cuda", 1): 123}.__getitem__)
    assert timing.peak_memory(torch.device("cuda", 1)) == 123
    assert timing.peak_memory(CPU) > 1e7  # Python and torch alone need more


# --- The run folder ---


def test_the_timing_log_has_dawnbenchs_columns(
    data: Dataset, tmp_path: Path, hand: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    class SlowBatches(TrainBatches):
        def epoch(self, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
            hand[0] += 36.0
            yield from super().epoch(epoch)

    monkeypatch.setattr(setup, "TrainBatches", SlowBatches)
    result = run(SMOKE, data, out=tmp_path / "run")
    header, *rows = [line.split("\t") for line in (tmp_path / "run" / "timing_log.tsv").read_text().splitlines()]
    assert header == ["epoch", "hours", "top1Accuracy"]
    assert [(int(epoch), float(hours)) for epoch, hours, _ in rows] == [(1, 0.01), (2, 0.02)]
    assert [float(accuracy) for *_, accuracy in rows] == [
        pytest.approx(100 * epoch.test_accuracy) for epoch in result.epochs
    ]


def test_the_log_grows_epoch_by_epoch(data: Dataset, tmp_path: Path) -> None:
    lines: list[int] = []
    log = tmp_path / "run" / "timing_log.tsv"
    run(SMOKE, data, out=tmp_path / "run", on_epoch=lambda _: lines.append(len(log.read_text().splitlines())))
    assert lines == [2, 3]


# --- What goes wrong ---


def test_a_loss_that_is_not_finite_stops_with_advice_and_keeps_the_log(
    data: Dataset, tmp_path: Path, built: list[Network]
) -> None:
    def spoil(epoch: EpochResult) -> None:
        with torch.no_grad():
            for p in built[0].parameters():
                p.fill_(torch.nan)

    with pytest.raises(TrainingError) as caught:
        run(replace(SMOKE, epochs=3.0), data, out=tmp_path / "run", on_epoch=spoil)
    message = str(caught.value)
    assert "the loss is nan at step 5" in message  # the first after the epoch of four steps
    assert re.search(r"learning rates? of \d", message)
    assert "lower peak_lr" in message and "warmup_fraction" in message
    logged = (tmp_path / "run" / "epochs.jsonl").read_text().splitlines()
    assert [json.loads(line)["epoch"] for line in logged] == [1]
    assert len((tmp_path / "run" / "timing_log.tsv").read_text().splitlines()) == 2
    assert not (tmp_path / "run" / "weights.safetensors").exists()


def test_a_learning_rate_far_too_high_is_found_out(data: Dataset) -> None:
    with pytest.raises(TrainingError, match="training has diverged"):
        run(replace(RESNET9, peak_lr=1e30, epochs=2.0), data)


def test_a_batch_larger_than_the_set_is_refused_before_anything_is_written(data: Dataset, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="40 images cannot be drawn from a shard of 20"):
        run(replace(recipes.smoke(), precision="float32", convolution="direct"), data, out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_an_output_folder_that_exists_is_refused_and_kept(data: Dataset, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("keep")
    with pytest.raises(UserError, match="exists already"):
        run(SMOKE, data, out=tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_a_device_that_is_not_there_is_refused(data: Dataset) -> None:
    with pytest.raises(UserError, match="device 'cuda:99' is not there"):
        train(SMOKE, data, device="cuda:99", progress=False)


# --- On a GPU ---


@pytest.mark.gpu
@pytest.mark.parametrize("recipe", [SMOKE, RESNET9], ids=["convnet6", "resnet9"])
def test_a_gpu_trains_as_a_cpu_does(recipe: Recipe, data: Dataset) -> None:
    recipe = replace(
        recipe, precision="float32", epochs=0.5, flat_epochs=0.0
    )  # two steps: rounding has no time to grow
    on_cpu = run(recipe, data)
    on_gpu = train(recipe, data, device="cuda", progress=False)
    assert next(on_gpu.model.parameters()).is_cuda
    assert on_gpu.epochs[0].train_loss == pytest.approx(on_cpu.epochs[0].train_loss, rel=2e-2)
    assert on_gpu.epochs[0].test_loss == pytest.approx(on_cpu.epochs[0].test_loss, rel=5e-2)


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["float16", "bfloat16"])
def test_a_gpu_learns_in_half_precision(precision: str, tiny_data: Dataset) -> None:
    result = train(replace(EASY, precision=precision), tiny_data, device="cuda", progress=False)
    assert result.environment["precision"] == precision
    assert result.accuracy > 0.3
