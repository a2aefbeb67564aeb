"""A scale takes a part of the data and makes recipes smaller, and leaves every trick as it is."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from cifar_fast import recipes as recipe
from cifar_fast.errors import UserError
from cifar_fast.recipe import changed_fields
from cifar_fast.teaching import scales
from cifar_fast.teaching.scales import Scale, here

# What `shrink` may change; a trick is none of them.
SIZES = {
    "epochs", "flat_epochs", "whitening_bias_epochs", "ema_off_epochs", "resolutions", "global_batch_size",
    "micro_batch_size", "peak_lr", "widths",
}  # fmt: skip


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.delenv(scales.VARIABLE, raising=False)


def gpus(monkeypatch: pytest.MonkeyPatch, n: int) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: n)


# --- which scale ---


@pytest.mark.parametrize("n, name", [(0, "classroom"), (1, "gpu"), (2, "gpu"), (7, "gpu"), (8, "8gpu"), (16, "8gpu")])
def test_the_machine_chooses_its_scale(monkeypatch, n, name):
    gpus(monkeypatch, n)
    scale = here()
    assert scale.name == name
    assert scale.why == ("no GPU here" if n == 0 else "one GPU here" if n == 1 else f"{n} GPUs here")


def test_the_variable_comes_before_the_machine_and_the_name_before_both(monkeypatch):
    gpus(monkeypatch, 8)
    monkeypatch.setenv(scales.VARIABLE, "smoke")
    assert (here().name, here().why) == ("smoke", "CIFAR_FAST_SCALE=smoke")
    assert (here("laptop").name, here("laptop").why) == ("laptop", "asked for")
    monkeypatch.setenv(scales.VARIABLE, "")  # as good as unset
    assert here().name == "8gpu"


def test_an_unknown_scale_is_told_the_known_ones(monkeypatch):
    monkeypatch.setenv(scales.VARIABLE, "huge")
    with pytest.raises(
        UserError, match="no scale 'huge'; set CIFAR_FAST_SCALE to one of smoke, classroom, laptop, gpu, 8gpu"
    ):
        here()


@pytest.mark.parametrize("n, name, needs", [(0, "gpu", 1), (0, "8gpu", 8), (7, "8gpu", 8)])
def test_a_scale_whose_gpus_are_not_there_is_refused(monkeypatch, n, name, needs):
    gpus(monkeypatch, n)
    with pytest.raises(UserError, match=f"'{name}' needs {needs} GPU.*machine has {n};.*classroom .* or smoke"):
        here(name)


def all_scales(monkeypatch: pytest.MonkeyPatch) -> list[Scale]:
    gpus(monkeypatch, 8)
    return [here(name) for name in scales.NAMES]


def test_every_scale_has_seeds_for_an_interval_and_processes_that_its_recipe_has_shards_for(monkeypatch):
    for scale in all_scales(monkeypatch):
        assert len(set(scale.seeds)) == len(scale.seeds) >= 2
        assert scale.recipe.n_shards % scale.world_size == 0


def test_a_scale_names_itself_in_a_line(monkeypatch):
    smoke, _, laptop, *_ = all_scales(monkeypatch)
    assert str(smoke) == (
        "scale: smoke (asked for); 3,000 training images, 3 seeds; "
        "recipe 'smoke', 2 epochs; rungs of the ladder, 1 epoch"
    )
    assert ", 1 seed; " in str(replace(smoke, seeds=(0,)))
    assert "all training images" in str(laptop) and "\n" not in str(laptop)


# --- the data ---


def test_a_part_is_the_first_images_under_a_fingerprint_of_its_own(tiny_data):
    part = replace(here("smoke"), n_train=60, n_test=20).part(tiny_data)
    assert torch.equal(part.train_images, tiny_data.train_images[:60])
    assert torch.equal(part.train_labels, tiny_data.train_labels[:60])
    assert torch.equal(part.test_images, tiny_data.test_images[:20])
    assert torch.equal(part.test_labels, tiny_data.test_labels[:20])
    assert (part.name, part.classes) == (tiny_data.name, tiny_data.classes)
    assert part.fingerprint != tiny_data.fingerprint
    assert part.source == f"the first 60 training and 20 test images of: {tiny_data.source}"


def test_the_whole_set_stays_itself(tiny_data):
    scale = here("smoke")  # takes more images than these are
    assert scale.part(tiny_data) is tiny_data
    assert replace(scale, n_train=None, n_test=None).part(tiny_data) is tiny_data
    cut = replace(scale, n_train=None, n_test=20).part(tiny_data)
    assert (len(cut.train_labels), len(cut.test_labels)) == (640, 20)


def test_load_takes_its_part_of_what_load_or_synthetic_finds(tiny_data, monkeypatch):
    monkeypatch.setattr(scales, "load_or_synthetic", lambda: tiny_data)
    assert len(replace(here("smoke"), n_train=60).load().train_labels) == 60


# --- the recipes ---


@pytest.mark.parametrize("name", recipe.names())
@pytest.mark.parametrize("scale", ["smoke", "classroom", "laptop"])
def test_shrinking_changes_sizes_and_no_trick(name, scale):
    whole, scale = recipe.named(name), here(scale)
    small = scale.shrink(whole)
    assert set(changed_fields(whole, small)) <= SIZES
    assert small.epochs == min(whole.epochs, scale.most_epochs)
    assert len(small.widths) == len(whole.widths)
    assert all(width >= 8 for width in small.widths)
    # The batch: no larger than asked for, unless one norm group of each shard is; whole norm groups of every shard.
    unit = whole.n_shards * (whole.ghost_batch_size or 1)
    assert small.global_batch_size <= max(unit, scale.most_images_per_step)
    assert small.global_batch_size % unit == whole.global_batch_size % unit == 0
    # The rate of an image under SGD, and the shape of the schedule, are the whole recipe's.
    assert small.peak_lr / small.global_batch_size == pytest.approx(whole.peak_lr / whole.global_batch_size)
    for field in ("flat_epochs", "whitening_bias_epochs", "ema_off_epochs"):
        assert getattr(small, field) / small.epochs == pytest.approx(getattr(whole, field) / whole.epochs)


def test_epochs_of_small_images_shrink_with_the_epochs():
    whole = replace(recipe.laptop(), epochs=9.0, resolutions=(18, 18, 24, 24, 32))
    assert here("laptop").shrink(whole).resolutions == (18, 32)  # the first and the fifth of nine
    assert here("laptop").shrink(replace(whole, epochs=2.0)).resolutions == (18, 18)
    assert here("laptop").shrink(replace(whole, resolutions=())).resolutions == ()


def test_what_is_small_enough_is_left_alone():
    scale = replace(here("smoke"), narrower=1)
    small = replace(recipe.smoke(), n_shards=1, ghost_batch_size=0, global_batch_size=40, epochs=1.0)
    assert not changed_fields(scale.shrink(small), small)


def test_gpus_train_recipes_as_they_are(monkeypatch):
    for scale in all_scales(monkeypatch)[3:]:
        whole = recipe.page_2019()
        assert not changed_fields(scale.shrink(whole), whole)


# --- the rungs of the ladder ---

RUNGS = list(recipe.classroom_arms())[1:]


@pytest.mark.parametrize("name", RUNGS)
def test_a_rung_changes_the_same_fields_at_every_scale(monkeypatch, name):
    wanted = changed_fields(*recipe.rung_pair(name))
    for scale in all_scales(monkeypatch):
        below, with_it = scale.rung(name)
        changed = changed_fields(below, with_it)
        assert set(changed) == set(wanted) and with_it.name == name
        assert {field: changed[field] for field in changed if field != "peak_lr"} == {
            field: wanted[field] for field in changed if field != "peak_lr"
        }
        assert below.epochs == with_it.epochs == (2.0 if name == "small_images" else scale.rung_epochs)


def test_a_rung_is_the_ladders_at_classroom_and_tiny_at_smoke():
    below, with_it = here("classroom").rung("muon")
    assert (below, with_it) == recipe.rung_pair("muon", 1.0)
    small, _ = here("smoke").rung("muon")
    assert max(small.widths) <= 8 and here("smoke").n_train // small.global_batch_size >= 8
    assert small.peak_lr / small.global_batch_size == pytest.approx(below.peak_lr / below.global_batch_size)
