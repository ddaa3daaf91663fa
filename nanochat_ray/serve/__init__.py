"""Serving: the OpenAI-shaped schema, SSE framing, the chat page, and `app`, the Ray Serve shell around them."""
