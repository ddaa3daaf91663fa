"""Measurements behind `python -m jobs.bench`: each a ratio within one run, beside a limit or a peer."""
