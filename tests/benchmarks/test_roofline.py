"""benchmarks/roofline.py predicts by the model that it describes, and the README shows what it has saved."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cifar_fast.errors import UserError
from cifar_fast.recipes import named

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def script() -> Iterator[Any]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "benchmarks"))
        yield importlib.import_module("roofline")
        sys.modules.pop("roofline", None)


def test_a_kernel_takes_what_its_narrowest_limit_allows(script: Any) -> None:
    add = script.Kernel("block1a", "forward", "elementwise", "add", 600_000_000, 0, 2)  # 0.6 GB at 3 TB/s: 200 us
    convolution = script.Kernel("block2a", "forward", "convolution", "conv", 30_000_000, 79_000_000_000, 1)  # 100 us
    tiny = script.Kernel("loss", "forward", "loss", "sum", 4, 0, 10)  # 2 us
    assert script.seconds(add, script.AT_PEAK) == pytest.approx(200e-6)
    assert script.seconds(convolution, script.AT_PEAK) == pytest.approx(100e-6)
    assert script.seconds(tiny, script.AT_PEAK) == pytest.approx(2e-6)
    # 79 GFLOP at 450 TFLOP/s; other kernels take as long as before.
    assert script.seconds(convolution, script.SLOWER) == pytest.approx(175.5556e-6)
    assert script.seconds(add, script.SLOWER) == script.seconds(add, script.AT_PEAK)
    found = script.totals([add, convolution, tiny])
    assert (found["kernels"], found["bytes"], found["flop"]) == (13, 1_230_000_040, 79_000_000_000)
    assert found["seconds"] == pytest.approx(520e-6) and found["seconds_slower"] == pytest.approx(595.5556e-6)
    expected = {"bytes": 400e-6, "arithmetic": 100e-6, "launches": 20e-6}
    assert found["decided_by"] == pytest.approx(expected)
    sent = script.Kernel("set-up", "", "copy from pageable memory", "images", 50_000_000, 0, 1)
    assert script.seconds(sent, script.AT_PEAK) == pytest.approx(1e-3)


def test_steps_are_counted_by_size_and_state_of_the_whitening_bias(script: Any) -> None:
    # 32 steps an epoch; the bias is learned for the first 0.19 epochs, 7 steps.
    assert script.variants()["large"].steps() == {(32, "learned"): 7, (32, "frozen"): 281}
    small = script.Variant("", named("speedrun")).steps()
    assert small == {(24, "learned"): 7, (24, "frozen"): 121, (28, "frozen"): 96, (32, "frozen"): 128}


def test_a_training_run_takes_its_set_up_its_steps_and_the_ends_of_its_epochs(script: Any) -> None:
    def row(n_bytes: int, launches: int = 1) -> list[Any]:
        return ["layer", "", "elementwise", "what", n_bytes, 0, launches]

    milliseconds = 3_000_000_000  # bytes
    counted = {
        "step mode": "captured",
        "torch": "2.99",
        "set-up": [row(5 * milliseconds)],
        "steps": {"learned": [row(3 * milliseconds)], "frozen": [row(milliseconds, 2)]},
        "rest of two epochs": [row(milliseconds, 2)],
    }
    found = script.predict(script.variants()["large"], {32: counted})
    # 5 ms; 7 steps of 3 ms and 281 of 2 ms; 9 ends of 1 ms.
    assert found["predicted_train_seconds"] == pytest.approx((5 + 7 * 3 + 281 * 2 + 9) / 1e3)


def test_the_saved_files_and_the_readme_show_the_saved_report(script: Any) -> None:
    report = script.saved(script.SAVED)
    assert (script.SAVED / "table.txt").read_text() == script.text_table(report)
    readme = script.README.read_text()
    assert script.BEGIN + script.readme_block(report) + script.END in readme
    assert set(report["variants"]) == set(script.variants())
    for name, variant in script.variants().items():
        assert report["variants"][name]["recipe"] == variant.recipe.to_dict(), f"{name} has changed: {script.COMMAND}"
    rates = vars(script.AT_PEAK) | {"convolution_slower": script.SLOWER.convolution}
    assert report["rates"] == rates


def test_without_the_compiled_step_what_is_saved_of_it_is_kept(
    script: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    report = script.saved(script.SAVED)
    script.write(report, tmp_path)
    asked: list[str] = []

    def count(names: list[str]) -> dict[str, Any]:
        asked.extend(names)
        return {name: report["variants"][name] | {"commit": "a later one"} for name in names}

    monkeypatch.setattr(script, "count", count)
    assert script.main(["--out", str(tmp_path), "--without-compiled"]) == 0
    compiled = {"speedrun_compiled", "large_compiled", "large_unfused_compiled"}
    assert asked == [name for name in script.variants() if name not in compiled]
    commits = {name: found["commit"] for name, found in script.saved(tmp_path)["variants"].items()}
    kept = {name: report["variants"][name]["commit"] for name in compiled}
    assert commits == dict.fromkeys(asked, "a later one") | kept
    assert script.main(["--out", str(tmp_path / "nothing"), "--readme"]) == 2
    assert "cannot be read" in capsys.readouterr().err


def test_a_readme_without_the_lines_around_the_tables_is_refused(
    script: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    report = script.saved(script.SAVED)
    readme = tmp_path / "README.md"
    monkeypatch.setattr(script, "README", readme)
    monkeypatch.setattr(script, "SAVED", tmp_path / "roofline")
    readme.write_text("# Results\n")
    with pytest.raises(UserError, match="README.md lacks the lines"):
        script.write(report, tmp_path / "roofline")
    readme.write_text(f"# Results\n{script.BEGIN}old{script.END}\nmore\n")
    script.write(report, tmp_path / "roofline")
    assert readme.read_text() == f"# Results\n{script.BEGIN}{script.readme_block(report)}{script.END}\nmore\n"
    with pytest.raises(UserError, match="make it with python benchmarks/roofline.py"):
        script.saved(tmp_path)
    replaced = replace(script.AT_PEAK, memory=1.0)
    assert script.seconds(script.Kernel("", "", "", "", 7, 0, 1), replaced) == 7.0
