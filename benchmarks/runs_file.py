"""Files of saved runs, one JSON line each, to which a script that may be killed at any time adds."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any


def read(path: Path) -> list[dict[str, Any]]:
    """Return the runs in `path`, none if it does not exist. A last line that a kill has cut short is left out."""
    content = path.read_text() if path.exists() else ""
    return [json.loads(line) for line in content[: content.rfind("\n") + 1].splitlines()]


def append(path: Path, runs: Iterable[Mapping[str, Any]]) -> None:
    """Add `runs` to `path` in one write, in place of a last line that a kill has cut short."""
    whole = path.read_bytes().rfind(b"\n") + 1 if path.exists() else 0
    with path.open("ab") as file:
        file.truncate(whole)
        file.write("".join(json.dumps(run) + "\n" for run in runs).encode())
