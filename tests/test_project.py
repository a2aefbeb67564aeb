"""The files around the package agree with each other and with the package."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from dataclasses import replace
from functools import partial
from operator import attrgetter
from pathlib import Path
from statistics import fmean, median
from types import SimpleNamespace

import pytest
from cells import run_cell
from packaging.requirements import Requirement
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "cifar_fast"
MODULES = sorted(PACKAGE.rglob("*.py"))
SOURCES = sorted([*MODULES, *PACKAGE.rglob("*.c")])
RESULTS = ROOT / "benchmarks" / "results"
PAGES = ("README.md", "CONTRIBUTING.md", "benchmarks/results/README.md")
SHOWN = ("laptop", "classroom", "apple_8gpu", "page_2019")
"""Folders of `RESULTS` whose mean accuracy the README's table of recipes gives."""
FULL = ("ablation", "ablation_without_tiles")
# Where conda-forge calls a package otherwise than PyPI does.
CONDA_NAMES = {"torch": "pytorch", "playwright": "playwright-python"}


def project() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def code_blocks(page: Path = ROOT / "README.md") -> list[tuple[str, list[str]]]:
    """Each fenced block of a page, as the heading it stands under and its lines."""
    blocks: list[tuple[str, list[str]]] = []
    heading, fenced = "", False
    for line in page.read_text().splitlines():
        if line.startswith("```"):
            fenced = not fenced
            if fenced:
                blocks.append((heading, []))
        elif fenced:
            blocks[-1][1].append(line)
        elif line.startswith("#"):
            heading = line.lstrip("# ")
    return blocks


def readme_command(word: str) -> str:
    """The first fenced block under a heading that starts with the word."""
    for heading, lines in code_blocks():
        if heading.startswith(word):
            return "\n".join(lines)
    raise AssertionError(f"README.md has no fenced code block under a heading that starts with {word!r}")


def table_rows(page: Path) -> list[list[str]]:
    """The cells of each row of all tables of a page."""
    lines = [line for line in page.read_text().splitlines() if line.startswith("|") and not line.startswith("|---")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def headings(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    titles = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def specifiers(requirements: list[str]) -> dict[str, object]:
    parsed = [Requirement(text) for text in requirements]
    return {requirement.name: requirement.specifier for requirement in parsed}


# --- pyproject.toml and environment.yml ---


def test_environment_yml_asks_for_the_same_packages_as_pyproject():
    extras = project()["optional-dependencies"]
    wanted = specifiers([*project()["dependencies"], *extras["notebooks"], *extras["test"], *extras["docs"]])
    wanted = {CONDA_NAMES.get(name, name): specifier for name, specifier in wanted.items()}
    wanted["python"] = Requirement(f"python{project()['requires-python']}").specifier

    lines = (ROOT / "environment.yml").read_text().splitlines()
    items = [line.removeprefix("  - ") for line in lines if re.match(r"  - \w", line)]
    offered = specifiers([item for item in items if item not in ("conda-forge", "pip", "pip:")])
    assert offered == wanted
    assert "  - conda-forge" in lines and "      - -e ." in lines


def test_every_dependency_has_a_lower_and_an_upper_bound():
    for text in [*project()["dependencies"], *sum(project()["optional-dependencies"].values(), [])]:
        requirement = Requirement(text)
        if requirement.name != "cifar_fast":  # the extra `all` names the package itself
            assert {specifier.operator for specifier in requirement.specifier} == {">=", "<"}, text


def test_extra_all_names_every_other_extra():
    extras = project()["optional-dependencies"]
    (everything,) = extras["all"]
    assert Requirement(everything).extras == set(extras) - {"all"}


# --- README.md and .ci/run ---


def test_ci_runs_the_readme_test_command():
    assert os.access(ROOT / ".ci" / "run", os.X_OK)
    shown = subprocess.run([ROOT / ".ci" / "run", "--show"], capture_output=True, text=True, check=True).stdout
    assert shown.rstrip("\n") == readme_command("Test")


@pytest.mark.parametrize("readme", ["# Title\n", "# Test\nno block\n\n# Other\n```sh\nfalse\n```\n"])
def test_ci_fails_loudly_when_the_readme_has_no_test_command(tmp_path, readme):
    (tmp_path / ".ci").mkdir()
    shutil.copy(ROOT / ".ci" / "run", tmp_path / ".ci" / "run")
    (tmp_path / "README.md").write_text(readme)
    result = subprocess.run([tmp_path / ".ci" / "run"], capture_output=True, text=True)
    assert result.returncode == 1
    assert "no fenced code block" in result.stdout


def ci_on_a_bare_machine(folder: Path, stubs: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """Run .ci/run in a folder where nothing is installed but some tools and `stubs`, each a shell script."""
    tools = folder / "bin"
    tools.mkdir()
    for tool in ("bash", "env", "awk", "dirname", "timeout"):
        (tools / tool).symlink_to(shutil.which(tool))
    made = {"python3": "", ".venv/bin/pip": "", ".venv/bin/ruff": "", ".venv/bin/mypy": ""} | stubs
    for name, does in made.items():
        script = folder / name if "/" in name else tools / name
        script.parent.mkdir(parents=True, exist_ok=True)
        script.write_text(f"#!{shutil.which('bash')}\n{does}\n")
        script.chmod(0o755)
    (folder / ".ci").mkdir()
    shutil.copy(ROOT / ".ci" / "run", folder / ".ci" / "run")
    (folder / "README.md").write_text("# Test\n```\necho the tests ran\n```\n")
    command = [shutil.which("bash"), folder / ".ci" / "run"]
    return subprocess.run(command, env={"PATH": str(tools)}, capture_output=True, text=True)


@pytest.mark.parametrize("user, exit_status", [("0", 0), ("0", 1), ("1000", 0)])
def test_ci_installs_a_browser_where_it_can_and_tests_without_one_where_it_cannot(tmp_path, user, exit_status):
    stubs = {"id": f"echo {user}", "apt-get": f'echo "$@" >> {tmp_path}/asked\nexit {exit_status}'}
    result = ci_on_a_bare_machine(tmp_path, stubs)
    assert result.returncode == 0 and result.stdout.endswith("+ echo the tests ran\nthe tests ran\n")
    asked = (tmp_path / "asked").read_text() if (tmp_path / "asked").exists() else ""
    assert ("update" in asked) == (user == "0")
    assert ("install -y --no-install-recommends chromium" in asked) == (user == "0" and exit_status == 0)
    assert ("so the browser tests skip" in result.stdout) == (user == "0" and exit_status != 0)


@pytest.mark.parametrize("check", ["ruff check .", "ruff format --check .", "mypy cifar_fast"])
def test_ci_checks_the_code_before_it_tests(tmp_path, check):
    tool, arguments = check.split(" ", 1)
    script = f'if [ "$*" = "{arguments}" ]; then echo a slip; exit 1; fi'
    result = ci_on_a_bare_machine(tmp_path, {f".venv/bin/{tool}": script})
    assert result.returncode == 1 and result.stdout.endswith(f"+ .venv/bin/{check}\na slip\n")


def test_readme_python_uses_names_that_exist():
    import cifar_fast

    names = re.findall(r"\bcf((?:\.\w+)+)", (ROOT / "README.md").read_text())
    assert len(names) > 5
    for name in names:
        assert attrgetter(name[1:])(cifar_fast)


def test_readme_commands_use_what_pyproject_offers():
    train, test = readme_command("Train"), readme_command("Test")
    for command in (train, test):
        assert command.startswith("python3 -m venv .venv && .venv/bin/pip install -e ")
    (script,) = project()["scripts"]
    assert train.endswith(f" && .venv/bin/{script} train")
    assert "'.[all]'" in test and "cifar_fast[notebooks,test,docs]" in project()["optional-dependencies"]["all"]
    assert test.endswith(" && .venv/bin/pytest")


def test_readme_is_one_page():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 120


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_to_files_and_headings_that_exist(page):
    for link in re.findall(r"\]\((?!https?:)([^)\s]+)\)", (ROOT / page).read_text()):
        file, _, heading = link.partition("#")
        target = ((ROOT / page).parent / file).resolve() if file else ROOT / page
        assert target.exists(), link
        assert not heading or heading in headings(target), link


@pytest.mark.parametrize("page", PAGES)
def test_commands_on_a_page_are_commands_with_options_that_exist(page, capsys):
    from cifar_fast import cli

    assert cli.main(["--help"]) == 0
    known = capsys.readouterr().out
    lines = [line.partition("#")[0] for _, block in code_blocks(ROOT / page) for line in block]
    lines += re.findall(r"`([^`\n]+)`", (ROOT / page).read_text())
    for line in lines:
        for found in re.findall(r"\bcifar-fast((?: [\w./=-]+)+)", line):
            name, *options = found.split()
            if "NN" in options or name == "--help":
                continue
            assert re.search(rf"\b{name}\b", known), found
            assert cli.parse([name, *options]), found


def test_the_readmes_python_runs(tiny_data, tmp_path, monkeypatch, capsys):
    import cifar_fast as cf
    from cifar_fast.experiments.compare import compare

    small = cf.replace(
        cf.recipes.smoke(),
        n_shards=1,
        widths=(4, 4, 4),
        epochs=1.0,
        label_smoothing=0.1,
        precision="float32",
        convolution="direct",  # named, so that nothing is measured first
        fuse_norm=False,
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cf, "load_cifar10", lambda: tiny_data)
    monkeypatch.setattr(cf, "compare", partial(compare, max_runs=5, progress=False))
    monkeypatch.setattr(cf.recipes, "laptop", lambda: small)
    blocks = ["\n".join(lines) for _, lines in code_blocks()]
    first, second = [code for code in blocks if "import cifar_fast as cf" in code or "def focal" in code]
    run_cell(second, **run_cell(first))
    printed = capsys.readouterr().out
    assert (tmp_path / "curve.png").exists() and re.match(r"[\d.]+ [\d.]+\n", printed) and "focal loss" in printed


def test_readme_tables_name_every_notebook_and_every_recipe_outside_the_ladder():
    from cifar_fast import recipes

    text = (ROOT / "README.md").read_text()
    assert re.findall(r"\(notebooks/(.*?)\)", text) == sorted(path.name for path in ROOT.glob("notebooks/*.ipynb"))
    rungs = [rung.recipe.name for rung in recipes.ladder()]
    (_, *rows) = text.partition("## The recipes")[2].partition("\n## ")[0].split("\n| `")
    named = [name for row in rows for name in re.findall(r"`?(\w+)`", row.partition("|")[0])]
    assert sorted(named) == sorted([*(set(recipes.names()) - set(rungs)), rungs[0], rungs[-1]])


# --- figures, compared with the saved runs ---


def figures(runs: list[dict]) -> str:
    """Accuracy and time of runs, as the pages give them."""
    accuracies, seconds = ([run[key] for run in runs] for key in ("accuracy", "train_seconds"))
    spread = f" ({100 * min(accuracies):.2f} to {100 * max(accuracies):.2f})" if len(runs) > 1 else ""
    pace = f" ({min(seconds):.0f} to {max(seconds):.0f})" if len(runs) > 1 else ""
    return f"{100 * fmean(accuracies):.2f} %{spread} | {median(seconds):.0f}{{}}{pace}"


def test_readme_expects_what_was_measured():
    import cifar_fast as cf
    from cifar_fast import recipes
    from cifar_fast.experiments.arithmetic import train_flop
    from cifar_fast.experiments.saved import saved_runs
    from cifar_fast.recipe import Recipe

    now, with_amx, with_avx2 = map(saved_runs, ("laptop", "laptop_290_tflop", "laptop_290_tflop_avx2"))
    rows = [" | ".join(row) for row in table_rows(ROOT / "README.md")]
    quick, wide = saved_runs("classroom"), saved_runs("classroom_avx512")
    for machine, shown, runs in (
        ("AMD EPYC with AVX-512", "`laptop`", now),
        ("Intel Xeon with AMX", "`laptop` as it was", with_amx),
        ("AMD EPYC with AVX2", "`laptop` as it was", with_avx2),
        ("AMD EPYC with AVX-512", "`classroom`", wide),
        ("AMD EPYC with AVX2", "`classroom`", quick),
    ):
        name = shown.split("`")[1]
        assert f"{machine} | {shown} | {figures(runs).format(' s')} | {len(runs)}" in rows
        assert {run["dataset"]["name"] for run in runs} == {"CIFAR-10"}
        assert {(run["recipe"]["name"], run["environment"]["threads"]) for run in runs} == {(name, 2)}
        assert {run["environment"]["torch"].partition("+")[0] for run in runs} == {"2.14.1"}
    accuracy = {name: f"{100 * fmean(run['accuracy'] for run in saved_runs(name)):.2f} %" for name in SHOWN}
    (laptop,) = [row for row in rows if row.startswith("`laptop`")]
    assert f"{accuracy['laptop']}, n = {len(now)}" in laptop
    assert all(Recipe.from_dict(run["recipe"]) == recipes.laptop() for run in now)
    spent = [train_flop(Recipe.from_dict(runs[0]["recipe"])) / 1e12 for runs in (with_amx, now)]
    assert "{:.0f} TFLOP of arithmetic, today's {:.0f}".format(*spent) in (ROOT / "README.md").read_text()
    assert len({Recipe.from_dict(runs[0]["recipe"]) for runs in (with_amx, with_avx2)}) == 1
    assert all(Recipe.from_dict(run["recipe"]) == recipes.classroom() for run in [*quick, *wide])
    (classroom,) = [row for row in rows if row.startswith("`classroom`")]
    assert f"{accuracy['classroom']}, n = {len(quick)}" in classroom
    assert {run["environment"]["cpu_capability"] for run in [*quick, *with_avx2]} == {"AVX2"}
    assert {run["environment"]["cpu_capability"] for run in [*now, *wide]} == {"AVX512"}
    assert f"{100 * cf.pretrained('laptop').accuracy:.2f} %" in (ROOT / "README.md").read_text()
    (apple,) = [row for row in rows if row.startswith("`apple_8gpu`")]
    assert f"{accuracy['apple_8gpu']} on a CPU, n = 1" in apple
    (page,) = [row for row in rows if row.startswith("`baseline_2018`")]
    assert f"{accuracy['page_2019']} on a CPU, n = 1" in page


def test_the_results_say_what_the_form_of_the_velocity_was_worth():
    from cifar_fast.experiments.saved import saved_runs
    from cifar_fast.experiments.statistics import mean_interval

    found = {(run["arm"], run["seed"]): 100 * run["accuracy"] for run in saved_runs("velocity_form")}
    arms = ("lr_in_velocity=True", "lr_in_velocity=False")
    seeds = sorted(seed for arm, seed in found if arm == arms[0])
    assert set(found) == {(arm, seed) for arm in arms for seed in seeds}
    differences = [found[arms[0], seed] - found[arms[1], seed] for seed in seeds]
    low, high = mean_interval(differences)
    text = " ".join((RESULTS / "README.md").read_text().split())
    assert f"n = {len(seeds)} each: paired by seed {fmean(differences):+.2f} points" in text
    assert f"(95 % interval {low:+.2f} to {high:+.2f}; [runs](velocity_form/results.jsonl))" in text
    means = [f"{fmean(found[arm, seed] for seed in seeds):.2f} %" for arm in arms]
    assert f"reached {means[0]} with it and {means[1]} with PyTorch's SGD" in text


def test_the_table_of_laptop_runs_says_what_was_measured():
    from cifar_fast.experiments.saved import saved_runs

    rows = [row for row in table_rows(RESULTS / "README.md") if re.match(r"\[`laptop\w*`\]", row[0]) and len(row) == 8]
    assert len(rows) == 9
    for link, machine, epochs, n, accuracy, at_target, seconds, _ in rows:
        (name,) = re.findall(r"`(\w+)`", link)
        runs = saved_runs(name)
        reached = sum(round(run["accuracy"], 4) >= 0.94 for run in runs)
        assert f"{accuracy} | {seconds}" == figures(runs).format("")
        assert (int(n), at_target) == (len(runs), f"{reached} of {len(runs)}")
        assert {run["recipe"]["epochs"] for run in runs} == {int(epochs)}
        has_amx = {"AMX" in run["environment"]["cpu_capability"] for run in runs}
        assert has_amx == {machine == "with AMX"}


def test_the_table_of_the_ladder_says_what_was_measured():
    from cifar_fast import recipes
    from cifar_fast.experiments import rungs
    from cifar_fast.experiments.saved import saved_runs

    runs = saved_runs("classroom_ladder")
    rows = [" | ".join(row) for row in table_rows(RESULTS / "README.md")]
    for name in list(recipes.classroom_arms())[1:]:
        found = rungs.gain(name, runs)
        if found.differences:
            low, high = found.interval
            arithmetic = str(found.saving).replace(" times the arithmetic", "").replace("95 % interval ", "")
            assert (
                f"`{name}` | {found.title} | {found.epochs:g} | {len(found.differences)} | "
                f"{found.points:+.2f} ({low:+.2f} to {high:+.2f}) | {arithmetic}"
            ) in rows
    curves = rungs.curves(runs)
    plain, top = curves["plain"][-1], curves["tta"][0]
    told = [f"{100 * point.mean:.1f} % with {point.flop / 1e12:.{digits}f}" for point, digits in ((plain, 0), (top, 1))]
    readme = (ROOT / "README.md").read_text()
    assert (
        f"the plain recipe reaches {told[0]} TFLOP (n = {len(plain.accuracy)}), and all tricks but small images "
        f"{told[1]} (n = {len(top.accuracy)})."
    ) in readme
    worth = {name: f"{rungs.gain(name, runs).points:.1f}" for name in ("muon", "whitening", "schedule", "tta_flip")}
    said = "Muon is worth {muon} points, whitening {whitening}, a schedule {schedule}, mirror images in TTA {tta_flip}"
    assert said.format(**worth) in readme


def test_the_table_of_the_ladder_s_steps_says_what_was_measured():
    from cifar_fast.experiments import rungs
    from cifar_fast.experiments.saved import saved_runs

    saved = json.loads((RESULTS / "classroom_ladder" / "step_seconds.json").read_text())
    steps: dict[str, dict[int, float]] = {}
    for each in saved["steps"]:
        steps.setdefault(each["arm"], {})[each["side"]] = median(each["seconds"])
    rows = [" | ".join(row) for row in table_rows(RESULTS / "README.md")]
    for name, sides in steps.items():
        cells = (f"{1e3 * sides[side]:.0f}" if side in sides else "" for side in (32, 24, 16))
        assert f"`{name}` | " + " | ".join(cells) in rows, name
    curves = rungs.curves(saved_runs("classroom_ladder"))
    plain, (top, *_) = (
        [replace(point, flop=rungs.train_seconds(name, point.epochs, steps)) for point in curves[name]]
        for name in ("plain", "tta")
    )
    longer = str(rungs.saving(plain, [top])).replace("times the arithmetic", "times as long")
    text = (RESULTS / "README.md").read_text()
    assert f"after one epoch, {top.flop:.1f} s, the plain network takes {longer}." in text


def test_the_table_of_tricks_taken_away_says_what_was_measured():
    from cifar_fast.experiments import rungs
    from cifar_fast.experiments.saved import saved_runs
    from cifar_fast.experiments.statistics import mean_interval

    def shown(points: tuple[float, ...]) -> str:
        low, high = mean_interval(points)
        return f"{fmean(points):+.2f} ({low:+.2f} to {high:+.2f})"

    rows = [" | ".join(row) for row in table_rows(RESULTS / "README.md")]
    worth = rungs.added_and_left_out(saved_runs("classroom_ladder"), saved_runs("leave_one_out"))
    assert len(worth) == 7
    for name, each in worth.items():
        assert f"`{name}` | {shown(each.gains)} | {shown(each.losses)}" in rows
        assert len(each.gains) == len(each.losses) == 10
    sums = [sum(fmean(getattr(each, column)) for each in worth.values()) for column in ("gains", "losses")]
    text = (RESULTS / "README.md").read_text()
    assert "from the foot ({:.1f} points); the losses do not ({:.1f} points)".format(*sums) in text


def test_the_table_of_speedruns_images_says_what_was_measured():
    from cifar_fast import recipes
    from cifar_fast.experiments.arithmetic import train_flop
    from cifar_fast.experiments.saved import saved_ablation, saved_runs
    from cifar_fast.experiments.statistics import mean_interval
    from cifar_fast.recipe import Recipe, changed_fields

    arms = {run["arm"] for run in saved_runs("search_speedrun")}
    saved = saved_ablation(*(arms - {"as it is"}), folder=RESULTS / "search_speedrun")
    rows = [row for row in table_rows(RESULTS / "README.md") if len(row) == 4]
    flop = {}
    for arm, runs in saved.arms.items():
        recipe = Recipe.from_dict(runs[0]["recipe"])
        flop[arm] = train_flop(recipe, 45_000)
        accuracy = f"{100 * fmean(run['accuracy'] for run in runs):.2f} % ({len(runs)})"
        differences = [100 * each for each in saved.differences(arm)]
        low, high = mean_interval(differences)
        paired = f"{fmean(differences):+.2f} ({low:+.2f} to {high:+.2f})"
        if len(differences) == 2:
            paired = f"{differences[0]:+.2f}, {differences[1]:+.2f}: two seeds"
        expected = [f"{flop[arm] / flop['as it is']:.2f}", accuracy, "" if arm == "as it is" else paired]
        assert expected in [row[1:] for row in rows], arm
    adopted = replace(recipes.speedrun(), widths=(16, 64, 64))
    trained = [Recipe.from_dict(runs[0]["recipe"]) for runs in saved.arms.values()]
    assert any(not changed_fields(adopted, recipe) for recipe in trained)


def test_the_table_of_the_search_for_less_arithmetic_says_what_was_measured():
    from cifar_fast.experiments.arithmetic import train_flop
    from cifar_fast.experiments.saved import saved_runs
    from cifar_fast.experiments.statistics import mean_interval
    from cifar_fast.recipe import Recipe

    arms: dict[str, list[dict]] = {}
    for run in saved_runs("search_arithmetic"):
        assert run["dataset"]["n_train"] == 45_000
        arms.setdefault(run["arm"], []).append(run)
    rows = [row for row in table_rows(RESULTS / "README.md") if len(row) == 5 and row[1] in ("512", "1024", "1536")]
    assert len(rows) == len(arms)
    for runs in arms.values():
        recipe, own = Recipe.from_dict(runs[0]["recipe"]), runs[0].get("tricks")
        sides = [recipe.resolution(epoch) for epoch in range(round(recipe.epochs))]
        row = [
            ("" if recipe.bend_fraction else "short: ")
            + ", ".join(map(str, recipe.widths))
            + (", block 1 fixed after 6 epochs" if own else "")
            + (f", Muon's rate {recipe.muon_lr:g}" if "muon_lr" in runs[0]["arm"] else ""),
            str(recipe.global_batch_size),
            ", ".join(f"{sides.count(side)} at {side}" for side in dict.fromkeys(sides)),
            "" if own else f"{train_flop(recipe, 45_000) / 1e12:.0f}",
            f"{100 * fmean(run['accuracy'] for run in runs):.2f} % ({len(runs)})",
        ]
        assert row in rows, row
    text = " ".join((RESULTS / "README.md").read_text().split())
    for folder in ("laptop", "laptop_10_epochs"):
        on_test = [100 * run["accuracy"] for run in saved_runs(folder)]
        low, high = mean_interval(on_test)
        assert f"{fmean(on_test):.2f} % on average (95 % interval {low:.2f} to {high:.2f})" in text
    rates = [100 * run["accuracy"] for run in saved_runs("search_rates")]
    assert f"{len(rates)} runs, mostly of one seed, lie between {min(rates):.2f} and {max(rates):.2f} %" in text


def test_the_table_of_tricks_says_what_was_measured():
    from cifar_fast.experiments.ablation import points
    from cifar_fast.experiments.saved import saved_ablation

    (first, *rows) = [
        row for row in table_rows(RESULTS / "README.md") if len(row) == 6 and re.fullmatch(r"[\d+ ]+", row[1])
    ]
    as_it_is = saved_ablation().arms["as it is"]
    accuracy, seconds = (fmean(run[key] for run in as_it_is) for key in ("accuracy", "train_seconds"))
    assert first[1:4] == [str(len(as_it_is)), f"{100 * accuracy:.2f} %", f"{seconds:.0f}"]
    assert len(rows) == 12
    for changed, n, accuracy, seconds, difference, verdict in rows:
        (arm,) = re.findall(r"\(`(.*)`\)", changed)
        machines = [found for name in FULL if (found := saved_ablation(arm, folder=RESULTS / name))]
        runs = machines[0].arms[arm]
        assert n == " + ".join(str(len(machine.differences(arm))) for machine in machines), arm
        assert accuracy == f"{100 * fmean(run['accuracy'] for run in runs):.2f} %", arm
        assert seconds == (f"{fmean(run['train_seconds'] for run in runs):.0f}" if "tta" not in arm else "the same"), (
            arm
        )
        pooled = [each for machine in machines for each in machine.differences(arm)]
        assert f"{difference.removesuffix(' points')} points: {verdict}" == points(pooled), arm


# --- CITATION.cff ---


def test_the_citation_is_valid_and_names_this_version():
    yaml = pytest.importorskip("yaml", reason="needs PyYAML: pip install -e '.[test]'")
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert {"cff-version", "message", "title", "authors"} <= set(citation)  # what the format requires
    known = {"cff-version", "message", "type", "title", "abstract", "authors", "version", "license", "keywords"}
    assert set(citation) <= known
    assert (citation["cff-version"], citation["type"], citation["title"]) == ("1.2.0", "software", project()["name"])
    assert citation["version"] == project()["version"] and citation["license"] == project()["license"]
    assert [author["name"] for author in citation["authors"]] == [author["name"] for author in project()["authors"]]
    assert all(isinstance(word, str) for word in citation["keywords"])


# --- how the tests run ---


def test_pytest_runs_the_notebooks_and_compares_what_they_show(pytestconfig):
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["pytest"]["ini_options"]
    assert settings["testpaths"] == ["tests", "notebooks"]
    assert pytestconfig.option.nbval and not pytestconfig.option.nbval_lax
    assert Path(pytestconfig.option.nbval_sanitize_with) == ROOT / "notebooks" / "sanitize.cfg"
    assert (ROOT / "notebooks" / "sanitize.cfg").exists()
    assert os.environ["OMP_NUM_THREADS"]  # before torch is imported: several tests share the cores


@pytest.mark.parametrize(
    "options, shared",
    [
        ({}, True),
        ({"markexpr": "not browser"}, True),
        ({"markexpr": "gpu"}, False),
        ({"keyword": "ladder"}, False),
        ({"usepdb": True}, False),
        ({"collectonly": True}, False),
        ({"args_source": pytest.Config.ArgsSource.ARGS}, False),
        ({"args_source": pytest.Config.ArgsSource.ARGS, "numprocesses": 2}, True),
        ({"numprocesses": 0}, False),
    ],
    ids=str,
)
def test_only_the_whole_suite_is_shared_among_processes(pytestconfig, monkeypatch, options, shared):
    conftest = pytestconfig.pluginmanager.get_plugin(str(ROOT / "conftest.py"))
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1}, raising=False)
    option = SimpleNamespace(
        numprocesses=None, dist="no", loadscopereorder=True, keyword="", markexpr="", usepdb=False, collectonly=False
    )
    config = SimpleNamespace(args_source=pytest.Config.ArgsSource.TESTPATHS, option=option)
    for name, value in options.items():
        setattr(config if name == "args_source" else option, name, value)
    conftest.pytest_cmdline_main(config)
    assert option.numprocesses == (2 if shared else options.get("numprocesses"))
    # File by file: the cells of a notebook need one kernel. In the order of collection: the longest come first.
    assert (option.dist, option.loadscopereorder) == (("loadfile", False) if shared else ("no", True))


def test_the_longest_files_are_there(pytestconfig):
    conftest = pytestconfig.pluginmanager.get_plugin(str(ROOT / "conftest.py"))
    there = [*(ROOT / "tests").rglob("test_*.py"), *(ROOT / "notebooks").glob("*.ipynb")]
    assert set(conftest.LONGEST) <= {path.name for path in there}


# --- the tree in CONTRIBUTING.md ---


def test_the_tree_says_one_line_about_every_source_file():
    """The tree is drawn by indentation: `folder/   what it is`, and below it `file.py   what it is`.

    The modules with the lessons' exercises share the line of `lesson_NN.py`.
    """
    (tree,) = [lines for _, lines in code_blocks(ROOT / "CONTRIBUTING.md") if lines[:1] == ["cifar_fast/"]]
    drawn: list[str] = []
    rooms: list[str] = []
    for line in tree[1:]:
        if found := re.fullmatch(r"((?:  )+)([\w.]+/?) +\w.*", line):
            depth, name = len(found[1]) // 2, found[2]
            rooms[depth - 1 :] = [name] if name.endswith("/") else []
            drawn += [] if name.endswith("/") else ["".join(rooms) + name]
    there = {re.sub(r"lesson_\d\d", "lesson_NN", path.relative_to(PACKAGE).as_posix()) for path in SOURCES}
    there |= {"teaching/exercises/lesson_NN.py"}
    assert sorted(drawn) == sorted(name for name in there if not name.endswith("/__init__.py"))


# --- the package ---


def test_import_does_nothing_heavy():
    code = "import json, sys, cifar_fast; print(json.dumps(sorted(sys.modules)))"
    loaded = json.loads(subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, cwd=ROOT).stdout)
    assert "cifar_fast" in loaded
    assert not {"torchvision", "matplotlib", "ipywidgets", "IPython", "tyro"} & set(loaded)


def test_public_names_exist():
    import cifar_fast

    assert cifar_fast.__all__
    assert len(set(cifar_fast.__all__)) == len(cifar_fast.__all__)
    missing = [name for name in cifar_fast.__all__ if not hasattr(cifar_fast, name)]
    assert not missing


# --- the repository ---


def repository_files() -> list[Path]:
    """Every file that is tracked or would be by `git add .`, skipping the test where this is no git checkout."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    try:
        listing = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    except (FileNotFoundError, subprocess.CalledProcessError) as error:
        pytest.skip(f"not a git checkout: {error}")
    return [path for name in listing.split("\0") if name and (path := ROOT / name).is_file()]


def test_no_file_names_private_places():
    here = "|".join(re.escape(str(path)) for path in {ROOT, Path.home()} if path != Path("/"))
    home = re.compile(rf"(?<![\w.:/-])(?:{here}|/home/\w+|/Users/\w+|/root|[A-Z]:\\Users\\\w+)(?=[/\\])".encode())
    shared = re.compile(rb"\.\./shared")
    offenders = []
    for path in repository_files():
        content = path.read_bytes()
        patterns = [home] if path == ROOT / ".ci" / "run" else [home, shared]
        offenders += [f"{path.relative_to(ROOT)}: {found[0]!r}" for one in patterns for found in one.finditer(content)]
    assert not offenders


def test_the_wheel_alone_has_the_notebooks_and_predicts_with_a_network_that_ships(tmp_path):
    source, wheels, installed, here = (tmp_path / name for name in ("source", "wheels", "installed", "here"))
    for path in repository_files():
        (source / path.relative_to(ROOT)).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, source / path.relative_to(ROOT))
    wheels.mkdir()
    here.mkdir()
    build = f"from setuptools import build_meta; build_meta.build_wheel({str(wheels)!r})"
    subprocess.run([sys.executable, "-c", build], cwd=source, capture_output=True, check=True)
    with zipfile.ZipFile(next(wheels.glob("*.whl"))) as wheel:
        wheel.extractall(installed)
    shutil.rmtree(source)
    Image.new("RGB", (40, 30), "navy").save(here / "sea.png")

    def python(*arguments: str) -> str:
        environment = os.environ | {"PYTHONPATH": str(installed)}
        command = [sys.executable, *arguments]
        return subprocess.run(command, cwd=here, env=environment, capture_output=True, text=True, check=True).stdout

    assert re.search(r"sea\.png +\w+ \d", python("-m", "cifar_fast", "predict", "sea.png", "--top", "1"))
    listed = [line.split(":")[0] for line in python("-m", "cifar_fast", "notebooks").splitlines()]
    assert listed == sorted(path.name for path in (ROOT / "notebooks").glob("*.ipynb"))
    shown = "import cifar_fast as cf; print(cf.__file__, cf.results_folder(), cf.lessons.gain('muon'))"
    file, results, *gain = python("-c", shown).split()
    assert [file, results] == [str(installed / "cifar_fast" / name) for name in ("__init__.py", "results")]
    assert "points of test accuracy" in " ".join(gain)
