"""Says, before anything slow is imported, what a GPU machine lacks, and how to get it without a package index.

Only the standard library is used here: whatever is missing, this still runs, and takes a fraction of a second.
"""

from __future__ import annotations

import os
import re
import sys
import tomllib
from collections.abc import Callable, Iterable
from importlib import metadata
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
TESTS_NEED = ("pytest", "hypothesis")
OPTIONAL = {"airbench": "speedrun is not measured beside it"}
"""Packages that a part can do without, and what is left out then."""
SYNTHETIC = "synthetic"
_PARTS = [*(f"data_batch_{number}" for number in range(1, 6)), "test_batch"]
FILES = {"cifar-10-batches-bin": [f"{part}.bin" for part in _PARTS], "cifar-10-batches-py": [*_PARTS, "batches.meta"]}
"""The files of CIFAR-10, by the folder of each of its two layouts."""


def required() -> list[str]:
    """Return the names of the packages that the project needs to train and to be tested, as pyproject.toml has them."""
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    return [*map(_name, project["dependencies"]), *TESTS_NEED]


def missing(names: Iterable[str], requires: Callable[[str], list[str] | None] = metadata.requires) -> list[str]:
    """Return which of the packages, and of those that they need in turn, are not installed."""
    found, lacking, left = set(), set(), list(names)
    while left:
        name = left.pop()
        if name in found or name in lacking:
            continue
        try:
            needs = requires(name) or []
        except metadata.PackageNotFoundError:
            lacking.add(name)
            continue
        found.add(name)
        # A requirement with a condition (an extra, another system) is not always needed, and torch brings its own.
        left += [_name(need) for need in needs if ";" not in need and name != "torch"]
    return sorted(lacking)


def _name(requirement: str) -> str:
    return re.split(r"[^A-Za-z0-9._-]", requirement, maxsplit=1)[0]


def missing_data(named: str | None) -> str:
    """Return what the folder that `--data` or CIFAR_FAST_DATA names lacks of CIFAR-10; empty where it lacks nothing.

    Empty too where no folder is named: then the cache folder is read, and what it lacks is downloaded.
    """
    named = named or os.environ.get("CIFAR_FAST_DATA")
    if not named or named == SYNTHETIC:
        return ""
    folder = Path(named).expanduser()
    for name, files in FILES.items():
        for place in (folder / name, folder):
            if place.name == name and place.is_dir():
                lacking = [file for file in files if not (place / file).is_file()]
                return f"{place} lacks {', '.join(lacking)}" if lacking else ""
    return f"{folder} {'holds no' if folder.is_dir() else 'does not exist, so there is no'} {' or '.join(FILES)}"


def describe(packages: list[str], data: str, left_out: list[str]) -> str:
    """Return what is missing and how to get it, as text; empty where nothing is missing."""
    lines = [f"missing, but not needed: {name} ({OPTIONAL[name]}; pip install {name})" for name in left_out]
    if packages:
        version = f"{sys.version_info.major}.{sys.version_info.minor}"
        names = " ".join([*packages, *left_out])
        lines += [
            f"missing packages: {', '.join(packages)}",
            f"  with an index:  pip install {names}",
            "  without one:    on a machine with one and the same kind of system,",
            f"                  pip download --dest wheels --only-binary :all: --python-version {version} {names}",
            f"                  then copy that folder here, and pip install --no-index --find-links wheels {names}",
        ]
    if data:
        lines += [
            f"missing data: {data}",
            "  with internet:  cifar-10-binary.tar.gz from https://www.cs.toronto.edu/~kriz/cifar.html, unpacked",
            "  without it:     copy the folder cifar-10-batches-bin (six files, 184 MB) here",
            "                  then name the folder that it is in: --data FOLDER",
        ]
    return "\n".join(lines)


def report(named_data: str | None) -> tuple[str, bool]:
    """Return what this machine lacks, as text, and whether the command can run all the same."""
    packages, data = missing(required()), missing_data(named_data)
    return describe(packages, data, missing(OPTIONAL)), not packages and not data
