"""Renders the templates beside this file. What they show is text: others' markup is escaped."""

import re
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from ito.cli import one_line

LONGEST = 2000  # characters of one value: a caption may be a megabyte


def plain_text(text: object) -> str:
    """As text of Markdown: without markup, links and control characters."""
    marks = r"[\\`*_<>|\[\]!&~#$]|(?<=www)\.|:(?=//)|(?<=\w)@(?=\w+\.)"
    return re.sub(marks, r"\\\g<0>", one_line(str(text), LONGEST), flags=re.IGNORECASE)


def line(value: object) -> object:
    """As text of a page, which jinja2 escapes: without control characters."""
    return value if isinstance(value, Markup) else one_line(str(value), LONGEST)


def render(template: str, **values: object) -> str:
    """The page; each value that the template shows is escaped, in a `.md` as Markdown."""
    markdown = template.endswith(".md")
    found = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=not markdown,
        finalize=plain_text if markdown else line,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return found.get_template(template).render(values) + "\n"
