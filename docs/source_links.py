"""A Sphinx extension: the role :src:`ipc.init_ipc` links to the source of a name of ours, in this documentation.

The name is looked up in the code when the pages are built, and the link in the pages when they are there; what is not
there stops the build. So the pages cannot speak of functions that are gone.
"""

from __future__ import annotations

import importlib
import inspect
from pathlib import Path

from docutils import nodes
from sphinx.util import logging

logger = logging.getLogger(__name__)


def find(name: str):
    """The object for `ipc.init_ipc` (in the package) or `ctl.main`; its name in the module that defines it; that one's.

    Raises ImportError or AttributeError.
    """
    first, *path = name.split(".")
    target = module = importlib.import_module("ctl" if first == "ctl" else f"mini_bhyve.{first}")
    while path and inspect.ismodule(getattr(module, path[0])):
        target = module = getattr(module, path.pop(0))
    for part in path:
        target = getattr(target, part)
    defined_here = inspect.isclass(target) or inspect.isroutine(
        target
    )  # anything else does not say where it comes from
    return target, ".".join(path), target.__module__ if defined_here else module.__name__


def src(role, rawtext, text, lineno, inliner, options=None, content=()):
    """The role. Classes and functions have an anchor on viewcode's pages; for the rest the page must do."""
    try:
        return [link(inliner.document.settings.env, text)], []
    except (ImportError, AttributeError) as error:
        return [], [inliner.reporter.error(f"no such name in the code: {text} ({error})", line=lineno)]


def link(env, text, shown=""):
    """A link to the source of a name. Raises as `find` does."""
    target, name, module = find(text)
    page = "_modules/" + module.replace(".", "/")
    anchor = name if inspect.isclass(target) or inspect.isroutine(target) else ""
    env.app.source_links.add((text, page, anchor))
    address = env.app.builder.get_relative_uri(env.docname, page) + (f"#{anchor}" if anchor else "")
    made = nodes.reference("", "", internal=True, refuri=address)
    made += nodes.literal("", shown or text)
    return made


def check_links(app, failure):
    """When the pages are written: is there what the links lead to?"""
    for text, page, anchor in sorted(app.source_links) if not failure else ():
        file = Path(app.outdir, f"{page}.html")
        if not file.exists() or (anchor and f'id="{anchor}"' not in file.read_text(encoding="utf-8")):
            logger.warning("the link to the source of %s leads nowhere", text)


def setup(app):
    app.source_links = set()
    app.add_role("src", src)
    app.connect("build-finished", check_links)
    return {"parallel_read_safe": False}
