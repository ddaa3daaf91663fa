"""Corpora: ordered parquet shards of text, one of them pinned for validation, from a folder, a URI or the web."""
