"""A Sphinx extension: the directive `config-variables` lists the variables of bhyve_config(5) that mean something."""

from __future__ import annotations

from docutils import nodes
from docutils.parsers.rst import Directive

from mini_bhyve.config import SLOT_VARIABLES, VARIABLES


class ConfigVariables(Directive):
    def run(self) -> list[nodes.Node]:
        named = dict(VARIABLES)
        named.update((f"pci.0.SLOT.0.{name}", variable) for name, variable in SLOT_VARIABLES.items())
        entries = nodes.definition_list()
        for name, variable in named.items():
            term = nodes.term("", "", nodes.literal("", name))
            if variable.default:
                term += [nodes.Text("  (default: "), nodes.literal("", variable.default), nodes.Text(")")]
            entries += nodes.definition_list_item(
                "", term, nodes.definition("", nodes.paragraph("", f"{variable.meaning}."))
            )
        return [entries]


def setup(app):
    app.add_directive("config-variables", ConfigVariables)
    return {"parallel_read_safe": True}
