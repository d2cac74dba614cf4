"""The directive `command-help`: a section for every command with what `crossmorph COMMAND --help` prints."""

import io
import os
import textwrap
import typing
from contextlib import redirect_stdout, suppress
from unittest import mock

from docutils import nodes
from docutils.parsers.rst import Directive
from sphinx.application import Sphinx

from crossmorph.cli import Command, main
from crossmorph.commands.train import Train

WIDTH = 88


def names(union: typing.Any) -> list[str]:
    """The subcommands of a union, in its order."""
    return [choice.__metadata__[0].name for choice in typing.get_args(union)]


def help_text(*words: str) -> str:
    """What `--help` prints, in plain letters; long lines of the description are broken."""
    printed = io.StringIO()
    plain = {"COLUMNS": str(WIDTH), "NO_COLOR": "1", "TERM": "dumb"}
    with mock.patch.dict(os.environ, plain), redirect_stdout(printed), suppress(SystemExit):
        main([*words, "--help"])
    lines = [textwrap.fill(line, WIDTH) if line[:1].strip() else line for line in printed.getvalue().splitlines()]
    return "\n".join(lines).strip() + "\n"


class CommandHelp(Directive):
    """Sections with the help of all commands, made by the commands themselves."""

    def run(self) -> list[nodes.Node]:
        what = typing.get_type_hints(Train, include_extras=True)["what"].__origin__
        training = [("train", name) for name in names(what)]
        sections: list[nodes.Node] = []
        for words in [(name,) for name in names(Command)] + training:
            title = " ".join(("crossmorph", *words))
            section = nodes.section("", nodes.title("", title), ids=[nodes.make_id(title)], names=[title])
            section += nodes.literal_block("", help_text(*words), language="none")
            sections.append(section)
        return sections


def setup(app: Sphinx) -> dict[str, bool]:
    app.add_directive("command-help", CommandHelp)
    return {"parallel_read_safe": True}
