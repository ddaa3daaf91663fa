"""Multiple-choice questions as chats: MMLU and ARC. The answer is one letter.

Hendrycks et al., "Measuring Massive Multitask Language Understanding", 2021; Clark et al., "Think you have Solved
Question Answering? Try ARC", 2018.
"""

from collections.abc import Sequence
from string import ascii_uppercase

from nanochat_ray.errors import UserError
from nanochat_ray.storage import Folder
from nanochat_ray.tasks.conversations import Conversation, exchange
from nanochat_ray.tasks.public_sets import PublicSet, read_split

MMLU = PublicSet("cais/mmlu", "all", "mmlu/all", ("question", "choices", "answer"))
ARC_EASY = PublicSet("allenai/ai2_arc", "ARC-Easy", "arc/ARC-Easy", ("question", "choices", "answerKey"))
ARC_CHALLENGE = PublicSet("allenai/ai2_arc", "ARC-Challenge", "arc/ARC-Challenge", ("question", "choices", "answerKey"))


def render_question(question: str, choices: Sequence[str]) -> str:
    """The user's message. Each letter stands right after its choice, so that answering is looking up what follows.

    The one wording for training and for evaluation; letters are A, B, C … whatever the set calls them.
    """
    lines = [f"- {choice}={letter}" for choice, letter in zip(choices, ascii_uppercase, strict=False)]
    return "\n".join([f"Choose the right answer: {question}", *lines, "Reply with its letter only."])


def load_mmlu(split: str, tasks: Folder | None) -> list[Conversation]:
    """MMLU's `auxiliary_train`, `dev`, `validation` or `test`; the answer column is the index of the right choice.

    Raises:
        UserError: the split cannot be read, or an answer is not one of the choices.
    """
    conversations = []
    for where, row in read_split(MMLU, split, tasks):
        conversations.append(_answered(where, row["question"], row["choices"], row["answer"]))
    return conversations


def load_arc(public_set: PublicSet, split: str, tasks: Folder | None) -> list[Conversation]:
    """`train`, `validation` or `test` of ARC_EASY or ARC_CHALLENGE; the answer column is the label of the right choice.

    Raises:
        UserError: the split cannot be read, or an answer is not one of the labels.
    """
    conversations = []
    for where, row in read_split(public_set, split, tasks):
        texts, labels = row["choices"]["text"], row["choices"]["label"]
        if row["answerKey"] not in labels:
            raise UserError(f"{where}: the answer {row['answerKey']!r} is not one of the labels {labels}")
        conversations.append(_answered(where, row["question"], texts, labels.index(row["answerKey"])))
    return conversations


def _answered(where: str, question: str, choices: Sequence[str], answer: int) -> Conversation:
    if not 0 <= answer < len(choices) <= len(ascii_uppercase):
        raise UserError(f"{where}: the answer {answer} is not one of the {len(choices)} choices")
    return exchange(render_question(question, choices), ascii_uppercase[answer])
