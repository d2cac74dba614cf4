"""Docstrings are plain text; three habits of theirs are put into reStructuredText before they are rendered.

Bars and stars are lengths and products, ``n``^3 is a literal with an exponent, and a formula in indented lines
after a colon stays as it is written.
"""

import re
from typing import Any

from sphinx.application import Sphinx

MARKS = re.compile(r"``.*?``\^?|[|*]")


def indent_of(line: str) -> int:
    return len(line) - len(line.lstrip())


def escaped(mark: re.Match[str]) -> str:
    if mark[0] in "|*":
        return "\\" + mark[0]
    return mark[0].replace("``^", "``\\ ^")


def plain(app: Sphinx, what: str, name: str, thing: Any, options: Any, lines: list[str]) -> None:
    literal = -1  # indentation that ends the formula, or -1 outside of one
    for n, line in enumerate(lines):
        if line.strip() and indent_of(line) <= literal:
            literal = -1
        if literal >= 0:
            continue
        lines[n] = MARKS.sub(escaped, line)
        blank, formula = (*lines[n + 1 : n + 3], "", "")[:2]
        if line.endswith(":") and not blank.strip() and indent_of(formula) > indent_of(line):
            lines[n] += ":"
            literal = indent_of(line)


def setup(app: Sphinx) -> dict[str, bool]:
    app.connect("autodoc-process-docstring", plain, priority=400)  # before sections such as Args are read
    return {"parallel_read_safe": True}
