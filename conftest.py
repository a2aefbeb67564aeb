"""How the whole suite runs: in several processes of one thread each, with the notebooks beside the tests.

A plain `pytest` runs the tests and executes every notebook (under nbval, which compares the outputs with the stored
ones), in as many processes as there are cores. Named files, `-k` and `-m MARK` run in this process alone; `-n` decides
otherwise.
"""

from __future__ import annotations

import os

import pytest

# Before torch is imported; test processes, kernels and all that they start inherit it.
os.environ.setdefault("OMP_NUM_THREADS", "1")

MOST_PROCESSES = 4  # each takes a gigabyte or two, and a test may start eight more
NOTEBOOK_SECONDS = 1800  # of one cell, which must have hung if it takes this long

LONGEST = (
    "test_lab.py",
    "test_benchmark.py",
    "test_launch.py",
    "test_processes.py",
    "test_site.py",
    "03_half_precision.ipynb",  # where a processor has no instructions for bfloat16
    "11_eight_ways_at_once.ipynb",
)
"""Files that take minutes and start first; then the notebooks, then all others, so that all processes end together."""


@pytest.hookimpl(tryfirst=True)  # before xdist reads its options
def pytest_cmdline_main(config: pytest.Config) -> None:
    """Check notebooks with nbval, and share the whole suite among processes: file by file, as cells belong together."""
    option = config.option
    # A machine that only runs the GPU tests may lack nbval; there the option does not exist.
    if getattr(option, "nbval", None) is False:
        option.nbval = True
        option.nbval_sanitize_with = option.nbval_sanitize_with or str(config.rootpath / "notebooks" / "sanitize.cfg")
        option.nbval_kernel_startup_timeout = 600
        option.nbval_cell_timeout = NOTEBOOK_SECONDS
    if hasattr(config, "workerinput") or not hasattr(option, "numprocesses"):
        return  # one of the processes, or no xdist
    if option.numprocesses is None and _is_whole(config):
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        option.numprocesses = min(cores, MOST_PROCESSES)
    if option.numprocesses and option.dist == "no":
        option.dist, option.loadscopereorder = "loadfile", False


def _is_whole(config: pytest.Config) -> bool:
    """Whether no part of the suite is picked (leaving a mark out picks none), and nobody wants to debug."""
    option = config.option
    named = config.args_source == pytest.Config.ArgsSource.ARGS or option.keyword
    marked = option.markexpr and not option.markexpr.startswith("not ")
    return not (named or marked or option.usepdb or option.collectonly)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the longest files first, and give notebooks the time that they need on a busy machine."""
    items.sort(key=_turn)
    for item in filter(_is_cell, items):
        item.output_timeout = NOTEBOOK_SECONDS  # type: ignore[attr-defined]  # nbval's own is 5 s, whatever its options
        item.add_marker(pytest.mark.timeout(NOTEBOOK_SECONDS + 60))


def _is_cell(item: pytest.Item) -> bool:
    return item.path.suffix == ".ipynb"


def _turn(item: pytest.Item) -> int:
    if item.path.name in LONGEST:
        return LONGEST.index(item.path.name)
    return len(LONGEST) + (not _is_cell(item))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_setup(item: pytest.Item) -> object:
    """Start a notebook's kernel, which the first cell's set-up does, at the scale that its outputs were stored with."""
    with pytest.MonkeyPatch.context() as patch:
        if _is_cell(item):
            patch.setenv("CIFAR_FAST_SCALE", "smoke")
        return (yield)
