"""Formulas as MathML, which every current browser draws without a script, translated from LaTeX while Sphinx builds."""

from __future__ import annotations

import re
from typing import Any

from docutils import nodes
from latex2mathml.converter import convert


def from_latex(formula: str, *, block: bool) -> str:
    """Return a `<math>` element for a formula of LaTeX; ValueError for what the translator does not know."""
    known = formula.replace("{aligned}", "{align*}")
    known = re.sub(r"\\log(?=\s*(?:\w|\\[a-z]))(?!\s*\\left)", r"\\log\\,", known)
    element = convert(known, display="block" if block else "inline")
    if left := re.search(r"\\[a-zA-Z]+|>&<", element):
        raise ValueError(f"no MathML for {left[0]} in the formula {formula!r}: write it another way")
    return element


def visit_inline(page: Any, node: nodes.math) -> None:
    """Write a formula that stands in a line."""
    page.body.append(f'<span class="math">{from_latex(node.astext(), block=False)}</span>')
    raise nodes.SkipNode


def visit_block(page: Any, node: nodes.math_block) -> None:
    """Write a formula that stands alone."""
    page.body.append(f'<div class="math">{from_latex(node.astext(), block=True)}</div>')
    raise nodes.SkipNode
