"""What decides a training run: the flat, frozen `Recipe`, with the rule of each field in the field's type."""

from __future__ import annotations

import dataclasses
import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

from cifar_fast.errors import RecipeError


@dataclass(frozen=True, kw_only=True)
class Bounds:
    """Limits of a number, written into its type: `Annotated[float, Bounds(at_least=0, below=1)]`."""

    above: float = -math.inf
    at_least: float = -math.inf
    below: float = math.inf
    at_most: float = math.inf

    def hold(self, number: float) -> bool:
        """Say whether `number` lies within the limits."""
        return self.above < number < self.below and self.at_least <= number <= self.at_most

    def __str__(self) -> str:
        limits = {"above": self.above, "of at least": self.at_least, "below": self.below, "at most": self.at_most}
        return " and ".join(f"{word} {limit:g}" for word, limit in limits.items() if math.isfinite(limit))


CIFAR_SIDE = 32
"""Width and height of CIFAR's images in pixels."""

PositiveFloat = Annotated[float, Bounds(above=0)]
NonNegativeFloat = Annotated[float, Bounds(at_least=0)]
FloatBelowOne = Annotated[float, Bounds(at_least=0, below=1)]
PositiveInt = Annotated[int, Bounds(at_least=1)]
NonNegativeInt = Annotated[int, Bounds(at_least=0)]


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Everything that decides what a training run computes. Each trick is one field, and its default turns it off.

    A field's type says which values it allows; any other raises a `RecipeError` (a `ValueError`) that names the field.
    Losses are means over images, so a learning rate means the same at any batch size and on any number of processes.
    """

    name: str = "custom"
    """Name of the recipe in results and run folders."""

    # The network
    network: Literal["resnet9", "convnet6"] = "resnet9"
    """`resnet9`, the network of Page (2018) and Apple (2019), or `convnet6`, airbench's three blocks of two layers."""
    widths: tuple[PositiveInt, ...] = (64, 128, 256, 512)
    """Channels of each stage: four for `resnet9`, three for `convnet6`."""
    activation: Literal["relu", "celu", "gelu", "silu"] = "relu"
    """Activation function after each batch norm."""
    celu_alpha: PositiveFloat = 0.075
    """Alpha of CELU: how far below zero it reaches. Used only if `activation` is `celu`."""
    pool_position: Literal["after_activation", "before_activation", "before_norm"] = "after_activation"
    """Where max-pooling happens. The first two agree if the activation never decreases, as with ReLU and CELU."""
    conv_init: Literal["kaiming", "dirac"] = "kaiming"
    """Initial filters: random, or `dirac`: the first output channels copy the input, so the signal passes through."""
    whitening_size: Annotated[int, Bounds(at_least=0, at_most=7)] = 0
    """Side in pixels of the patches that the fixed first convolution whitens; 0: an ordinary, learned convolution."""
    whitening_eps: NonNegativeFloat = 1e-2
    """Added to each eigenvalue of the patch covariance, to limit how much faint patterns are amplified."""
    whitening_bias_epochs: NonNegativeFloat = 0.0
    """Epochs in which the whitening layer's bias is trained (`convnet6` only)."""
    ghost_batch_size: NonNegativeInt = 0
    """Images per batch-norm group (ghost batch norm); 0: each shard's whole local batch is one group."""
    freeze_bn_scale: bool = False
    """Fix batch norm's scale at 1 and train only its bias."""
    bn_momentum: PositiveFloat = 0.1
    """Weight of the newest batch in batch norm's running statistics, as in PyTorch."""
    bn_eps: PositiveFloat = 1e-5
    """Added to the variance in batch norm."""
    logit_scale: PositiveFloat = 0.125
    """Factor applied to the logits."""

    # The data
    preload: bool = True
    """Keep the training set on the device and augment it there; otherwise the CPU prepares and sends each batch."""
    n_shards: PositiveInt = 1
    """Number of fixed, strided shards of the training set; a global batch takes equally many images from each."""
    global_batch_size: PositiveInt = 512
    """Images per optimiser step, over all shards."""
    crop_padding: NonNegativeInt = 4
    """Pixels of reflected border around an image before its random crop; 0 turns cropping off."""
    flip: Literal["none", "random", "alternating"] = "random"
    """Horizontal flips: `random` decides anew each epoch, `alternating` decides once and then switches each epoch."""
    cutout: NonNegativeInt = 0
    """Side in pixels of the square that cutout blanks; 0 turns it off."""
    color_jitter: FloatBelowOne = 0.0
    """Largest random change of contrast (relative) and of brightness (in standard deviations); 0 turns it off."""
    # The networks halve an image three times, so smaller ones would vanish.
    resolutions: tuple[Annotated[int, Bounds(at_least=16)], ...] = ()
    """Side in pixels of the training images, epoch by epoch; the last applies to the rest. Empty: their own size.
    They are meant for data sets of 32 pixels; larger images shrink in the same proportion."""

    # The loss and the optimiser
    label_smoothing: FloatBelowOne = 0.0
    """Share of each target that is spread evenly over all classes."""
    epochs: PositiveFloat = 24.0
    """Passes over the training set; a fraction stops within an epoch."""
    optimizer: Literal["sgd", "muon"] = "sgd"
    """`sgd`: SGD with Nesterov momentum. `muon`: Muon for the convolutions' filters, SGD for everything else."""
    peak_lr: PositiveFloat = 0.4
    """Highest learning rate of the weights under SGD, for a loss averaged over the batch."""
    start_lr_fraction: NonNegativeFloat = 0.0
    """Learning rate of the first step, as a fraction of the peak."""
    warmup_fraction: FloatBelowOne = 0.2
    """Fraction of the epochs in which the learning rate rises."""
    final_lr_fraction: NonNegativeFloat = 0.0
    """Learning rate at the end, as a fraction of the peak."""
    bend_fraction: NonNegativeFloat = 0.0
    """Two-slope decay: when the slope changes, as a fraction of the epochs; 0 is plain linear decay."""
    bend_lr_fraction: NonNegativeFloat = 0.0
    """Two-slope decay: the learning rate when the slope changes, as a fraction of the peak."""
    flat_epochs: NonNegativeFloat = 0.0
    """Epochs at the end that keep the final learning rate."""
    schedule_time: Literal["start", "end"] = "start"
    """When a step reads its learning rate from the schedule: at its start, so the first rate is the schedule's first
    value, or at its end."""
    momentum: FloatBelowOne = 0.9
    """Nesterov momentum of SGD."""
    lr_in_velocity: bool = False
    """Whether SGD's velocity adds up gradients times the learning rate of their own step, as in Page's code (2019) and
    Apple's (2019). Otherwise it adds up plain gradients, as in PyTorch."""
    weight_decay: NonNegativeFloat = 5e-4
    """Adds `weight_decay * weight` to the gradient, before momentum and learning rate (SGD only)."""
    bias_lr_scale: NonNegativeFloat = 1.0
    """Learning rate of the biases, relative to that of the weights."""
    bias_weight_decay_scale: NonNegativeFloat = 1.0
    """Weight decay of the biases, relative to that of the weights."""
    muon_lr: NonNegativeFloat = 0.24
    """Highest learning rate of Muon. Used only if `optimizer` is `muon`."""
    muon_momentum: FloatBelowOne = 0.6
    """Nesterov momentum of Muon. Used only if `optimizer` is `muon`."""

    # Averaging
    ema_decay: FloatBelowOne = 0.0
    """Decay per step of the weights' moving average (EMA), which is evaluated in their place; 0 turns it off."""
    ema_every: PositiveInt = 5
    """Steps from one update of the EMA to the next."""
    ema_off_epochs: NonNegativeFloat = 0.0
    """Epochs at the end in which the weights themselves are evaluated: as they settle, the EMA lags behind them."""
    lookahead_alpha: FloatBelowOne = 0.0
    """Lookahead: how far slow weights move towards the fast ones, which restart from there; 0 turns it off."""
    lookahead_every: PositiveInt = 5
    """Lookahead: steps from one move of the slow weights to the next."""
    tta: Literal["none", "flip", "flip_shift"] = "none"
    """Test-time augmentation: average the logits of an image and its mirror image, or of one-pixel shifts too."""
    tta_margin: Annotated[float, Bounds(at_least=0, at_most=1)] = 1.0
    """Augment only test images whose two likeliest classes differ by at most this probability; 1: all of them."""

    # Numerics: they change the speed and the rounding, not the mathematics
    precision: Literal["auto", "float64", "float32", "bfloat16", "float16"] = "auto"
    """Number format of the convolutions; `auto`: the device's fastest. `float64` is slow, for exact comparisons."""
    micro_batch_size: NonNegativeInt = 0
    """Images in each forward and backward pass of a step, to save memory; 0: the whole batch in one pass."""
    channels_last: bool = True
    """Store activations with the channels innermost."""
    convolution: Literal["auto", "direct", "winograd", "amx"] = "auto"
    """How a CPU computes 3x3 convolutions: PyTorch's way, Winograd's (float32), with AMX (bfloat16), or the fastest."""
    fuse_norm: bool = True
    """Fuse each batch norm with the activation after it: on a CPU with a C compiler, and on a GPU with Triton, there
    together with the max-pool before it."""
    cuda_graph: Literal["off", "auto", "on"] = "off"
    """On a GPU, record a whole step once and replay it: `auto` where possible, `on` with a warning where not."""
    compile: Literal["off", "auto", "on"] = "off"
    """On a GPU, have torch.compile fuse the kernels of augmentation, network, loss and Muon's update; `auto` and
    `on` as above."""

    def __post_init__(self) -> None:
        """Check each field by its own rule, then the rules that join several, so that every recipe can be run."""
        for name, rule in _rules().items():
            _check_field(name, getattr(self, name), rule)
            if get_origin(rule) is tuple:
                object.__setattr__(self, name, tuple(getattr(self, name)))  # a list could be changed later
        for check in (
            _check_one_width_per_stage,
            _check_whitening_keeps_the_size,
            _check_time_to_decay,
            _check_slope_changes_during_decay,
            _check_shards_share_the_batch,
            _check_groups_share_the_local_batch,
            _check_micro_batches_hold_whole_groups,
        ):
            check(self)

    @property
    def local_batch_size(self) -> int:
        """Images of one shard in a global batch."""
        return self.global_batch_size // self.n_shards

    @property
    def norm_group_size(self) -> int:
        """Images whose batch-norm statistics are computed together; a group never crosses a shard."""
        return self.ghost_batch_size or self.local_batch_size

    def resolution(self, epoch: int, side: int = CIFAR_SIDE) -> int:
        """Return the side in pixels of the training images in `epoch`, counted from 0, in a data set of `side` pixels.

        `resolutions` are meant for CIFAR's images; others shrink in the same proportion.
        """
        if not self.resolutions:
            return side
        return round(self.resolutions[min(epoch, len(self.resolutions) - 1)] * side / CIFAR_SIDE)

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as plain values, ready for JSON."""
        return {
            key: list(value) if isinstance(value, tuple) else value for key, value in dataclasses.asdict(self).items()
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Recipe:
        """Build a recipe from plain values, as `to_dict` returns them; the fields left out keep their defaults.

        Raises `RecipeError`, and nothing else, for values that make no recipe, whatever their types.
        """
        if not isinstance(values, Mapping):
            raise RecipeError(f"{values!r} is not a recipe; a recipe maps the names of fields to values")
        known = _rules()
        if unknown := sorted(str(name) for name in values if name not in known):
            raise RecipeError(f"unknown recipe field {', '.join(unknown)}; the fields are {', '.join(sorted(known))}")
        return cls(**values)


def choices(field: str) -> tuple[str, ...]:
    """Return the values that a field of the recipe allows, if its type lists them; otherwise raise `RecipeError`."""
    listed = {name: get_args(rule) for name, rule in _rules().items() if get_origin(rule) is Literal}
    if field not in listed:
        raise RecipeError(f"the recipe has no list of choices for {field}; it has one for {', '.join(sorted(listed))}")
    return listed[field]


def changed_fields(a: Recipe, b: Recipe) -> dict[str, tuple[Any, Any]]:
    """Return each field in which two recipes differ, other than the name, as `(value in a, value in b)`."""
    pairs = {name: (getattr(a, name), getattr(b, name)) for name in _rules() if name != "name"}
    return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}


# --- The rule of one field ---


@cache
def _rules() -> dict[str, Any]:
    """Return the type of each field."""
    return get_type_hints(Recipe, include_extras=True)


def _check_field(name: str, value: object, rule: Any) -> None:
    if not _allows(rule, value):
        raise RecipeError(f"{name}={value!r} must be {_in_words(rule)}")


def _allows(rule: Any, value: Any) -> bool:
    """Say whether `value` is one of those that the type `rule` describes."""
    if get_origin(rule) is Annotated:
        plain, bounds = get_args(rule)
        return _allows(plain, value) and bounds.hold(value)
    if get_origin(rule) is Literal:
        return value in get_args(rule)
    if get_origin(rule) is tuple:
        item, _ = get_args(rule)
        return isinstance(value, tuple | list) and all(_allows(item, each) for each in value)
    if rule is float:  # a whole number will do, but neither infinity nor NaN
        return _is_a(int | float, value) and abs(value) <= sys.float_info.max
    return _is_a(rule, value)


def _is_a(kind: Any, value: object) -> bool:
    return isinstance(value, kind) and (kind is bool or not isinstance(value, bool))  # to Python, True is an int


def _in_words(rule: Any, *, article: str = "a ", plural: str = "") -> str:
    """Describe the values that the type `rule` allows: "a whole number of at least 1"."""
    if get_origin(rule) is Annotated:
        plain, bounds = get_args(rule)
        return f"{_in_words(plain, article=article, plural=plural)} {bounds}"
    if get_origin(rule) is Literal:
        return f"one of {', '.join(get_args(rule))}"
    if get_origin(rule) is tuple:
        return f"a list of {_in_words(get_args(rule)[0], article='', plural='s')}"
    if rule is bool:
        return "true or false"
    return article + {int: "whole number", float: "number", str: "string"}[rule] + plural


# --- The rules that join several fields ---


def _check_one_width_per_stage(recipe: Recipe) -> None:
    n_stages = {"resnet9": 4, "convnet6": 3}[recipe.network]
    if len(recipe.widths) != n_stages:
        raise RecipeError(
            f"widths={recipe.widths} must be {n_stages} numbers, one for each stage of network={recipe.network!r}"
        )


def _check_whitening_keeps_the_size(recipe: Recipe) -> None:
    if recipe.network == "resnet9" and recipe.whitening_size and recipe.whitening_size % 2 == 0:
        raise RecipeError(
            f"whitening_size={recipe.whitening_size} must be odd for network='resnet9', whose first convolution keeps "
            "the image's size"
        )


def _check_time_to_decay(recipe: Recipe) -> None:
    if recipe.flat_epochs > recipe.epochs * (1 - recipe.warmup_fraction):
        raise RecipeError(
            f"flat_epochs={recipe.flat_epochs} leaves no time for the learning rate to decay: epochs={recipe.epochs}, "
            f"warmup_fraction={recipe.warmup_fraction}"
        )


def _check_slope_changes_during_decay(recipe: Recipe) -> None:
    decays_until = 1 - recipe.flat_epochs / recipe.epochs
    if recipe.bend_fraction and not recipe.warmup_fraction < recipe.bend_fraction < decays_until:
        raise RecipeError(
            f"bend_fraction={recipe.bend_fraction} must lie where the learning rate decays: between "
            f"warmup_fraction={recipe.warmup_fraction} and {decays_until:g} of the epochs (epochs={recipe.epochs}, "
            f"flat_epochs={recipe.flat_epochs})"
        )


def _check_shards_share_the_batch(recipe: Recipe) -> None:
    if recipe.global_batch_size % recipe.n_shards:
        raise RecipeError(
            f"global_batch_size={recipe.global_batch_size} does not divide into n_shards={recipe.n_shards}"
        )


def _check_groups_share_the_local_batch(recipe: Recipe) -> None:
    if recipe.local_batch_size % recipe.norm_group_size:
        raise RecipeError(
            f"ghost_batch_size={recipe.ghost_batch_size} does not divide the local batch of {recipe.local_batch_size} "
            f"images (global_batch_size={recipe.global_batch_size} over n_shards={recipe.n_shards})"
        )


def _check_micro_batches_hold_whole_groups(recipe: Recipe) -> None:
    size = recipe.micro_batch_size
    if size and (size % recipe.norm_group_size or recipe.global_batch_size % size):
        raise RecipeError(
            f"micro_batch_size={size} must divide global_batch_size={recipe.global_batch_size} and hold whole "
            f"batch-norm groups of {recipe.norm_group_size} images (ghost_batch_size={recipe.ghost_batch_size}, "
            f"n_shards={recipe.n_shards})"
        )
