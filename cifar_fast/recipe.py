"""What decides a training run: the flat, frozen `Recipe`, with the rule of each field beside the field."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal

from cifar_fast.errors import RecipeError

CHOICES: dict[str, tuple[str, ...]] = {
    "network": ("resnet9", "convnet6"),
    "activation": ("relu", "celu", "gelu", "silu"),
    "pool_position": ("after_activation", "before_activation", "before_norm"),
    "conv_init": ("kaiming", "dirac"),
    "flip": ("none", "random", "alternating"),
    "optimizer": ("sgd", "muon"),
    "tta": ("none", "flip", "flip_shift"),
    "precision": ("auto", "float64", "float32", "bfloat16", "float16"),
    "convolution": ("auto", "direct", "winograd", "amx"),
    "cuda_graph": ("off", "auto", "on"),
    "compile": ("off", "auto", "on"),
}
POSITIVE = ("epochs", "global_batch_size", "n_shards", "peak_lr", "bn_momentum", "bn_eps", "celu_alpha", "logit_scale")
NOT_NEGATIVE = """
    ghost_batch_size micro_batch_size whitening_size whitening_eps whitening_bias_epochs crop_padding cutout
    color_jitter label_smoothing warmup_fraction start_lr_fraction final_lr_fraction bend_fraction bend_lr_fraction
    flat_epochs momentum
    weight_decay bias_lr_scale bias_weight_decay_scale muon_lr muon_momentum ema_decay ema_off_epochs lookahead_alpha
    tta_margin
""".split()
INTEGERS = """
    ghost_batch_size micro_batch_size whitening_size n_shards global_batch_size crop_padding cutout ema_every
    lookahead_every
""".split()
BELOW_ONE = "label_smoothing warmup_fraction momentum muon_momentum ema_decay lookahead_alpha color_jitter".split()


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Everything that decides what a training run computes; a trick is a field, and its default is the trick's off
    value.

    Losses are means over images, so a learning rate means the same whatever the batch and the number of processes.
    `RecipeError` (a `ValueError`) says which field cannot be.
    """

    name: str = "custom"
    """Name under which results are filed."""

    # The network
    network: Literal["resnet9", "convnet6"] = "resnet9"
    """`resnet9` as Page (2018) and Apple (2019) have it, or `convnet6`, airbench's three blocks of two convolutions."""
    widths: tuple[int, ...] = (64, 128, 256, 512)
    """Channels of each stage: four for `resnet9`, three for `convnet6`."""
    activation: Literal["relu", "celu", "gelu", "silu"] = "relu"
    """Nonlinearity after each norm."""
    celu_alpha: float = 0.075
    """Alpha of CELU: how far below zero it reaches. Read only when `activation` is `celu`."""
    pool_position: Literal["after_activation", "before_activation", "before_norm"] = "after_activation"
    """Where max-pool stands. The first two compute the same function when the activation never falls (ReLU, CELU)."""
    conv_init: Literal["kaiming", "dirac"] = "kaiming"
    """`dirac`: the first output channels of each convolution copy its input, so that the signal passes at once."""
    whitening_size: int = 0
    """Side in pixels of the patches that the fixed first convolution whitens; 0: an ordinary learned convolution."""
    whitening_eps: float = 1e-2
    """Added to each eigenvalue of the patch covariance: how much the faintest directions are held back."""
    whitening_bias_epochs: float = 0.0
    """Epochs during which the whitening layer's bias is learned (`convnet6` only)."""
    ghost_batch_size: int = 0
    """Images per batch-norm group; 0 takes each shard's whole local batch."""
    freeze_bn_scale: bool = False
    """Leave batch norm's scale at 1 and learn its bias alone."""
    bn_momentum: float = 0.1
    """Share of the newest batch in batch norm's running statistics, as PyTorch means it."""
    bn_eps: float = 1e-5
    """Added to the variance in batch norm."""
    logit_scale: float = 0.125
    """Factor on the logits."""

    # The data
    preload: bool = True
    """Keep the training set on the device and augment it there; off: make each batch on the CPU and send it."""
    n_shards: int = 1
    """Fixed strided shards of the training set; a global batch takes as many images of each."""
    global_batch_size: int = 512
    """Images per optimiser step, over all shards."""
    crop_padding: int = 4
    """Pixels of reflected border from which the random crop is taken; 0 is no crop."""
    flip: Literal["none", "random", "alternating"] = "random"
    """Mirror image: by chance each time, or by chance once and then every other epoch (`alternating`)."""
    cutout: int = 0
    """Side in pixels of the square that is blanked; 0 is off."""
    color_jitter: float = 0.0
    """Largest relative change of contrast, and of brightness in standard deviations; 0 is off."""
    resolutions: tuple[int, ...] = ()
    """Side in pixels of the training images, epoch by epoch (the last goes on); empty: the data set's own size."""

    # The loss and the optimiser
    label_smoothing: float = 0.0
    """Share of each target spread evenly over all classes."""
    epochs: float = 24.0
    """Passes over the training set; a fraction stops within an epoch."""
    optimizer: Literal["sgd", "muon"] = "sgd"
    """`sgd` with Nesterov momentum for all, or `muon` for the convolutions' filters and SGD for the rest."""
    peak_lr: float = 0.4
    """Highest learning rate of the weights under SGD, for the mean loss."""
    start_lr_fraction: float = 0.0
    """Learning rate of the first step, as a share of the peak."""
    warmup_fraction: float = 0.2
    """Share of the epochs during which the learning rate rises."""
    final_lr_fraction: float = 0.0
    """Learning rate at the end, as a share of the peak."""
    bend_fraction: float = 0.0
    """Share of the epochs after which the learning rate changes the pace at which it falls; 0: it falls in one line."""
    bend_lr_fraction: float = 0.0
    """Learning rate at that moment, as a share of the peak."""
    flat_epochs: float = 0.0
    """Epochs at the end with the final learning rate."""
    momentum: float = 0.9
    """Nesterov momentum of SGD."""
    weight_decay: float = 5e-4
    """Added to the gradient as `weight_decay * weight`, before momentum and learning rate (SGD only)."""
    bias_lr_scale: float = 1.0
    """Learning rate of the biases, relative to the weights'."""
    bias_weight_decay_scale: float = 1.0
    """Weight decay of the biases, relative to the weights'."""
    muon_lr: float = 0.24
    """Highest learning rate of Muon. Read only when `optimizer` is `muon`."""
    muon_momentum: float = 0.6
    """Nesterov momentum of Muon."""

    # Averaging
    ema_decay: float = 0.0
    """Decay a step of the running average of the weights that is evaluated in their place; 0 is off."""
    ema_every: int = 5
    """Steps between two updates of that average."""
    ema_off_epochs: float = 0.0
    """Epochs at the end that are evaluated without that average: it is behind once the weights settle."""
    lookahead_alpha: float = 0.0
    """Share of the way that Lookahead's slow weights go to the fast ones, which restart from there; 0 is off."""
    lookahead_every: int = 5
    """Steps between two such moves."""
    tta: Literal["none", "flip", "flip_shift"] = "none"
    """Test-time augmentation: logits averaged over the image and its mirror, and over shifts by a pixel too."""
    tta_margin: float = 1.0
    """Test-time augmentation only for images whose two likeliest classes differ by at most this much in probability
    (seen once, as they are); 1: for all."""

    # Numerics: what they change is the time and the rounding, not the mathematics
    precision: Literal["auto", "float64", "float32", "bfloat16", "float16"] = "auto"
    """Number format of the convolutions; `auto` takes what the device computes fastest, `float64` (slow) is for
    proofs."""
    micro_batch_size: int = 0
    """Images whose activations are held at once, in whole norm groups; their gradients add up. 0: the whole batch."""
    channels_last: bool = True
    """Store activations with the channels innermost."""
    convolution: Literal["auto", "direct", "winograd", "amx"] = "auto"
    """How a CPU computes 3x3 convolutions: as torch does, by Winograd's algorithm (float32), or on matrix tiles
    (bfloat16); `auto` takes the fastest on this machine."""
    fuse_norm: bool = True
    """Compute batch norm and the activation after it at once, on a CPU with a C compiler."""
    cuda_graph: Literal["off", "auto", "on"] = "off"
    """Record a whole step on a GPU once, then replay it; `auto`: where that can be, `on`: and warn where not."""
    compile: Literal["off", "auto", "on"] = "off"
    """Have torch.compile fuse the network's and the augmentation's kernels on a GPU; `auto` and `on` as above."""

    def __post_init__(self) -> None:
        """Check every field, so that a recipe that exists can be run."""
        for field, allowed in CHOICES.items():
            if getattr(self, field) not in allowed:
                raise RecipeError(f"{field}={getattr(self, field)!r} is not known; choose one of {', '.join(allowed)}")
        for field in POSITIVE:
            if not _is_number(getattr(self, field)) or getattr(self, field) <= 0:
                raise RecipeError(f"{field}={getattr(self, field)!r} must be a number above 0")
        for field in NOT_NEGATIVE:
            if not _is_number(getattr(self, field)) or getattr(self, field) < 0:
                raise RecipeError(f"{field}={getattr(self, field)!r} must be a number of at least 0")
        for field in BELOW_ONE:
            if getattr(self, field) >= 1:
                raise RecipeError(f"{field}={getattr(self, field)!r} must be below 1")
        if self.tta_margin > 1:
            raise RecipeError(f"tta_margin={self.tta_margin!r} is a difference of probabilities: at most 1")
        for field in ("ema_every", "lookahead_every"):
            if getattr(self, field) < 1:
                raise RecipeError(f"{field}={getattr(self, field)!r} must be at least 1 step")
        for field in INTEGERS:
            if not isinstance(getattr(self, field), int) or isinstance(getattr(self, field), bool):
                raise RecipeError(f"{field}={getattr(self, field)!r} must be a whole number")
        for field in ("widths", "resolutions"):
            values = getattr(self, field)
            if not isinstance(values, tuple | list) or not all(isinstance(value, int) for value in values):
                raise RecipeError(f"{field}={values!r} must be a list of whole numbers")
        for field in ("freeze_bn_scale", "preload", "channels_last"):
            if not isinstance(getattr(self, field), bool):
                raise RecipeError(f"{field}={getattr(self, field)!r} must be true or false")
        n_widths = 4 if self.network == "resnet9" else 3
        if len(self.widths) != n_widths or min(self.widths, default=0) < 1:
            raise RecipeError(
                f"widths={self.widths} must be {n_widths} positive channel counts for network={self.network!r}"
            )
        if any(side < 16 for side in self.resolutions):
            raise RecipeError(
                f"resolutions={self.resolutions} must be at least 16 pixels: the networks halve the image three times"
            )
        if self.whitening_size > 7 or (
            self.network == "resnet9" and self.whitening_size % 2 == 0 and self.whitening_size
        ):
            raise RecipeError(
                f"whitening_size={self.whitening_size} must be at most 7, and odd for network='resnet9', whose first "
                "convolution keeps the image's size"
            )
        if self.flat_epochs > self.epochs * (1 - self.warmup_fraction):
            raise RecipeError(
                f"flat_epochs={self.flat_epochs} leaves no time to come down: epochs={self.epochs}, "
                f"warmup_fraction={self.warmup_fraction}"
            )
        falls_until = 1 - self.flat_epochs / self.epochs
        if self.bend_fraction and not self.warmup_fraction < self.bend_fraction < falls_until:
            raise RecipeError(
                f"bend_fraction={self.bend_fraction} must lie where the learning rate falls: between "
                f"warmup_fraction={self.warmup_fraction} and {falls_until:g} of the epochs"
            )
        if self.global_batch_size % self.n_shards:
            raise RecipeError(
                f"global_batch_size={self.global_batch_size} does not divide into n_shards={self.n_shards}"
            )
        if self.ghost_batch_size and self.local_batch_size % self.ghost_batch_size:
            raise RecipeError(
                f"ghost_batch_size={self.ghost_batch_size} does not divide the local batch of "
                f"{self.local_batch_size} images (global_batch_size={self.global_batch_size} over "
                f"n_shards={self.n_shards})"
            )
        if (
            self.micro_batch_size % self.norm_group_size
            or self.micro_batch_size
            and self.global_batch_size % self.micro_batch_size
        ):
            raise RecipeError(
                f"micro_batch_size={self.micro_batch_size} must hold whole norm groups of {self.norm_group_size} "
                f"images and divide global_batch_size={self.global_batch_size}"
            )

    @property
    def local_batch_size(self) -> int:
        """Images of one shard in a global batch."""
        return self.global_batch_size // self.n_shards

    @property
    def norm_group_size(self) -> int:
        """Images whose batch-norm statistics are taken together; a group never crosses a shard."""
        return self.ghost_batch_size or self.local_batch_size

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as plain values, ready for JSON."""
        return {
            key: list(value) if isinstance(value, tuple) else value for key, value in dataclasses.asdict(self).items()
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Recipe:
        """Build a recipe from plain values, as `to_dict` gives them; an unknown field is a `RecipeError`."""
        known = {field.name for field in fields(cls)}
        if unknown := sorted(set(values) - known):
            raise RecipeError(f"unknown recipe field {', '.join(unknown)}; the fields are {', '.join(sorted(known))}")
        plain: dict[str, Any] = {}
        for key, value in values.items():
            plain[key] = tuple(value) if isinstance(value, list) else value
        return cls(**plain)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def changed_fields(a: Recipe, b: Recipe) -> dict[str, tuple[Any, Any]]:
    """Return each field in which two recipes differ, other than the name, as `(value in a, value in b)`."""
    pairs = {
        field.name: (getattr(a, field.name), getattr(b, field.name)) for field in fields(Recipe) if field.name != "name"
    }
    return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}
