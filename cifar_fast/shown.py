"""Puts results into words and tables, as text and as HTML."""

from __future__ import annotations

import html
from collections.abc import Iterable, Mapping, Sequence
from typing import Any


def table(rows: Iterable[Sequence[str]], *, right: bool = False) -> str:
    """Return the rows with aligned columns, to the left or to the right."""
    rows = list(rows)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    aligned = [
        [cell.rjust(width) if right else cell.ljust(width) for cell, width in zip(row, widths, strict=True)]
        for row in rows
    ]
    return "\n".join("  ".join(row).rstrip() for row in aligned)


def html_table(rows: Sequence[Sequence[str]], notes: Sequence[str] = ()) -> str:
    """Return the rows as an HTML table, the first as its heading, and below it the notes in small print."""
    head, *body = [[html.escape(cell) for cell in row] for row in rows]
    heading = "".join(f"<th>{cell}</th>" for cell in head)
    lines = "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>\n" for row in body)
    below = "<br>\n".join(map(html.escape, notes))
    shown = f"<table>\n<thead><tr>{heading}</tr></thead>\n<tbody>\n{lines}</tbody></table>"
    return shown + f"\n<p><small>{below}</small></p>" * bool(notes)


def percent(share: float) -> str:
    """Return a share (0 ... 1) in per cent."""
    return f"{100 * share:.2f} %"


def epochs(number: float) -> str:
    """Return a number of epochs in words: `1 epoch`, `2.5 epochs`."""
    return f"{number:g} epoch" + "s" * (number != 1)


def data_set(data: Mapping[str, Any]) -> str:
    """Return in words the name and size of a data set, given as `Dataset.describe()`."""
    return f"{data['name']} ({data['n_train']:,} training and {data['n_test']:,} test images)"


def hardware(environment: Mapping[str, Any]) -> str:
    """Return an environment's machine and its processes in words."""
    processes, backend = environment.get("world_size", 1), environment.get("backend")
    together = f", {processes} processes" + (f" ({backend})" if backend else "") if processes > 1 else ""
    if environment["gpu"]:
        return f"{processes} x {environment['gpu']}{together}" if processes > 1 else environment["gpu"]
    threads = f"{environment['threads']} thread" + ("s" if environment["threads"] != 1 else "")
    each = " each" if together else ""
    return f"{environment['cpu']}, {environment['cpu_capability']}{together}, {threads}{each}"
