"""The rehearsal attributes each kernel to a layer, and counts its bytes and its arithmetic."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest

from cifar_fast.experiments.arithmetic import train_flop
from cifar_fast.recipes import named
from gpu_rehearsal.runtime import Rehearsal
from gpu_rehearsal.work import OWN_KERNELS, Kernel

NAMES = ("speedrun", "airbench_2024", "apple_8gpu")
OUTSIDE = {"batch", "loss", "optimiser"}
BLOCKS = [f"block{number}{letter}" for number in (1, 2, 3) for letter in "ab"]


@pytest.fixture(scope="module", params=NAMES)
def recipe_and_work(request: pytest.FixtureRequest, rehearsal: Rehearsal) -> tuple[str, Mapping[str, Any]]:
    # Two steps an epoch are enough: a step does not depend on the number of images.
    return request.param, rehearsal.run("count_work", name=request.param, n_train=4096)


def kernels(rows: list[list[Any]]) -> Counter[Kernel]:
    return Counter({Kernel(*row[:-1]): row[-1] for row in rows})


def test_a_steps_arithmetic_is_what_the_layers_shapes_say(recipe_and_work: tuple[str, Mapping[str, Any]]) -> None:
    name, found = recipe_and_work
    recipe = replace(named(name), epochs=1.0, flat_epochs=0.0, resolutions=())
    for state, rows in found["steps"].items():
        one_step = replace(recipe, whitening_bias_epochs=1.0 if state == "learned" else 0.0)
        counted = sum(n * kernel.flop for kernel, n in kernels(rows).items() if kernel.layer not in OUTSIDE)
        assert counted == train_flop(one_step, n_train=recipe.global_batch_size), state
    assert set(found["steps"]) == ({"frozen"} if name == "apple_8gpu" else {"frozen", "learned"})


def test_every_kernel_of_a_step_is_counted_and_belongs_to_a_layer(
    rehearsal: Rehearsal, recipe_and_work: tuple[str, Mapping[str, Any]]
) -> None:
    name, found = recipe_and_work
    step = kernels(found["steps"]["frozen"])
    launched = rehearsal.run("measure_launches", name=name, captured=True)  # it counts by the runtime's log alone
    assert step.total() == sum(launched["kernels of a step"].values())
    layers = (
        ["whiten", "mix", "block1", "residual1", "block2", "block3", "residual3"]
        if name == "apple_8gpu"
        else ["whiten", "activation", *BLOCKS]
    )
    assert {kernel.layer for kernel in step} == {*layers, "pool", "linear", "scale", *OUTSIDE}
    # Two gradients for each convolution but the first that learns, whose input needs none, and the whitening.
    backward: Counter[str] = Counter()
    for kernel, n in step.items():
        if kernel.family == "convolution" and kernel.direction == "backward":
            backward[kernel.layer] += n
    convolutions = {layer: 4 if layer.startswith("residual") else 2 for layer in layers}
    first = "mix" if name == "apple_8gpu" else "block1a"
    expected = {
        layer: n - (layer == first) for layer, n in convolutions.items() if layer not in ("whiten", "activation")
    }
    assert backward == expected
    for layer in expected:
        own = [each for each in step.elements() if (each.layer, each.family) == (layer, OWN_KERNELS)]
        n_norms = 2 if layer.startswith("residual") else 1
        directions = Counter(each.direction for each in own)
        assert directions == {"forward": 3 * n_norms, "backward": 3 * n_norms}, layer


def test_a_fused_norm_moves_what_its_kernels_read_and_write(rehearsal: Rehearsal) -> None:
    found = rehearsal.run("count_work", name="airbench_2024", n_train=4096)
    step = kernels(found["steps"]["frozen"])

    def moved(layer: str) -> int:
        return sum(n * each.n_bytes for each, n in step.items() if (each.layer, each.family) == (layer, OWN_KERNELS))

    # Images of 31 pixels are pooled to 15. Forward a norm reads its input twice and writes once, backward it reads both
    # the input and the gradient twice and writes once.
    after = 2000 * 64 * 15 * 15 * 2  # float16
    assert 8 * after < moved("block1b") < 8.05 * after  # and a little for sums over parts of the batch
    # With a pool: reads x, writes it pooled and with the places of the maxima, one byte each; then as before, but with
    # the places read and a gradient written for every pixel of x.
    before = 2000 * 64 * 31 * 31 * 2
    pooled = (before + 1.5 * after) + 2 * after + 2 * after + (2.5 * after + before)
    assert pooled < moved("block1a") < 1.02 * pooled


def test_setting_up_sends_the_whole_training_set(rehearsal: Rehearsal) -> None:
    found = rehearsal.run("count_work", name="airbench_2024", n_train=6000)
    sent = [kernel for kernel in kernels(found["set-up"]) if kernel.family.startswith("copy from")]
    assert max(kernel.n_bytes for kernel in sent) == 6000 * 3 * 32 * 32
    # Two epochs draw their choices: five int64, a bool and two float32 for each image of their three batches.
    epochs = kernels(found["rest of two epochs"])
    drawn = sum(n * kernel.n_bytes for kernel, n in epochs.items() if kernel.family == "copy from pinned memory")
    assert drawn == 2 * 3 * 2000 * (5 * 8 + 1 + 2 * 4)


# Bytes of two float16 tensors of 100 x 200, a row of 200, and a matrix of 40 x 100, worked out by hand.
ONE = 100 * 200 * 2
KNOWN = {
    "a + b": [["elementwise", 3 * ONE, 0]],
    "a + a": [["elementwise", 2 * ONE, 0]],
    "a + row": [["elementwise", 2 * ONE + 400, 0]],
    "a += b": [["elementwise", 3 * ONE, 0]],
    "a := b": [["cast or copy", 2 * ONE, 0]] * 2,
    "as float32": [["cast or copy", ONE + 2 * ONE, 0]],
    "a view": [],
    "row repeated": [["cast or copy", 400 + ONE, 0]],
    "three rows of a": [["copy from pageable memory", 24, 0], ["elementwise", 24 + 2 * 3 * 400, 0]],
    "bank @ a": [["matrix product", 8000 + ONE + 16000, 2 * 40 * 100 * 200]],
    "own operator": [["cifar_fast::rehearsed", 2 * ONE, 0]] + [["cifar_fast::rehearsed", 0, 0]] * 2,
}


def test_known_operations_move_what_they_read_and_write(rehearsal: Rehearsal) -> None:
    assert rehearsal.run("count_known_operations") == KNOWN
