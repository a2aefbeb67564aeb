"""The networks have the published shapes, and what should not change them does not."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cifar_fast import recipes
from cifar_fast.kernels import amx
from cifar_fast.recipe import Recipe
from cifar_fast.training.layers import Conv3x3, GhostBatchNorm
from cifar_fast.training.model import Network, Residual, build_model, whiten_first_layer

RESNET9 = Recipe(widths=(8, 8, 16, 16), global_batch_size=8)
CONVNET6 = replace(recipes.smoke(), widths=(8, 16, 16), n_shards=1, global_batch_size=8)


def random_batch(n: int = 8, side: int = 32) -> Tensor:
    return torch.randn(n, 3, side, side, generator=torch.Generator().manual_seed(0))


def random_images(n: int = 64) -> Tensor:
    return torch.randint(0, 256, (n, 3, 32, 32), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


def build(recipe: Recipe, n_classes: int = 10, **options: int | bool | str) -> Network:
    return build_model(recipe, n_classes, torch.zeros(3), torch.ones(3), **options)


def output_shapes(model: Network, images: Tensor) -> dict[str, tuple[int, ...]]:
    """The shape of one image's output at each layer in the row."""
    shapes: dict[str, tuple[int, ...]] = {}
    for name, layer in model.layers.named_children():
        layer.register_forward_hook(lambda _, __, output, name=name: shapes.update({name: tuple(output.shape[1:])}))
    with torch.no_grad():
        model.eval()(images)
    return shapes


# --- As published ---


def test_the_8_gpu_network_has_the_published_layers() -> None:
    model = build(recipes.apple_8gpu())
    assert output_shapes(model, random_batch(1)) == {
        "whiten": (27, 32, 32),
        "mix": (64, 32, 32),
        "block1": (128, 16, 16),
        "residual1": (128, 16, 16),
        "block2": (256, 8, 8),
        "block3": (512, 4, 4),
        "residual3": (512, 4, 4),
        "pool": (512, 1, 1),
        "flatten": (512,),
        "linear": (10,),
        "scale": (10,),
    }
    residuals = [(layer.block1, layer.block2) for layer in model.modules() if isinstance(layer, Residual)]
    assert len(residuals) == 2
    for name in ("block1", "block2", "block3"):
        assert list(dict(model.layers.get_submodule(name).named_children())) == ["conv", "norm", "activation"]
        assert model.layers.get_submodule(f"{name}.conv").pool  # before norm and activation
    for conv in (layer for layer in model.modules() if isinstance(layer, nn.Conv2d)):
        assert conv.bias is None and conv.stride == (1, 1)
    assert all(layer.group_size == 16 for layer in model.modules() if isinstance(layer, GhostBatchNorm))
    assert all(layer.alpha == 0.3 for layer in model.modules() if isinstance(layer, nn.CELU))


def test_the_8_gpu_network_has_as_many_parameters_as_its_layers_say() -> None:
    recipe = recipes.apple_8gpu()
    model = build(recipe)
    whiten_first_layer(model, recipe, random_images(8))
    convolutions = 27 * 64 + 9 * (64 * 128 + 2 * 128 * 128 + 128 * 256 + 256 * 512 + 2 * 512 * 512)
    biases = 64 + 3 * 128 + 256 + 3 * 512
    learned = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert learned == convolutions + biases + 512 * 10 == 6_570_880
    frozen = sum(p.numel() for p in model.parameters() if not p.requires_grad)
    assert frozen == 27 * 27 + biases  # whitening, and a scale for each bias


def test_the_baseline_starts_with_a_learned_convolution_and_learns_its_scales() -> None:
    model = build(recipes.baseline_2018())
    assert output_shapes(model, random_batch(1))["prepare"] == (64, 32, 32)
    assert all(p.requires_grad for p in model.parameters())


def test_convnet6_has_three_blocks_of_two_convolutions() -> None:
    model = build(recipes.speedrun())
    assert output_shapes(model, random_batch(1)) == {
        "whiten": (24, 31, 31),
        "activation": (24, 31, 31),
        "block1a": (64, 15, 15),
        "block1b": (64, 15, 15),
        "block2a": (256, 7, 7),
        "block2b": (256, 7, 7),
        "block3a": (256, 3, 3),
        "block3b": (256, 3, 3),
        "pool": (256, 1, 1),
        "flatten": (256,),
        "linear": (10,),
        "scale": (10,),
    }


def test_convnet6_without_whitening_learns_a_first_convolution_of_the_same_shape() -> None:
    model = build(replace(recipes.speedrun(), whitening_size=0))
    assert output_shapes(model, random_batch(1))["first"] == (24, 31, 31)
    assert all(p.requires_grad for p in model.layers.get_submodule("first").parameters())


# --- Equivalences ---


@pytest.mark.parametrize("activation", ["relu", "celu"])
@pytest.mark.parametrize("training", [True, False])
def test_pooling_before_or_after_a_monotone_activation_is_the_same(activation: str, training: bool) -> None:
    recipe = replace(RESNET9, activation=activation, celu_alpha=0.3)
    after, before = (
        build(replace(recipe, pool_position=f"{place}_activation")).train(training) for place in ("after", "before")
    )
    assert torch.equal(after(random_batch()), before(random_batch()))


@pytest.mark.parametrize(("activation", "place"), [("gelu", "before_activation"), ("relu", "before_norm")])
def test_pooling_elsewhere_is_another_function(activation: str, place: str) -> None:
    recipe = replace(RESNET9, activation=activation)
    after, other = build(recipe), build(replace(recipe, pool_position=place))
    assert not torch.allclose(after(random_batch()), other(random_batch()), atol=1e-4)


def test_a_trick_at_its_off_value_is_no_trick() -> None:
    plain = build(replace(RESNET9, ghost_batch_size=0))
    whole = build(replace(RESNET9, ghost_batch_size=8))
    assert torch.equal(plain(random_batch()), whole(random_batch()))


@pytest.mark.parametrize("recipe", [RESNET9, CONVNET6])
def test_winograd_is_the_same_network(recipe: Recipe) -> None:
    direct, fast = build(recipe).eval(), build(recipe, convolution="winograd").eval()
    x = random_batch().to(memory_format=torch.channels_last)
    assert sum(layer.convolution == "winograd" for layer in fast.modules() if isinstance(layer, Conv3x3)) >= 6
    torch.testing.assert_close(fast(x), direct(x), rtol=1e-3, atol=1e-4)


@pytest.mark.usefixtures("amx_everywhere")
@pytest.mark.parametrize("place", ["before_norm", "before_activation"])
@pytest.mark.parametrize("recipe", [RESNET9, CONVNET6])
def test_matrix_tiles_are_the_same_network(recipe: Recipe, place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = replace(recipe, pool_position=place)
    direct, fast = build(recipe), build(recipe, convolution="amx")
    x, used = random_batch().to(memory_format=torch.channels_last), []
    apply = amx.AmxConv2d.apply
    monkeypatch.setattr(amx.AmxConv2d, "apply", lambda x, w, pool: used.append(pool) or apply(x, w, pool))
    expected, *found = (
        logits_and_gradients(model, x, half) for model, half in ((direct, False), (direct, True), (fast, True))
    )
    assert sum(used) == 3 * (place == "before_norm") and len(used) >= 6
    for exact, torchs, ours in zip(expected, *found, strict=True):
        assert (ours - exact).norm() < 1.1 * (torchs - exact).norm()  # as near as torch's own bfloat16


def logits_and_gradients(model: Network, x: Tensor, half: bool) -> tuple[Tensor, Tensor]:
    """Float32; the gradients in one row. `half`: under bfloat16 autocast."""
    with torch.autocast("cpu", torch.bfloat16, enabled=half):
        logits = model(x).float()
    gradients = torch.autograd.grad(logits.square().sum(), [p for p in model.parameters() if p.requires_grad])
    return logits.detach(), torch.cat([gradient.flatten() for gradient in gradients])


@pytest.mark.parametrize("recipe", [RESNET9, CONVNET6])
def test_pooling_within_the_convolution_is_the_same_network(recipe: Recipe) -> None:
    recipe = replace(recipe, widths=tuple(2 * width for width in recipe.widths), pool_position="before_norm")
    direct, fast = build(recipe), build(recipe, convolution="winograd")
    assert list(direct.state_dict()) == list(fast.state_dict())
    assert sum(layer.pool for layer in fast.modules() if isinstance(layer, Conv3x3)) == 3
    apart = copy.deepcopy(fast)
    for name, layer in list(apart.named_modules()):
        if isinstance(layer, Conv3x3) and layer.pool:
            layer.pool = False
            apart.set_submodule(name, nn.Sequential(layer, nn.MaxPool2d(2)))
    x = random_batch().to(memory_format=torch.channels_last)
    torch.testing.assert_close(fast(x), direct(x), rtol=1e-3, atol=1e-3)
    assert torch.equal(fast(x), apart(x))
    gradients = [
        torch.autograd.grad(m(x).square().sum(), [p for p in m.parameters() if p.requires_grad]) for m in (fast, apart)
    ]
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_channels_last_is_the_same_network() -> None:
    model = build(RESNET9).eval()
    other = copy.deepcopy(model).to(memory_format=torch.channels_last)
    x = random_batch()
    torch.testing.assert_close(other(x.to(memory_format=torch.channels_last)), model(x), rtol=1e-4, atol=1e-5)


def test_logits_are_scaled_by_the_constant() -> None:
    one, eighth = build(replace(RESNET9, logit_scale=1.0)), build(replace(RESNET9, logit_scale=0.125))
    torch.testing.assert_close(one(random_batch()) / 8, eighth(random_batch()))


def test_a_residual_adds_to_its_input() -> None:
    residual = Residual(RESNET9, 8).eval()
    x = torch.randn(2, 8, 4, 4)
    torch.testing.assert_close(residual(x), x + residual.block2(residual.block1(x)))


# --- Weights ---


def test_weights_come_from_the_seed_alone() -> None:
    a = build(CONVNET6, seed=1).state_dict()
    torch.manual_seed(99)
    b, other = build(CONVNET6, seed=1).state_dict(), build(CONVNET6, seed=2).state_dict()
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert not torch.equal(a["layers.linear.weight"], other["layers.linear.weight"])


def test_building_leaves_torchs_own_generator_alone() -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    build(RESNET9, seed=1)
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize("recipe", [RESNET9, CONVNET6])
@pytest.mark.parametrize("n_classes", [2, 17])
def test_there_is_a_logit_for_each_class(recipe: Recipe, n_classes: int) -> None:
    assert build(recipe, n_classes)(random_batch()).shape == (8, n_classes)


@pytest.mark.parametrize("recipe", [RESNET9, CONVNET6])
@pytest.mark.parametrize("side", [16, 24, 40])
def test_other_resolutions_pass(recipe: Recipe, side: int) -> None:
    assert build(recipe)(random_batch(side=side)).isfinite().all()


# --- Whitening ---


@pytest.mark.parametrize(
    "recipe", [replace(RESNET9, whitening_size=3, whitening_eps=1e-9), replace(CONVNET6, whitening_eps=1e-9)]
)
def test_the_first_layer_whitens_the_patches_it_was_made_from(recipe: Recipe) -> None:
    images = random_images(16)
    mean, std = images.float().mean((0, 2, 3)), images.float().std((0, 2, 3))
    model = build_model(recipe, 10, mean, std)
    whiten_first_layer(model, recipe, images)
    layer = model.layers.get_submodule("whiten")
    assert isinstance(layer, nn.Conv2d) and not layer.weight.requires_grad
    # Without its border, where the padding's zeros would count too.
    outputs = (
        F.conv2d(model.normalise(images), layer.weight)[:, : 3 * recipe.whitening_size**2].transpose(0, 1).flatten(1)
    )
    torch.testing.assert_close(outputs @ outputs.T / outputs.shape[1], torch.eye(len(outputs)), atol=2e-3, rtol=0)


def test_convnet6_has_each_whitened_direction_and_its_opposite() -> None:
    model = build(CONVNET6)
    whiten_first_layer(model, CONVNET6, random_images(16))
    layer = model.layers.get_submodule("whiten")
    assert isinstance(layer, nn.Conv2d) and layer.bias is not None
    there, back = layer.weight.chunk(2)
    assert torch.equal(there, -back) and layer.bias.requires_grad


def test_without_whitening_nothing_is_filled() -> None:
    model = build(RESNET9)
    before = copy.deepcopy(model.state_dict())
    whiten_first_layer(model, RESNET9, random_images(4))
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert all(p.requires_grad for p in model.parameters())
