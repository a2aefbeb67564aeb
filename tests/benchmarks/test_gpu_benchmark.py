"""benchmarks/gpu.py keeps what each part has found, whatever becomes of the others, and says when there is no GPU."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from argparse import Namespace
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import psutil
import pytest
import torch

from cifar_fast import recipes
from cifar_fast.data.dataset import Dataset
from cifar_fast.errors import UserError


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def test_without_a_gpu_it_says_so_and_measures_nothing(
    gpu: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.main(["--out", str(tmp_path / "gpu")]) == 2
    said = capsys.readouterr().err
    assert "there is no GPU" in said and "--device cpu" in said
    assert not (tmp_path / "gpu").exists()


def test_every_part_has_its_work_and_its_word_in_the_description(gpu: ModuleType) -> None:
    assert gpu.PARTS == ("tests", *gpu.WORK)
    assert all(f"\n    {part} " in gpu.__doc__ for part in gpu.PARTS)


def test_the_tests_that_the_description_names_exist(gpu: ModuleType) -> None:
    names = re.findall(r"test_\w+", gpu.__doc__)
    there = "\n".join(path.read_text() for path in Path(__file__).parents[1].rglob("test_*.py"))
    assert names and all(f"def {name}(" in there for name in names)


@pytest.fixture
def scripted(gpu: ModuleType, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """What the parts do in place of their work, as Python code; `{out}` is the folder."""
    codes: dict[str, str] = {}

    def command_of(part: str, options: Namespace, seconds: float) -> list[str]:
        return python(codes[part].replace("{out}", str(options.out)))

    monkeypatch.setattr(gpu, "command_of", command_of)
    monkeypatch.setattr(gpu, "load", lambda options: None)
    return codes


def test_what_a_part_has_found_is_kept_when_others_fail(
    gpu: ModuleType, tmp_path: Path, scripted: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    scripted["start"] = "open('{out}/start.json', 'w').write('{\"first\": {\"total_seconds\": 3.0}}')"
    scripted["kernels"] = "print('about to fail'); raise SystemExit(7)"
    scripted["airbench"] = "open('{out}/airbench.json', 'w').write('{half a fi')"
    parts = ["start", "kernels", "airbench"]
    assert gpu.main(["--out", str(tmp_path), "--device", "cpu", "--only", *parts]) == 1
    report = json.loads((tmp_path / "gpu.json").read_text())
    states = {part: entry["state"] for part, entry in report["parts"].items()}
    assert states == {
        "start": "done",
        "kernels": "failed with status 7",
        "airbench": "done, but its result cannot be read (JSONDecodeError)",
    }
    assert report["parts"]["start"]["found"] == {"first": {"total_seconds": 3.0}}
    assert (tmp_path / "kernels.log").read_text() == "about to fail\n"
    assert "met: total_seconds of the first command: 3, required 20" in capsys.readouterr().out

    # Another call leaves other parts alone, and a failed attempt leaves a note beside what an earlier one found, also
    # when it found something; only one that ends well takes its place.
    half = "open('{out}/start.json', 'w').write('{\"second\": {\"total_seconds\": 9.0}}')"
    for code, state in (("raise SystemExit(1)", "failed with status 1"), (f"{half}; 1 / 0", "failed with status 1")):
        scripted["start"] = code
        assert gpu.main(["--out", str(tmp_path), "--device", "cpu", "--only", "start"]) == 1
        again = json.loads((tmp_path / "gpu.json").read_text())["parts"]
        assert again["kernels"] == report["parts"]["kernels"]
        later = again["start"].pop("later_attempt")
        assert again["start"] == report["parts"]["start"] and later["state"] == state
    scripted["start"] = half
    assert gpu.main(["--out", str(tmp_path), "--device", "cpu", "--only", "start"]) == 0
    start = json.loads((tmp_path / "gpu.json").read_text())["parts"]["start"]
    assert start["found"] == {"second": {"total_seconds": 9.0}} and "later_attempt" not in start


def test_a_part_that_adds_to_its_runs_replaces_its_entry_however_it_ended(gpu: ModuleType) -> None:
    before = {"state": "done", "found": {"runs": 2}, "ended": "", "commit": ""}
    more = before | {"state": "out of time", "found": {"runs": 3}}
    assert gpu.keep_best(before, more, "speedrun") == more
    assert gpu.keep_best(before | {"state": "out of time"}, more, "kernels") == more  # neither ended well
    assert gpu.keep_best(before, more, "kernels")["found"] == {"runs": 2}
    assert gpu.keep_best(None, more, "kernels") == more


def test_a_dry_run_passes_no_verdict(gpu: ModuleType, tmp_path: Path, scripted: dict[str, str]) -> None:
    scripted["start"] = "open('{out}/start.json', 'w').write('{\"first\": {\"total_seconds\": 3.0}}')"
    dry = ["--out", str(tmp_path), "--device", "cpu", "--recipe", "smoke", "--only", "start"]
    assert gpu.main(dry) == 0
    report = json.loads((tmp_path / "gpu.json").read_text())
    start = report["parts"]["start"]
    assert start["state"] == "done" and report["verdicts"] == [] and start["environment"]["gpu"] is None


def test_a_part_that_takes_too_long_is_ended_with_all_it_has_started(gpu: ModuleType, tmp_path: Path) -> None:
    child = "import subprocess, sys, time; p = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])"
    code = f"{child}; open({str(tmp_path / 'pid')!r}, 'w').write(str(p.pid)); time.sleep(600)"
    state, seconds = gpu.run_part(python(code), tmp_path / "log", 5.0)
    assert state == "ended after 5 s" and seconds >= 5
    pid = int((tmp_path / "pid").read_text())
    end = time.monotonic() + 30
    while psutil.pid_exists(pid) and psutil.Process(pid).status() != "zombie" and time.monotonic() < end:
        time.sleep(0.05)
    assert not psutil.pid_exists(pid) or psutil.Process(pid).status() == "zombie"


def test_a_part_can_say_that_its_time_is_over(gpu: ModuleType, tmp_path: Path) -> None:
    state, _ = gpu.run_part(python(f"raise SystemExit({gpu.OUT_OF_TIME})"), tmp_path / "log", 60.0)
    assert state == "out of time"


def options_of(gpu: ModuleType, out: Path, *more: str) -> Namespace:
    options = gpu.parse(["--out", str(out), "--device", "cpu", "--recipe", "smoke", "--seconds", "480", *more])
    options.end = time.monotonic() + options.seconds
    return options


@pytest.fixture
def quick(gpu: ModuleType, tiny_data: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    """`smoke` and its data, smaller still."""
    small = replace(
        recipes.smoke(), widths=(4, 4, 4), epochs=1.0, precision="float32", convolution="direct", n_shards=1
    )
    monkeypatch.setattr(gpu.cf.recipes, "named", lambda name: small)
    monkeypatch.setattr(gpu, "load", lambda options: tiny_data)


def test_runs_are_saved_and_continued_by_a_later_call(
    gpu: ModuleType, quick: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu, "commit", lambda: "one")
    options = options_of(gpu, tmp_path, "--runs", "2")
    gpu.part_speedrun(options)
    found = gpu.collect("speedrun", tmp_path)["speedrun"]
    assert found["summary"]["n"] == 2 and found["warm_up_seconds_mean"] >= 0
    about = found["about"]
    assert about["recipe"] == "smoke" and about["dataset"]["name"] == "synthetic" and about["commits"] == ["one"]
    assert about["environment"]["step_mode"] == "eager" and about["environment"]["gpu"] is None
    monkeypatch.setattr(gpu, "commit", lambda: "another")
    options.end = time.monotonic() - 1
    with pytest.raises(gpu.OutOfTime, match="run the part again"):
        gpu.part_speedrun(options)
    options = options_of(gpu, tmp_path, "--runs", "3")
    gpu.part_speedrun(options)
    found = gpu.collect("speedrun", tmp_path)["speedrun"]
    assert found["summary"]["n"] == 3 and found["about"]["commits"] == ["one", "another"]


def test_without_a_checkout_the_commit_is_unknown(
    gpu: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    revision = sys.modules[gpu.commit.__module__]
    monkeypatch.setattr(revision, "REPOSITORY", tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert gpu.commit() == "unknown"
    monkeypatch.setenv("PATH", "")
    assert gpu.commit() == "unknown"


def test_the_commit_is_marked_where_what_is_measured_differs_from_it(
    gpu: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.modules[gpu.commit.__module__], "REPOSITORY", tmp_path)
    names = ("cifar_fast/a.py", "benchmarks/b.py", "benchmarks/results/c.json")
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("")
    for command in (
        ["init", "-q"],
        ["add", "."],
        ["-c", "user.name=a", "-c", "user.email=a@b.c", "commit", "-qm", "a", "--no-gpg-sign"],
    ):
        subprocess.run(["git", "-C", str(tmp_path), *command], check=True)
    revision = gpu.commit()
    assert len(revision) == 40
    for name, mark in zip(names, ("-changed", "-changed", ""), strict=True):
        (tmp_path / name).write_text("changed")
        assert gpu.commit() == revision + mark
        (tmp_path / name).write_text("")


def test_a_fresh_command_is_saved_with_what_it_trained_on(
    gpu: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clocks = dict.fromkeys(
        ("total_seconds", "warm_up_seconds", "first_step_seconds", "train_seconds", "evaluate_seconds"), 1.0
    )
    about = {"recipe": {"name": "smoke"}, "dataset": {"name": "synthetic"}, "environment": {"gpu": None}}

    def run(command: list[str], **_: Any) -> None:
        out = Path(command[command.index("--out") + 1])
        out.mkdir()
        (out / "result.json").write_text(json.dumps(about | clocks | {"accuracy": 0.5, "seed": 0}))

    monkeypatch.setattr(gpu.subprocess, "run", run)
    gpu.part_start(options_of(gpu, tmp_path))
    found = gpu.collect("start", tmp_path)
    assert found["about"] == about | {"recipe": "smoke"}
    for which in ("first", "second"):
        assert set(found[which]) == {"accuracy", "command_seconds", *clocks}


def test_a_run_that_would_not_end_in_time_is_not_started(
    gpu: ModuleType, quick: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = options_of(gpu, tmp_path, "--runs", "50")
    options.end = 100.0 + 30.0
    monkeypatch.setattr(gpu, "time", SimpleNamespace(monotonic=lambda: 100.0))  # so that any run takes too long
    with pytest.raises(gpu.OutOfTime, match="1 of 50 runs of smoke are saved"):
        gpu.part_apple(options)
    assert gpu.collect("apple", tmp_path)["apple_8gpu"]["summary"]["n"] == 1


def test_parts_share_the_time_and_leave_what_they_do_not_need(gpu: ModuleType) -> None:
    def at(left: float, taken: float) -> list[float]:
        given = []
        for place, part in enumerate(gpu.PARTS):
            given.append(gpu.allowance(part, gpu.PARTS[place + 1 :], left))
            left -= taken * given[-1]
        return given

    assert sum(gpu.MINUTES.values()) == 30
    assert at(1800, 1) == pytest.approx([60 * minutes for minutes in gpu.MINUTES.values()])
    assert sum(at(840, 1)) == pytest.approx(840)  # fewer runs in a quarter of an hour
    assert at(840, 1)[0] == 120 and at(100, 1)[0] == 100  # but for the tests, which are all or nothing
    quick, slow = at(1800, 0.5), at(1800, 1)
    assert all(more >= less for more, less in zip(quick, slow, strict=True)) and quick[-1] > 1.5 * slow[-1]


def test_a_later_call_goes_on_with_what_is_missing(
    gpu: ModuleType, tmp_path: Path, scripted: dict[str, str], monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setattr(gpu, "PARTS", ("kernels", "start", "recipes"))
    monkeypatch.setattr(gpu, "commit", lambda: "one")
    write = "open('{out}/PART.json', 'w').write('{}'); open('{out}/order', 'a').write('PART ')"
    scripted |= {part: write.replace("PART", part) for part in gpu.PARTS}
    scripted["start"] += "; raise SystemExit(7)"
    again = ["--out", str(tmp_path), "--device", "cpu"]
    assert gpu.main(again) == 1  # `start` fails
    assert gpu.main([*again, "--minutes", "0"]) == 0  # nothing fails where no time is left
    assert "start: no time is left" in capsys.readouterr().out
    assert gpu.main(again) == 1
    assert (tmp_path / "order").read_text().split() == ["kernels", "start", "recipes", "start"]
    gpu.main([*again, "--only", "kernels"])
    gpu.main([*again, "--runs", "60"])  # more than were asked for
    assert (tmp_path / "order").read_text().split()[4:] == ["kernels", "kernels", "start", "recipes"]
    monkeypatch.setattr(gpu, "commit", lambda: "another")
    gpu.main([*again, "--runs", "60"])
    assert (tmp_path / "order").read_text().split()[8:] == ["kernels", "start", "recipes"]


def test_what_is_missing_is_said_with_what_to_do(gpu: ModuleType, tmp_path: Path, tiny_data: Dataset) -> None:
    needs = gpu.needs
    installed = {"tyro": ["typeguard>=4.0.0", "old; python_version < '3'"], "torch": ["sympy"], "pytest": None}

    def requires(name: str) -> list[str] | None:
        if name not in installed:
            raise needs.metadata.PackageNotFoundError(name)
        return installed[name]

    assert needs.missing(["tyro", "torch", "platformdirs"], requires) == ["platformdirs", "typeguard"]
    assert {"torch", "platformdirs", "tyro", "pytest"} <= set(needs.required())
    assert needs.missing_data(None) == needs.missing_data("synthetic") == ""
    assert "does not exist" in needs.missing_data(str(tmp_path / "nowhere"))
    folder = tmp_path / "cifar-10-batches-bin"
    folder.mkdir()
    for name in needs.FILES[folder.name][:-1]:
        (folder / name).touch()
    assert needs.missing_data(str(tmp_path)) == needs.missing_data(str(folder)) == f"{folder} lacks test_batch.bin"
    text = needs.describe(["platformdirs", "typeguard"], "no folder", ["airbench"])
    assert "pip download --dest wheels" in text and "--find-links wheels platformdirs typeguard airbench" in text
    assert "missing data: no folder" in text and "--data FOLDER" in text and needs.describe([], "", []) == ""


def test_it_ends_in_the_first_second_where_something_is_missing(tmp_path: Path) -> None:
    script = Path(__file__).resolve().parents[2] / "benchmarks" / "gpu.py"
    code = (
        "import sys, runpy; sys.argv = sys.argv[1:]; sys.path.insert(0, sys.argv[0].rpartition('/')[0])\n"
        "try: runpy.run_path(sys.argv[0], run_name='__main__')\n"
        "finally: print('torch' in sys.modules)"
    )
    arguments = [str(script), "--out", str(tmp_path / "out"), "--data", str(tmp_path / "nowhere")]
    done = subprocess.run([*python(code), *arguments], capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and "missing data" in done.stdout and done.stdout.endswith("False\n")
    assert not (tmp_path / "out").exists()


def test_without_airbench_or_a_gpu_the_part_says_so(
    gpu: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu.importlib.util, "find_spec", lambda name: None)
    gpu.part_airbench(options_of(gpu, tmp_path))
    assert "not installed" in gpu.collect("airbench", tmp_path)["left_out"]


def test_airbenchs_table_is_read(gpu: ModuleType) -> None:
    rows = [
        ["0", "0", "1.9", "0.4", "0.5", "", "0.31"],
        ["", "9", "0.9", "0.97", "0.93", "", "3.20"],
        ["", "eval", "0.9", "0.97", "0.93", "0.9405", "3.25"],
    ]
    head = "|  run     |  epoch  |  train_loss  |  train_acc  |  val_acc  |  tta_val_acc  |  total_time_seconds  |"
    table = "\n".join(
        ["-" * 80, head, "-" * 80, *("|" + "|".join(f"  {cell:>8}  " for cell in row) + "|" for row in rows)]
    )
    assert gpu.read_airbench(table) == {"accuracy": 0.9405, "train_seconds": 3.20, "with_tta_seconds": 3.25}
    with pytest.raises(UserError, match="a different table"):
        gpu.read_airbench("|  something else  |")


def test_airbench_finds_the_images_where_it_looks_for_them(gpu: ModuleType, tiny_data: Dataset, tmp_path: Path) -> None:
    gpu.lay_out_for_airbench(tiny_data, tmp_path / "cifar10")
    for name, images in (("train", tiny_data.train_images), ("test", tiny_data.test_images)):
        content = torch.load(tmp_path / "cifar10" / f"{name}.pt")
        assert content["images"].shape == (len(images), 32, 32, 3)
        assert torch.equal(content["images"].permute(0, 3, 1, 2), images)
        assert content["classes"] == list(tiny_data.classes)


def test_kernels_and_gaps_are_added_up(gpu: ModuleType) -> None:
    kernels = [
        ("conv", 0.0, 10.0),
        ("norm", 12.0, 15.0),
        ("conv", 20.0, 30.0),
        ("copy", 25.0, 28.0),
        ("norm", 29.0, 34.0),
    ]
    found = gpu.analyse(reversed(kernels), n_steps=2)
    assert found["us_a_step"] == 17 and found["n_kernels_a_step"] == 2.5
    assert found["busy_share"] == pytest.approx(27 / 34)  # 10, 3 and the overlapping 14
    assert found["gaps"] == {"us_a_step": 3.5, "count": 2, "longest_us": [5.0, 2.0]}
    assert [(kernel["name"], kernel["us_a_step"], kernel["calls_a_step"]) for kernel in found["kernels"]] == [
        ("conv", 10.0, 1.0),
        ("norm", 4.0, 1.0),
        ("copy", 1.5, 0.5),
    ]
    assert sum(kernel["share"] for kernel in found["kernels"]) == pytest.approx(1)
    with pytest.raises(UserError, match="CUPTI"):
        gpu.analyse([], 1)


def test_the_networks_operations_are_those_of_its_convolutions(gpu: ModuleType) -> None:
    recipe = replace(recipes.speedrun(), widths=(8, 8, 8))
    convolutions = [(24, 8, 31), (8, 8, 15), (8, 8, 15), (8, 8, 7), (8, 8, 7), (8, 8, 3)]
    forward = sum(2 * 9 * n_in * n_out * side**2 for n_in, n_out, side in convolutions)
    first = 2 * 12 * 24 * 31**2
    # Backward takes twice as much, but at the images nothing is computed back.
    assert gpu.training_flops(recipe) == pytest.approx(3 * forward + 2 * first, rel=0.01)


def summary(accuracy: float, seconds: float) -> dict[str, Any]:
    figures = {"accuracy": {"mean": accuracy, "median": accuracy}, "train_seconds": {"mean": seconds}}
    return {"summary": {"share_at_target": 41 / 50, **figures}}


def test_verdicts_compare_what_was_found_with_what_is_required(gpu: ModuleType) -> None:
    parts: dict[str, Any] = {
        "tests": {"found": {"passed": 9, "failure": [], "error": [], "skipped": ["one"]}},
        "speedrun": {"found": {"speedrun": summary(0.9401, 0.95)}},
        "airbench": {"found": {"runs": [{"train_seconds": 3.0}, {"train_seconds": 3.2}]}},
        "apple": {"found": {"apple_8gpu": summary(0.9420, 8.0)}},
        "kernels": {"found": None},
    }
    met = {verdict["what"]: verdict["met"] for verdict in gpu.verdicts(parts)}
    assert list(met.values()) == [False, True, False, True, True, True]
    assert gpu.verdicts({"airbench": {"found": {"left_out": "not installed"}}}) == []


def test_the_tests_that_did_not_pass_are_named(gpu: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "tests.xml").write_text(
        "<testsuites><testsuite><testcase classname='x' name='a'/><testcase classname='y' name='a'><failure/>"
        "</testcase><testcase classname='x' name='c'><skipped/></testcase></testsuite></testsuites>"
    )
    assert gpu.collect("tests", tmp_path) == {"passed": 1, "failure": ["y::a"], "error": [], "skipped": ["x::c"]}
