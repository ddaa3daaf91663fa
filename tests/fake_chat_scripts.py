"""What the fake chat server says and does: steps, and the scripts the page's tests share."""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Step:
    """One thing the server does. `times`: how often, for one reply, if it is something that breaks the reply."""

    kind: str
    value: Any = None
    times: int = 1


def say(text: str) -> Step:
    return Step("delta", {"content": text})


def call(expression: str, result: str | None) -> Step:
    """A calculator call; `call("", None)` begins one, as the engine does while the model writes the expression."""
    return Step("delta", {"tool": {"expression": expression, "result": result}})


def tokens(text: str, size: int = 4) -> list[Step]:
    """The text in small pieces, each with its position."""
    return [say(text[at : at + size]) for at in range(0, len(text), size)]


def wait(seconds: float) -> Step:
    return Step("wait", seconds)


def gate(name: str) -> Step:
    """Goes on when the test opens `api.gate(name)`."""
    return Step("gate", name)


def state(name: str, **more: Any) -> Step:
    return Step("state", {"state": name, **more})


def drop(times: int = 1) -> Step:
    """Breaks the connection."""
    return Step("drop", times=times)


def error(message: str, code: str = "server_error", times: int = 99) -> Step:
    """Fails in the middle of the stream."""
    return Step("error", {"message": message, "type": code, "param": None, "code": code}, times)


def refuse(status: int, message: str, code: str, retry_after: str | None = None, times: int = 1) -> Step:
    """Refuses before the first byte."""
    headers = {"retry-after": retry_after} if retry_after is not None else {}
    body = {"message": message, "type": code, "param": None, "code": code}
    return Step("refuse", {"status": status, "error": body, "headers": headers}, times)


def finish(reason: str) -> Step:
    return Step("finish", reason)


def raw(portion: bytes) -> Step:
    """Bytes as they are: for what is not an event of ours."""
    return Step("raw", portion)


MARKDOWN = """## Dedent

`textwrap.dedent` removes the **common** leading space of all lines:

```python
from textwrap import dedent

def greet(name: str) -> str:  # a comment
    return dedent(f'''
        <b>Hello {name}!</b>
    ''').strip()
```

1. It looks at every line.
2. Blank lines do not count:
   - tabs are not spaces
   - see [the documentation](https://docs.python.org/3/library/textwrap.html)

| function | what it does |
|---|---|
| `dedent` | removes |
| `indent` | adds |

> Tabs and spaces are never equal.
"""

SCRIPTS: dict[str, list[Step]] = {
    "": [say("Hello "), say("from the script.")],
    "What is 17*23?": [
        *tokens("Let me see: "),
        call("", None),
        wait(0.05),
        call("17*23", "391"),
        *tokens(" so it is 391."),
    ],
    "markdown": tokens(MARKDOWN),
    "slow": [step for _ in range(400) for step in (say("tick "), wait(0.02))],
    "long": [step for piece in tokens(MARKDOWN * 14, 4) for step in (piece, wait(0.001))],
    "queued": [
        state("queued", ahead=3),
        gate("free"),
        state("queued", ahead=0),
        wait(0.3),
        state("writing"),
        say("At last."),
    ],
    "starting": [state("starting"), gate("started"), state("writing"), say("Awake now.")],
    "moved": [say("One "), state("moved"), gate("elsewhere"), state("writing"), say("two.")],
    "drop": [
        *tokens("One two three "),
        wait(0.2),
        drop(),
        *tokens("four five six "),
        wait(0.2),
        drop(),
        *tokens("seven eight."),
    ],
    "full": [refuse(503, "all places are taken", "overloaded", "2"), say("There was a place.")],
    "replaced": [say("The old model "), wait(0.2), drop(), refuse(409, "the model has changed", "model_changed")],
    "breaks": [say("Half a"), error("the model failed on this machine")],
}
