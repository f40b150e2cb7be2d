"""A Sphinx extension: the role :src:`ipc.init_ipc` links to the source of a name of ours, in this documentation.

The name is looked up in the code when the pages are built, and one that is not there stops the build: so the pages
cannot speak of functions that are gone.
"""

from __future__ import annotations

import importlib
import inspect

from docutils import nodes


def find(name: str):
    """The object for `ipc.init_ipc` (in the package) or `ctl.main`, and the name of the module that defines it.

    Raises ImportError or AttributeError.
    """
    module_name, _, path = name.partition(".")
    module = importlib.import_module("ctl" if module_name == "ctl" else f"mini_bhyve.{module_name}")
    target = module
    for part in path.split(".") if path else ():
        target = getattr(target, part)
    defined_here = inspect.isclass(target) or inspect.isroutine(
        target
    )  # anything else does not say where it comes from
    return target, target.__module__ if defined_here else module.__name__


def src(role, rawtext, text, lineno, inliner, options=None, content=()):
    """The role. Classes and functions have an anchor on viewcode's pages; for the rest the page must do."""
    env = inliner.document.settings.env
    try:
        target, module = find(text)
    except (ImportError, AttributeError) as error:
        return [], [inliner.reporter.error(f"no such name in the code: {text} ({error})", line=lineno)]
    page = "_modules/" + module.replace(".", "/")
    anchor = "#" + text.partition(".")[2] if inspect.isclass(target) or inspect.isroutine(target) else ""
    link = nodes.reference(rawtext, internal=True, refuri=env.app.builder.get_relative_uri(env.docname, page) + anchor)
    link += nodes.literal(text, text)
    return [link], []


def setup(app):
    app.add_role("src", src)
    return {"parallel_read_safe": True}
