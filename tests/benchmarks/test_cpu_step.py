"""benchmarks/cpu_step.py: its parts add up, its reference computes what we compute, and it counts as torch does."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from cifar_fast import recipes
from cifar_fast.distributed.processes import WatchedProcesses
from cifar_fast.hardware.numerics import Numerics, capabilities
from cifar_fast.kernels import amx, fused, winograd
from cifar_fast.recipe import Recipe
from cifar_fast.training import optim
from cifar_fast.training.alone import ALONE
from cifar_fast.training.layers import Block, GhostBatchNorm
from cifar_fast.training.setup import Execution, choose_execution
from cifar_fast.training.step import forward_backward

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks"
TINY = replace(
    recipes.laptop(),
    widths=(16, 16, 16),
    resolutions=(),
    global_batch_size=8,
    ghost_batch_size=0,
    micro_batch_size=0,
)
NETWORKS = {
    "convnet6": TINY,
    "in parts, bias learned": replace(TINY, ghost_batch_size=2, micro_batch_size=4, whitening_bias_epochs=9.0),
    "no whitening, pooled late": replace(TINY, whitening_size=0, pool_position="after_activation"),
    "resnet9": replace(recipes.page_2019(), widths=(8, 8, 16, 16), global_batch_size=8, ghost_batch_size=0),
}


needs_fused = pytest.mark.skipif(not fused.available()[0], reason=fused.available()[1])


@pytest.fixture(scope="module")
def cpu_step() -> Iterator[ModuleType]:
    """As the other processes import it."""
    sys.path.insert(0, str(FOLDER))
    yield importlib.import_module("cpu_step")
    sys.path.remove(str(FOLDER))


@pytest.fixture(params=NETWORKS)
def recipe(request: pytest.FixtureRequest) -> Recipe:
    return NETWORKS[request.param]


def setting_of(
    cpu_step: ModuleType,
    recipe: Recipe,
    *,
    convolution: str = "direct",
    fuse_norm: bool = False,
    dtype: torch.dtype = torch.float32,
) -> Any:
    execution = Execution(Numerics(dtype, convolution, "for a test", fuse_norm))
    return cpu_step.Setting(recipe, cpu_step.RANDOM, 4 * recipe.global_batch_size, torch.get_num_threads(), execution)


@pytest.fixture(params=["direct", "winograd", "amx"])
def convolution(request: pytest.FixtureRequest) -> str:
    if why_not := capabilities().unavailable.get(request.param):
        pytest.skip(why_not)
    return request.param


@pytest.fixture
def fresh(cpu_step: ModuleType) -> None:
    """A network that no other test has trained."""
    cpu_step.prepare.cache_clear()


# --- the reference ---


def test_the_reference_is_made_of_stock_layers_with_the_same_weights(
    cpu_step: ModuleType, recipe: Recipe, fresh: None
) -> None:
    setting = setting_of(cpu_step, recipe)
    ours, reference = cpu_step.prepare(setting, False), cpu_step.prepare(setting, True)
    leaves = [layer for layer in reference.model.modules() if next(layer.children(), None) is None]
    ours_only = {type(layer).__name__ for layer in leaves if not type(layer).__module__.startswith("torch.nn.")}
    # Plain arithmetic, the first outside of the step, and another name for torch's convolution.
    assert ours_only - {"Whitening"} == {"Normalise", "Scale"}
    names = [[(p.shape, p.requires_grad) for p in side.model.parameters()] for side in (ours, reference)]
    assert names[0] == names[1]
    for a, b in zip(ours.model.parameters(), reference.model.parameters(), strict=True):
        assert torch.equal(a, b)
    assert [type(optimizer) for optimizer in reference.optimizers] == [type(each) for each in ours.optimizers]


def losses_and_gradients(
    cpu_step: ModuleType, recipe: Recipe, convolution: str, dtype: torch.dtype = torch.float32
) -> list[tuple[float, list[torch.Tensor]]]:
    """Ours in `dtype` and the reference's, of the same batch and over the same norm groups."""
    setting = setting_of(cpu_step, recipe, convolution=convolution, dtype=dtype)
    ours, reference = cpu_step.prepare(setting, False), cpu_step.prepare(setting, True)
    images, labels = next(ours.stream)
    again, same = next(reference.stream)
    assert torch.equal(images, again) and torch.equal(labels, same)
    loss, _ = forward_backward(ours.model, images, labels, recipe, dtype)
    found = cpu_step.reference_gradients(
        reference.model, images, labels, recipe.label_smoothing, recipe.norm_group_size
    )
    gradients = [[p.grad for p in side.model.parameters()] for side in (ours, reference)]
    assert [g is None for g in gradients[0]] == [g is None for g in gradients[1]]
    ours_found, its_found = ([g for g in each if g is not None] for each in gradients)
    return [(loss.item(), ours_found), (found.item(), its_found)]


def test_without_autocast_the_reference_computes_our_gradients(
    cpu_step: ModuleType, recipe: Recipe, fresh: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cpu_step.torch, "autocast", lambda *_, **__: nullcontext())
    (ours, our_gradients), (reference, gradients) = losses_and_gradients(cpu_step, recipe, "direct")
    assert reference == pytest.approx(ours, rel=1e-5)
    for a, b in zip(our_gradients, gradients, strict=True):
        assert (a - b).norm() <= 2e-3 * a.norm() + 1e-7


@pytest.mark.parametrize("convolution", ["direct", "winograd", "amx"])
def test_the_reference_computes_our_loss_to_the_precision_of_bfloat16(
    cpu_step: ModuleType, convolution: str, fresh: None
) -> None:
    kernels = {"winograd": winograd, "amx": amx}
    if convolution in kernels and not kernels[convolution].available()[0]:
        pytest.skip(kernels[convolution].available()[1])
    dtype = torch.bfloat16 if convolution == "amx" else torch.float32
    (ours, _), (reference, _) = losses_and_gradients(cpu_step, TINY, convolution, dtype)
    assert reference == pytest.approx(ours, rel=0.02)
    if dtype == torch.float32:
        assert reference != ours  # the reference is rounded, ours is not


# --- the split ---


def test_the_parts_add_up_to_the_step_and_none_is_unknown(cpu_step: ModuleType, recipe: Recipe, fresh: None) -> None:
    setting = setting_of(cpu_step, recipe)
    found = cpu_step.split_turn(ALONE, setting, 2)
    assert sum(part["seconds"] for part in found["parts"]) == pytest.approx(found["seconds"], rel=0.01)
    kinds = {part["kind"] for part in found["parts"]}
    assert kinds <= set(cpu_step.ORDER)
    expected = {"augmentation", "convolutions", "norms", "activations", "pooling", "head and loss", "rest"}
    assert kinds >= expected | {"optimiser, other"}
    assert (cpu_step.FIRST in kinds) == bool(recipe.whitening_size)
    assert ("Newton-Schulz" in kinds) == (recipe.optimizer == "muon")
    assert ("additions" in kinds) == (recipe.network == "resnet9")
    for kind in ("convolutions", "norms", "activations"):
        for phase in ("forward", "backward"):
            seconds = [part["seconds"] for part in found["parts"] if (part["kind"], part["phase"]) == (kind, phase)]
            assert sum(seconds) > 0
    moved = {part["kind"] for part in found["parts"] if part["bytes"]}
    assert moved == kinds - {"rest", "autograd"}
    assert all(part["bytes"] > 0 for part in found["parts"] if part["layer"] and part["seconds"])


def test_the_split_leaves_the_step_as_it_is(cpu_step: ModuleType, recipe: Recipe, fresh: None) -> None:
    setting = setting_of(cpu_step, recipe)
    plain = [cpu_step.take_turn(ALONE, setting, cpu_step.OURS, 1)["loss"] for _ in range(3)]
    cpu_step.prepare.cache_clear()
    before = patched()
    watched = [cpu_step.split_turn(ALONE, setting, 1)["loss"] for _ in range(3)]
    assert watched == plain
    assert patched() == before
    prepared = cpu_step.prepare(setting, False)
    assert not any(layer._forward_hooks or layer._forward_pre_hooks for layer in prepared.model.modules())
    assert not any(each._optimizer_step_pre_hooks or each._optimizer_step_post_hooks for each in prepared.optimizers)


def patched() -> list[Any]:
    functions, methods = torch.nn.functional, (torch.Tensor.backward, GhostBatchNorm.then)
    return [functions.max_pool2d, functions.cross_entropy, optim.orthogonalise_all, *methods]


@needs_fused
def test_fused_norms_and_activations_are_one_kind_and_stay_fused(
    cpu_step: ModuleType, recipe: Recipe, fresh: None
) -> None:
    setting = setting_of(cpu_step, recipe, fuse_norm=True)
    plain = [cpu_step.take_turn(ALONE, setting, cpu_step.OURS, 1)["loss"] for _ in range(2)]
    cpu_step.prepare.cache_clear()
    found = [cpu_step.split_turn(ALONE, setting, 1) for _ in range(2)]
    assert [each["loss"] for each in found] == plain
    parts: dict[tuple[str, str], list] = {(part["kind"], part["phase"]): [] for part in found[0]["parts"]}
    for part in found[0]["parts"]:
        parts[part["kind"], part["phase"]].append(part)
    layers = dict(cpu_step.prepare(setting, False).model.named_modules())
    blocks = {name for name, layer in layers.items() if isinstance(layer, Block)}
    pooled_between = {name for name in blocks if [*layers[name]._modules].index("activation") != 2}
    for phase in ("forward", "backward"):
        both = parts["norm and activation", phase]
        assert {f"layers.{part['layer']}" for part in both} == blocks - pooled_between
        assert all(part["seconds"] > 0 and part["bytes"] > 0 for part in both)
    assert len(parts.get(("norms", "forward"), [])) == len(pooled_between)
    # convnet6 has an activation after its first layer, where there is no norm.
    assert len(parts.get(("activations", "forward"), [])) == len(pooled_between) + (recipe.network == "convnet6")


@needs_fused
def test_one_side_does_not_fuse_norms_and_activations(cpu_step: ModuleType, fresh: None) -> None:
    setting = setting_of(cpu_step, TINY, fuse_norm=True)
    losses = {side: cpu_step.take_turn(ALONE, setting, side, 1)["loss"] for side in (cpu_step.OURS, cpu_step.UNFUSED)}
    assert losses[cpu_step.OURS] == pytest.approx(losses[cpu_step.UNFUSED], rel=1e-4)
    for each, fuse in ((setting, True), (setting.with_numerics(fuse_norm=False), False)):
        model = cpu_step.prepare(each, False).model
        assert {layer.fuse for layer in model.modules() if isinstance(layer, Block)} == {fuse}


def test_pooling_is_told_from_the_convolution_whose_forward_it_is_in(cpu_step: ModuleType, fresh: None) -> None:
    parts = cpu_step.split_turn(ALONE, setting_of(cpu_step, TINY), 1)["parts"]
    layers = {(part["phase"], part["layer"]) for part in parts if part["kind"] == "pooling" and part["seconds"]}
    blocks = {f"block{number}a.conv" for number in (1, 2, 3)}
    assert layers == {(phase, name) for phase in ("forward", "backward") for name in blocks | {"pool"}}
    assert {part["layer"] for part in parts if part["kind"] == "convolutions" and part["phase"] == "backward"} == {
        f"block{number}{letter}.conv" for number in (1, 2, 3) for letter in "ab"
    }


def test_the_operations_counted_are_torchs_own_count(cpu_step: ModuleType, recipe: Recipe, fresh: None) -> None:
    setting = setting_of(cpu_step, recipe, dtype=torch.bfloat16)
    parts = cpu_step.split_turn(ALONE, setting, 1)["parts"]
    prepared = cpu_step.prepare(setting, False)
    with FlopCounterMode(display=False) as counter:
        prepared.step(*next(prepared.stream))
    assert sum(part["flops"] for part in parts) == counter.get_total_flops()
    assert all(part["multiplied"] == part["flops"] for part in parts)  # no Winograd


def test_newton_schulz_is_counted_as_torch_counts_it(cpu_step: ModuleType) -> None:
    split, matrices = cpu_step.Split(), [torch.randn(4, 9), torch.randn(12, 5), torch.randn(4, 9)]
    split._orthogonalised(cpu_step.NEWTON_SCHULZ, matrices, matrices)
    with FlopCounterMode(display=False) as counter:
        optim.orthogonalise_all(matrices)
    assert split.work[cpu_step.NEWTON_SCHULZ].flops == counter.get_total_flops()


@pytest.mark.skipif(not winograd.available()[0], reason="Winograd cannot be compiled here")
def test_winograd_multiplies_less_than_the_direct_algorithm(cpu_step: ModuleType, fresh: None) -> None:
    parts = cpu_step.split_turn(ALONE, setting_of(cpu_step, TINY, convolution="winograd"), 1)["parts"]
    direct = cpu_step.split_turn(ALONE, setting_of(cpu_step, TINY), 1)["parts"]
    names = ("kind", "phase", "layer")
    flops = [{tuple(p[n] for n in names): p["flops"] for p in side if p["flops"]} for side in (parts, direct)]
    assert flops[0] == flops[1]
    found = {(part["phase"], part["layer"]): part for part in parts if part["kind"] == "convolutions"}
    last = found["forward", "block3b.conv"]  # 3x3 pixels: one tile
    assert last["multiplied"] == 2 * 36 * 8 * 16 * 16 and last["flops"] == 2 * 9 * 9 * 8 * 16 * 16
    first = found["backward", "block1a.conv"]  # the layer before is frozen: its weights' gradient alone
    assert first["multiplied"] == found["forward", "block1a.conv"]["multiplied"] < first["flops"]
    assert {part["layer"] for part in parts if part["kind"] == "pooling"} == {"pool"}  # the rest is in the convolutions


@pytest.mark.usefixtures("amx_everywhere")
def test_amx_multiplies_no_taps_outside_an_image(cpu_step: ModuleType, fresh: None) -> None:
    parts = cpu_step.split_turn(ALONE, setting_of(cpu_step, TINY, convolution="amx", dtype=torch.bfloat16), 1)["parts"]
    found = {(part["phase"], part["layer"]): part for part in parts if part["kind"] == "convolutions"}
    last = found["forward", "block3b.conv"]  # 3x3 pixels: in each direction 2 + 3 + 2 taps
    assert last["multiplied"] == 2 * 7 * 7 * 8 * 16 * 16 and last["flops"] == 2 * 9 * 9 * 8 * 16 * 16
    pooled = found["forward", "block3a.conv"]  # 7x7 pixels, of which 6x6 are pooled: 2 + 5 * 3 taps
    assert pooled["multiplied"] == 2 * 17 * 17 * 8 * 16 * 16 and pooled["flops"] == 2 * 9 * 49 * 8 * 16 * 16
    assert {part["layer"] for part in parts if part["kind"] == "pooling"} == {"pool"}  # the rest is in the convolutions


def test_bytes_are_inputs_weights_and_outputs(cpu_step: ModuleType) -> None:
    model = nn.Sequential(nn.Linear(6, 4, bias=False))
    split = cpu_step.Split()
    with split.watching(model, []):
        model(torch.randn(3, 6)).sum().backward()
    forward, backward = (split.work[cpu_step.Part("head and loss", phase, "0")] for phase in ("forward", "backward"))
    assert forward.bytes == 4 * (18 + 24 + 12) and forward.flops == 2 * 3 * 6 * 4
    assert backward.bytes == 4 * (12 + 18 + 24 + 24) and backward.flops == forward.flops  # the weight's alone


# --- the limits ---


def test_the_limits_are_rates(cpu_step: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_step, "PRODUCTS", (32, 64))
    monkeypatch.setattr(cpu_step, "array_bytes", lambda: 1 << 20)
    measured = [cpu_step.measure_limits([torch.float32, torch.bfloat16]) for _ in range(2)]
    best = cpu_step.best_limits(measured)
    assert set(best["flops"]) == {"float32", "bfloat16"} and best["measured"] == measured
    assert best["flops"]["float32"] == max(each["flops"]["float32"] for each in measured) > 0
    assert best["bandwidth"] == max(each["bytes"][name] for each in measured for name in ("copy", "triad")) > 0


def test_the_arrays_exceed_the_cache_if_memory_allows(cpu_step: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    assert cpu_step.last_level_cache() > 0
    monkeypatch.setattr(cpu_step, "last_level_cache", lambda: 100 << 20)
    for memory, array in ((1 << 40, 400 << 20), (800 << 20, 100 << 20)):
        monkeypatch.setattr(cpu_step.psutil, "virtual_memory", lambda memory=memory: SimpleNamespace(available=memory))
        assert cpu_step.array_bytes() == array


def test_larger_products_are_left_out_where_they_would_take_long(
    cpu_step: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    sides: list[int] = []
    monkeypatch.setattr(cpu_step, "PRODUCTS", (8, 16, 32))
    monkeypatch.setattr(cpu_step, "SECONDS", 0.0)
    monkeypatch.setattr(cpu_step, "best_time", lambda work: sides.append(work().shape[0]) or 1.0)
    assert cpu_step.matrix_rate(torch.float32) == 2 * 8**3 and sides == [8]


# --- the whole ---


class Here:
    """Does in this process what the sides' own processes do, and notes what each was asked for."""

    asked: ClassVar[list[list[str]]] = []

    def __init__(self, *_: object, **__: object) -> None:
        self.own: list[str] = []
        self.asked.append(self.own)

    def __enter__(self) -> Here:
        return self

    def __exit__(self, *_: object) -> None: ...

    def run(self, function: Callable[..., Any], *args: Any) -> list[Any]:
        self.own.append(args[1] if function.__name__ == "take_turn" else function.__name__)
        return [function(ALONE, *args)]


@pytest.fixture
def quick(cpu_step: ModuleType, monkeypatch: pytest.MonkeyPatch, fresh: None) -> None:
    execution = Execution(Numerics(torch.float32, "direct", "for a test"))

    def choose(*_: object) -> Execution:
        return execution

    monkeypatch.setattr(cpu_step, "PRODUCTS", (32,))
    monkeypatch.setattr(cpu_step, "array_bytes", lambda: 1 << 20)
    monkeypatch.setattr(cpu_step, "N_IMAGES", 64)
    monkeypatch.setattr(cpu_step, "choose", choose)
    monkeypatch.setattr(cpu_step, "WatchedProcesses", Here)
    monkeypatch.setattr(Here, "asked", [])


def require_complete(cpu_step: ModuleType, report: dict[str, Any], rounds: int) -> None:
    assert set(report["sides"]) == set(cpu_step.SIDES) and len(report["ratios"]) == 6
    for side in report["sides"].values():
        assert len(side["turns"]) == rounds and side["seconds"]["min"] > 0
        assert side["first_loss"] == pytest.approx(report["sides"]["ours"]["first_loss"], rel=0.05)
    ours, reference = (report["sides"][name]["turns"] for name in ("ours", "reference"))
    ratio = report["ratios"]["our step / the reference's arithmetic"]
    assert ratio["by_round"] == [a["seconds"] / b["seconds"] for a, b in zip(ours, reference, strict=True)]
    assert ratio["n"] == rounds and ratio["min"] <= ratio["median"] <= ratio["max"]
    split = report["split"]
    for rows in (split["rows"], split["convolutions"]):
        assert rows and all(row["least_seconds"] >= 0 for row in rows)
    assert sum(row["seconds"] for row in split["rows"]) == pytest.approx(split["seconds"], rel=0.01)
    assert sum(row["share"] for row in split["rows"]) == pytest.approx(1, rel=0.01)
    assert report["step"]["flops"] == sum(row["flops"] for row in split["rows"]) > 0
    assert {"commit", "started", "environment", "recipe", "images", "data", "limits", "step", "allocation"} <= set(
        report
    )


def test_the_report_is_complete_and_written_whole(
    cpu_step: ModuleType, quick: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "new" / "folder"
    asked = ["--out", str(out), "--recipe", "smoke", "--batch", "16", "--rounds", "2", "--steps", "2"]
    assert cpu_step.main(asked) == 0
    assert sorted(path.name for path in out.iterdir()) == ["cpu_step.json", "cpu_step.txt"]
    report = json.loads((out / "cpu_step.json").read_text())
    require_complete(cpu_step, report, 2)
    ours, *others = Here.asked  # a process each, so that none allocates memory as another has asked for
    assert ours == ["choose", *(1 + 2) * ["ours", "split_turn"]]
    assert others == [3 * [side] for side in cpu_step.SIDES[1:-1]]
    assert report["images"] == 16 and report["data"] == "64 random images"
    text = (out / "cpu_step.txt").read_text()
    assert text in capsys.readouterr().out
    for words in ("convolutions, backward", "Newton-Schulz", "reference", "rest", "sum", "random images", "16 images"):
        assert words in text
    assert max(map(len, text.splitlines())) <= 140


@pytest.mark.slow
def test_a_side_allocates_memory_as_it_says(cpu_step: ModuleType) -> None:
    with WatchedProcesses(1, device="cpu", backend="gloo", timeout=60.0) as process:
        sides = (cpu_step.REFERENCE, cpu_step.DEFAULT, cpu_step.UNFUSED)  # the last one asks for the other allocator
        setting = setting_of(cpu_step, TINY)
        keeps = [process.run(cpu_step.take_turn, setting, side, 1)[0]["keeps_freed_memory"] for side in sides]
    assert keeps == [False, False, True]


def test_our_numerics_are_chosen_as_in_training_in_a_process_that_keeps_freed_memory(cpu_step: ModuleType) -> None:
    cpu_step.keep_freed_memory.cache_clear()
    recipe = replace(TINY, precision="float32", convolution="direct")
    assert cpu_step.choose(ALONE, recipe, torch.get_num_threads()) == choose_execution(recipe, cpu_step.CPU)
    assert cpu_step.keep_freed_memory.cache_info().currsize


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        (["--recipe", "nothing"], "no recipe 'nothing'"),
        (["--rounds", "0"], "--rounds 0 must be at least 1"),
        (["--batch", "0"], "--batch 0 must be at least 1"),
        (["--batch", "128"], "drawn from a shard of 64"),
        (["--reference-part", "7"], "--reference-part 7 must divide the batch of 1024"),
        (["--data", "no/such/folder", "--batch", "16"], "no/such/folder"),
    ],
)
def test_a_mistake_is_one_line_of_advice(
    cpu_step: ModuleType, quick: None, tmp_path: Path, capsys: pytest.CaptureFixture[str], asked: list[str], said: str
) -> None:
    assert cpu_step.main(["--out", str(tmp_path / "out"), *asked]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ") and said in error and len(error.splitlines()) == 1
    assert not list((tmp_path / "out").glob("*"))


def test_a_folder_that_cannot_be_made_is_reported_before_anything_is_measured(
    cpu_step: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("in the way")
    assert cpu_step.main(["--out", str(tmp_path / "file")]) == 1
    assert "cannot be made" in capsys.readouterr().err


def test_the_recipe_is_measured_at_full_size_without_averages_and_groups_shrink_to_the_batch(
    cpu_step: ModuleType,
) -> None:
    laptop = recipes.laptop()
    whole = replace(laptop, resolutions=(), ema_decay=0.0)
    assert cpu_step.measured_recipe(replace(laptop, lookahead_alpha=0.5), None) == whole
    small = cpu_step.measured_recipe(laptop, 48)
    assert (small.norm_group_size, small.micro_batch_size) == (48, 0)
    assert cpu_step.measured_recipe(laptop, 1024) == replace(whole, global_batch_size=1024)


def test_the_report_shows_the_split_of_the_median_round(cpu_step: ModuleType) -> None:
    assert cpu_step.middle([3.0, 1.0, 2.0]) == 2 and cpu_step.middle([4.0, 1.0, 3.0, 2.0]) == 3
