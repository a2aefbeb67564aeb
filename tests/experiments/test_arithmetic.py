"""The counted arithmetic, compared with sums over layers written out here."""

from dataclasses import replace

from cifar_fast import recipes
from cifar_fast.experiments.arithmetic import train_flop
from cifar_fast.recipe import changed_fields


def test_airbench_spends_what_its_layers_add_up_to():
    recipe = recipes.airbench_2024()
    # (side of the output, channels in, channels out, side of the filter); max-pool halves after each block's first.
    layers = [(31, 24, 64, 3), (15, 64, 64, 3), (15, 64, 256, 3), (7, 256, 256, 3), (7, 256, 256, 3), (3, 256, 256, 3)]
    forward = [2 * side**2 * size**2 * n_in * n_out for side, n_in, n_out, size in layers] + [2 * 256 * 10]
    whitening = 2 * 31**2 * 2**2 * 3 * 24
    # Forward, then gradients of filters and inputs; the first block's input has none once the whitening is frozen.
    learned, frozen = whitening + 3 * sum(forward), whitening + 3 * sum(forward) - forward[0]
    assert train_flop(recipe) == 50_000 * (3 * learned + 5 * frozen)


def test_small_images_and_fewer_epochs_save_arithmetic():
    recipe = recipes.classroom()
    halves = [replace(recipe, epochs=2.0, resolutions=sizes) for sizes in ((16,), (32,), (16, 32))]
    small, large, mixed = map(train_flop, halves)
    assert small < mixed < large
    one, more = (train_flop(replace(recipe, epochs=n, resolutions=(), whitening_bias_epochs=0.0)) for n in (1.0, 1.5))
    assert more == 1.5 * one


def test_the_classroom_ladder_ends_at_the_classroom_recipe():
    *_, top = recipes.classroom_ladder(5.0)
    assert replace(top.recipe, name="classroom") == recipes.classroom()
    rungs = recipes.classroom_ladder()
    assert all(above.changes(below) for below, above in zip(rungs, rungs[1:], strict=False))
    assert len({rung.recipe.name for rung in rungs}) == len(rungs) == 9


def test_leaving_a_trick_out_undoes_that_trick_alone():
    rungs = [rung.recipe for rung in recipes.classroom_ladder()]
    without = recipes.leave_one_out()
    assert list(without) == [rung.name for rung in rungs[1:]]
    for below, rung in zip(rungs, rungs[1:], strict=False):
        for field, (before, _) in changed_fields(below, rung).items():
            assert getattr(without[rung.name], field) == before
    assert changed_fields(rungs[-1], without["muon"]).keys() == {"optimizer"}
    # `warmup` has undone two of the fields that `schedule` sets, so leaving `schedule` out leaves these as they are.
    assert changed_fields(rungs[-1], without["schedule"]).keys() == {"peak_lr", "final_lr_fraction"}
    assert replace(without["tta"], name="tta_flip") == rungs[-2]
    assert replace(without["tta_flip"], name="small_images") == rungs[-3]


def test_the_rungs_above_the_last_trained_one_only_evaluate_its_network():
    for epochs, trained in ((1.0, "augmentation"), (2.0, "small_images")):
        ladder = [rung.recipe for rung in recipes.classroom_ladder(epochs)]
        last, above = recipes.last_trained(epochs)
        assert (last.name, last.tta, [(rung.name, rung.tta) for rung in above]) == (
            trained,
            "none",
            [("tta_flip", "flip"), ("tta", "flip_shift")],
        )
        assert [last, *above] == ladder[-3:]
