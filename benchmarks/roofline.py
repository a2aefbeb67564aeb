"""Predicts how long a training step would take on an H100, from counts alone: no GPU is used, and nothing is timed.

    python benchmarks/roofline.py                     # count, predict, save, rewrite the README: a few minutes
    python benchmarks/roofline.py --without-compiled  # keep what is saved of compiled steps: quicker
    python benchmarks/roofline.py --readme            # rewrite table.txt and the README from what is saved

`tests/gpu_rehearsal` runs each recipe at full size on a simulated GPU, with its step captured as a CUDA graph, and
notes the layer, bytes and floating-point operations of each kernel. A kernel is then predicted to take the longest of
three times: its bytes at the rate of a copy, its operations at the rate of the matrix units, and a launch inside a
graph. A step takes the sum of its kernels. `train_seconds` is the set-up, all steps, and what each epoch does besides.

What the model leaves out, in both directions:

- Kernels do not overlap, and every byte comes from memory. An H100 keeps 50 MB in its L2 cache, so a kernel that reads
  what the one before it has just written can be faster than predicted.
- An operation moves each of its tensors once. A real batch norm or sum may read its input twice, and be slower.
- A kernel that Inductor generated, and each of our own in Triton, moves all of each tensor it is given, even if it only
  needs a part.
- No convolution reaches the peak, so a second prediction computes convolutions at a lower rate.
- The host keeps up. Python's time between replays, the drawing of random choices, and what the set-up computes on the
  CPU (initial weights, eigenvectors for the whitening layer) cost nothing here.

roofline.json has all counts and predictions, table.txt shows them, and the README sums them up.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from revision import REPOSITORY, commit

from cifar_fast.errors import UserError
from cifar_fast.files import write_text
from cifar_fast.recipe import Recipe, changed_fields
from cifar_fast.recipes import named
from cifar_fast.shown import table
from cifar_fast.training.batches import steps_per_epoch
from cifar_fast.training.result import write_json

SAVED = REPOSITORY / "benchmarks" / "results" / "roofline"
README = SAVED.parent / "README.md"
BEGIN, END = "<!-- roofline.json: begin -->\n", "\n<!-- roofline.json: end -->"
"""The lines around what this script writes in the README."""
COMMAND = "python benchmarks/roofline.py"
N_TRAIN, SIDE = 50_000, 32
"""CIFAR-10's training images, and their side in pixels."""
LONGEST = 12
"""How many kernels of a step table.txt lists."""
COMPILE_SECONDS = 1200.0
"""After which compiling counts as hung."""


# --- the model ---


@dataclass(frozen=True)
class Rates:
    """What the prediction assumes about an H100; none of it is measured."""

    arithmetic: float = 790e12
    """Floating-point operations a second, of matrix products in 16 bits."""
    convolution: float = 790e12
    """The same, of convolutions."""
    memory: float = 3.0e12
    """Bytes a second, read and written."""
    launch: float = 2e-6
    """Seconds that the shortest kernel of a CUDA graph takes."""
    upload: float = 50e9
    """Bytes a second from pinned memory over PCIe 5. Copies from pageable memory are slower, but counted alike."""


AT_PEAK = Rates()
SLOWER = Rates(convolution=450e12)
"""Convolutions at a little over half of the peak, an assumption too."""
TRANSFERS = ("copy from pinned memory", "copy from pageable memory", "copy to the host")


class Kernel(NamedTuple):
    """A kernel or a transfer, as `count_work` of tests/gpu_rehearsal/tasks.py returns it."""

    layer: str
    direction: str
    """`forward`, `backward`, or empty."""
    family: str
    what: str
    n_bytes: int
    flop: int
    launches: int
    """How often it is launched with these figures."""


def limits(kernel: Kernel, rates: Rates) -> dict[str, float]:
    """Return the shortest time, in seconds, that each limit allows for one launch of a kernel."""
    if kernel.family in TRANSFERS:
        return {"bytes": kernel.n_bytes / rates.upload, "launches": rates.launch}
    arithmetic = rates.convolution if kernel.family == "convolution" else rates.arithmetic
    return {
        "bytes": kernel.n_bytes / rates.memory,
        "arithmetic": kernel.flop / arithmetic,
        "launches": rates.launch,
    }


def seconds(kernel: Kernel, rates: Rates) -> float:
    """Return the predicted seconds of one launch of a kernel: the longest of those times."""
    return max(limits(kernel, rates).values())


def totals(kernels: Iterable[Kernel]) -> dict[str, Any]:
    """Add up launches, bytes, operations and predicted seconds, and the seconds that each limit decides."""
    found: dict[str, Any] = {"kernels": 0, "bytes": 0, "flop": 0, "seconds": 0.0, "seconds_slower": 0.0}
    decided = {"bytes": 0.0, "arithmetic": 0.0, "launches": 0.0}
    for kernel in kernels:
        possible = limits(kernel, AT_PEAK)
        decided[max(possible, key=possible.__getitem__)] += kernel.launches * seconds(kernel, AT_PEAK)
        found["kernels"] += kernel.launches
        found["bytes"] += kernel.launches * kernel.n_bytes
        found["flop"] += kernel.launches * kernel.flop
        found["seconds"] += kernel.launches * seconds(kernel, AT_PEAK)
        found["seconds_slower"] += kernel.launches * seconds(kernel, SLOWER)
    return found | {"decided_by": decided}


# --- what is predicted ---


@dataclass(frozen=True)
class Variant:
    """A recipe, and how its captured step is made."""

    title: str
    recipe: Recipe
    compile: str = "off"

    def steps(self) -> Counter[tuple[int, str]]:
        """Count the training steps by the side of their images and the state of the whitening bias."""
        per_epoch = steps_per_epoch(self.recipe, N_TRAIN)
        found: Counter[tuple[int, str]] = Counter()
        for step in range(math.ceil(self.recipe.epochs * per_epoch)):
            epoch = step / per_epoch
            state = "frozen" if epoch >= self.recipe.whitening_bias_epochs else "learned"
            found[self.recipe.resolution(int(epoch), SIDE), state] += 1
        return found


def variants() -> dict[str, Variant]:
    """Return what is predicted, by the names in roofline.json."""
    speedrun = named("speedrun")
    large = replace(speedrun, resolutions=(), epochs=9.0)
    unfused = replace(large, fuse_norm=False)
    in_full = "`speedrun` with nine epochs of full-size images"
    return {
        "speedrun": Variant("`speedrun`, not compiled", speedrun),
        "speedrun_compiled": Variant("`speedrun` as it is, compiled", speedrun, compile="on"),
        "narrow": Variant(
            "`speedrun` with widths of 64, 192 and 192, not compiled", replace(speedrun, widths=(64, 192, 192))
        ),
        "large": Variant(f"{in_full}, not compiled", large),
        "large_compiled": Variant(f"{in_full}, compiled", large, compile="on"),
        "large_unfused": Variant(f"{in_full}, without `fuse_norm`, not compiled", unfused),
        "large_unfused_compiled": Variant(f"{in_full}, without `fuse_norm`, compiled", unfused, compile="on"),
        "airbench_2024": Variant("`airbench_2024`, not compiled", named("airbench_2024")),
        "apple_8gpu": Variant("`apple_8gpu`, 8 shards on one GPU, not compiled", named("apple_8gpu")),
    }


def predict(variant: Variant, counted: Mapping[int, Mapping[str, Any]]) -> dict[str, Any]:
    """Return the predictions for a variant, and the counts behind them.

    Args:
        variant: what is predicted.
        counted: for each side of the images, what `count_work` returned.
    """
    sizes, whole = [], {"seconds": 0.0, "seconds_slower": 0.0}
    first = counted[max(counted)]
    setting_up = totals(_kernels(first["set-up"]))
    besides = totals(_kernels(first["rest of two epochs"]))
    epochs = math.ceil(variant.recipe.epochs)
    for (side, state), n_steps in variant.steps().items():
        kernels = _kernels(counted[side]["steps"][state])
        step = totals(kernels)
        sizes.append(
            {"side": side, "whitening_bias": state, "n_steps": n_steps, "step": step}
            | {"layers": _grouped(kernels), "longest": _longest(kernels)}
        )
        for clock in whole:
            whole[clock] += n_steps * step[clock]
    for clock in whole:
        whole[clock] += setting_up[clock] + epochs * besides[clock] / 2
    return {
        "title": variant.title,
        "recipe": variant.recipe.to_dict(),
        "step_mode": first["step mode"],
        "torch": first["torch"],
        "set_up": setting_up,
        "rest_of_two_epochs": besides,
        "steps": sizes,
        "predicted_train_seconds": whole["seconds"],
        "predicted_train_seconds_slower": whole["seconds_slower"],
    }


def _kernels(rows: Iterable[Sequence[Any]]) -> list[Kernel]:
    return [Kernel(*row) for row in rows]


def _grouped(kernels: Iterable[Kernel]) -> list[dict[str, Any]]:
    """Return the totals of each layer, direction and family, in the order of a step."""
    groups: dict[tuple[str, str, str], list[Kernel]] = {}
    for kernel in kernels:
        groups.setdefault((kernel.layer, kernel.direction, kernel.family), []).append(kernel)
    names = ("layer", "direction", "family")
    return [dict(zip(names, group, strict=True)) | _sum([totals(inside)]) for group, inside in groups.items()]


def _longest(kernels: Iterable[Kernel]) -> list[dict[str, Any]]:
    slowest = sorted(kernels, key=lambda kernel: kernel.launches * seconds(kernel, AT_PEAK), reverse=True)
    return [kernel._asdict() | {"seconds": kernel.launches * seconds(kernel, AT_PEAK)} for kernel in slowest[:LONGEST]]


def count(names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Rehearse the variants, each size of their images once, and return what is predicted for each.

    Raises `UserError` where the simulated GPU cannot be built, or a step was not captured or compiled as it should be.
    """
    sys.path.insert(0, str(REPOSITORY / "tests"))
    from gpu_rehearsal.runtime import CannotBuild, Rehearsal, build

    found, known = {}, {}
    with tempfile.TemporaryDirectory() as folder:
        try:
            runtime = build(Path(folder))
        except CannotBuild as error:
            raise UserError(str(error)) from error
        with Rehearsal(runtime) as rehearsal:
            for name in names:
                variant = variants()[name]
                counted = {}
                for side in sorted({side for side, _ in variant.steps()}):
                    arguments = {"name": variant.recipe.name, "side": side, "compile": variant.compile}
                    changed = changed_fields(named(variant.recipe.name), variant.recipe)
                    # The size is given already, and no step depends on the number of epochs.
                    given = ("resolutions", "epochs")
                    arguments |= {field: now for field, (_, now) in changed.items() if field not in given}
                    key = repr(arguments)
                    if key not in known:
                        known[key] = rehearsal.run("count_work", seconds=COMPILE_SECONDS, **arguments)
                        print("counted " + ", ".join(map(str, arguments.items())), flush=True)
                    counted[side] = known[key]
                    wanted = "compiled and captured" if variant.compile == "on" else "captured"
                    if counted[side]["step mode"] != wanted or counted[side]["violations"]:
                        raise UserError(f"{name}: the step is not {wanted}: {counted[side]['reason']}")
                found[name] = predict(variant, counted) | {"commit": commit()}
    return found


# --- what is shown ---

TOGETHER = ("whiten, activation", "pool, linear, scale")
"""Layers before the first and behind the last block, shown as one."""
LAST = ("loss", "optimiser")
FIGURES = ("kernels", "GB", "TFLOP", "predicted ms", "with slower convolutions")


def text_table(report: Mapping[str, Any]) -> str:
    """Return the report to read: each step with its layers, directions and families, and its longest kernels."""
    rates = report["rates"]
    parts = [
        f"Predicted by a model, not measured. Assumed of an H100: arithmetic {rates['arithmetic'] / 1e12:g} TFLOP/s, "
        f"memory {rates['memory'] / 1e12:g} TB/s, a launch {rates['launch'] * 1e6:g} us, upload "
        f"{rates['upload'] / 1e9:g} GB/s; slower convolutions {rates['convolution_slower'] / 1e12:g} TFLOP/s."
    ]
    for found in report["variants"].values():
        title = found["title"].replace("`", "")
        parts.append(
            f"== {title}: {found['step_mode']}, torch {found['torch']}, commit {found['commit'][:9]}; predicted "
            f"train_seconds {found['predicted_train_seconds']:.3f}, with slower convolutions "
            f"{found['predicted_train_seconds_slower']:.3f}; of these the set-up {found['set_up']['seconds']:.4f}"
        )
        for each in found["steps"]:
            parts.append(f"{each['n_steps']} steps, {each['side']} pixels, whitening bias {each['whitening_bias']}")
            head: tuple[str, ...] = ("layer", "direction", "family", *FIGURES)
            rows: list[tuple[str, ...]] = [
                (row["layer"], row["direction"], row["family"], *_figures(row, 4)) for row in each["layers"]
            ]
            parts.append(table([head, *rows, ("a step", "", "", *_figures(each["step"], 4))]))
            head = ("launches", "layer", "direction", "MB each", "GFLOP each", "predicted us", "longest kernels")
            rows = [
                (
                    str(row["launches"]),
                    row["layer"],
                    row["direction"],
                    f"{row['n_bytes'] / 1e6:.1f}",
                    f"{row['flop'] / 1e9:.1f}",
                    f"{row['seconds'] * 1e6:.1f}",
                    row["what"],
                )
                for row in each["longest"]
            ]
            parts.append(table([head, *rows]))
    return "\n\n".join(parts) + "\n"


def readme_block(report: Mapping[str, Any]) -> str:
    """Return as Markdown what the README says: the layers of a step of `speedrun`, all variants, and what follows."""
    found = report["variants"]
    step = _usual(found["speedrun"])[-1]
    layers: dict[str, list[dict[str, Any]]] = {}
    for row in step["layers"]:
        names = [names for names in TOGETHER if row["layer"] in names.split(", ")]
        layers.setdefault(names[0] if names else row["layer"], []).append(row)
    order = [name for name in layers if name not in LAST] + list(LAST)
    rows: list[tuple[str, ...]] = [
        ("layer of `speedrun`, not compiled", *FIGURES[:-1], "share of the step", FIGURES[-1])
    ]
    for name in order:
        rows.append(_with_share(name, _sum(layers[name]), step["step"]["seconds"]))
    rows.append(_with_share("the whole step", step["step"], step["step"]["seconds"]))
    clocks = ("predicted `train_seconds`", "with slower convolutions")
    others = [("variant", *FIGURES, "limited by memory / arithmetic / launches", *clocks)]
    for each in found.values():
        for usual in _usual(each):
            shares = [part / usual["step"]["seconds"] for part in usual["step"]["decided_by"].values()]
            limited = " / ".join(f"{100 * share:.0f} %" for share in shares)
            whole = [each[f"predicted_train_seconds{slower}"] for slower in ("", "_slower")]
            # Only once for a recipe with images of several sizes.
            last = [f"{clock:.2f} s" if usual is _usual(each)[-1] else "" for clock in whole]
            title = each["title"] + (f", {usual['side']} pixels" if len(_usual(each)) > 1 else "")
            others.append((title, *_figures(usual["step"]), limited, *last))
    return "\n\n".join([_markdown(rows), _markdown(others), NOTE, *_conclusions(found)])


NOTE = (
    "The first table is a step of `speedrun` on full-size images that is captured but not compiled. Each layer "
    "includes its forward and backward pass; `batch` makes and augments the images. The steps shown have a "
    "frozen whitening bias. `train_seconds` adds up the set-up, all the steps, and the work at the end of each epoch. "
    "No convolution reaches the peak rate, so the columns `with slower convolutions` assume "
    f"{SLOWER.convolution / 1e12:.0f} TFLOP/s for them."
)


def _conclusions(found: Mapping[str, Any]) -> list[str]:
    """Return what the figures say about the limits of a step and about capture, small images and compilation."""
    plain = found["speedrun"]
    step, unfused = (_usual(each)[-1]["step"] for each in (plain, found["large_unfused"]))
    names = {"bytes": "memory traffic", "arithmetic": "arithmetic", "launches": "launches"}
    shares = {names[limit]: 100 * part / step["seconds"] for limit, part in step["decided_by"].items()}
    first, second, third = sorted(shares, key=shares.__getitem__, reverse=True)
    said = [
        f"In this model, {first} limits {shares[first]:.0f} % of the time of that step, {second} "
        f"{shares[second]:.0f} %, and {third} {shares[third]:.0f} %. At the assumed rate, the arithmetic alone would "
        f"take {1e3 * step['flop'] / AT_PEAK.arithmetic:.2f} of the {1e3 * step['seconds']:.2f} ms.",
        f"*Fused norms.* With `fuse_norm` a step has {_traffic(step)}; without it, {_traffic(unfused)}. The predicted "
        f"time goes from {1e3 * unfused['seconds']:.2f} to {1e3 * step['seconds']:.2f} ms. The real gain may be "
        "larger: the model assumes that torch's batch norm reads its input only once.",
        f"*Capture.* The predicted kernels take {1e6 * step['seconds'] / step['kernels']:.1f} us on average. If Python "
        "launches them one by one and needs longer than that for each, the GPU has to wait. A captured step does not "
        "depend on Python's speed.",
    ]
    (products,) = [
        row for row in _usual(plain)[-1]["layers"] if (row["layer"], row["family"]) == ("optimiser", "matrix product")
    ]
    said.append(
        "*Muon on several GPUs.* Each GPU orthogonalises all filters. The matrix products are predicted to take "
        f"{1e3 * products['seconds']:.3f} ms of a step, and their {products['kernels']} launches alone "
        f"{1e3 * products['kernels'] * AT_PEAK.launch:.3f}. If the GPUs shared the filters, they would save at most "
        "the difference, and need another collective to exchange the results."
    )
    if {"large_compiled", "large_unfused_compiled"} <= set(found):
        compiled, without = (_usual(found[f"large{name}_compiled"])[-1] for name in ("", "_unfused"))
        clocks = [f"{found[name]['predicted_train_seconds']:.2f}" for name in ("large_compiled", "speedrun_compiled")]
        short, long = (Recipe.from_dict(found[name]["recipe"]) for name in ("large_compiled", "speedrun_compiled"))
        sizes = Counter(long.resolution(epoch, SIDE) for epoch in range(math.ceil(long.epochs)))
        listed = [f"{n} epochs at {side} pixels" for side, n in sorted(sizes.items())]
        said.append(
            f"*Small images.* `speedrun` trains {', '.join(listed[:-1])} and {listed[-1]}. Compiled, they are "
            f"predicted to take {clocks[1]} s, and {short.epochs:g} epochs at full size {clocks[0]} s ([their accuracy]"
            "(#how-the-images-of-speedrun-were-chosen))."
        )
        version = found["large_compiled"]["torch"].partition("+")[0]
        pools = [
            sum(row["bytes"] for row in each["layers"] if row["direction"] == "backward" and "pool" in row["family"])
            for each in (_usual(found["large_unfused"])[-1], without)
        ]
        said.append(
            f"*Compilation* (torch {version}) of augmentation, network, loss and Muon's update leaves "
            f"{_traffic(compiled['step'])} and are predicted to take "
            f"{1e3 * compiled['step']['seconds']:.2f} ms. Without `fuse_norm` it leaves {_traffic(without['step'])} "
            f"and are predicted to take {1e3 * without['step']['seconds']:.2f} ms; those of them that compute the "
            f"gradient of a max-pool move {pools[1] / 1e9:.1f} GB, and {pools[0] / 1e9:.1f} if nothing is compiled."
        )
    return said


def _traffic(step: Mapping[str, Any]) -> str:
    return f"{step['kernels']} kernels, which move {step['bytes'] / 1e9:.1f} GB"


def _usual(found: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the steps with a frozen whitening bias, those with the largest images last."""
    frozen = [each for each in found["steps"] if each["whitening_bias"] == "frozen"]
    return sorted(frozen, key=lambda each: each["side"])


def _sum(rows: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    rows = list(rows)
    return {key: sum(row[key] for row in rows) for key in ("kernels", "bytes", "flop", "seconds", "seconds_slower")}


def _figures(row: Mapping[str, Any], digits: int = 2) -> tuple[str, ...]:
    more = digits + 1
    return (
        str(row["kernels"]),
        f"{row['bytes'] / 1e9:.{digits}f}",
        f"{row['flop'] / 1e12:.{more}f}",
        f"{row['seconds'] * 1e3:.{digits}f}",
        f"{row['seconds_slower'] * 1e3:.{digits}f}",
    )


def _with_share(name: str, row: Mapping[str, Any], whole: float) -> tuple[str, ...]:
    *figures, slower = _figures(row)
    return name, *figures, f"{100 * row['seconds'] / whole:.0f} %", slower


def _markdown(rows: Sequence[Sequence[str]]) -> str:
    head, *body = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([head, "|---" * len(rows[0]) + "|", *body])


# --- the command ---


def write(report: Mapping[str, Any], out: Path) -> None:
    """Save the report as roofline.json and table.txt; rewrite the README if `out` is where its results are."""
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / "roofline.json", report)
    write_text(out / "table.txt", text_table(report))
    if out != SAVED:
        return
    text = README.read_text()
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise UserError(f"{README.name} lacks the lines {BEGIN.strip()} and {END.strip()}; put them where results go")
    write_text(README, before + begin + readme_block(report) + end + after)


def saved(out: Path) -> dict[str, Any]:
    """Return the report in a folder; raise `UserError` if it has none."""
    try:
        return dict(json.loads((out / "roofline.json").read_text()))
    except (OSError, ValueError) as error:
        raise UserError(f"{out / 'roofline.json'} cannot be read; make it with {COMMAND}") from error


def main(argv: Sequence[str]) -> int:
    """Do what the command line says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=SAVED, help="folder of roofline.json and table.txt")
    parser.add_argument("--without-compiled", action="store_true", help="keep what is saved of the compiled step")
    parser.add_argument(
        "--readme", action="store_true", help="count nothing; rewrite what is shown of the saved report"
    )
    options = parser.parse_args(argv)
    out = options.out.resolve()
    try:
        if options.readme:
            write(saved(out), out)
            return 0
        kept = saved(out)["variants"] if options.without_compiled and (out / "roofline.json").exists() else {}
        names = [
            name for name, variant in variants().items() if variant.compile == "off" or not options.without_compiled
        ]
        found = kept | count(names)
        report = {
            "predicted": "by a model from counted kernels; nothing was measured",
            "command": COMMAND,
            "rates": asdict(AT_PEAK) | {"convolution_slower": SLOWER.convolution},
            "rates_from": "assumed, not measured",
            "variants": {name: found[name] for name in variants() if name in found},
        }
        write(report, out)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
