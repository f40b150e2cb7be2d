"""A Sphinx extension: the directive `instruction-table` lists all instructions that capstone has a name for.

Those that are defined by file, the others by reason. One without a reason stops the build.
"""

from __future__ import annotations

import instruction_reasons as reasons
import source_links
from docutils import nodes
from docutils.parsers.rst import Directive

from mini_bhyve.instructions import DEFINITIONS


class InstructionTable(Directive):
    def run(self) -> list[nodes.Node]:
        files: dict[str, list[int]] = {}
        for number, definition in DEFINITIONS.items():
            files.setdefault(definition.function.__module__, []).append(number)
        by_reason: dict[str, list[int]] = {why: [] for why in (*reasons.UNITS.values(), *reasons.OTHER)}
        for number in reasons.NAMES.keys() - DEFINITIONS.keys():
            why = reasons.reason(number)
            if why is None:
                raise self.error(f"docs/instruction_reasons.py does not say why there is no {reasons.NAMES[number]}")
            by_reason[why].append(number)
        defined = nodes.definition_list()
        for module in sorted(files):
            term = nodes.term("", "", self.file(module))
            numbers = sorted(files[module], key=reasons.NAMES.get)
            defined += self.entry(term, [self.mnemonic(number) for number in numbers])
        missing = nodes.definition_list()
        for why, numbers in by_reason.items():
            names = [nodes.literal("", reasons.NAMES[number]) for number in sorted(numbers, key=reasons.NAMES.get)]
            missing += self.entry(nodes.term("", why[0].upper() + why[1:]), names)
        count = len(DEFINITIONS)
        return [
            nodes.rubric("", f"There: {count} names of {len(reasons.NAMES)}"), defined,
            nodes.rubric("", f"Not there: {len(reasons.NAMES) - count}"), missing,
        ]  # fmt: skip

    def file(self, module: str) -> nodes.Node:
        """A link to what the API says of the module."""
        env = self.state.document.settings.env
        address = env.app.builder.get_relative_uri(env.docname, "api") + f"#module-{module}"
        made = nodes.reference("", "", internal=True, refuri=address)
        made += nodes.literal("", module.rpartition(".")[2] + ".py")
        return made

    def mnemonic(self, number: int) -> nodes.Node:
        """The mnemonic, linked to its function where that stands at the top of its file."""
        function, name = DEFINITIONS[number].function, reasons.NAMES[number]
        if "<locals>" in function.__qualname__:
            return nodes.literal("", name)
        path = f"{function.__module__.partition('.')[2]}.{function.__name__}"
        return source_links.link(self.state.document.settings.env, path, name)

    def entry(self, term: nodes.term, names: list[nodes.Node]) -> nodes.definition_list_item:
        paragraph = nodes.paragraph()
        for name in names:
            paragraph += [name, nodes.Text(" ")]
        return nodes.definition_list_item("", term, nodes.definition("", paragraph))


def setup(app):
    app.add_directive("instruction-table", InstructionTable)
    return {"parallel_read_safe": True}
