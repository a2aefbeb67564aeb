"""The stored notebooks are what a reader needs and nothing else, and nbval notices what no longer holds."""

from __future__ import annotations

import ast
import copy
import json
import os
import re
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from cifar_fast.errors import UserError
from cifar_fast.recipe import Recipe
from cifar_fast.teaching import notebooks

ROOT = Path(__file__).resolve().parents[2]
STORED = sorted((ROOT / "notebooks").glob("*.ipynb"))
EACH = pytest.mark.parametrize("path", STORED, ids=lambda path: path.stem)
# The fourteen, each with the recipe's fields that it is about.
ABOUT = {
    "00_quickstart": (),
    "01_a_plain_loop": (),
    "02_data_on_the_device": ("preload",),
    "03_half_precision": ("precision",),
    "04_label_smoothing": ("label_smoothing",),
    "05_activations_and_pooling": ("activation", "pool_position"),
    "06_ghost_batch_norm": ("ghost_batch_size",),
    "07_frozen_scales_and_bias_rates": ("freeze_bn_scale", "bias_lr_scale"),
    "08_patch_whitening": ("whitening_size",),
    "09_schedules_and_optimisers": ("optimizer", "peak_lr"),
    "10_averaging_and_tta": ("ema_decay", "lookahead_alpha", "tta"),
    "11_eight_ways_at_once": ("n_shards",),
    "12_the_timing_cell": (),
    "13_your_own_trick": (),
}
ABSOLUTE_PATH = re.compile(r"(?<![\w.:/<*~)\]-])/(?:[\w.+-]+/)+[\w.+-]*|[A-Z]:\\\w+")
MOST_LINES, MOST_BYTES = 15, 400_000


def load(path: Path) -> Any:
    return json.loads(path.read_text())


def text(value: str | list[str]) -> str:
    """A cell's source or an output's text, which a file holds as lines."""
    return value if isinstance(value, str) else "".join(value)


def cells(path: Path, kind: str) -> list[Any]:
    return [cell for cell in load(path)["cells"] if cell["cell_type"] == kind]


def prose(path: Path) -> str:
    return "\n\n".join(text(cell["source"]) for cell in cells(path, "markdown"))


def outputs(path: Path) -> list[tuple[Any, Any]]:
    return [(cell, output) for cell in cells(path, "code") for output in cell["outputs"]]


# --- the fourteen ---


def test_all_fourteen_are_there_and_found():
    assert [path.stem for path in STORED] == list(ABOUT)
    assert notebooks.find() == STORED


@EACH
def test_no_backslash_of_a_formula_became_a_control_character(path):
    assert not re.search(r"[\x00-\x09\x0b-\x1f]", "".join(text(cell["source"]) for cell in load(path)["cells"]))


@EACH
def test_cells_are_short_and_the_file_is_small(path):
    for number, cell in enumerate(load(path)["cells"]):
        lines = [line for line in text(cell["source"]).splitlines() if not line.startswith("| ")]  # tables are as long
        assert 0 < len(lines) <= MOST_LINES, f"cell {number} has {len(lines)} lines: {lines[:1]}"
    assert path.stat().st_size < MOST_BYTES


@EACH
def test_one_clean_run_from_top_to_bottom_is_what_is_stored(path):
    code = cells(path, "code")
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    for cell, output in outputs(path):
        assert output.get("name") != "stderr", output
        if output["output_type"] == "error":
            assert "raises-exception" in cell["metadata"].get("tags", []), output["evalue"]
            assert output is cell["outputs"][-1]


def shows_something(source: str) -> bool:
    """Whether a cell prints or displays at its top level, or ends with a value."""
    code = "\n".join(line for line in source.splitlines() if not line.lstrip().startswith(("%", "!")))
    statements = ast.parse(code).body
    calls = [
        ast.unparse(node.value.func)
        for node in statements
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call)
    ]
    if any(name in ("print", "display") or "exercises.c" in name for name in calls):  # check or compare
        return True
    last = statements[-1] if statements else None
    if not isinstance(last, ast.Expr) or code.rstrip().endswith(";"):
        return False
    silent = isinstance(last.value, ast.Call) and "assert" in ast.unparse(last.value.func)
    return not silent


def test_what_shows_something():
    for source in (
        "print(1)",
        "x = 1\nx",
        "display(x)\ny = 2",
        "cf.exercises.check('04.1', f)",
        "cf.exercises.compare(None, 1)",
        "%pip list\nx",
    ):
        assert shows_something(source), source
    for source in (
        "x = 1",
        "import os",
        "x;",
        "torch.testing.assert_close(a, b)",
        "def f():\n    print(1)",
        "%pip list",
    ):
        assert not shows_something(source), source


@EACH
def test_every_cell_that_has_something_to_show_has_it_stored(path):
    for cell in cells(path, "code"):
        if shows_something(text(cell["source"])):
            assert cell["outputs"], text(cell["source"])


@EACH
def test_every_picture_says_what_it_shows(path):
    pictures = [output for _, output in outputs(path) if "image/png" in output.get("data", {})]
    assert pictures, "needs at least one picture"
    for output in pictures:
        for alt in (output["metadata"]["image/png"]["alt"], text(output["data"]["text/plain"]).strip("<>")):
            assert len(alt.split()) >= 4 and not alt.startswith(("Figure", "Picture")), f"no description: {alt!r}"
    for alt in re.findall(r"!\[([^]]*)\]\(", prose(path)):
        assert len(alt.split()) >= 4


@EACH
def test_no_output_names_a_place_on_a_machine(path):
    for _, output in outputs(path):
        shown = [
            output.get("text", ""),
            *(output.get("data", {}).get(kind, "") for kind in ("text/plain", "text/html")),
        ]
        shown += output.get("traceback", [])
        found = [place for value in shown for place in ABSOLUTE_PATH.findall(text(value))]
        assert not found, found


def test_what_is_a_place_on_a_machine():
    for place in ("in /tmp/x/y", "'/srv/me/data'", '"C:\\\\Users"', "(/opt/venv/lib/)"):
        assert ABSOLUTE_PATH.search(place.replace("\\\\", "\\")), place
    for other in ("images / s", "1/2/3", "https://github.com/apple/x", "runs/five/six", "<b></b>", "../a/b", "~/a/b"):
        assert not ABSOLUTE_PATH.search(other), other


@EACH
def test_a_stored_notebook_is_tidy(path):
    nbformat = pytest.importorskip("nbformat", reason="needs JupyterLab: pip install -e '.[notebooks]'")
    stored = nbformat.read(path, as_version=4)
    assert stored.metadata == notebooks.METADATA
    nbformat.validate(stored)
    again = copy.deepcopy(stored)
    notebooks.tidy(again)
    assert again == stored


@EACH
def test_a_notebook_asks_a_question_names_its_fields_and_has_exercises(path):
    said = prose(path)
    number, before_and_after = int(path.name[:2]), [other.name for other in STORED]
    assert re.match(rf"# {number:02d}  ?\S", said) and "?" in said.split("##")[0]
    known = {field.name for field in fields(Recipe)}
    for field in ABOUT[path.stem]:
        assert field in known and f"`{field}" in said, f"does not name the field {field}"
    assert "## What we saw" in said and "## Exercises" in said
    code = "\n".join(text(cell["source"]) for cell in cells(path, "code"))
    assert 2 <= code.count("exercises.check(") + code.count("exercises.compare(") <= 5
    assert said.count("<details>") == said.count("</details>")
    neighbours = before_and_after[max(0, number - 1) : number] + before_and_after[number + 1 : number + 2]
    for name in neighbours:
        assert f"]({name})" in said, f"does not link to {name}"


@EACH
def test_every_link_to_a_file_of_the_repository_leads_there(path):
    links = re.findall(r"\]\(([^)\s#]+)[^)]*\)", prose(path))
    missing = [link for link in links if "://" not in link and not (path.parent / link).exists()]
    assert not missing


# --- finding, executing, storing ---


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(notebooks, "FOLDER", tmp_path)
    return tmp_path


def test_find_takes_the_beginnings_of_names_and_keeps_the_order(folder):
    for name in ("11_last.ipynb", "00_first.ipynb", "04_middle.ipynb", "notes.ipynb", "04_notes.txt"):
        (folder / name).touch()
    assert [path.name[:2] for path in notebooks.find()] == ["00", "04", "11"]
    assert [path.name[:2] for path in notebooks.find(["11", "04_mid"])] == ["04", "11"]
    with pytest.raises(UserError, match="no notebook starts with '07'; there are 00_first, 04_middle, 11_last"):
        notebooks.find(["04", "07"])


def test_find_in_an_empty_folder_says_where_notebooks_come_from(folder):
    with pytest.raises(UserError, match="no notebooks in .*; install the package again, or clone the repository"):
        notebooks.find()


TABLE = """
class Runs:
    def _repr_html_(self):
        rows = "<tr><td>as it is</td><td>3</td><td>51.2 &#177; 1.5 %</td></tr><tr><td>more accurate</td></tr>"
        return f"<table>\\n<tr><th>arm</th><th>n</th><th>accuracy</th></tr>\\n{rows}</table>\\n<p>hardware: abacus</p>"

    def __repr__(self):
        return "<the table as text>"


Runs()"""
SCALE = """
print("scale: smoke (CIFAR_FAST_SCALE=smoke); 3,000 training images, 3 seeds; recipe 'smoke', 2 epochs")
print("CIFAR-10: 3,000 training and 1,000 test images; 123 of 1,000 images are wrong")
print("recipe 'smoke', 2 epochs; TTA: flip")
print("smoke, mine on CIFAR-10, seed 0: 25.50 % after 2.0 s of training")
print("{'peak_lr': (0.1, 138.5), 'whitening_size': (0, 2)}")"""
CODE = [
    ("import os, sys, time", []),
    ("print('arm        n  accuracy')\nprint(f'as it is   3  {51.25:.2f} +- 1.50 %')", []),
    ("print('train_seconds', 1.5)\nprint('hardware: an abacus')\nprint((256, 27))", []),
    ("print('first')\nsys.stdout.flush()\ntime.sleep(0.5)\nprint('second')", []),
    ("os.environ['CIFAR_FAST_SCALE'], os.getcwd()", ["nbval-ignore-output"]),
    ("raise ValueError('on purpose')", ["raises-exception"]),
    ("{'a table': 'of shapes', 'weight': (64, 3, 3, 3)}", []),
    (TABLE.strip(), []),
    (SCALE.strip(), []),
]


def write(path: Path, code: list[tuple[str, list[str]]]) -> Path:
    nbformat = pytest.importorskip("nbformat", reason="needs JupyterLab: pip install -e '.[notebooks]'")
    pytest.importorskip("nbclient", reason="needs JupyterLab: pip install -e '.[notebooks]'")
    notebook = nbformat.v4.new_notebook()
    notebook.metadata["signature"] = "of a session"
    notebook.cells.append(nbformat.v4.new_markdown_cell("# A notebook"))
    for source, tags in code:
        notebook.cells.append(nbformat.v4.new_code_cell(source))
        notebook.cells[-1].metadata = {"tags": tags, "collapsed": True} if tags else {"collapsed": True}
    nbformat.write(notebook, path)
    return path


@pytest.fixture(scope="module")
def executed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small notebook, run and stored at the scale `laptop`."""
    path = write(tmp_path_factory.mktemp("executed") / "00_small.ipynb", CODE)
    notebooks.execute(path, "laptop")
    return path


def test_execute_stores_what_the_cells_gave_and_no_more(executed):
    stored = load(executed)
    assert stored["metadata"] == notebooks.METADATA and stored["nbformat_minor"] == 5
    assert [cell["id"] for cell in stored["cells"]] == [f"cell-{number:02d}" for number in range(1 + len(CODE))]
    code = cells(executed, "code")
    assert [cell["execution_count"] for cell in code] == list(range(1, 1 + len(CODE)))
    assert [cell["metadata"] for cell in code] == [{"tags": tags} if tags else {} for _, tags in CODE]
    given = [[text(output.get("text", "")) for output in cell["outputs"]] for cell in code]
    assert given[3] == ["first\nsecond\n"]  # sent in two pieces, stored as one
    (value,) = code[4]["outputs"]
    assert text(value["data"]["text/plain"]) == str(("laptop", str(executed.parent)))
    assert [output["output_type"] for output in code[5]["outputs"]] == ["error"]
    assert [path.name for path in executed.parent.iterdir()] == [executed.name]


def test_executing_again_changes_nothing_and_leaves_the_environment_alone(executed, monkeypatch):
    monkeypatch.setenv("CIFAR_FAST_SCALE", "gpu")
    before = executed.read_text()
    notebooks.execute(executed, "laptop")
    assert executed.read_text() == before
    assert os.environ["CIFAR_FAST_SCALE"] == "gpu"


def test_a_cell_that_fails_leaves_the_file_as_it_was(tmp_path):
    path = write(tmp_path / "00_fails.ipynb", [("print('fine')", []), ("1 / 0", []), ("print('never')", [])])
    before = path.read_bytes()
    with pytest.raises(UserError, match=r"(?s)00_fails.ipynb failed, and is not stored:.*1 / 0.*ZeroDivisionError"):
        notebooks.execute(path)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]
    assert "CIFAR_FAST_SCALE" not in os.environ


def test_execute_without_jupyter_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "nbclient", None)
    with pytest.raises(UserError, match=r"pip install 'cifar_fast\[notebooks\]'"):
        notebooks.execute(tmp_path / "00_none.ipynb")


def test_every_notebook_installs_the_package_with_the_same_short_cell():
    wanted = notebooks.install_cell(notebooks.repository_address())
    for path in STORED:
        assert text(cells(path, "code")[0]["source"]) == wanted, path.name
    assert len(wanted.splitlines()) <= MOST_LINES


def test_the_installing_cell_takes_the_address_from_pyproject(tmp_path):
    project = tmp_path / "pyproject.toml"
    assert notebooks.repository_address(project) == ""
    project.write_text('[project.urls]\nRepository = "https://example.org/me/cifar_fast/"\n')
    address = notebooks.repository_address(project)
    assert address == "https://example.org/me/cifar_fast"
    code = notebooks.install_cell(address)
    assert f'"git+{address}"' in code and "assert" not in code
    assert "assert source, " in notebooks.install_cell("")


@pytest.mark.parametrize("named, beside", [("", False), ("somewhere", False), ("", True), ("somewhere", True)])
def test_the_installing_cell_prefers_the_variable_to_the_clone(tmp_path, monkeypatch, named, beside):
    (tmp_path / "notebooks").mkdir()
    (tmp_path / "cifar_fast").mkdir(exist_ok=True) if beside else None
    monkeypatch.chdir(tmp_path / "notebooks")
    monkeypatch.delenv(notebooks.SOURCE, raising=False)
    if named:
        monkeypatch.setenv(notebooks.SOURCE, named)
    lines = notebooks.install_cell("").splitlines()
    first, last = lines.index("    import os"), next(i for i, line in enumerate(lines) if "%pip" in line)
    found: dict[str, Any] = {}
    code = "if True:\n" + "\n".join(lines[first:last])
    if named or beside:
        exec(code, found)
        assert found["source"] == (named or f"file://{tmp_path}")
    else:
        with pytest.raises(AssertionError, match="set CIFAR_FAST_SOURCE to the repository's address"):
            exec(code, found)


def test_tidy_drops_widgets_of_a_session_joins_streams_and_is_idempotent():
    nbformat = pytest.importorskip("nbformat", reason="needs JupyterLab: pip install -e '.[notebooks]'")
    v4 = nbformat.v4
    view = {"application/vnd.jupyter.widget-view+json": {"model_id": "a1"}, "text/plain": "Explorer(epochs=4)"}
    given = [
        v4.new_output("stream", name="stdout", text="one\n"),
        v4.new_output("stream", name="stdout", text="two\n"),
        v4.new_output("stream", name="stderr", text="a warning\n"),
        v4.new_output("stream", name="stdout", text="three\n"),
        v4.new_output("display_data", data=view),
    ]
    cell = v4.new_code_cell("x", outputs=given, metadata={"execution": {"iopub.status.busy": "now"}})
    notebook = v4.new_notebook(cells=[cell], metadata={"widgets": {"state": {}}})
    notebooks.tidy(notebook)
    (cell,) = notebook.cells
    assert [output.get("text") for output in cell.outputs] == ["one\ntwo\n", "a warning\n", "three\n", None]
    assert cell.outputs[-1].data == {"text/plain": "Explorer(epochs=4)"}
    assert notebook.metadata == notebooks.METADATA and cell.metadata == {}
    nbformat.validate(notebook)
    again = copy.deepcopy(notebook)
    notebooks.tidy(again)
    assert again == notebook


# --- nbval ---

# What somebody changes in a stored output: of which cell, what, into what, and whether nbval has to notice.
EDITS = {
    "another accuracy": (1, "51.25 +- 1.50", "48.75 +- 12.50", False),
    "another time": (2, "1.5", "120.75", False),
    "another machine": (2, "an abacus", "a slide rule", False),
    "another column": (1, "accuracy", "precision", True),
    "another arm": (1, "as it is", "as it was", True),
    "another n": (1, " 3 ", " 5 ", True),
    "another shape": (2, "(256, 27)", "(256, 48)", True),
    "another clock": (2, "train_seconds", "total_seconds", True),
    "another weight": (6, "64, 3, 3, 3", "64, 3, 5, 5", True),
    "a line less": (3, "second\n", "", True),
    "another accuracy in a table": (7, "51.2", "86.93", False),
    "another verdict in a table": (7, "more accurate", "no clear difference", False),
    "another machine in a table": (7, "abacus", "slide rule", False),
    "another column in a table": (7, "<th>accuracy", "<th>loss", True),
    "another row in a table": (7, "as it is", "as it was", True),
    "another n in a table": (7, "<td>3", "<td>5", True),
    "a column less in a table": (7, "<th>n</th>", "", True),
    "another scale": (8, "smoke (CIFAR_FAST_SCALE=smoke); 3,000", "classroom (no GPU here); all", False),
    "other counts of images": (8, "3,000 training and 1,000", "50,000 training and 10,000", False),
    "another count of mistakes": (8, "123 of 1,000", "1,234 of 10,000", False),
    "other images": (8, "test images", "validation images", True),
    "another recipe": (8, "'smoke', 2 epochs; TTA: flip", "'classroom', 6 epochs; TTA: flip_shift", False),
    "another run": (8, "smoke, mine on CIFAR-10, seed 0: 25.50", "classroom, mine on synthetic, seed 0: 86.9", False),
    "other tricks": (8, "mine on", "yours on", True),
    "another seed": (8, "seed 0", "seed 1", True),
    "another rate": (8, "(0.1, 138.5)", "(0.2, 277.0)", False),
    "another field": (8, "'whitening_size'", "'whitening_eps'", True),
    "another value": (8, "(0, 2)", "(0, 3)", True),
}


def test_nbval_notices_an_edited_name_or_shape_and_no_other_time_or_accuracy(executed, tmp_path):
    pytest.importorskip("nbval", reason="needs nbval: pip install -e '.[test]'")
    notebook = load(executed)
    code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    for number, old, new, _ in EDITS.values():  # once more the cell, with another output
        cell = copy.deepcopy(code[number])
        stored, old, new = json.dumps(cell["outputs"]), json.dumps(old)[1:-1], json.dumps(new)[1:-1]
        assert old in stored
        cell["outputs"] = json.loads(stored.replace(old, new))
        notebook["cells"].append(cell | {"id": f"edited-{len(notebook['cells'])}"})
    (tmp_path / "edited.ipynb").write_text(json.dumps(notebook))
    command = [sys.executable, "-m", "pytest", "--nbval", "-p", "no:cacheprovider", "-c", os.devnull, "--rootdir=."]
    command += ["--nbval-sanitize-with", str(ROOT / "notebooks" / "sanitize.cfg"), "-rA", "--color=no", "."]
    env = os.environ | {"CIFAR_FAST_SCALE": "laptop"}
    said = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True).stdout
    failed, passed = (
        {int(number) for number in re.findall(rf"^{word} (?:.*/)?edited\.ipynb::Cell (\d+)", said, re.MULTILINE)}
        for word in ("FAILED", "PASSED")
    )
    assert failed | passed == set(range(len(CODE) + len(EDITS))), said
    assert failed == {len(CODE) + i for i, (*_, noticed) in enumerate(EDITS.values()) if noticed}, said
