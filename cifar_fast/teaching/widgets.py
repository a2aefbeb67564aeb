"""Explorers for notebooks: sliders over the figures of `concept_plots` and `image_grids`, and a growing curve.

Without a kernel, on GitHub for instance, an explorer is the picture of its first position, and its caption says what
moving the sliders shows. A learning curve is then the curve of the whole run.
"""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from html import escape
from typing import Any

from torch import Tensor

from cifar_fast.errors import UserError
from cifar_fast.recipe import Recipe
from cifar_fast.shown import percent
from cifar_fast.teaching import concept_plots, image_grids
from cifar_fast.teaching.result_plots import Picture, learning_curve
from cifar_fast.training.result import EpochResult

try:
    import ipywidgets
    from traitlets import Unicode
except ImportError as error:
    raise UserError(
        "cifar_fast.widgets needs ipywidgets, which is not installed: pip install 'cifar_fast[notebooks]' (in a clone: "
        "pip install -e '.[notebooks]'), then restart the kernel"
    ) from error


class Shown(ipywidgets.Image):
    """A PNG as wide as there is room for, with a tooltip for those who cannot see it."""

    description = Unicode("").tag(sync=True)  # the browser's part of ipywidgets fails on a tooltip without one

    def __init__(self) -> None:
        """Start without a picture."""
        super().__init__(format="png", layout={"max_width": "100%", "object_fit": "contain"})


class Explorer(ipywidgets.VBox):
    """Controls above a picture that a function draws from their values; whenever one changes, the picture is redrawn.

    `controls` holds them by the name of the function's argument, `figure` is the picture that is shown, and `message`
    says why values cannot be drawn. The picture is replaced in place: no flicker, and no new output in the cell.
    `caption` stands below the picture that is stored.
    """

    def __init__(self, draw: Callable[..., Picture], moving: str = "", **controls: Any) -> None:
        """Take the function, a sentence on what moving shows, and for each argument a widget with a `value`."""
        self.draw, self.controls = draw, controls
        self.caption = f"Run this notebook to move {_listed(list(controls))}. {moving}".strip()
        self.figure: Picture | None = None
        self.picture = Shown()
        self.message = ipywidgets.HTML()
        self.reset = ipywidgets.Button(description="start values", icon="undo")
        first = {name: control.value for name, control in controls.items()}
        self.reset.on_click(lambda _: self._set(first))
        # Sliders stand in two columns where there is room for them.
        panel = ipywidgets.Box([*controls.values(), self.reset], layout={"flex_flow": "row wrap"})
        super().__init__([panel, self.message, self.picture])
        for control in controls.values():
            control.observe(self._redraw, "value")
        self._redraw()

    def _redraw(self, change: Any = None) -> None:
        try:
            figure = self.draw(**{name: control.value for name, control in self.controls.items()})
        except UserError as error:  # the picture stays as it was
            self.message.value = f"<b>Not drawn:</b> {escape(str(error))}"
            return
        self.figure = figure
        self.message.value = ""
        self.picture.tooltip = figure.alt
        self.picture.value = figure.png()

    def _set(self, values: dict[str, Any]) -> None:
        for name, value in values.items():
            self.controls[name].value = value

    def _repr_mimebundle_(self, **options: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        """Return the sliders for a page with a kernel, and the picture of their first position for one without."""
        assert self.figure is not None
        alt = f"{self.figure.alt}. {self.caption}"
        data = dict(super()._repr_mimebundle_(**options))
        data |= {"image/png": b64encode(self.figure.png(self.caption)).decode(), "text/plain": f"<{alt}>"}
        return data, {"image/png": {"alt": alt}}

    def __repr__(self) -> str:
        """Return the controls' values."""
        values = (f"{name}={control.value!r}" for name, control in self.controls.items())
        return f"Explorer({', '.join(values)})"


class LiveCurve:
    """The learning curve of a training run in progress: `train(..., on_epoch=curve.add)` lets it grow in its cell."""

    def __init__(self) -> None:
        """Start without an epoch."""
        self.epochs: list[EpochResult] = []
        self.figure = Picture(figsize=(9, 3.8))
        self.figure.alt = "The learning curve appears after the first epoch"
        self.figure.text(0.5, 0.5, self.figure.alt, ha="center", va="center", fontsize=12, color="#444444")
        self._cells: list[Any] = []

    def add(self, epoch: EpochResult) -> None:
        """Redraw the curve with one more epoch."""
        self.epochs.append(epoch)
        figure = learning_curve(self.epochs)
        assert isinstance(figure, Picture)
        after = f"{epoch.epoch} epoch" + "s" * (epoch.epoch != 1)
        figure.alt = f"Learning curve after {after}: test accuracy {percent(epoch.test_accuracy)}"
        figure.suptitle(figure.alt, fontsize="medium")
        self.figure = figure
        for cell in self._cells:
            cell.update(figure)

    def _ipython_display_(self) -> None:
        """Show the curve so far in a cell, where it grows."""
        from IPython.display import display

        self._cells.append(display(self.figure, display_id=True))

    def __repr__(self) -> str:
        return f"<{self.figure.alt}>"


def _listed(names: Sequence[str]) -> str:
    """Return a list of names as text: a, b and c."""
    return " and ".join(filter(None, [", ".join(names[:-1]), names[-1]]))


def _control(kind: Any, name: str, **options: Any) -> Any:
    """Return a slider or another control, with its whole name beside it."""
    return kind(description=name, style={"description_width": "11em"}, layout={"width": "28em"}, **options)


def _whole(name: str, value: int, low: int, high: int) -> Any:
    return _control(ipywidgets.IntSlider, name, value=value, min=low, max=high)


def _real(name: str, value: float, low: float, high: float, step: float, format: str = ".2f") -> Any:
    options = {"min": low, "max": high, "step": step, "readout_format": format}
    return _control(ipywidgets.FloatSlider, name, value=value, **options)


def _powers(name: str, value: float, low: float, high: float, format: str = ".3g") -> Any:
    """Return a slider whose steps are factors, from 10^low to 10^high."""
    options = {"base": 10, "min": low, "max": high, "step": 0.05, "readout_format": format}
    return _control(ipywidgets.FloatLogSlider, name, value=value, **options)


def _select(name: str, value: Any, options: Sequence[Any]) -> Any:
    return _control(ipywidgets.SelectionSlider, name, value=value, options=list(options))


def augmentation(images: Tensor, *, dataset: str, padding: int = 4, most_cutout: int = 16) -> Explorer:
    """Explore crop, flip and cutout on one of uint8 `images` (N, 3, H, W); `padding` and `most_cutout` in pixels."""
    side = images.shape[-1]

    def draw(image: int, **chosen: Any) -> Picture:
        return image_grids.augmentation_steps(images[image], padding=padding, dataset=dataset, **chosen)

    return Explorer(
        draw,
        moving="The crop, the flip and the square that cutout erases follow the sliders.",
        image=_whole("image", 0, 0, len(images) - 1),
        top=_whole("crop, top", padding, 0, 2 * padding),
        left=_whole("crop, left", padding, 0, 2 * padding),
        mirrored=_control(ipywidgets.Checkbox, "flip", value=False, indent=True),
        cutout=_whole("cutout, pixels", most_cutout // 2, 0, most_cutout),
        cutout_top=_whole("cutout, top", side // 4, 1 - most_cutout, side - 1),
        cutout_left=_whole("cutout, left", side // 4, 1 - most_cutout, side - 1),
    )


def calibration(logits: Mapping[str, Tensor], labels: Tensor, *, dataset: str) -> Explorer:
    """Explore confidence and accuracy over the temperature: networks' logits, float (N, K), by name; int64 (N,)."""

    def draw(temperature: float) -> Picture:
        return concept_plots.calibration(logits, labels, dataset=dataset, temperature=temperature)

    return Explorer(
        draw,
        moving="A temperature changes how confident a network is, and never which class it predicts.",
        temperature=_powers("temperature", 1.0, -1, 1, ".2f"),
    )


def activations() -> Explorer:
    """Explore the activations, and which of them commute with max-pool, over the alpha of CELU."""
    return Explorer(
        concept_plots.activation_curves,
        moving="With a small alpha CELU approaches ReLU.",
        celu_alpha=_real("celu_alpha", 0.3, 0.025, 1.0, 0.025, ".3f"),
    )


def number_formats() -> Explorer:
    """Explore what float16, bfloat16 and float32 make of a number."""
    return Explorer(
        concept_plots.number_formats,
        moving="Very small numbers vanish in float16 first, very large ones become infinite.",
        value=_powers("number", 1e-5, -12, 8, ".3g"),
    )


def loss_scale(gradients: Mapping[str, Tensor]) -> Explorer:
    """Explore which of the gradients of layers, float (n,) each, float16 loses when the loss is multiplied first."""

    def draw(loss_scale: int) -> Picture:
        return concept_plots.gradient_sizes(gradients, loss_scale)

    return Explorer(
        draw,
        moving="A larger loss scale lifts small gradients above what float16 can hold, until the large ones overflow.",
        loss_scale=_select("loss scale", 1, [2**power for power in range(0, 33, 2)]),
    )


def ghost_batches(activations: Tensor, *, dataset: str) -> Explorer:
    """Explore the statistics of ghost groups in `activations`, float (N, C, H, W), by group size and channel."""
    n, channels = activations.shape[:2]
    sizes = [size for size in range(2, n + 1) if n % size == 0]

    def draw(group_size: int, channel: int) -> Picture:
        return concept_plots.group_statistics(activations, group_size, dataset=dataset, channel=channel)

    return Explorer(
        draw,
        moving="The smaller the groups, the more their means and variances scatter.",
        group_size=_select("group_size, images", sizes[len(sizes) // 2], sizes),
        channel=_whole("channel", 0, 0, channels - 1),
    )


def scaled_activation(values: Tensor, *, dataset: str) -> Explorer:
    """Explore scale and bias of a batch norm and the alpha of the CELU after them, on normalised `values`, float."""

    def draw(scale: float, bias: float, celu_alpha: float) -> Picture:
        return concept_plots.scaled_activation(values, scale, bias, celu_alpha=celu_alpha, dataset=dataset)

    return Explorer(
        draw,
        moving="A scale and an alpha that grow together give the same curve, only larger.",
        scale=_powers("scale", 0.25, -1.5, 0.5, ".2f"),
        bias=_real("bias", -0.1, -1.0, 1.0, 0.05),
        celu_alpha=_real("celu_alpha", 0.075, 0.025, 1.0, 0.025, ".3f"),
    )


def whitening(images: Tensor, *, dataset: str) -> Explorer:
    """Explore spectrum and covariance of the patches of normalised `images` (N, 3, H, W) by patch size and eps."""

    def draw(size: int, eps: float) -> Picture:
        return image_grids.whitening_spectrum(images, size, eps, dataset=dataset)

    return Explorer(
        draw,
        moving="A larger eps leaves the directions of small variance small, so that their noise is not blown up.",
        size=_select("patch size, pixels", 3, (2, 3, 4)),
        eps=_powers("whitening_eps", 1e-2, -6, 0, ".1e"),
    )


def schedule(recipe: Recipe) -> Explorer:
    """Explore the learning rate's knots, beside those of `recipe`, and its value under a pointer."""

    def draw(at: float, **changes: Any) -> Picture:
        return concept_plots.learning_rates({recipe.name: recipe, "as set here": replace(recipe, **changes)}, at)

    most = 2 * recipe.epochs
    return Explorer(
        draw,
        moving="The curve follows its knots, beside that of the recipe.",
        epochs=_real("epochs", recipe.epochs, 1.0, most, 0.5, ".1f"),
        start_lr_fraction=_real("start_lr_fraction", recipe.start_lr_fraction, 0.0, 1.0, 0.05),
        warmup_fraction=_real("warmup_fraction", recipe.warmup_fraction, 0.0, 0.95, 0.05),
        flat_epochs=_real("flat_epochs", recipe.flat_epochs, 0.0, recipe.epochs, 0.5, ".1f"),
        final_lr_fraction=_real("final_lr_fraction", recipe.final_lr_fraction, 0.0, 1.0, 0.05),
        at=_real("at epoch", recipe.epochs / 2, 0.0, most, 0.1, ".1f"),
    )


def newton_schulz(matrices: Mapping[str, Tensor]) -> Explorer:
    """Explore what Newton-Schulz iterations make of the singular values of `matrices`, float (m, n), by their names."""

    def draw(matrix: str, steps: int) -> Picture:
        return concept_plots.newton_schulz(matrices[matrix], steps)

    return Explorer(
        draw,
        moving="A few iterations bring all singular values near 1.",
        matrix=_control(ipywidgets.Dropdown, "matrix", value=next(iter(matrices)), options=list(matrices)),
        steps=_whole("iterations", 3, 0, 10),
    )


def averages_on_a_bowl(ema_decay: float = 0.9, lookahead_alpha: float = 0.5, every: int = 5) -> Explorer:
    """Explore what EMA and Lookahead do to the path of two weights under noisy gradients."""
    return Explorer(
        concept_plots.averages_on_a_bowl,
        moving="A larger decay cancels more of the noise, and follows the path more slowly.",
        ema_decay=_real("ema_decay, a step", ema_decay, 0.0, 0.99, 0.01),
        lookahead_alpha=_real("lookahead_alpha", lookahead_alpha, 0.05, 1.0, 0.05),
        every=_whole("every, steps", every, 1, 20),
        seed=_whole("seed of the noise", 0, 0, 20),
    )


def share_intervals(share: float = 0.82, n: int = 50) -> Explorer:
    """Explore how precisely n runs determine the share that reaches a target; the start is Apple's 41 of 50."""

    def draw(share: float, n: int) -> Picture:
        return concept_plots.share_intervals(share / 100, n)

    return Explorer(
        draw,
        moving="With more runs the interval of the share shrinks, slowly: four times as many halve it.",
        share=_real("at the target, %", 100 * share, 0.0, 100.0, 1.0, ".0f"),
        n=_whole("runs", n, 1, 500),
    )
