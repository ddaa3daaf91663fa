"""Conversations as tokens: who speaks where, and which tokens a model is trained to say.

    <|bos|> <|user_start|> … <|user_end|> <|assistant_start|> … <|assistant_end|> <|user_start|> …

An assistant's turn is text, or parts in order: text, a tool call `<|python_start|> 12*7 <|python_end|>` and the tool's
answer `<|output_start|> 84 <|output_end|>`. A system message is put in front of the first user message, with a blank
line between them. All special tokens come from this structure; none can come from what a message says.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from nanochat_ray.errors import UserError
from nanochat_ray.tokenizer import Tokenizer

Message = Mapping[str, Any]  # {"role": …, "content": str | list of {"type": …, "text": str}}
Part = tuple[str, str]  # (type, text)

_ROLES = ("user", "assistant", "system")
_PART_TYPES = {
    "user": ("text",),
    "system": ("text",),
    "assistant": ("text", "python", "python_output"),
}


def check_conversation(messages: Sequence[Message]) -> None:
    """Accept an optional system message, then user and assistant in turns; the last may be either.

    Raises:
        UserError: which message is wrong (counted from 0) and what was expected there.
    """
    _turns(messages)


def render(tokenizer: Tokenizer, messages: Sequence[Message]) -> tuple[list[int], list[int]]:
    """A conversation to train on.

    Returns:
        ids and a mask of the same length: 1 where the model learns to produce that id (assistant text, tool calls with
        their two marks, assistant_end), 0 elsewhere (bos, user turns, assistant_start, tool answers).

    Raises:
        UserError: as `check_conversation`, or there is no assistant message and so nothing to learn.
    """
    turns = _turns(messages)
    if len(turns) < 2:
        raise UserError("the conversation has no assistant message, so there is nothing to train on")
    ids, mask = [tokenizer.bos], [0]
    for role, parts in turns:
        for piece, trained in _render_turn(tokenizer, role, parts):
            ids += piece
            mask += [trained] * len(piece)
    return ids, mask


def render_prompt(tokenizer: Tokenizer, messages: Sequence[Message]) -> list[int]:
    """A conversation to answer: ids that end with assistant_start, exactly as in training.

    Raises:
        UserError: as `check_conversation`, or the last message is not the user's.
    """
    turns = _turns(messages)
    if turns[-1][0] != "user":
        raise UserError(f'message {len(messages) - 1} has role "assistant"; expected a last message with role "user"')
    ids = [tokenizer.bos]
    for role, parts in turns:
        for piece, _ in _render_turn(tokenizer, role, parts):
            ids += piece
    return [*ids, tokenizer.special("assistant_start")]


def _render_turn(tokenizer: Tokenizer, role: str, parts: list[Part]) -> list[tuple[list[int], int]]:
    """The turn as runs of ids with their mask value."""

    def mark(name: str) -> list[int]:
        return [tokenizer.special(name)]

    if role == "user":
        return [(mark("user_start"), 0), (tokenizer.encode(parts[0][1]), 0), (mark("user_end"), 0)]
    pieces = [(mark("assistant_start"), 0)]
    for kind, text in parts:
        ids = tokenizer.encode(text)
        if kind == "python":
            pieces.append((mark("python_start") + ids + mark("python_end"), 1))
        elif kind == "python_output":
            pieces.append((mark("output_start") + ids + mark("output_end"), 0))
        else:
            pieces.append((ids, 1))
    return [*pieces, (mark("assistant_end"), 1)]


def _turns(messages: Sequence[Message]) -> list[tuple[str, list[Part]]]:
    """Checked (role, parts) turns without a system message; a user's turn has one part."""
    if not isinstance(messages, Sequence) or isinstance(messages, str):
        raise UserError(f"a conversation is a list of messages, not {type(messages).__name__}")
    if not messages:
        raise UserError('the conversation is empty; expected at least one message with role "user"')
    turns: list[tuple[str, list[Part]]] = []
    system = ""
    for index, message in enumerate(messages):
        role, parts = _role(index, message), _parts(index, message)
        expected = "assistant" if len(turns) % 2 else "user"
        if role == "system":
            if index:
                raise UserError(f'message {index} has role "system"; only message 0 may, expected "{expected}"')
            system = _joined(parts) + "\n\n"
            continue
        if role != expected:
            raise UserError(f'message {index} has role "{role}"; expected "{expected}": user and assistant take turns')
        if role == "user":
            parts = [("text", ("" if turns else system) + _joined(parts))]
        turns.append((role, parts))
    if not turns:
        raise UserError('the conversation has only a system message; expected message 1 with role "user"')
    return turns


def _role(index: int, message: Message) -> str:
    if not isinstance(message, Mapping):
        raise UserError(f'message {index} is {type(message).__name__}; expected an object with "role" and "content"')
    role = message.get("role")
    if role not in _ROLES:
        found = f"role {role!r}" if "role" in message else "no role"
        raise UserError(f"message {index} has {found}; expected one of {', '.join(_ROLES)}")
    return role


def _parts(index: int, message: Message) -> list[Part]:
    role, content = message["role"], message.get("content")
    if isinstance(content, str):
        content = [{"type": "text", "text": content}]
    if not isinstance(content, Sequence):
        found = f"content of type {type(content).__name__}" if "content" in message else "no content"
        raise UserError(f"message {index} ({role}) has {found}; expected text or a list of parts")
    parts: list[Part] = []
    for number, part in enumerate(content):
        where = f"message {index} ({role}), part {number}"
        kind, text = (part.get("type"), part.get("text")) if isinstance(part, Mapping) else (None, None)
        if kind not in _PART_TYPES[role] or not isinstance(text, str):
            kinds = " | ".join(_PART_TYPES[role])
            raise UserError(f'{where}: expected {{"type": {kinds}, "text": string}}, found {_shortened(part)}')
        if kind == "python" and not text:
            raise UserError(f"{where}: the tool call is empty; expected an expression")
        if kind == "python_output" and (not parts or parts[-1][0] != "python"):
            raise UserError(f"{where}: a python_output must follow its python part")
        parts.append((kind, text))
    if not _joined(parts):
        raise UserError(f"message {index} ({role}) is empty; expected text")
    return parts


def _joined(parts: list[Part]) -> str:
    return "".join(text for _, text in parts)


def _shortened(part: Any) -> str:
    text = repr(part)
    return text if len(text) <= 80 else text[:77] + "..."
