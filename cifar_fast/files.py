"""Where the package keeps its files, and how it writes one: completely or not at all."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import platformdirs


def cache_folder() -> Path:
    """Return the folder for downloads, decoded data and compiled kernels.

    `CIFAR_FAST_CACHE` names it, and may begin with `~`; by default it is the system's cache folder for this user.
    """
    named = os.environ.get("CIFAR_FAST_CACHE")
    return Path(named).expanduser() if named else Path(platformdirs.user_cache_dir("cifar_fast", appauthor=False))


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; when the block ends, the file written there replaces `path`.

    The data reaches the disk before the file is renamed, so neither a reader nor a power cut ever sees half a file. If
    the block raises, the temporary file is removed and `path` stays as it was.
    """
    temporary = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        yield temporary
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write `text` to `path`, completely or not at all."""
    with written_whole(path) as temporary:
        temporary.write_text(text)


def file_size(path: Path) -> int:
    """Return the size of a file in bytes; 0 if it does not exist."""
    return path.stat().st_size if path.exists() else 0
