"""Moving a slider redraws the picture, with what the plain function draws."""

from __future__ import annotations

import io
import sys
from base64 import b64decode
from importlib import import_module
from typing import Any

import pytest
import torch
from PIL import Image

from cifar_fast import recipes as recipe
from cifar_fast.errors import UserError
from cifar_fast.experiments.all_reduce import Link
from cifar_fast.experiments.step_costs import StepCosts, StepPoint
from cifar_fast.teaching.result_plots import Picture
from cifar_fast.training.batches import pixel_statistics
from cifar_fast.training.result import EpochResult


def test_without_ipywidgets_the_message_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "ipywidgets", None)
    monkeypatch.delitem(sys.modules, "cifar_fast.teaching.widgets", raising=False)
    with pytest.raises(UserError, match=r"needs ipywidgets, .* pip install 'cifar_fast\[notebooks\]'"):
        import_module("cifar_fast.teaching.widgets")


ipywidgets = pytest.importorskip("ipywidgets", reason="needs ipywidgets: pip install -e '.[notebooks]'")


def widgets() -> Any:
    from cifar_fast.teaching import widgets

    return widgets


def picture(values: list[float]) -> Picture:
    """A small picture that is quickly drawn."""
    figure = Picture(figsize=(1, 1))
    figure.subplots().plot(values)
    figure.alt = f"a line through {values}"
    return figure


def make(moving: str = "", **controls: Any) -> Any:
    def draw(height: int) -> Picture:
        if height > 8:
            raise UserError(f"height={height} is <too> much")
        return picture([0, height])

    return widgets().Explorer(draw, moving, height=ipywidgets.IntSlider(value=1, max=10), **controls)


def line(explorer: Any) -> list[float]:
    return list(explorer.figure.axes[0].get_lines()[0].get_ydata())


# --- the explorer ---


def test_a_slider_redraws_the_picture_in_place():
    explorer = make()
    shown, before = explorer.picture, bytes(explorer.picture.value)
    assert line(explorer) == [0, 1]
    explorer.controls["height"].value = 5
    assert line(explorer) == [0, 5]
    assert explorer.picture is shown and bytes(shown.value) != before
    assert bytes(shown.value) == explorer.figure.png()
    assert shown.tooltip == "a line through [0, 5]"
    assert shown.get_state()["description"] == ""  # what the browser asks for before it shows a tooltip
    assert Image.open(io.BytesIO(shown.value)).format == "PNG"


def test_a_button_returns_to_the_start_values():
    explorer = make()
    before = bytes(explorer.picture.value)
    explorer.controls["height"].value = 5
    explorer.reset.click()
    assert explorer.controls["height"].value == 1 and bytes(explorer.picture.value) == before


def test_a_live_curve_grows_by_an_epoch_in_the_cell_that_shows_it(monkeypatch):
    display = import_module("IPython.display")
    shown: list[Any] = []

    class Handle:
        def update(self, figure: Any) -> None:
            shown[-1] = figure

    monkeypatch.setattr(display, "display", lambda figure, display_id: (shown.append(figure), Handle())[1])
    curve = widgets().LiveCurve()
    curve._ipython_display_()
    assert shown[0].alt == "The learning curve appears after the first epoch"
    for number in (1, 2):
        before, accuracy = shown[0].png(), 0.4 + 0.1 * number
        curve.add(EpochResult(number, 1.5, accuracy, 1.4, accuracy, "none", float(number)))
        assert shown == [curve.figure] and curve.figure.png() != before
        after = "1 epoch" if number == 1 else "2 epochs"
        assert repr(curve) == f"<Learning curve after {after}: test accuracy {100 * accuracy:.2f} %>"


def test_nothing_is_printed_or_displayed(capfd):
    make().controls["height"].value = 3
    assert capfd.readouterr() == ("", "")


def test_what_cannot_be_drawn_is_said_and_the_picture_stays():
    explorer = make()
    before = bytes(explorer.picture.value)
    explorer.controls["height"].value = 9
    assert "height=9 is &lt;too&gt; much" in explorer.message.value
    assert bytes(explorer.picture.value) == before
    explorer.controls["height"].value = 2
    assert explorer.message.value == "" and line(explorer) == [0, 2]


def test_an_explorer_is_sliders_with_a_kernel_and_a_picture_with_a_caption_without():
    explorer = make(moving="The line rises.")
    assert isinstance(explorer, ipywidgets.VBox) and repr(explorer) == "Explorer(height=1)"
    data, metadata = explorer._repr_mimebundle_()
    assert "application/vnd.jupyter.widget-view+json" in data
    said = "a line through [0, 1]. Run this notebook to move height. The line rises."
    assert data["text/plain"] == f"<{said}>" and metadata["image/png"]["alt"] == said
    stored = Image.open(io.BytesIO(b64decode(data["image/png"])))
    alone = Image.open(io.BytesIO(explorer.figure.png()))
    assert stored.width == alone.width and stored.height > alone.height  # the caption stands below
    assert stored.convert("RGB").crop((0, 0, *alone.size)).tobytes() == alone.convert("RGB").tobytes()
    assert len(set(stored.convert("L").crop((0, alone.height, *stored.size)).tobytes())) > 1


def test_explorers_do_not_share_anything():
    first, second = make(), make()
    first.controls["height"].value = 7
    assert line(second) == [0, 1]


# --- the explorers of the notebooks ---

LINK = Link("wire", latency_seconds=1e-4, bytes_per_second=1e9, source="made up for a test")
COSTS = StepCosts(
    points=(StepPoint(256, 0.0045, 0.0045, 0.0), StepPoint(2048, 0.0225, 0.0225, 0.0)),
    n_parameters=1_000_000,
    precision="float16",
    setup_seconds=0.5,
    evaluate_seconds_per_image=1e-4,
    hardware="Some GPU",
    on_gpu=True,
)


def move(explorer: Any, **values: Any) -> tuple[Picture, Picture]:
    """The figures before and after the controls are set, which differ in what a person sees."""
    before, shown = explorer.figure, bytes(explorer.picture.value)
    assert explorer.message.value == ""
    for name, value in values.items():
        explorer.controls[name].value = value
    assert explorer.message.value == ""
    assert explorer.figure is not before and bytes(explorer.picture.value) != shown
    return before, explorer.figure


def test_augmentation_moves_the_window_and_changes_the_image(tiny_data):
    images = tiny_data.test_images[:2]
    before, after = move(widgets().augmentation(images, dataset="synthetic"), left=0, image=1)
    windows = [figure.axes[0].patches[0].get_x() for figure in (before, after)]
    assert windows == [3.5, -0.5]
    crop = torch.from_numpy(after.axes[0].get_images()[0].get_array()[4:36, 4:36].copy())
    assert torch.equal(crop, images[1].permute(1, 2, 0))


def test_temperature_moves_the_confidence():
    logits = torch.randn(50, 3, generator=torch.Generator().manual_seed(0))
    explorer = widgets().calibration({"noise": logits}, logits.argmax(1), dataset="noise")
    before, after = move(explorer, temperature=10.0)
    assert [figure.get_suptitle().split()[-1] for figure in (before, after)] == ["1.00", "10.00"]
    sure = [100 * (logits / temperature).softmax(1).amax(1).mean().item() for temperature in (1, 10)]
    for figure, expected in zip((before, after), sure, strict=True):
        assert f"noise: confidence {expected:.1f} %, accuracy 100.0 %" in figure.alt


def test_alpha_moves_celu():
    before, after = move(widgets().activations(), celu_alpha=0.8)
    lowest = [figure.axes[0].get_lines()[1].get_ydata().min() for figure in (before, after)]
    assert lowest == [pytest.approx(-0.3, abs=1e-3), pytest.approx(-0.78, abs=0.01)]


def test_the_number_is_rounded_anew():
    before, after = move(widgets().number_formats(), value=1e6)
    titles = [figure.axes[0].get_lines()[0].get_label() for figure in (before, after)]
    assert titles == ["float16: 1e-05 becomes 1.001e-05", "float16: 1e+06 becomes inf"]


def test_the_loss_scale_moves_the_gradients():
    explorer = widgets().loss_scale({"a": torch.tensor([1e-9, 1.0, 1.0, 1.0])})
    before, after = move(explorer, loss_scale=2**10)
    titles = [figure.axes[0].get_lines()[0].get_label() for figure in (before, after)]
    assert titles == ["a: 25.0 % become 0", "a: 0.0 % become 0"]


def test_group_size_marks_other_groups():
    activations = torch.randn(8, 2, 3, 3, generator=torch.Generator().manual_seed(0))
    explorer = widgets().ghost_batches(activations, dataset="noise")
    assert list(explorer.controls["group_size"].options) == [2, 4, 8]
    before, after = move(explorer, group_size=2, channel=1)
    titles = [figure.get_suptitle() for figure in (before, after)]
    assert titles == [f"data set: noise, a batch of 8 images, channel {channel}" for channel in (0, 1)]
    assert "4 group means with groups of 2" in after.alt


def test_the_scale_moves_the_curve_and_not_what_the_next_norm_sees():
    values = torch.randn(100, generator=torch.Generator().manual_seed(0))
    before, after = move(widgets().scaled_activation(values, dataset="noise"), scale=1.0, bias=-0.4, celu_alpha=0.3)
    first, second = (figure.axes[0].get_lines()[0].get_ydata() for figure in (before, after))
    assert second == pytest.approx(4 * first)
    first, second = (figure.axes[1].get_lines()[0].get_ydata() for figure in (before, after))
    assert second == pytest.approx(first)


def test_eps_moves_the_whitened_spectrum(tiny_data):
    mean, std = (value[:, None, None] for value in pixel_statistics(tiny_data.train_images))
    images = (tiny_data.train_images[:20] - mean) / std
    before, after = move(widgets().whitening(images, dataset="synthetic"), size=2, eps=1.0)
    spectra = [figure.axes[0].get_lines()[1].get_ydata() for figure in (before, after)]
    assert [len(spectrum) for spectrum in spectra] == [27, 12]
    assert spectra[1].min() < 0.1 < spectra[0].max()


def test_the_schedule_keeps_the_recipe_s_and_moves_its_own():
    page = recipe.page_2019()
    explorer = widgets().schedule(page)
    before, after = move(explorer, warmup_fraction=0.5, at=4.0)
    kept, moved = (line.get_xdata() for line in after.axes[0].get_lines() if len(line.get_xdata()) > 2)
    assert list(kept) == list(before.axes[0].get_lines()[0].get_xdata()) and moved[1] == 5.0
    explorer.controls["flat_epochs"].value = 8.0
    assert "flat_epochs=8.0 leaves no time" in explorer.message.value


def test_iterations_move_the_singular_values():
    matrices = {
        name: torch.randn(rows, 12, generator=torch.Generator().manual_seed(0)) for name, rows in (("a", 4), ("b", 6))
    }
    before, after = move(widgets().newton_schulz(matrices), matrix="b", steps=0)
    assert "4 x 12" in before.get_suptitle() and "6 x 12" in after.get_suptitle()
    first, then = (line.get_ydata() for line in after.axes[1].get_lines()[1:3])
    assert list(first) == pytest.approx(list(then), abs=1e-5)  # no iteration, no change


def test_the_bowl_follows_its_sliders():
    before, after = move(widgets().averages_on_a_bowl(), lookahead_alpha=1.0)
    ways = [figure.axes[1].get_lines()[1].get_ydata().tolist() for figure in (before, after)]
    assert ways[0] != ways[1] and ways[1] == pytest.approx(after.axes[1].get_lines()[0].get_ydata().tolist(), abs=1e-5)


def test_more_runs_narrow_the_interval():
    before, after = move(widgets().share_intervals(), n=200)
    assert "82.00 % of 50 runs: 95 % interval 69.2 to 90.2 %" in before.alt
    assert "82.00 % of 200 runs: 95 % interval 76.1 to 86.7 %" in after.alt
