"""Where the time and the money of a stage went: its ledger as a timeline, a table by label, and what spot saved."""

from dataclasses import dataclass
from statistics import median
from typing import Any

from nanochat_ray.plan import duration
from nanochat_ray.report.document import Block, Plot, Plots, Table, Text
from nanochat_ray.report.plots import timeline
from nanochat_ray.train.ledger import Label, Ledger

_SHADES = {
    Label.USEFUL: "#2457a6",
    Label.COMPILE: "#8c74c2",
    Label.DATA_WAIT: "#e2b93b",
    Label.EVALUATION: "#6aa89e",
    Label.CHECKPOINT_STALL: "#e08a3c",
    Label.RESTART: "#cf5c4e",
    Label.REPEATED_WORK: "#7f2222",
    Label.WAITING_FOR_CAPACITY: "#c3cad3",
    Label.OTHER: "#5d6672",
}
# What machines that nobody takes away do not spend. The first start of a run is among it: the saving is understated.
_BY_INTERRUPTION = (Label.RESTART, Label.REPEATED_WORK, Label.WAITING_FOR_CAPACITY)


@dataclass(frozen=True)
class Prices:
    """US dollars per worker and hour; None where they were not given."""

    spot: float | None = None
    on_demand: float | None = None

    def given(self) -> dict[str, float]:
        """By the name of the market."""
        prices = {"spot": self.spot, "on demand": self.on_demand}
        return {market: price for market, price in prices.items() if price is not None}


NO_PRICES = Prices()


def goodput_blocks(ledger: Ledger, prices: Prices) -> list[Block]:
    """A timeline, worker time by label, and money; nothing where no event says how long anything took."""
    if ledger.goodput is None:
        return []
    shades = {words(label): shade for label, shade in _SHADES.items()}
    segments = [(end - begin, workers, words(label)) for begin, end, workers, label in ledger.segments()]
    remarks = ["Worker time is time · workers; a restart counts at the size of the group that follows."]
    if "saved" in (costs := money(ledger, prices)):
        remarks.append(_saving(costs))
    picture = Plot("Workers over time", timeline(segments, shades), f"goodput {ledger.goodput:.1%}")
    return [Plots((picture,)), goodput_table(ledger, prices), Text(" ".join(remarks))]


def goodput_table(ledger: Ledger, prices: Prices) -> Table:
    """Worker time, share and cost of each label that took time, then of all together."""
    totals = ledger.totals()
    everything = sum(totals.values())
    entries = [*((words(label), seconds) for label, seconds in totals.items() if seconds), ("together", everything)]
    rows = tuple(
        (
            name,
            duration(seconds),
            f"{seconds / everything:.1%}" if everything else "",
            *(f"${seconds / 3600 * price:,.2f}" for price in prices.given().values()),
        )
        for name, seconds in entries
    )
    columns = ("time went to", "worker time", "share", *(f"cost, {market}" for market in prices.given()))
    return Table(columns, rows, right=tuple(range(1, len(columns))))


def goodput_figures(ledger: Ledger) -> list[tuple[str, str]]:
    """Goodput, and what interruptions cost, as lines of a table."""
    if ledger.goodput is None:
        return []
    rows = [("goodput", f"{ledger.goodput:.1%} of all worker time was useful")]
    if ledger.restarts:
        seen = []
        for kind in ("killed", "notice", "grown"):
            if times := [recovery.seconds for recovery in ledger.recoveries if recovery.kind == kind]:
                seen.append(f"{len(times)} {kind} (median {duration(median(times))})")
        rows.append(("restarts", f"{ledger.restarts}: last step to next step, with machines enough: {', '.join(seen)}"))
        rows.append(("steps lost and done again", f"{ledger.steps_lost:,}"))
    return rows


def money(ledger: Ledger, prices: Prices) -> dict[str, Any]:
    """What the workers of a stage cost in dollars; empty where no price is given or no time is known.

    Returns:
        by_label: for each market, the dollars of each label that took time. With both prices also spot, the dollars of
        all; on_demand, those of the same work without interruptions; saved, as a share of the latter.
    """
    markets, everything = prices.given(), sum(ledger.totals().values())
    if not markets or not everything:
        return {}
    hours = {label: seconds / 3600 for label, seconds in ledger.totals().items() if seconds}
    costs: dict[str, Any] = {
        "by_label": {market: {label: hours[label] * price for label in hours} for market, price in markets.items()}
    }
    if prices.spot is not None and prices.on_demand is not None:
        spot = sum(hours.values()) * prices.spot
        on_demand = sum(hours[label] for label in hours if label not in _BY_INTERRUPTION) * prices.on_demand
        costs |= {"spot": spot, "on_demand": on_demand, "saved": 1 - spot / on_demand if on_demand else 0.0}
    return costs


def money_lines(costs: dict[str, Any]) -> list[str]:
    """`money` for a terminal."""
    markets = costs["by_label"]
    rows = [[words(label), *(by[label] for by in markets.values())] for label in next(iter(markets.values()))]
    rows.append(["together", *(sum(by.values()) for by in markets.values())])
    lines = ["".join(["cost of workers".ljust(24), *(market.rjust(14) for market in markets)])]
    lines += ["".join([f"  {name:<22}", *(f"${dollars:,.2f}".rjust(14) for dollars in cells)]) for name, *cells in rows]
    return [*lines, *([_saving(costs)] if "saved" in costs else [])]


def words(label: str) -> str:
    """`repeated work`, for people."""
    return label.replace("_", " ")


def _saving(costs: dict[str, Any]) -> str:
    share = f"{costs['saved']:.0%} saved" if costs["saved"] >= 0 else f"{-costs['saved']:.0%} more on spot"
    return (
        f"${costs['spot']:,.2f} on spot, all losses included; the same work without interruptions costs "
        f"${costs['on_demand']:,.2f} on demand: {share}."
    )
