"""Log-probabilities of tokens in OpenAI's two shapes. Pure.

A token that is no text on its own, because it holds a part of a character, is written `bytes:\\xf0\\x9f`.
"""

import codecs
from collections.abc import Sequence

from pydantic import BaseModel

from nanochat_ray.engine.reply import ChatTokenizer
from nanochat_ray.engine.sampler import TokenLogprob

_IMPOSSIBLE = -9999.0  # OpenAI's, for what JSON has no number for


class TopLogprob(BaseModel):
    token: str
    logprob: float
    bytes: list[int]


class ChatTokenLogprob(TopLogprob):
    top_logprobs: list[TopLogprob]


class ChatLogprobs(BaseModel):
    content: list[ChatTokenLogprob]
    refusal: None = None


class CompletionLogprobs(BaseModel):
    """`text_offset`: characters of the text before each token."""

    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]]
    text_offset: list[int]


def chat_logprobs(tokenizer: ChatTokenizer, logprobs: Sequence[TokenLogprob]) -> ChatLogprobs:
    """The `logprobs` of a chat's choice or chunk."""
    content = []
    for one in logprobs:
        chosen = _entry(tokenizer, one.token, one.logprob)
        tops = [_entry(tokenizer, token, logprob) for token, logprob in one.top]
        content.append(ChatTokenLogprob(**chosen.model_dump(), top_logprobs=tops))
    return ChatLogprobs(content=content)


class CompletionLogprobsMaker:
    """Makes the `logprobs` of one choice of a completion, portion by portion."""

    def __init__(self, tokenizer: ChatTokenizer) -> None:
        self._tokenizer = tokenizer
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._offset = 0

    def skip(self, tokens: Sequence[int]) -> None:
        """Count tokens that were sent before."""
        self._offset += len(self._utf8.decode(self._tokenizer.decode_bytes(tokens)))

    def make(self, logprobs: Sequence[TokenLogprob]) -> CompletionLogprobs:
        """The next tokens' log-probabilities. As OpenAI's, the likeliest include the chosen one."""
        made = CompletionLogprobs(tokens=[], token_logprobs=[], top_logprobs=[], text_offset=[])
        for one in logprobs:
            name = _name(self._tokenizer.decode_bytes([one.token]))
            made.tokens.append(name)
            made.token_logprobs.append(_finite(one.logprob))
            tops = {_name(self._tokenizer.decode_bytes([token])): _finite(logprob) for token, logprob in one.top}
            made.top_logprobs.append({**tops, name: _finite(one.logprob)} if tops else {})
            made.text_offset.append(self._offset)
            self.skip([one.token])
        return made


def _entry(tokenizer: ChatTokenizer, token: int, logprob: float) -> TopLogprob:
    data = tokenizer.decode_bytes([token])
    return TopLogprob(token=_name(data), logprob=_finite(logprob), bytes=list(data))


def _name(data: bytes) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


def _finite(logprob: float) -> float:
    return max(logprob, _IMPOSSIBLE)
