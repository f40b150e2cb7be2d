"""Sphinx's configuration: `make docs` builds these pages, and a warning is an error."""

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]  # the extensions beside this file; ctl.py and the package

project = "mini-bhyve"
author = "the mini-bhyve authors"
copyright = "2026, the mini-bhyve authors"  # noqa: A001  (Sphinx's name for it)

extensions = [
    "sphinx.ext.autodoc",  # the API from the docstrings
    "sphinx.ext.viewcode",  # the source as pages, a link beside each name
    "sphinxarg.ext",  # the command lines from their parsers
    "config_variables",
    "figures",
    "instruction_table",
    "plain_docstrings",
    "source_links",
]

autodoc_default_options = {
    "members": True,
    "undoc-members": True,
    "member-order": "bysource",
    "ignore-module-all": True,  # what a module offers for others stands where it is defined
}
autodoc_typehints = "none"  # the signature in the source says it, and the source is one link away
default_role = "code"
smartquotes_action = "qe"  # quotes and dots; the dashes of `--json` stay what they are
exclude_patterns = ["_build"]

html_theme = "furo"
html_title = "mini-bhyve"
