"""A report as Markdown, for terminals, code review and diffs."""

import re

from nanochat_ray.report.document import Block, Document, KeyFigures, Plots, Samples, Table, Text


def to_markdown(document: Document) -> str:
    """The whole report; pictures become the words that describe them."""
    parts = [f"# {_inline(document.title)}", _inline(document.subtitle)]
    for section in document.sections:
        parts.append(f"## {_inline(section.title)}")
        parts += [_block(block) for block in section.blocks]
    return "\n\n".join(parts) + "\n"


def _block(block: Block) -> str:
    match block:
        case Text():
            return _inline(block.text)
        case KeyFigures():
            return _table(
                Table(
                    ("", ""), tuple((f"{name} ({note})" if note else name, value) for value, name, note in block.items)
                )
            )
        case Table():
            return _table(block)
        case Plots():
            return "\n".join(f"- {_inline(plot.title)}: {_inline(plot.words)}" for plot in block.items)
        case Samples():
            return "\n\n".join(
                _inline(sample.label) + "\n\n" + _fenced(f"{sample.given}\n→ {sample.said}") for sample in block.items
            )


def _table(table: Table) -> str:
    rules = ["---:" if column in table.right else "---" for column in range(len(table.columns))]
    lines = [table.columns, rules, *table.rows]
    return "\n".join(f"| {' | '.join(_cell(cell) for cell in line)} |" for line in lines)


def _cell(text: str) -> str:
    return _inline(text).replace("|", "\\|")


def _inline(text: str) -> str:
    """One line in which nothing from outside is read as markup."""
    return re.sub(r"([\\`*_<>\[\]#])", r"\\\1", " ".join(text.split()))


def _fenced(text: str) -> str:
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}text\n{text}\n{fence}"
