"""A Sphinx extension: docstrings are plain text, made to be read in the source; this makes reStructuredText of them.

- What stands indented is a drawing, a table or an example, and is shown as it stands.
- What stands between single backquotes is code.
- Other characters that mean something to reStructuredText (an asterisk, a bar, an underscore at the end of a name) mean
  themselves here.

A docstring that is reStructuredText already comes out as it went in: a double colon before what is indented, double
backquotes, roles and emphasis are left alone.
"""

from __future__ import annotations

import re

# What is kept, what is code, and what must be escaped: the first that matches wins.
MARKUP = re.compile(
    r"""
    (?P<keep> ``.+?``                       # code already
            | :[\w:]+:`[^`]+`               # a role
            | `[^`]+`_+                     # a link
            | (?<![\w*])\*[^\s*][^*]*\*(?![\w*])     # emphasis
            | \*\*[^\s*][^*]*\*\*(?![\w*])  # strong emphasis
            | \\.                           # escaped already
    )
  | `(?P<code>[^`]+)`
  | (?P<escape> [*|`] | _(?![A-Za-z0-9_]) )
    """,
    re.VERBOSE,
)
LIST_ITEM = re.compile(r"(-|\*|\d+\.) ")


def _replace(match: re.Match) -> str:
    if match["keep"]:
        return match["keep"]
    if match["code"]:
        return f"``{match['code']}``"
    return "\\" + match["escape"]


def _indent(line: str) -> int:
    return len(line) - len(line.lstrip())


def convert(lines: list[str]) -> list[str]:
    """The docstring's lines, already without common indentation, as lines of reStructuredText."""
    made: list[str] = []
    text: list[str] = []  # lines at margin 0, so that code may run over the end of a line

    def finish_text() -> None:
        made.extend(MARKUP.sub(_replace, "\n".join(text)).split("\n") if text else [])
        text.clear()

    number = 0
    while number < len(lines):
        line = lines[number]
        previous = next((above for above in reversed(text) if above.strip()), "")
        in_list = LIST_ITEM.match(previous) or (_indent(previous) and not previous.startswith("    "))
        if not line.strip() or not _indent(line) or (in_list and _indent(line) < 4):
            text.append(line)
            number += 1
            continue
        # A block: everything up to the next line at the margin.
        explained = previous.endswith("::") or previous.startswith("..")
        finish_text()
        made.extend([""] if explained else ["", "::", ""])
        while number < len(lines) and (not lines[number].strip() or _indent(lines[number])):
            made.append(lines[number])
            number += 1
        made.append("")
    finish_text()
    return made


def on_docstring(app, what, name, obj, options, lines):  # the signature that Sphinx calls
    if lines and lines[0].startswith("Alias for field number"):  # what Python itself says of a NamedTuple's fields
        lines.clear()
    lines[:] = convert(lines)


def setup(app):
    app.connect("autodoc-process-docstring", on_docstring)
    return {"parallel_read_safe": True}
