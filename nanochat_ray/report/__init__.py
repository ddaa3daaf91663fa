"""The report card of a run: what its artifacts say, as Markdown and as one self-contained HTML file.

artifacts → sections (`sections`, `training`) → a document of plain blocks (`document`) → `markdown`, `html`
"""

from nanochat_ray.report.card import build_card

__all__ = ["build_card"]
