"""One module per stage; each runs as `python -m jobs.<stage>` here or under `ray job submit`."""
