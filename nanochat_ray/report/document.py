"""What a report is made of: plain blocks that every output format knows how to write. Text in them is never markup."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Text:
    """One paragraph."""

    text: str


@dataclass(frozen=True)
class KeyFigures:
    """The few numbers to see first: (value, what it is, a remark or "")."""

    items: tuple[tuple[str, str, str], ...]


@dataclass(frozen=True)
class Table:
    """Cells as text; `right` are the indices of columns that hold numbers; `total`: the last row sums up the others."""

    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    right: tuple[int, ...] = ()
    total: bool = False


@dataclass(frozen=True)
class Plot:
    """An SVG picture, and the same in words for those who do not see it."""

    title: str
    svg: bytes
    words: str


@dataclass(frozen=True)
class Plots:
    """Pictures to be seen beside each other."""

    items: tuple[Plot, ...]


@dataclass(frozen=True)
class Sample:
    """What a model was given and what it said."""

    label: str
    given: str
    said: str


@dataclass(frozen=True)
class Samples:
    """Replies of a model, as they came."""

    items: tuple[Sample, ...]


Block = Text | KeyFigures | Table | Plots | Samples


@dataclass(frozen=True)
class Section:
    """A titled part; a folded one is closed at first where the format can do that."""

    title: str
    blocks: tuple[Block, ...]
    folded: bool = False


@dataclass(frozen=True)
class Document:
    """A whole report."""

    title: str
    subtitle: str
    sections: tuple[Section, ...]


def printable(text: str, limit: int = 1200) -> str:
    """The text without control characters (newline and tab stay), cut at `limit` characters."""
    kept = "".join(letter if letter in "\n\t" or letter.isprintable() else "�" for letter in text)
    return kept if len(kept) <= limit else kept[:limit] + " …"
