"""A client of our own server, or of any that speaks OpenAI's streamed chat completions. No Ray."""

import json
from collections.abc import Iterator
from typing import Any

import httpx

from nanochat_ray.engine.sampler import SamplingParams
from nanochat_ray.errors import UserError
from nanochat_ray.serve.sse import Parser

CONNECT_TIMEOUT_S = 10.0
SILENCE_TIMEOUT_S = 300.0  # a long prompt on a slow machine takes its time before the first token


def ask(url: str, messages: list[dict[str, Any]], params: SamplingParams) -> Iterator[dict[str, Any]]:
    """The deltas of one streamed reply.

    Args:
        url: of the server, without a path.

    Raises:
        UserError: the server cannot be reached, refuses the request (with its own words), or breaks off.
    """
    body = {
        "messages": messages,
        "stream": True,
        "temperature": params.temperature,
        "top_k": params.top_k,
        "top_p": params.top_p,
        "seed": params.seed,
        "max_tokens": params.max_tokens,
    }
    timeout = httpx.Timeout(SILENCE_TIMEOUT_S, connect=CONNECT_TIMEOUT_S)
    try:
        with httpx.stream("POST", f"{url.rstrip('/')}/v1/chat/completions", json=body, timeout=timeout) as response:
            if response.status_code != 200:
                raise UserError(f"{url} answered {response.status_code}: {_message(response.read())}")
            parser = Parser()
            for portion in response.iter_bytes():
                for event in parser.push(portion):
                    if event == "[DONE]":
                        return
                    value = json.loads(event)
                    if "error" in value:
                        raise UserError(f"{url} broke off: {value['error']['message']}")
                    yield from (choice["delta"] for choice in value["choices"])
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise UserError(f"no reply from {url} ({error}); is the server running? `python -m jobs.serve`") from error
    raise UserError(f"{url} closed the connection in the middle of the reply")


def _message(body: bytes) -> str:
    try:
        return str(json.loads(body)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return body[:200].decode(errors="replace")
