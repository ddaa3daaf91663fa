"""Train a small ChatGPT from nothing and serve it, on a Ray cluster whose machines come and go."""

__version__ = "0.1.0"
