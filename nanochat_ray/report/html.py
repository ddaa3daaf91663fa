"""A report as one HTML file: style and pictures inside, nothing fetched, no script."""

import base64
from html import escape

from nanochat_ray.report.document import Block, Document, KeyFigures, Plots, Samples, Section, Table, Text

MANY_COLUMNS = 7  # tables with more are set closer, to be seen whole

_STYLE = """
:root { --ink: #1d232b; --soft: #626c79; --line: #e3e7ec; --wash: #f6f8fa; --accent: #2457a6; color-scheme: light; }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 64rem; padding: 3rem 1.5rem 4rem; color: var(--ink); background: #fff;
       font: 15px/1.55 system-ui, -apple-system, "Segoe UI", Helvetica, Arial, sans-serif; }
h1 { font-size: 1.9rem; line-height: 1.2; margin: 0; letter-spacing: -0.02em; }
.subtitle { color: var(--soft); margin: 0.4rem 0 2rem; }
h2 { font-size: 1.15rem; margin: 2.8rem 0 0.9rem; padding-bottom: 0.35rem; border-bottom: 1px solid var(--line); }
p { max-width: 46rem; margin: 0.6rem 0; }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(12rem, 1fr)); gap: 1px; margin: 0;
           border: 1px solid var(--line); border-radius: 8px; overflow: hidden; }
.figures div { box-shadow: 0 0 0 1px var(--line); padding: 0.9rem 1rem; }
.figures dd { margin: 0; font-size: 1.35rem; white-space: nowrap; font-weight: 600; letter-spacing: -0.01em;
              font-variant-numeric: tabular-nums; }
.figures dt { color: var(--soft); font-size: 0.8rem; line-height: 1.35; }
.wide { overflow-x: auto; margin: 0.8rem 0; }
table { border-collapse: collapse; font-size: 0.87rem; font-variant-numeric: tabular-nums; }
th { text-align: left; color: var(--soft); font-weight: 500; }
th, td { padding: 0.28rem 1.6rem 0.28rem 0; border-bottom: 1px solid var(--line); vertical-align: top; }
td:first-child { white-space: nowrap; }
.total tr:last-child td { font-weight: 600; border-top: 1px solid var(--soft); }
.right { text-align: right; white-space: nowrap; }
.dense { font-size: 0.8rem; }
.dense th, .dense td { padding-right: 0.8rem; white-space: nowrap; }
.dense th { vertical-align: bottom; }
.dense th.right { white-space: normal; }
.plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(18rem, 1fr)); gap: 1.2rem; margin: 1.2rem 0; }
figure { margin: 0; }
figure img { width: 100%; height: auto; display: block; }
figure:only-child { overflow-x: auto; }
figure:only-child img { min-width: 38rem; }
figcaption { font-size: 0.87rem; font-weight: 600; margin-bottom: 0.3rem; }
figcaption span { display: block; font-weight: 400; color: var(--soft); font-size: 0.8rem; }
.sample { border-left: 3px solid var(--line); padding: 0.1rem 0 0.1rem 1rem; margin: 1rem 0; }
.sample small { color: var(--soft); }
.sample pre { margin: 0.25rem 0 0; font: 0.85rem/1.5 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace;
              white-space: pre-wrap; overflow-wrap: anywhere; }
.sample .said { color: var(--accent); }
summary { cursor: pointer; color: var(--soft); font-size: 0.87rem; }
@media print { body { padding: 0; font-size: 11px; } h2 { break-after: avoid; }
               figure, .sample { break-inside: avoid; } }
"""


def to_html(document: Document) -> str:
    """The whole report; every piece of text is escaped."""
    title = escape(document.title)
    body = "\n".join(_section(section) for section in document.sections)
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta http-equiv="Content-Security-Policy" '
        "content=\"default-src 'none'; img-src data:; style-src 'unsafe-inline'\">\n"
        f"<title>{title}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n"
        f'<h1>{title}</h1>\n<p class="subtitle">{escape(document.subtitle)}</p>\n{body}\n</body>\n</html>\n'
    )


def _section(section: Section) -> str:
    body = "\n".join(_block(block) for block in section.blocks)
    if section.folded:
        body = f"<details>\n<summary>show</summary>\n{body}\n</details>"
    return f"<section>\n<h2>{escape(section.title)}</h2>\n{body}\n</section>"


def _block(block: Block) -> str:
    match block:
        case Text():
            return f"<p>{escape(block.text)}</p>"
        case KeyFigures():
            items = (
                f"<div><dd>{escape(value)}</dd><dt>{escape(name)}{f'<br>{escape(note)}' if note else ''}</dt></div>"
                for value, name, note in block.items
            )
            return f'<dl class="figures">{"".join(items)}</dl>'
        case Table():
            return _table(block)
        case Plots():
            return (
                f'<div class="plots">{"".join(_plot(plot.title, plot.svg, plot.words) for plot in block.items)}</div>'
            )
        case Samples():
            return "".join(
                f'<div class="sample"><small>{escape(sample.label)}</small><pre>{escape(sample.given)}</pre>'
                f'<pre class="said">{escape(sample.said)}</pre></div>'
                for sample in block.items
            )


def _table(table: Table) -> str:
    def line(tag: str, cells: tuple[str, ...]) -> str:
        side = [' class="right"' if column in table.right else "" for column in range(len(cells))]
        return f"<tr>{''.join(f'<{tag}{s}>{escape(c)}</{tag}>' for s, c in zip(side, cells, strict=True))}</tr>"

    head, rows = line("th", table.columns), "".join(line("td", row) for row in table.rows)
    total = ' class="total"' if table.total else ""
    dense = ' class="dense"' if len(table.columns) > MANY_COLUMNS else ""
    return f'<div class="wide"><table{dense}><thead>{head}</thead><tbody{total}>{rows}</tbody></table></div>'


def _plot(title: str, svg: bytes, words: str) -> str:
    picture = base64.b64encode(svg).decode()
    alt = escape(f"{title}: {words}")
    return (
        f"<figure><figcaption>{escape(title)}<span>{escape(words)}</span></figcaption>"
        f'<img alt="{alt}" src="data:image/svg+xml;base64,{picture}"></figure>'
    )
