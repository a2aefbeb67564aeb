"""How Sphinx builds the site: `sphinx-build -M html docs docs/_build -W` leaves it in docs/_build/html.

Nothing is executed and nothing is fetched: the notebooks show their stored outputs, formulas become MathML while the
pages are built, and the theme brings its own script and style. Text uses the fonts of the reader's device.
"""

from __future__ import annotations

import os
import sys
import tomllib
from pathlib import Path
from typing import Any

from sphinx.application import Sphinx

DOCS = Path(__file__).parent
ROOT = DOCS.parent
sys.path[:0] = [str(DOCS), str(ROOT)]  # autodoc documents this checkout, wherever the package is installed

import api_pages
import mathml
import notebook_pages
import results_page

METADATA = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def repository_address() -> str:
    """Return the repository's address: pyproject's, else that of the GitHub repository that builds; "" without one."""
    address = METADATA.get("urls", {}).get("Repository", "")
    if not address and os.environ.get("GITHUB_REPOSITORY"):
        server = os.environ.get("GITHUB_SERVER_URL", "https://github.com")
        address = f"{server}/{os.environ['GITHUB_REPOSITORY']}"
    return address.removesuffix("/").removesuffix(".git")


REPOSITORY = repository_address()

project = "cifar_fast"
version = release = METADATA["version"]
language = "en"
exclude_patterns = ["_build"]
extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]

# notebooks
nb_execution_mode = "off"
nb_merge_streams = True
nb_code_prompt_show = "Show the code that installs the package"
nb_code_prompt_hide = "Hide it"
nb_ipywidgets_js: dict[str, Any] = {}  # no stored output needs the script, which would come from another host
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3
myst_update_mathjax = False

# API
autodoc_default_options = {"members": True, "member-order": "bysource"}
autodoc_preserve_defaults = True
default_role = "code"  # docstrings put code between single backticks
python_maximum_signature_line_length = 80
python_use_unqualified_type_names = True
add_module_names = False
toc_object_entries_show_parents = "hide"

# pages
html_theme = "furo"
html_title = "cifar_fast"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_favicon = "_static/favicon.svg"
pygments_dark_style = "github-dark"
templates_path = ["_templates"]
html_math_renderer = "mathml"
html_copy_source = False
html_show_copyright = False
html_domain_indices = False
html_use_index = False  # its two columns do not fit a phone, and the search finds the same
html_theme_options = {"source_repository": "", "top_of_page_buttons": []}
html_context = {"repository": REPOSITORY}


def setup(app: Sphinx) -> dict[str, bool]:
    """Write the pages that are made from other files, before Sphinx looks for pages."""
    notebook_pages.write(ROOT / "notebooks", DOCS / "notebooks")
    results_page.write(ROOT / "benchmarks" / "results" / "README.md", DOCS / "results.md", REPOSITORY)
    api_pages.write(DOCS / "api")
    app.add_html_math_renderer("mathml", (mathml.visit_inline, None), (mathml.visit_block, None))
    app.connect("autodoc-process-docstring", api_pages.escape_substitutions)
    app.connect("autodoc-process-docstring", api_pages.hide_colons, priority=400)  # before Napoleon
    app.connect("autodoc-process-docstring", api_pages.show_colons, priority=600)  # after it
    app.connect("autodoc-process-docstring", api_pages.say_limits_in_words)
    app.connect("autodoc-process-signature", api_pages.hide_fields)
    app.connect("autodoc-skip-member", api_pages.skip_foreign)
    app.connect("html-page-context", notebook_pages.add_to_context)
    app.connect("build-finished", notebook_pages.offer_originals)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
