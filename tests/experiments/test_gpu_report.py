"""What is filed of GPUs is shown with where it was measured, what is missing is named, and a dry run is never shown."""

from __future__ import annotations

import copy
import fnmatch
import functools
import json
import re
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from cifar_fast import recipes
from cifar_fast.errors import RunError, UserError
from cifar_fast.experiments import gpu_report as gpu_results
from cifar_fast.experiments.gpu_report import (
    MISSING,
    WAYS,
    filed,
    readme_block,
    recipe_table,
    sharing_table,
    step_tables,
)
from cifar_fast.experiments.published import CIFAR10_FINGERPRINT
from cifar_fast.recipe import Recipe

ROOT = Path(__file__).resolve().parents[2]
TABLES = (step_tables, sharing_table, recipe_table, readme_block)
EACH = pytest.mark.parametrize("table", TABLES, ids=lambda table: table.__name__)
# All that follows is made up.
DATA = {"name": "CIFAR-10", "fingerprint": CIFAR10_FINGERPRINT, "n_train": 50_000, "n_test": 10_000, "classes": ["a"]}
MACHINE = {
    "device": "cuda", "gpu": "Some GPU", "cpu": "Some Processor", "cpu_capability": "AVX512", "threads": 2,
    "torch": "2.99", "python": "3.11.7", "precision": "float16", "convolution": "direct", "world_size": 1,
    "backend": None, "launch": "cuda graph", "compiled": True, "launch_reason": "",
}  # fmt: skip
CLOCKS = {"train_seconds": 111.0, "warm_up_seconds": 222.0, "evaluate_seconds": 5.0, "total_seconds": 333.0}
COMMIT = 10 * "abcd"


def write_runs(folder: Path, recipe: Recipe, accuracies: list[float], **machine: Any) -> None:
    """What a benchmark leaves, made up."""
    folder.mkdir(parents=True)
    epoch = {"epoch": 1, "train_loss": 1.0, "train_accuracy": 0.5, "test_loss": 0.5, "test_accuracy": 0.5}
    kept = {
        "loss": 0.5,
        "target": 0.94,
        "version": "0.1.0",
        "dataset": DATA,
        "environment": MACHINE | machine,
        **CLOCKS,
    }
    kept |= {"recipe": recipe.to_dict(), "epochs": [epoch]}
    lines = [kept | {"run": run, "seed": run, "accuracy": accuracy} for run, accuracy in enumerate(accuracies)]
    (folder / "results.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "commits.txt").write_text(f"{COMMIT}\n")


@pytest.fixture(scope="module")
def whole(gpu: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A report of all parts, put together by the script from made-up findings."""
    out = tmp_path_factory.mktemp("whole")
    eight = {"world_size": 8, "backend": "nccl"}
    write_runs(out / "speedrun", recipes.speedrun(), [0.8801, 0.8802, 0.8803])
    write_runs(out / "speedrun_all_gpus", recipes.speedrun(), [0.8811, 0.8812], **eight)
    write_runs(out / "apple_8gpu", recipes.apple_8gpu(), [0.9421, 0.8822], **eight)
    for number, name in enumerate(recipes.names()):
        write_runs(out / "recipes" / name, recipes.named(name), [0.77 + number / 10_000], **eight)
    run = {"accuracy": 0.7, **CLOCKS, "precision": "float16", "launch": "cuda graph", "compiled": True}
    profile = {
        "recipe": recipes.speedrun().to_dict(), "dataset": DATA,
        "ways": {way: [run, run | {"train_seconds": 10.0 + number}] for number, way in enumerate(WAYS)},
        "limit": {"side": 8192, "repeats": 20, "tflops": {"float16": 654.0, "bfloat16": 543.0}},
        "step": gpu.analyse([("conv", 0.0, 10.0), ("norm", 12.0, 15.0)], 1) | {"share_of_limit": 0.321},
    }  # fmt: skip
    airbench = {"recipe": {"name": "train94"}, "dataset": DATA, "version": "0.1.8", "warm_up_seconds": 99.0}
    airbench |= {"runs": [{"accuracy": 0.66, "train_seconds": 44.0}, {"accuracy": 0.66, "train_seconds": 45.0}]}
    start = {"recipe": recipes.speedrun().to_dict(), "dataset": DATA, "environment": MACHINE}
    start |= {which: {"accuracy": 0.55, **CLOCKS} for which in ("first", "second")}
    for name, found in (("profile", profile), ("airbench", airbench), ("start", start)):
        (out / f"{name}.json").write_text(json.dumps(found))
    (out / "tests.xml").write_text(
        "<testsuite><testcase name='a'/><testcase name='b'><skipped/></testcase></testsuite>"
    )
    about = {"state": "done", "seconds": 1.0, "ended": "2031-01-01T00:00:00+00:00", "commit": COMMIT}
    about |= {"environment": MACHINE, "gpus": ["Some GPU"], "dry_run": []}
    return {"parts": {part: about | {"found": gpu.collect(part, out)} for part in gpu.PARTS}}


@pytest.fixture
def file(tmp_path: Path) -> Callable[[Any], Path]:
    """Files a report; returns the folder."""

    def file(report: Any) -> Path:
        (tmp_path / "gpu.json").write_text(report if isinstance(report, str) else json.dumps(report))
        return tmp_path

    return file


FIGURES = re.compile(r"\d+\.\d+ (?:%|s\b|TFLOP)|(?<!python )\b\d+ of \d+\b|\d us\b|\d passed")


@EACH
def test_without_a_file_everything_is_said_to_be_missing(table, tmp_path):
    assert filed(tmp_path) is None
    text = table(tmp_path)
    assert MISSING in text and not FIGURES.search(text)
    assert all(line.rstrip(".").endswith(MISSING) or gpu_results.COMMAND in line for line in text.splitlines() if line)


def test_what_is_filed_is_returned_as_it_is(whole, file):
    assert filed(file(whole)) == whole


@EACH
def test_what_is_whole_lacks_nothing_and_says_where_it_was_measured(table, whole, file):
    text = table(file(whole))
    # airbench has no clock for a whole run.
    assert text.count(MISSING) == (1 if table in (recipe_table, readme_block) else 0)
    for words in ("Some GPU", "2.99", COMMIT[:9], "CIFAR-10 (50,000 training and 10,000 test images)"):
        assert words in text
    assert COMMIT not in text and "note:" not in text.lower()


def test_the_step_is_told_with_the_second_run_of_each_way(whole, file):
    text = step_tables(file(whole))
    for number, way in enumerate(WAYS):
        found = f"cuda graph, compiled 1 {10 + number:.3f} s {13 / (10 + number):.2f} times 222.000 s"
        assert f"{way} {found}" in re.sub(" +", " ", text)
    assert "float16 654 TFLOP/s, bfloat16 543 TFLOP/s" in text and "best of n = 20" in text
    assert "15 us a step" in text and "share of the matrix limit reached: 32.1 %" in text
    assert re.search(r"conv +76\.9 % +10\.0 +1\.0\n", text)


def test_sharing_tells_the_share_with_its_interval_and_leaves_out_what_one_gpu_cannot(whole, file):
    text = re.sub(" +", " ", sharing_table(file(whole)))
    assert "apple_8gpu 2 1 of 2 (9.5 to 90.5 %) 91.22 % 111.000 s (111.000 to 111.000) 8 x Some GPU, 8 pro" in text
    assert "speedrun on all of several GPUs 2 0 of 2" in text
    report = copy.deepcopy(whole)
    del report["parts"]["speedrun"]["found"]["speedrun_all_gpus"]
    assert f"speedrun on all of several GPUs: {MISSING}" in sharing_table(file(report))


def test_every_recipe_has_one_row_that_of_the_part_with_most_runs(whole, file):
    folder = file(whole)
    rows = {line.split("  ")[0]: re.sub(" +", " ", line) for line in recipe_table(folder).splitlines()}
    assert set(recipes.names()) <= set(rows)
    assert "speedrun 3 88.02 % (88.00 to 88.04) 111.000 s (111.000 to 111.000) 222.000 s 333.000" in rows["speedrun"]
    assert "apple_8gpu 2 91.22 %" in rows["apple_8gpu"] and "laptop 1 77.00 % 111.000 s" in rows["laptop"]
    assert f"2 66.00 % (66.00 to 66.00) 44.500 s (38.147 to 50.853) 99.000 s {MISSING} Some" in rows["PyPI's airbench"]
    assert "1 55.00 % 111.000 s 222.000 s 333.000 s Some GPU" in rows["the first fresh command of speedrun"]
    markdown = [line for line in readme_block(folder).splitlines() if line.startswith("|")]
    assert len(markdown) == 2 + len(recipes.names()) + 3 and len({line.count("|") for line in markdown}) == 1


def test_without_the_longer_parts_their_recipes_rows_are_those_of_the_rounds(whole, file):
    report = copy.deepcopy(whole)
    del report["parts"]["apple"], report["parts"]["speedrun"]
    text = re.sub(" +", " ", recipe_table(file(report)))
    assert "\nspeedrun 1 77.01 %" in text and "\napple_8gpu 1 77.02 %" in text


def test_rungs_that_are_missing_together_are_named_by_the_first_and_the_last(whole, file):
    report = copy.deepcopy(whole)
    found = report["parts"]["recipes"]["found"]["recipes"]
    rungs = [rung.recipe.name for rung in recipes.ladder()]
    for name in [*rungs[1:5], "airbench_2024"]:
        del found[name]
    text = recipe_table(file(report))
    assert f"\nairbench_2024, {rungs[1]} ... {rungs[4]}: {MISSING}\n" in text


# --- not whole ---


def test_a_part_that_failed_or_ended_early_says_so_beside_what_it_found(whole, file):
    report = copy.deepcopy(whole)
    parts = report["parts"]
    parts["speedrun"]["state"] = "out of time"
    parts["apple"] |= {"state": "done", "found": None, "trouble": "JSONDecodeError: /somewhere/of/mine is broken"}
    parts["start"] |= {"state": "ended after 480 s", "found": {**parts["start"]["found"], "second": None}}
    parts["profile"] |= {"state": "failed with status 7", "found": None}
    folder = file(report)
    text = recipe_table(folder)
    assert "note: part speedrun: out of time" in text and "88.02 %" in text
    assert "note: part apple: what it left cannot be read, JSONDecodeError" in text and "/somewhere" not in text
    assert "note: part start: ended after 480 s" in text and "55.00 %" in text
    assert f"the second fresh command of speedrun: {MISSING}" in text
    text = step_tables(folder)
    assert "note: part profile: failed with status 7" in text and text.count(MISSING) == 3
    assert not FIGURES.search(text)


def test_what_the_newest_attempt_did_not_find_is_that_of_an_earlier_one(whole, file):
    report = copy.deepcopy(whole)
    for part, found in (("profile", {"ways": {}}), ("apple", None)):
        earlier = {**whole["parts"][part], "commit": "an earlier one"}
        newest = {"state": "failed with status 1", "found": found, "earlier": earlier, "ended": "2032"}
        report["parts"][part] = {**whole["parts"][part], **newest}
    folder = file(report)
    for table, part in ((step_tables, "profile"), (sharing_table, "apple")):
        text = table(folder)
        assert MISSING not in text
        assert f"note: part {part}: failed with status 1\n" in text
        assert f"note: part {part}: what its newest attempt did not find is of 2031-01-01T00:00:00+00:00" in text
    assert "an earlier one" in step_tables(folder)


@pytest.mark.parametrize("content", ["{half a fi", "", "[]", '{"parts": []}', "null"])
@EACH
def test_a_broken_file_is_a_line_and_no_traceback(table, content, file):
    folder = file(content)
    with pytest.raises(RunError, match="gpu.json"):
        filed(folder)
    text = table(folder)
    assert MISSING in text and not FIGURES.search(text)
    (note,) = [line for line in text.splitlines() if line.lower().startswith("note: gpu.json ")]
    assert "measure again" in note and str(folder) not in text


def places(values: Any, path: tuple = ()) -> Iterator[tuple]:
    """Every place in nested values."""
    inside = values.items() if isinstance(values, dict) else enumerate(values) if isinstance(values, list) else ()
    for key, value in inside:
        yield (*path, key)
        yield from places(value, (*path, key))


@pytest.mark.parametrize("left", [None, "words", [], {}], ids=repr)
def test_whatever_is_missing_or_of_another_shape_nothing_is_raised(whole, file, left, monkeypatch):
    report = copy.deepcopy(whole)
    report["parts"]["recipes"]["found"]["recipes"] = {"laptop": whole["parts"]["recipes"]["found"]["recipes"]["laptop"]}
    report["parts"]["start"]["earlier"] = dict(report["parts"]["start"])
    monkeypatch.setattr(gpu_results, "filed", lambda folder: report)  # as `file` would, without the disk
    monkeypatch.setattr(recipes, "ladder", functools.cache(recipes.ladder))  # a thousand tables ask for it
    for *way, last in list(places(report)):
        if last == "parts" or "classes" in way or way[-2:] == ["found", "recipe"]:
            continue
        inner: Any = report
        for key in way:
            inner = inner[key]
        before, inner[last] = inner[last], left
        for table in TABLES:
            text = table()
            assert "nan" not in text and "None" not in text, (*way, last)
        inner[last] = before


# --- not of a GPU, not of CIFAR-10 ---


def spoil(report: dict[str, Any], how: str) -> dict[str, Any]:
    """The report as another kind of call would have filed it."""
    text = json.dumps(report)
    if how == "data":
        return json.loads(text.replace(CIFAR10_FINGERPRINT, "another").replace('"CIFAR-10"', '"synthetic"'))
    if how == "recipe":
        return json.loads(re.sub(r'"(speedrun|apple_8gpu|train94)"(?!: )', '"smoke"', text))
    if how == "device":
        return json.loads(text.replace('"gpu": "Some GPU"', '"gpu": null'))
    spoiled = json.loads(text)
    for entry in spoiled["parts"].values():
        if how == "a dry run":
            entry["dry_run"] = ["device cpu", "recipe smoke", "data synthetic"]
        else:
            del entry["dry_run"]
    return spoiled


SAYS = {
    "data": "measured on synthetic, not on all of CIFAR-10, so it is not shown",
    "recipe": "measured with the recipe smoke, not with ",
    "device": "measured without a GPU, so it is not shown",
    "a dry run": "a dry run (device cpu, recipe smoke, data synthetic), so it is not shown",
    "not said": "it may be a dry run, so it is not shown",
}


@pytest.mark.parametrize("how", SAYS)
@EACH
def test_what_is_not_of_the_recipe_on_cifar10_on_a_gpu_is_not_shown(table, how, whole, file):
    report = spoil(whole, how)
    if how in ("data", "recipe"):
        del report["parts"]["tests"]  # which are of neither
    if how == "recipe":
        del report["parts"]["recipes"]  # whose rows are of all recipes
    text = table(file(report))
    assert not FIGURES.search(text) and MISSING in text
    assert SAYS[how] in text


def test_a_dry_run_of_the_script_is_not_shown(gpu, file, tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "command_of", lambda part, options: [gpu.sys.executable, "-c", "pass"])
    write_runs(tmp_path / "speedrun", recipes.smoke(), [0.8801, 0.8802], gpu=None, device="cpu")
    dry = ["--out", str(tmp_path), "--device", "cpu", "--recipe", "smoke", "--data", "synthetic", "--parts", "speedrun"]
    assert gpu.main(dry) == 0
    report = filed(tmp_path)
    assert report is not None and report["parts"]["speedrun"]["found"]["speedrun"]["summary"]["n"] == 2
    for table in TABLES:
        text = table(tmp_path)
        assert not FIGURES.search(text) and MISSING in text
    assert "a dry run (device cpu, recipe smoke, data synthetic), so it is not shown" in recipe_table(tmp_path)


def test_the_made_up_report_has_what_the_script_writes(gpu, whole, tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "command_of", lambda part, options: [gpu.sys.executable, "-c", "pass"])
    report = gpu.measure(gpu.parse(["--out", str(tmp_path), "--device", "cpu", "--parts", "start"]))
    assert set(report["parts"]["start"]) == set(whole["parts"]["start"])
    assert report["parts"]["start"]["dry_run"] == ["device cpu"]


# --- README and package ---


def test_the_readme_says_what_is_filed_and_nothing_else_about_gpus(gpu):
    before, begin, rest = (ROOT / "README.md").read_text().partition(gpu.BEGIN)
    block, end, after = rest.partition(gpu.END)
    assert begin and end and block == readme_block()
    assert MISSING not in before + after  # or the two could contradict each other


def test_the_readme_is_rewritten_between_its_markers_only(gpu, whole, file, tmp_path):
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{gpu.BEGIN}old\n{gpu.END}\nafter\n")
    folder = file(whole)
    for _ in range(2):
        gpu.write_readme(readme, folder)
        assert readme.read_text() == f"before\n{gpu.BEGIN}{readme_block(folder)}{gpu.END}\nafter\n"
    readme.write_text("no markers\n")
    with pytest.raises(UserError, match="README.md has no lines <!-- gpu.json: begin --> and"):
        gpu.write_readme(readme, folder)
    assert readme.read_text() == "no markers\n" and {path.name for path in tmp_path.iterdir()} == {
        "README.md",
        "gpu.json",
    }


def test_the_script_rewrites_the_readme_only_from_the_folder_that_it_tells_of(gpu, tmp_path, monkeypatch, capsys):
    readme, filed_in = tmp_path / "README.md", tmp_path / "results"
    readme.write_text(f"{gpu.BEGIN}old{gpu.END}")
    monkeypatch.setattr(gpu, "README", readme)
    monkeypatch.setattr(gpu, "FILED", filed_in)
    monkeypatch.setattr(gpu, "command_of", lambda part, options: [gpu.sys.executable, "-c", "pass"])
    for out in (tmp_path / "elsewhere", filed_in):
        options = gpu.parse(["--out", str(out), "--device", "cpu", "--parts", "start"])
        gpu.measure(options)
        assert (readme.read_text() == f"{gpu.BEGIN}old{gpu.END}") == (out != filed_in)
    assert readme.read_text() == f"{gpu.BEGIN}{readme_block(filed_in)}{gpu.END}"
    readme.write_text(f"{gpu.BEGIN}old{gpu.END}")
    assert gpu.main(["--out", str(filed_in), "--readme"]) == 0
    assert readme.read_text() == f"{gpu.BEGIN}{readme_block(filed_in)}{gpu.END}"
    readme.write_text("no markers")
    gpu.measure(options)
    assert "warning: the README was not rewritten" in capsys.readouterr().err


def test_a_dry_run_is_not_filed_where_the_readme_reads(gpu, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(gpu, "REPOSITORY", tmp_path)
    monkeypatch.setattr(gpu, "FILED", tmp_path / "results")
    assert gpu.main(["--out", str(tmp_path / "results"), "--device", "cpu", "--recipe", "smoke"]) == 2
    said = capsys.readouterr().err
    assert "this is a dry run (device cpu, recipe smoke), and results is for" in said
    assert list(tmp_path.iterdir()) == []


def test_an_installed_package_has_the_file_where_it_is_looked_for(gpu):
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    where = gpu.FILED.relative_to(ROOT / settings["package-dir"]["cifar_fast.results"]) / gpu.RESULT
    patterns = settings["package-data"]["cifar_fast.results"]
    assert any(len(Path(one).parts) == len(where.parts) and fnmatch.fnmatch(str(where), one) for one in patterns)


@pytest.mark.parametrize("notebook, call", [("03", "step_tables"), ("11", "sharing_table"), ("12", "recipe_table")])
def test_the_notebooks_show_what_is_filed(notebook, call):
    (path,) = (ROOT / "notebooks").glob(f"{notebook}_*.ipynb")
    found = [
        cell for cell in json.loads(path.read_text())["cells"] if f"gpu_results.{call}()" in "".join(cell["source"])
    ]
    assert len(found) == 1 and found[0]["metadata"]["tags"] == ["nbval-ignore-output"]
