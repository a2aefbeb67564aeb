"""GPU results are shown with their origin, gaps are named, and nothing else is ever shown as a GPU result."""

from __future__ import annotations

import copy
import fnmatch
import json
import re
import tomllib
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from cifar_fast import recipes
from cifar_fast.errors import RunError, UserError
from cifar_fast.experiments import gpu_report
from cifar_fast.experiments.gpu_report import (
    MISSING,
    WAYS,
    readme_block,
    recipe_table,
    saved_parts,
    sharing_table,
    step_tables,
)
from cifar_fast.experiments.published import CIFAR10_FINGERPRINT
from cifar_fast.recipe import Recipe

ROOT = Path(__file__).resolve().parents[2]
TABLES = (step_tables, sharing_table, recipe_table, readme_block)
FIGURES = re.compile(r"\d+\.\d+ (?:%|s\b|TFLOP)|(?<!python )\b\d+ of \d+\b|\d us\b|\d passed")
# All that follows is made up.
DATA = {"name": "CIFAR-10", "fingerprint": CIFAR10_FINGERPRINT, "n_train": 50_000, "n_test": 10_000, "classes": ["a"]}
MACHINE = {
    "device": "cuda", "gpu": "Some GPU", "cpu": "Some Processor", "cpu_capability": "AVX512", "threads": 2,
    "torch": "2.99", "python": "3.11.7", "precision": "float16", "convolution": "direct", "world_size": 1,
    "backend": None, "step_mode": "compiled and captured", "step_mode_reason": "",
}  # fmt: skip
EIGHT = {"world_size": 8, "backend": "nccl"}
CLOCKS = {"train_seconds": 111.0, "warm_up_seconds": 222.0, "evaluate_seconds": 5.0, "total_seconds": 333.0}
COMMIT = 10 * "abcd"


def write_runs(folder: Path, recipe: Recipe, accuracies: list[float], **machine: Any) -> None:
    """What a benchmark leaves."""
    folder.mkdir(parents=True)
    epoch = {"epoch": 1, "train_loss": 1.0, "train_accuracy": 0.5, "test_loss": 0.5, "test_accuracy": 0.5}
    kept = CLOCKS | {"loss": 0.5, "target": 0.94, "version": "0.1.0", "dataset": DATA, "epochs": [epoch]}
    kept |= {"environment": MACHINE | machine, "recipe": recipe.to_dict()}
    lines = [kept | {"run": run, "seed": run, "accuracy": accuracy} for run, accuracy in enumerate(accuracies)]
    (folder / "results.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "commits.txt").write_text(f"{COMMIT}-changed\n")


@pytest.fixture(scope="module")
def whole(gpu: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A report of all parts, which the script has collected from made-up findings."""
    out = tmp_path_factory.mktemp("whole")
    write_runs(out / "speedrun", recipes.speedrun(), [0.8801, 0.8802, 0.8803])
    write_runs(out / "speedrun_all_gpus", recipes.speedrun(), [0.8811, 0.8812], **EIGHT)
    write_runs(out / "apple_8gpu", recipes.apple_8gpu(), [0.9421, 0.8822], **EIGHT)
    for name in recipes.names():
        if name not in ("speedrun", "apple_8gpu"):
            write_runs(out / "recipes" / name, recipes.named(name), [0.77], **EIGHT)
    ways = {}
    for number, way in enumerate(WAYS):
        run = SimpleNamespace(accuracy=0.7, environment=MACHINE, **CLOCKS)
        ways[way] = [gpu.brief(run), gpu.brief(run) | {"train_seconds": 10.0 + number}]
    about = {"about": {"recipe": "speedrun", "dataset": DATA}}
    kernels = about | {
        "limit": {"side": 8192, "repeats": 20, "tflops": {"float16": 654.0, "bfloat16": 543.0}},
        "step": gpu.analyse([("conv", 0.0, 10.0), ("norm", 12.0, 15.0)], 1) | {"share_of_limit": 0.321},
    }
    airbench = {"about": {"recipe": "train94", "dataset": DATA, "version": "0.1.8", "warm_up_seconds": 99.0}}
    airbench["runs"] = [{"accuracy": 0.66, "train_seconds": 44.0}, {"accuracy": 0.66, "train_seconds": 45.0}]
    command = {"recipe": recipes.speedrun().to_dict(), "dataset": DATA, "environment": MACHINE}
    start = {"about": gpu.about(command)} | {which: {"accuracy": 0.55, **CLOCKS} for which in ("first", "second")}
    for name, found in (
        ("kernels", kernels), ("ways", about | {"ways": ways}), ("airbench", airbench), ("start", start),
    ):  # fmt: skip
        (out / f"{name}.json").write_text(json.dumps(found))
    (out / "tests.xml").write_text(
        "<testsuite><testcase name='a'/><testcase name='b'><skipped/></testcase></testsuite>"
    )
    entry = {"state": "done", "seconds": 1.0, "ended": "2031-01-01T00:00:00+00:00", "commit": COMMIT}
    entry |= {"environment": MACHINE, "gpus": ["Some GPU"]}
    return {"parts": {part: entry | {"found": gpu.collect(part, out)} for part in gpu.PARTS}}


@pytest.fixture
def save(tmp_path: Path) -> Callable[[Any], Path]:
    """Writes a report to gpu.json; returns the folder."""

    def save(report: Any) -> Path:
        (tmp_path / "gpu.json").write_text(report if isinstance(report, str) else json.dumps(report))
        return tmp_path

    return save


def words(text: str) -> str:
    """The text with single spaces."""
    return re.sub(" +", " ", text)


def test_without_a_file_everything_is_missing_and_no_figure_is_shown(tmp_path):
    assert saved_parts(tmp_path) == {}
    for table in TABLES:
        text = table(tmp_path)
        assert not FIGURES.search(text)
        for line in filter(None, text.splitlines()):
            assert line.lower().startswith(MISSING.lower()) or gpu_report.COMMAND in line


def test_a_broken_file_is_reported_with_what_to_do(save):
    for content in ("{half a fi", "", "[]", "null", "{}"):
        for table in TABLES:
            with pytest.raises(RunError, match="gpu.json cannot be read .*; measure again: python"):
                table(save(content))


def test_a_complete_report_has_no_gap_and_says_where_it_was_measured(whole, save):
    for table in TABLES:
        text = table(save(whole))
        assert MISSING.lower() not in text.lower() and "not shown" not in text and "part " not in text.lower(), (
            table.__name__
        )
        for said in ("Some GPU", "2.99", COMMIT[:9], "CIFAR-10"):
            assert said in text
        assert COMMIT not in text
    assert "8 x Some GPU, 8 processes (nccl) 2.99 abcdabcda-changed" in words(sharing_table(save(whole)))


def test_step_tables_show_the_second_run_of_each_way_and_the_kernels(whole, save):
    text = words(step_tables(save(whole)))
    for number, way in enumerate(WAYS):
        seconds = 10 + number
        assert f"{way} compiled and captured 1 {seconds:.3f} s {16 / seconds:.2f} 222.000 s\n" in text
    assert "best of n = 20: float16 654 TFLOP/s, bfloat16 543 TFLOP/s" in text
    assert "takes 15 us (n = 1 steps); the GPU is busy for 86.7 % of it and reaches 32.1 % of the matrix limit" in text
    assert "\nconv 76.9 % 10.0 1.0\n" in text


def test_sharing_table_shows_the_share_at_the_target_with_its_interval(whole, save):
    text = words(sharing_table(save(whole)))
    assert "apple_8gpu 2 1 of 2 (9.5 to 90.5 %) 91.22 % 111.000 s (111.000 to 111.000) 8 x Some GPU" in text
    assert "speedrun on several GPUs 2 0 of 2" in text


def test_recipe_table_has_one_row_for_each_recipe_and_the_readme_the_same_rows(whole, save):
    rows = {line.split("  ")[0]: words(line) for line in recipe_table(save(whole)).splitlines()}
    assert set(recipes.names()) <= set(rows)
    assert "speedrun 3 88.02 % (88.00 to 88.04) 111.000 s (111.000 to 111.000) 222.000 s 333.000" in rows["speedrun"]
    assert "apple_8gpu 2 91.22 %" in rows["apple_8gpu"] and "laptop 1 77.00 % 111.000 s 222" in rows["laptop"]
    assert rows["PyPI's airbench"] == (
        "PyPI's airbench 2 66.00 % (66.00 to 66.00) 44.500 s (38.147 to 50.853) 99.000 s - Some GPU 2.99 airbench 0.1.8"
    )
    for start in ("a cold start of speedrun", "a warm start of speedrun"):
        assert f"{start} 1 55.00 % 111.000 s 222.000 s 333.000 s Some GPU" in rows[start]
    cells = [line.strip("| ").split(" | ") for line in readme_block(save(whole)).splitlines() if line.startswith("|")]
    assert [" ".join(row) for row in cells[2:]] == [rows[row[0]] for row in cells[2:]]
    assert len(cells) == 2 + len(recipes.names()) + 3 + len(gpu_report.SHOWN_RECORDS)
    assert rows["published: Hiverge"] == "published: Hiverge - 94 % 1.99 s - - 1 A100 - -"
    assert len([name for name in rows if name.startswith("published: ")]) - 1 == len(gpu_report.SHOWN_RECORDS)
    assert "`pytest -m gpu`: 1 passed, 1 skipped (::b); Some GPU; torch 2.99" in readme_block(save(whole))


def test_gaps_in_parts_that_ended_early_are_named_beside_what_they_found(whole, save):
    report = copy.deepcopy(whole)
    parts = report["parts"]
    rungs = [rung.recipe.name for rung in recipes.ladder()]
    for name in [*rungs[1:5], "airbench_2024"]:
        del parts["recipes"]["found"][name]
    parts["recipes"]["state"] = "out of time"
    parts["kernels"]["state"] = "ended after 60 s"
    del parts["kernels"]["found"]["limit"], parts["kernels"]["found"]["step"]
    del parts["ways"]["found"]["ways"][list(WAYS)[-1]]
    parts["start"] |= {"later_attempt": {"state": "failed with status 7", "ended": "2032", "commit": COMMIT}}
    del parts["airbench"], parts["speedrun"]["found"]["speedrun_all_gpus"]
    folder = save(report)
    text = recipe_table(folder)
    assert f"\n{MISSING}: airbench_2024, {rungs[1]} ... {rungs[4]}, PyPI's airbench\n" in text
    assert "77.00 %" in text and "note: part recipes on 2031-01-01T00:00:00+00:00: out of time" in text
    assert "55.00 %" in text and "note: part start on 2032: failed with status 7" in text
    text = words(step_tables(folder))
    assert f"1 10.000 s {MISSING} 222" in text and f"{MISSING}: speedrun with {list(WAYS)[-1]}" in text
    assert "TFLOP" not in text and "\nnote: part kernels on 2031" in text and text.endswith("measures what is missing")
    assert f"{MISSING}: speedrun on several GPUs" in sharing_table(folder)


@pytest.mark.parametrize(
    "pattern, replacement, reason",
    [
        (CIFAR10_FINGERPRINT, "another", "measured on CIFAR-10, not on all of CIFAR-10, so not shown"),
        ('"recipe": "(speedrun|apple_8gpu|train94)"', '"recipe": "smoke"', "measured with the recipe smoke, not with "),
        ('"gpu": "Some GPU"', '"gpu": null', "measured without a GPU, so not shown"),
    ],
    ids=["data set", "recipe", "hardware"],
)
def test_figures_of_another_data_set_recipe_or_device_are_refused_with_the_reason(
    pattern, replacement, reason, whole, save
):
    report = json.loads(re.sub(pattern, replacement, json.dumps(whole)))
    if "GPU" not in reason:
        del report["parts"]["tests"]  # which have neither recipe nor data set
    if "recipe" in reason:
        del report["parts"]["recipes"]  # whose rows are of all recipes
    for table in TABLES:
        text = table(save(report))
        assert reason.lower() in text.lower() and not FIGURES.search(text), table.__name__


# --- README, package and notebooks ---


def test_the_readme_shows_what_is_saved_and_says_nothing_else_about_gpus(gpu):
    before, begin, rest = gpu.README.read_text().partition(gpu.BEGIN)
    block, end, after = rest.partition(gpu.END)
    assert begin and end and block == readme_block()
    assert MISSING.lower() not in (before + after).lower()  # or the two could contradict each other


def test_the_front_page_says_that_no_gpu_has_been_timed_just_as_long_as_none_has():
    """Once there is a measurement, its row in the table of expectations gets the figures."""
    assert ("not yet timed on a GPU" in (ROOT / "README.md").read_text()) == (not saved_parts())


def test_the_script_rewrites_the_readme_between_its_markers_from_the_folder_of_saved_results_only(
    gpu, whole, tmp_path, monkeypatch, capsys
):
    readme, results, old = tmp_path / "README.md", tmp_path / "results", f"before\n{gpu.BEGIN}old\n{gpu.END}\nafter\n"
    readme.write_text(old)
    monkeypatch.setattr(gpu, "README", readme)
    monkeypatch.setattr(gpu, "REPOSITORY", tmp_path)
    monkeypatch.setattr(gpu, "SAVED", results)
    monkeypatch.setattr(gpu, "run_part", lambda *_: ("done", 1.0))
    gpu.measure(gpu.parse(["--out", str(tmp_path / "elsewhere"), "--device", "cpu", "--only", "start"]))
    assert readme.read_text() == old
    assert gpu.main(["--out", str(results), "--device", "cpu", "--recipe", "smoke"]) == 2
    assert "this is a dry run (device cpu, recipe smoke), and results holds" in capsys.readouterr().err
    assert not results.exists()
    options = gpu.parse(["--out", str(results), "--device", "cpu", "--only", "start"])
    gpu.measure(options)
    assert readme.read_text() == f"before\n{gpu.BEGIN}{readme_block(results)}{gpu.END}\nafter\n"
    (results / "gpu.json").write_text(json.dumps(whole))
    assert gpu.main(["--out", str(results), "--readme"]) == 0
    assert readme.read_text() == f"before\n{gpu.BEGIN}{readme_block(results)}{gpu.END}\nafter\n"
    assert "88.02 %" in readme.read_text()
    readme.write_text("no markers\n")
    with pytest.raises(UserError, match="README.md lacks the lines <!-- gpu.json: begin --> and"):
        gpu.main(["--out", str(results), "--readme"])
    gpu.measure(options)
    assert "warning: the README was not rewritten" in capsys.readouterr().err
    assert readme.read_text() == "no markers\n"


def test_an_installed_package_has_the_file_where_it_is_looked_for(gpu):
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    where = gpu.SAVED.relative_to(ROOT / settings["package-dir"]["cifar_fast.results"]) / gpu_report.FILE
    patterns = settings["package-data"]["cifar_fast.results"]
    assert any(len(Path(one).parts) == len(where.parts) and fnmatch.fnmatch(str(where), one) for one in patterns)


def test_notebooks_show_what_is_saved():
    for notebook, call in (("03", "step_tables"), ("11", "sharing_table"), ("12", "recipe_table")):
        (path,) = (ROOT / "notebooks").glob(f"{notebook}_*.ipynb")
        cells = json.loads(path.read_text())["cells"]
        found = [cell for cell in cells if f"gpu_report.{call}()" in "".join(cell["source"])]
        assert len(found) == 1 and found[0]["metadata"]["tags"] == ["nbval-ignore-output"]
