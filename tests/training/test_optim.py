"""Each optimiser is compared with the formula it stands for."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from cifar_fast import recipes
from cifar_fast.hardware.cuda_graph import CapturedFunction
from cifar_fast.recipe import Recipe
from cifar_fast.training.averaging import Lookahead
from cifar_fast.training.model import Network, build_model, whiten_first_layer
from cifar_fast.training.optim import (
    Muon,
    PiecewiseLinear,
    build_optimizers,
    fuse,
    keep_learning_rates_on,
    lr_schedule,
    newton_schulz,
    orthogonalise,
    orthogonalise_all,
    orthogonalise_by_shape,
    orthogonalise_padded,
    set_learning_rates,
)

TINY = Recipe(widths=(4, 4, 8, 8), global_batch_size=16)
TINY_MUON = replace(recipes.smoke(), widths=(4, 8, 8), n_shards=1, global_batch_size=16)


def build(recipe: Recipe) -> Network:
    model = build_model(recipe, 10, torch.full((3,), 128.0), torch.full((3,), 64.0))
    whiten_first_layer(model, recipe, torch.randint(0, 256, (8, 3, 32, 32), dtype=torch.uint8))
    return model


def random_matrices(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# --- Schedules ---


@given(st.lists(st.tuples(st.integers(0, 9), st.floats(-10, 10)), min_size=1, max_size=6), st.floats(0, 1))
def test_a_schedule_is_straight_between_its_knots_and_constant_outside(
    points: list[tuple[int, float]], share: float
) -> None:
    knots, values = zip(*sorted(points, key=lambda point: point[0]), strict=True)  # knots may coincide
    schedule = PiecewiseLinear(knots, values)
    assert schedule(knots[0] - 1.0) == values[0]
    assert schedule(knots[-1]) == schedule(knots[-1] + 1.0) == schedule(math.inf) == values[-1]
    for (t0, v0), (t1, v1) in pairwise(zip(knots, values, strict=True)):
        if t0 < t1:
            assert schedule(t0) == v0  # of coinciding knots the last
            assert schedule(t0 + share * (t1 - t0)) == pytest.approx(v0 + share * (v1 - v0), abs=1e-9) or share == 1


def test_where_two_knots_coincide_the_later_counts_from_there_on() -> None:
    schedule = PiecewiseLinear((0.0, 1.0, 1.0, 2.0), (0.0, 1.0, 5.0, 6.0))
    assert [schedule(t) for t in (0.5, 1.0, 1.5)] == [0.5, 5.0, 5.5]


def test_a_schedule_with_a_single_knot_is_constant() -> None:
    schedule = PiecewiseLinear((3.0,), (0.25,))
    assert [schedule(t) for t in (0.0, 3.0, 5.0, math.inf)] == [0.25] * 4


def test_the_8_gpu_schedule_passes_through_the_published_knots() -> None:
    recipe = recipes.apple_8gpu()
    schedule = lr_schedule(recipe)
    published = {0.0: 0.0, 1.8: 0.75, 3.6: 1.5, 16.0: 0.15, 17.0: 0.15, 18.0: 0.15}
    assert {t: schedule(t) * recipe.peak_lr for t in published} == pytest.approx(published)


def test_the_baseline_schedule_goes_up_and_down_to_zero() -> None:
    schedule = lr_schedule(recipes.baseline_2018())
    assert [schedule(t) for t in (0.0, 5.0, 14.5, 24.0)] == pytest.approx([0.0, 1.0, 0.5, 0.0])


def test_without_warm_up_the_first_step_has_the_peak() -> None:
    schedule = lr_schedule(recipes.airbench_2024())
    assert [schedule(t) for t in (0.0, 4.0, 8.0)] == pytest.approx([1.0, 0.5, 0.0])


def test_a_schedule_with_a_bend_passes_through_it() -> None:
    schedule = lr_schedule(recipes.laptop())
    assert [schedule(t) for t in (0.0, 2.75, 5.5, 7.75, 10.0)] == pytest.approx([1.0, 2 / 3, 1 / 3, 1 / 6, 0.0])
    straight = lr_schedule(replace(recipes.laptop(), epochs=8.25, bend_fraction=0.0))
    assert [schedule(t) for t in range(6)] == pytest.approx([straight(t) for t in range(6)])


@given(st.sampled_from(recipes.names()), st.floats(0, 1))
def test_no_schedule_leaves_zero_to_peak(name: str, share: float) -> None:
    recipe = recipes.named(name)
    assert 0 <= lr_schedule(recipe)(share * recipe.epochs) <= 1


# --- Groups and learning rates ---


def names_of(model: nn.Module, params: list[Tensor]) -> set[str]:
    return {name for name, p in model.named_parameters() if any(p is member for member in params)}


def test_weights_and_biases_are_groups_with_rates_and_decays_of_their_own() -> None:
    recipe = replace(
        TINY, freeze_bn_scale=True, peak_lr=1.5, bias_lr_scale=64.0, weight_decay=6e-4, bias_weight_decay_scale=1 / 64
    )
    model = build(recipe)
    (optimizer,) = build_optimizers(model, recipe)
    weights, biases = optimizer.param_groups
    learned = {name for name, p in model.named_parameters() if p.requires_grad}
    assert names_of(model, biases["params"]) == {name for name in learned if name.endswith("bias")}
    assert names_of(model, weights["params"]) == {name for name in learned if name.endswith("weight")}
    assert (weights["lr"], biases["lr"]) == (1.5, 96.0)
    assert (weights["weight_decay"], biases["weight_decay"]) == pytest.approx((6e-4, 6e-4 / 64))
    assert all(group["nesterov"] and group["momentum"] == 0.9 for group in optimizer.param_groups)


def test_learned_scales_are_weights_not_biases() -> None:
    recipe = replace(TINY, bias_lr_scale=64.0)
    model = build(recipe)
    (optimizer,) = build_optimizers(model, recipe)
    assert all(name.endswith("bias") for name in names_of(model, optimizer.param_groups[1]["params"]))
    assert "layers.block1.norm.weight" in names_of(model, optimizer.param_groups[0]["params"])


@pytest.mark.parametrize("name", ["baseline_2018", "page_2019", "smoke"])
def test_every_learned_parameter_is_in_one_group_and_no_frozen_one_in_any(name: str) -> None:
    recipe = replace(recipes.named(name), widths=(4, 4, 8) if name == "smoke" else (4, 4, 8, 8))
    model = build(recipe)
    members = [
        p for optimizer in build_optimizers(model, recipe) for group in optimizer.param_groups for p in group["params"]
    ]
    assert len(members) == len({id(p) for p in members})
    assert {id(p) for p in members} == {id(p) for p in model.parameters() if p.requires_grad}


def test_muon_takes_the_filters_and_sgd_the_rest() -> None:
    model = build(TINY_MUON)
    sgd, muon = build_optimizers(model, TINY_MUON)
    (filters,) = muon.param_groups
    assert isinstance(muon, Muon) and filters["momentum"] == TINY_MUON.muon_momentum
    assert names_of(model, filters["params"]) == {
        name for name, p in model.named_parameters() if name.endswith("conv.weight")
    }
    weights, _, whitening = sgd.param_groups
    assert names_of(model, weights["params"]) == {"layers.linear.weight"}
    assert names_of(model, whitening["params"]) == {"layers.whiten.bias"}


def test_beside_muon_learned_scales_go_with_the_biases_and_not_at_the_rate_of_the_head() -> None:
    model = build(replace(TINY_MUON, freeze_bn_scale=False))
    sgd, _ = build_optimizers(model, replace(TINY_MUON, freeze_bn_scale=False))
    head, norms, _ = sgd.param_groups
    assert names_of(model, head["params"]) == {"layers.linear.weight"}
    learned = {name for name, _ in model.named_parameters() if "norm." in name}
    assert names_of(model, norms["params"]) == learned and any(name.endswith("norm.weight") for name in learned)


def test_every_group_follows_the_schedule_and_the_whitening_bias_its_own() -> None:
    model = build(TINY_MUON)
    optimizers, schedule = build_optimizers(model, TINY_MUON), PiecewiseLinear((0.0, 10.0), (1.0, 0.0))
    recipe = TINY_MUON
    bias_lr = recipe.peak_lr * recipe.bias_lr_scale
    for epoch, whitening_share in ((0.0, 1.0), (1.5, 0.5), (3.0, 0.0), (7.0, 0.0)):
        set_learning_rates(optimizers, schedule, epoch)
        rates = [group["lr"] for optimizer in optimizers for group in optimizer.param_groups]
        share = 1 - epoch / 10
        assert rates == pytest.approx(
            [recipe.peak_lr * share, bias_lr * share, bias_lr * whitening_share, recipe.muon_lr * share]
        )


@pytest.mark.parametrize("recipe", [TINY, TINY_MUON], ids=["sgd", "muon"])
def test_learning_rates_in_memory_are_set_where_they_are_and_step_as_plain_ones_do(recipe: Recipe) -> None:
    plain, kept = build(recipe), build(recipe)
    kept.load_state_dict(plain.state_dict())
    plain_optimizers, kept_optimizers = build_optimizers(plain, recipe), build_optimizers(kept, recipe)
    keep_learning_rates_on(torch.device("cpu"), kept_optimizers)
    rates = [group["lr"] for optimizer in kept_optimizers for group in optimizer.param_groups]
    schedule = lr_schedule(recipe)
    for epoch in (0.1, 0.9, 1.7):
        for model, optimizers in ((plain, plain_optimizers), (kept, kept_optimizers)):
            for number, p in enumerate(model.parameters()):
                p.grad = random_matrices(*p.shape, seed=number)
            set_learning_rates(optimizers, schedule, epoch)
            for optimizer in optimizers:
                optimizer.step()
        now = [group["lr"] for optimizer in kept_optimizers for group in optimizer.param_groups]
        assert all(rate is before for rate, before in zip(now, rates, strict=True))
        assert [rate.item() for rate in now] == pytest.approx(
            [group["lr"] for optimizer in plain_optimizers for group in optimizer.param_groups]
        )
    for name, value in kept.state_dict().items():
        torch.testing.assert_close(value, plain.state_dict()[name], rtol=1e-5, atol=1e-5, msg=name)


# --- SGD ---


def test_the_mean_loss_with_our_rates_is_the_published_summed_loss() -> None:
    # There: losses summed over the batch of N images, learning rate lr / N inside the velocity, weight decay N * wd.
    recipe = replace(
        TINY,
        peak_lr=0.3,
        lr_in_velocity=True,
        weight_decay=5e-3,
        bias_lr_scale=4.0,
        bias_weight_decay_scale=0.25,
        freeze_bn_scale=True,
    )
    n = recipe.global_batch_size
    ours = build(recipe)
    theirs = copy.deepcopy(ours)
    (optimizer,) = build_optimizers(ours, recipe)
    learned = [(name, p) for name, p in theirs.named_parameters() if p.requires_grad]
    velocities = {name: torch.zeros_like(p) for name, p in learned}
    generator = torch.Generator().manual_seed(0)
    start = copy.deepcopy(ours.state_dict())
    for share in (0.3, 0.6, 1.0):  # the warm-up, in which the two forms of SGD differ
        set_learning_rates([optimizer], PiecewiseLinear((0.0,), (share,)), 0.0)
        images, labels = torch.randn(n, 3, 32, 32, generator=generator), torch.randint(0, 10, (n,), generator=generator)
        F.cross_entropy(ours(images), labels).backward()
        optimizer.step()
        optimizer.zero_grad()

        F.cross_entropy(theirs(images), labels, reduction="sum").backward()
        for name, p in learned:
            bias = name.endswith("bias")
            lr, decay = share * recipe.peak_lr / n * (4 if bias else 1), recipe.weight_decay * n / (4 if bias else 1)
            assert p.grad is not None
            update = -lr * (p.grad + decay * p.detach())
            velocities[name] = 0.9 * velocities[name] + update
            p.data += update + 0.9 * velocities[name]
            p.grad = None
    for (name, p), q in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-3, atol=1e-4, msg=name)
    assert not torch.allclose(start["layers.linear.weight"], ours.state_dict()["layers.linear.weight"], atol=1e-2)


def test_label_smoothing_is_mixing_the_target_with_the_uniform_one() -> None:
    logits, labels = random_matrices(6, 10), torch.arange(6)
    target = 0.8 * F.one_hot(labels, 10) + 0.2 / 10
    by_hand = -(target * logits.log_softmax(1)).sum(1).mean()
    torch.testing.assert_close(F.cross_entropy(logits, labels, label_smoothing=0.2), by_hand)


# --- Muon ---


@pytest.mark.parametrize("shape", [(4, 16, 144), (2, 64, 216), (3, 144, 16), (3, 16, 32)])
def test_orthogonalising_brings_the_singular_values_near_one(shape: tuple[int, ...]) -> None:
    values = torch.linalg.svdvals(orthogonalise(random_matrices(*shape)))
    assert 0.5 < values.min() and values.max() < 1.5


def test_orthogonalising_keeps_the_singular_vectors() -> None:
    u, values, vh = torch.linalg.svd(random_matrices(8, 20), full_matrices=False)
    inside = u.T @ orthogonalise((u * values @ vh)[None])[0] @ vh.T  # diagonal if the vectors are the same
    torch.testing.assert_close(inside, torch.diag(inside.diag()), atol=1e-4, rtol=0)
    assert (inside.diag() > 0).all()


@given(st.integers(1, 4), st.integers(2, 12), st.integers(2, 12))
def test_orthogonalising_a_batch_is_orthogonalising_one_by_one_and_the_transpose(
    n: int, rows: int, columns: int
) -> None:
    matrices = random_matrices(n, rows, columns)
    together = orthogonalise(matrices)
    assert together.shape == matrices.shape
    for matrix, found in zip(matrices, together, strict=True):
        torch.testing.assert_close(orthogonalise(matrix[None])[0], found, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(orthogonalise(matrices.mT), together.mT, rtol=1e-4, atol=1e-5)


def test_orthogonalising_in_half_precision_brings_the_singular_values_near_one_too() -> None:
    matrices = random_matrices(3, 64, 216)
    found = orthogonalise(matrices.bfloat16())  # as a step in half precision does it
    assert found.dtype == torch.bfloat16
    values = torch.linalg.svdvals(found.float())
    assert 0.5 < values.min() and values.max() < 1.5
    exact = orthogonalise(matrices)
    torch.testing.assert_close(found.float(), exact, rtol=0, atol=0.05 * exact.abs().max().item())
    assert not torch.equal(found.float(), exact)


def test_orthogonalising_does_not_depend_on_the_scale() -> None:
    matrices = random_matrices(2, 6, 20)
    torch.testing.assert_close(orthogonalise(1e-3 * matrices), orthogonalise(matrices), rtol=1e-2, atol=1e-3)
    assert not orthogonalise(torch.zeros(1, 4, 9)).any()


@pytest.mark.parametrize("steps", [0, 1, 3, 6])
def test_orthogonalising_iterates_a_polynomial_of_the_singular_values(steps: int) -> None:
    matrix = random_matrices(6, 20).double()
    u, values, vh = torch.linalg.svd(matrix / matrix.norm(), full_matrices=False)
    expected = u @ torch.diag(newton_schulz(values, steps)) @ vh
    torch.testing.assert_close(orthogonalise(matrix[None], steps)[0], expected, rtol=0, atol=1e-5)


def test_the_textbooks_cubic_leads_to_one() -> None:
    values = torch.tensor([0.01, 0.3, 1.0], dtype=torch.float64)
    torch.testing.assert_close(newton_schulz(values, 20, (1.5, -0.5, 0.0)), torch.ones_like(values))


SHAPES = st.lists(st.tuples(st.integers(1, 12), st.integers(1, 12)), min_size=1, max_size=5)


def test_a_cpu_keeps_matrices_in_autocasts_format_and_the_filters_in_theirs() -> None:
    generator = torch.Generator().manual_seed(0)
    matrices = [torch.randn(shape, generator=generator) for shape in ((16, 36), (16, 36), (8, 72))]
    exact = orthogonalise_all(matrices)
    filters = nn.Parameter(torch.randn(16, 4, 3, 3, generator=generator))
    filters.grad = torch.randn(16, 4, 3, 3, generator=generator)
    with torch.autocast("cpu", torch.bfloat16):
        short = orthogonalise_all(matrices)
        Muon([filters], lr=0.1, momentum=0.5).step()
    assert all(a.dtype == torch.float32 and b.dtype == torch.bfloat16 for a, b in zip(exact, short, strict=True))
    for a, b in zip(exact, short, strict=True):
        torch.testing.assert_close(b.float(), a, rtol=0, atol=0.05)
    assert filters.dtype == torch.float32 and filters.isfinite().all()


@pytest.mark.parametrize("all_of_them", [orthogonalise_by_shape, orthogonalise_padded])
@given(SHAPES)
def test_orthogonalising_matrices_of_any_shapes_is_orthogonalising_each(
    all_of_them: Callable[[list[Tensor]], list[Tensor]], shapes: list[tuple[int, int]]
) -> None:
    matrices = [random_matrices(*shape, seed=seed).double() for seed, shape in enumerate(shapes)]
    for matrix, found in zip(matrices, all_of_them(matrices), strict=True):
        torch.testing.assert_close(found, orthogonalise(matrix[None])[0])


def test_gradients_too_small_for_float16_are_orthogonalised_in_it() -> None:
    matrices = [1e-6 * random_matrices(*shape, seed=seed) for seed, shape in enumerate([(8, 20), (12, 6)])]
    expected = orthogonalise_by_shape(matrices)
    with torch.autocast("cpu", torch.float16):
        found = orthogonalise_padded([*matrices, torch.zeros(4, 5)])
    assert all(each.dtype == torch.float16 for each in found) and not found.pop().any()
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a.float(), b, rtol=0, atol=0.05)


def filter_banks() -> list[nn.Parameter]:
    return [
        nn.Parameter(random_matrices(*shape, seed=i))
        for i, shape in enumerate([(4, 3, 3, 3), (8, 4, 3, 3), (4, 3, 3, 3)])
    ]


def test_muon_is_its_formula_filter_bank_by_filter_bank() -> None:
    params, lr, momentum = filter_banks(), 0.1, 0.6
    expected = [p.detach().clone() for p in params]
    buffers = [torch.zeros_like(p) for p in expected]
    optimizer = Muon(params, lr=lr, momentum=momentum)
    for step in range(3):
        for i, p in enumerate(params):
            p.grad = random_matrices(*p.shape, seed=100 + 10 * step + i)
            buffers[i] = momentum * buffers[i] + p.grad
            nesterov = p.grad + momentum * buffers[i]
            update = orthogonalise(nesterov.reshape(1, len(p), -1))[0].reshape(p.shape)
            expected[i] = expected[i] / expected[i].norm() * len(p) ** 0.5 - lr * update
        optimizer.step()
        for p, q in zip(params, expected, strict=True):
            torch.testing.assert_close(p.data, q, rtol=1e-4, atol=1e-5)


def test_muon_steps_from_filters_of_norm_sqrt_k() -> None:
    params = filter_banks()
    optimizer = Muon(params, lr=0.0, momentum=0.6)
    for p in params:
        p.grad = torch.randn_like(p)
    optimizer.step()
    assert [p.norm().item() for p in params] == pytest.approx([len(p) ** 0.5 for p in params])


@pytest.mark.parametrize("rate_in_memory", [False, True])
@pytest.mark.parametrize("value", [0.0, 1e-30], ids=["zeros", "a norm that underflows"])
def test_muon_moves_a_bank_without_a_norm_by_the_update_alone(value: float, rate_in_memory: bool) -> None:
    params = filter_banks()
    others = [nn.Parameter(p.detach().clone()) for p in params]
    with torch.no_grad():
        params[1].fill_(value)
    optimizers = [Muon(params, lr=0.1, momentum=0.6), Muon([others[0], others[2]], lr=0.1, momentum=0.6)]
    if rate_in_memory:
        keep_learning_rates_on(torch.device("cpu"), list(optimizers))
    for p in params:
        p.grad = torch.zeros_like(p)
    others[0].grad, others[2].grad = torch.zeros_like(others[0]), torch.zeros_like(others[2])
    for optimizer in optimizers:
        optimizer.step()
    assert torch.equal(params[1], torch.full_like(params[1], value))
    gradient = random_matrices(*params[1].shape, seed=7)
    params[1].grad = gradient.clone()
    for optimizer in optimizers:
        optimizer.step()
    update = orthogonalise(1.6 * gradient.flatten(1)[None])[0].view_as(gradient)  # Nesterov: g + 0.6 g
    torch.testing.assert_close(params[1].detach(), -0.1 * update)
    for p, q in ((params[0], others[0]), (params[2], others[2])):
        assert torch.equal(p, q), "the other banks take the step that they take without it"


@pytest.mark.gpu
def test_a_captured_muon_step_moves_a_bank_of_zeros_by_the_update_alone() -> None:
    bank = nn.Parameter(torch.zeros(4, 3, 3, 3, device="cuda"))
    optimizer = Muon([bank], lr=0.1, momentum=0.0)
    keep_learning_rates_on(torch.device("cuda"), [optimizer])
    gradient = random_matrices(4, 3, 3, 3).cuda()
    bank.grad = torch.zeros_like(bank)

    def step(new: Tensor) -> Tensor:
        bank.grad.copy_(new)
        optimizer.step()
        return bank.detach()

    captured = CapturedFunction(step, torch.zeros_like(gradient))
    assert not captured(torch.zeros_like(gradient)).any()
    expected = -0.1 * orthogonalise(gradient.flatten(1)[None])[0].view_as(bank)
    torch.testing.assert_close(captured(gradient), expected, rtol=1e-3, atol=1e-3)


# --- Lookahead ---


def test_lookahead_moves_the_trained_weights_too() -> None:
    model = nn.Linear(3, 2)
    start = [p.detach().clone() for p in model.parameters()]
    lookahead = Lookahead(model, alpha=0.25)
    with torch.no_grad():
        for p in model.parameters():
            p += 4.0
    lookahead.move()
    for before, p in zip(start, model.parameters(), strict=True):
        torch.testing.assert_close(p.detach(), before + 1.0)
    with torch.no_grad():
        for p in model.parameters():
            p += 4.0
    lookahead.move()  # the slow weights went on from where they had gone
    for before, p in zip(start, model.parameters(), strict=True):
        torch.testing.assert_close(p.detach(), before + 2.0)


def test_lookahead_with_alpha_one_changes_nothing() -> None:
    model = nn.Linear(3, 2)
    lookahead = Lookahead(model, alpha=1.0)
    with torch.no_grad():
        model.weight.add_(1.0)
    after = model.weight.detach().clone()
    lookahead.move()
    torch.testing.assert_close(model.weight.detach(), after)


@pytest.mark.gpu
def test_a_fused_step_with_learning_rates_on_the_gpu_is_the_plain_one() -> None:
    on_cpu, on_gpu = build(TINY_MUON), build(TINY_MUON).cuda()
    on_gpu.load_state_dict(on_cpu.state_dict())
    pairs = [(model, build_optimizers(model, TINY_MUON)) for model in (on_cpu, on_gpu)]
    fuse(pairs[1][1])
    keep_learning_rates_on(torch.device("cuda"), pairs[1][1])
    assert all(group["fused"] for group in pairs[1][1][0].param_groups)
    for model, optimizers in pairs:
        for number, p in enumerate(model.parameters()):
            p.grad = random_matrices(*p.shape, seed=number).to(p.device)
        set_learning_rates(optimizers, lr_schedule(TINY_MUON), 0.5)
        for optimizer in optimizers:
            optimizer.step()
    for name, value in on_gpu.state_dict().items():
        torch.testing.assert_close(value.cpu(), on_cpu.state_dict()[name], rtol=1e-3, atol=1e-3, msg=name)
