"""GSM8K: grade-school word problems, their `<<expr=value>>` marks turned into calculator calls.

Cobbe et al., "Training Verifiers to Solve Math Word Problems", 2021. Columns question and answer; an answer ends with
a line `#### 42`, which is kept as text.
"""

import re
from decimal import Decimal

from nanochat_ray.errors import UserError
from nanochat_ray.storage import Folder
from nanochat_ray.tasks.conversations import Conversation
from nanochat_ray.tasks.public_sets import PublicSet, read_split

GSM8K = PublicSet("openai/gsm8k", "main", "gsm8k/main", ("question", "answer"))

_CALL = re.compile(r"<<([^<>]*)=([^<>=]*)>>")
_FINAL = re.compile(r"#### *\$?(-?[0-9][0-9,]*(?:\.[0-9]+)?)")


def load_gsm8k(split: str, tasks: Folder | None) -> list[Conversation]:
    """All problems of `train` or `test`, from a tasks folder or (None) from the hub.

    Raises:
        UserError: the split cannot be read, or a row has no question or no final `####` line.
    """
    conversations = []
    for where, row in read_split(GSM8K, split, tasks):
        if not row["question"] or final_number(row["answer"] or "") is None:
            raise UserError(f"{where}: no question, or no final '#### number' line")
        conversations.append(problem(row["question"], row["answer"]))
    return conversations


def problem(question: str, answer: str) -> Conversation:
    """One problem; text before, between and after the marks stays as it is written."""
    parts: list[dict[str, str]] = []

    def say(text: str) -> None:
        if text:
            parts.append({"type": "text", "text": text})

    end = 0
    for call in _CALL.finditer(answer):
        say(answer[end : call.start()])
        parts.append({"type": "python", "text": call.group(1).strip()})
        parts.append({"type": "python_output", "text": call.group(2).strip()})
        end = call.end()
    say(answer[end:])
    return [{"role": "user", "content": question}, {"role": "assistant", "content": parts}]


def final_number(text: str) -> Decimal | None:
    """The number after the last `####`; None when there is none."""
    found = _FINAL.findall(text)
    return Decimal(found[-1].replace(",", "")) if found else None
