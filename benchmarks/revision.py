"""The version of the package that a script measures."""

import subprocess
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]


def commit() -> str:
    """Return the commit that is checked out, with `-changed` when the package or the scripts differ from it.

    Returns `unknown` without a checkout or without git.
    """
    git = ["git", "-C", str(REPOSITORY)]
    try:
        revision = subprocess.run(
            [*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True
        ).stdout.strip()
    except (FileNotFoundError, subprocess.CalledProcessError):
        return "unknown"
    measured = ["cifar_fast", "benchmarks/*.py"]
    differs = subprocess.run([*git, "diff", "--quiet", "HEAD", "--", *measured]).returncode
    return revision + ("-changed" if differs else "")
