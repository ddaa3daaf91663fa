"""Reads a request's JSON more strictly than Python's parser: no field twice, no NaN, no half characters."""

import json
from collections.abc import Callable, Coroutine
from typing import Any, NoReturn

from fastapi import Request, Response
from fastapi.routing import APIRoute

from nanochat_ray.serve.refusals import Refusal

MAX_FIELDS = 256  # to complain of tens of thousands would take as long as many replies


def parse(data: bytes) -> Any:
    """The value.

    Raises:
        Refusal: 400, with the reason, but never with the text.
    """
    try:
        value = json.loads(data.decode("utf-8"), object_pairs_hook=_object, parse_constant=_constant)
        if b"\\u" in data:  # only so can half of a surrogate pair be written
            json.dumps(value, ensure_ascii=False).encode("utf-8")
    except UnicodeDecodeError:
        raise Refusal(400, "the body is not UTF-8") from None
    except UnicodeEncodeError:
        raise Refusal(400, "the body has half of a surrogate pair (\\ud800 … \\udfff), which is no character") from None
    except RecursionError:
        raise Refusal(400, "the body is nested too deeply") from None
    except ValueError:  # a number of thousands of digits, too
        raise Refusal(400, "the body is not valid JSON") from None
    return value


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(pairs) > MAX_FIELDS:
        raise Refusal(400, f"the body has an object with {len(pairs)} fields; at most {MAX_FIELDS} are allowed")
    value = dict(pairs)
    if len(value) < len(pairs):
        raise Refusal(400, "the body has an object with the same field twice; which one counts would be a guess")
    return value


def _constant(_: str) -> NoReturn:
    raise Refusal(400, "the body has NaN or Infinity, which are not JSON")


class StrictRoute(APIRoute):
    """A route whose body is read so."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()

        async def handle_strictly(request: Request) -> Response:
            return await handle(_StrictRequest(request.scope, request.receive))

        return handle_strictly


class _StrictRequest(Request):
    async def json(self) -> Any:
        return parse(await self.body())
