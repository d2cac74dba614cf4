"""The site of docs/, made by `make docs`. Pages are plain Markdown whose links work in the repository as well.

The source folder is the repository itself, so that benchmarks/README.md and CONTRIBUTING.md are pages like the
others and relative links need no translation. Nothing is fetched from a network.
"""

import re
import sys
from pathlib import Path

from sphinx.application import Sphinx

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE / "extensions"))

project = "crossmorph"
copyright = "the crossmorph authors"  # noqa: A001  # Sphinx asks for this name
extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.napoleon",
    "command_help",
    "plain_docstrings",
]

root_doc = "docs/index"
include_patterns = [
    "README.md",
    "CHANGELOG.md",
    "CONTRIBUTING.md",
    "SECURITY.md",
    "benchmarks/README.md",
    "docs/**.md",
]
exclude_patterns = [".*", "build", "dist", "results", "demo-output", "benchmarks/.*", "src", "tests"]

html_theme = "furo"
html_title = "crossmorph"
html_additional_pages = {"index": "redirect.html"}
templates_path = ["templates"]
html_static_path = ["static"]
html_css_files = ["site.css"]
html_copy_source = False

myst_heading_anchors = 4
myst_links_external_new_tab = False

nb_execution_mode = "cache"
nb_execution_cache_path = str(HERE.parent / "build" / "notebooks")
nb_execution_raise_on_error = True
nb_execution_timeout = 300
nb_execution_show_tb = True
nb_execution_in_temp = True
nb_merge_streams = True

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
autosummary_generate = False
napoleon_numpy_docstring = False
napoleon_use_rtype = False
add_module_names = False
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 88


def toctrees(app: Sphinx, page: str, source: list[str]) -> None:
    """The lists of links on the first page are also the site's navigation: a group for every heading."""
    if page != root_doc:
        return
    groups = []
    for section in re.split(r"^## ", source[0], flags=re.MULTILINE)[1:]:
        caption, _, text = section.partition("\n")
        pages = re.findall(r"^- \[[^]]*\]\(([^)]+)\.md\)", text, re.MULTILINE)
        groups.append("\n".join(["```{toctree}", ":hidden:", f":caption: {caption}", "", *pages, "```"]))
    source[0] += "\n" + "\n\n".join(groups) + "\n"


def setup(app: Sphinx) -> None:
    app.connect("source-read", toctrees)
