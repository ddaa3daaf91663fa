"""Curves as SVG, drawn with matplotlib on figures of their own (no global state, same input, same bytes)."""

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

MAX_POINTS = 600  # more cannot be told apart, and would only make the file large
MAX_COLUMNS = 240  # of a timeline: each is as wide as three points of print
SMOOTHING_SHARE = 50  # a moving average reaches this part of the curve to each side

_INK, _FAINT, _ACCENT, _WASH = "#3c434d", "#c3cad3", "#2457a6", "#b7cae6"
_BESIDE = ("#e2b93b", "#e08a3c", "#cf5c4e", "#7f2222")  # the shades of references, again from the first after the last
_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",  # text stays text: small files, sharp, selectable
    "svg.hashsalt": "nanochat_ray",
    "text.parse_math": False,  # names hold what they hold
    "font.family": "sans-serif",
    "font.sans-serif": ["Helvetica", "Arial", "DejaVu Sans"],
    "font.size": 9,
    "axes.edgecolor": _FAINT,
    "axes.labelcolor": _INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#eceff3",
    "xtick.color": _INK,
    "ytick.color": _INK,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
}


def curve(
    x: Sequence[float], y: Sequence[float], y_label: str, *, smooth: bool = False, from_zero: bool = False
) -> bytes:
    """A line over steps as SVG; `smooth` draws the values faint under their moving average, else each point shows.

    Long curves are thinned to MAX_POINTS by averaging neighbours. `x` and `y` are of equal length, at least 1.
    """
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(3.7, 2.4), layout="constrained")
        axes = figure.add_subplot()
        if smooth:
            axes.plot(*thin(x, y), color=_FAINT, linewidth=1)
            axes.plot(*thin(x, moving_average(y)), color=_ACCENT, linewidth=1.6)
        else:
            axes.plot(x, y, color=_ACCENT, linewidth=1.6, marker="o", markersize=3.5)
        axes.set_xlabel("step")
        axes.set_ylabel(y_label)
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:,.4g}" if abs(value) < 1000 else f"{value:,.0f}")
        axes.xaxis.set_major_locator(MaxNLocator("auto", integer=True))
        axes.margins(x=0.01)
        if from_zero:
            axes.set_ylim(bottom=0)
        return _svg(figure)


def timeline(stretches: Sequence[tuple[float, int, str]], shades: Mapping[str, str]) -> bytes:
    """How many workers did what, over time, as SVG with a legend.

    Args:
        stretches: (seconds, workers, what they did), one after the other; at least one, and a positive sum of seconds.
        shades: the colour of everything that workers do, in the order in which it is stacked.
    """
    whole = sum(seconds for seconds, _, _ in stretches)
    unit, size = ("hours", 3600) if whole >= 7200 else ("minutes", 60) if whole >= 120 else ("seconds", 1)
    width = whole / MAX_COLUMNS
    heights = {what: [0.0] * MAX_COLUMNS for what in shades if any(what == done for _, _, done in stretches)}
    at = 0.0
    for seconds, workers, what in stretches:
        for column in range(int(at / width), min(int((at + seconds) / width) + 1, MAX_COLUMNS)):
            overlap = min(at + seconds, (column + 1) * width) - max(at, column * width)
            heights[what][column] += max(0.0, overlap) / width * workers
        at += seconds
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(7.6, 2.6), layout="constrained")
        axes = figure.add_subplot()
        edges = [column * width / size for column in range(MAX_COLUMNS + 1)]
        floor = [0.0] * MAX_COLUMNS
        for what, height in heights.items():
            top = [low + high for low, high in zip(floor, height, strict=True)]
            axes.stairs(top, edges, baseline=floor, fill=True, color=shades[what], label=what)
            floor = top
        axes.set_xlabel(unit)
        axes.set_ylabel("workers")
        axes.yaxis.set_major_locator(MaxNLocator("auto", integer=True))
        axes.margins(x=0)
        axes.set_ylim(bottom=0)
        axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1.03), frameon=False)
        return _svg(figure)


@dataclass(frozen=True)
class Bar:
    """A named figure and the ends of its interval."""

    name: str
    value: float
    low: float
    high: float


def bars(found: Sequence[Bar], references: Mapping[str, Mapping[str, float]], x_label: str) -> bytes:
    """Horizontal bars from 0, the first on top, with their intervals as whiskers; as SVG.

    Args:
        found: at least one.
        references: by the name in the legend, a tick for each bar that the reference has a figure for.
    """
    places = {bar.name: place for place, bar in enumerate(found)}
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(8.6, 1.0 + 0.23 * len(found) + (0.2 if references else 0)), layout="constrained")
        axes = figure.add_subplot()
        axes.barh(list(places.values()), [bar.value for bar in found], height=0.62, color=_WASH)
        axes.hlines(
            list(places.values()), [bar.low for bar in found], [bar.high for bar in found], _ACCENT, linewidth=1.4
        )
        for end in ([bar.low for bar in found], [bar.high for bar in found]):
            axes.plot(end, list(places.values()), "|", color=_ACCENT, markersize=5, markeredgewidth=1.4)
        for number, (name, values) in enumerate(references.items()):
            at = [places[task] for task in values]
            shade = _BESIDE[number % len(_BESIDE)]
            axes.plot(list(values.values()), at, "|", color=shade, markersize=11, markeredgewidth=2.4, label=name)
        axes.axvline(0, color=_INK, linewidth=0.9)
        axes.set_yticks(list(places.values()), list(places))
        axes.set_ylim(len(found) - 0.4, -0.6)
        axes.grid(axis="y", visible=False)
        axes.spines["left"].set_visible(False)
        axes.margins(x=0.02)
        axes.set_xlabel(x_label)
        if references:
            figure.legend(loc="outside upper right", ncols=4, handlelength=0.6, labelcolor=_INK, frameon=False)
        return _svg(figure)


def band(x: Sequence[float], y: Sequence[float], low: Sequence[float], high: Sequence[float], y_label: str) -> bytes:
    """A line over steps within the band of its intervals, as SVG. All of equal length, at least 1."""
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(7.6, 2.6), layout="constrained")
        axes = figure.add_subplot()
        axes.fill_between(x, low, high, color=_WASH, alpha=0.55, linewidth=0)
        axes.plot(x, y, color=_ACCENT, linewidth=1.6, marker="o", markersize=3.5)
        axes.set_xlabel("step")
        axes.set_ylabel(y_label)
        axes.xaxis.set_major_locator(MaxNLocator("auto", integer=True))
        axes.margins(x=0.02)
        return _svg(figure)


def _svg(figure: Figure) -> bytes:
    picture = io.BytesIO()
    figure.savefig(picture, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    return picture.getvalue()


def moving_average(values: Sequence[float]) -> list[float]:
    """Mean of each value and its neighbours on both sides, a fiftieth of the curve each; without lag."""
    reach = len(values) // SMOOTHING_SHARE
    sums = [0.0, *accumulate(values)]
    spans = ((max(0, i - reach), min(len(values), i + reach + 1)) for i in range(len(values)))
    return [(sums[stop] - sums[start]) / (stop - start) for start, stop in spans]


def thin(x: Sequence[float], y: Sequence[float]) -> tuple[list[float], list[float]]:
    """At most MAX_POINTS points, each the mean of a run of neighbours."""
    size = -(-len(x) // MAX_POINTS)
    starts = range(0, len(x), size)
    return tuple([sum(v[i : i + size]) / len(v[i : i + size]) for i in starts] for v in (x, y))  # type: ignore[return-value]
