"""Generated arithmetic: a question, the calculator call that copies its numbers, and the result."""

import operator

from nanochat_ray.tasks.conversations import Conversation, exchange_with_tool, generator, held_out

TEST_EVERY = 20  # one operand pair in 20 is only ever tested

_OPERATIONS = {"+": operator.add, "-": operator.sub, "*": operator.mul}
_WORDS = {"+": "plus", "-": "minus", "*": "times"}
_TEMPLATES = (
    "What is {a} {sign} {b}?",
    "What is {a} {word} {b}?",
    "{a} {sign} {b}",
    "{a} {sign} {b} = ?",
    "Calculate {a} {sign} {b}.",
    "How much is {a} {word} {b}?",
)


def arithmetic(seed: int, split: str, count: int, max_operand: int = 999) -> list[Conversation]:
    """`count` questions about operands 0 … max_operand under +, − and ×. Test questions never train, in any wording.

    Item i depends only on (seed, split, i, max_operand).
    """
    return [_question(seed, split, index, max_operand) for index in range(count)]


def _question(seed: int, split: str, index: int, max_operand: int) -> Conversation:
    random = generator(seed, "arithmetic", split, index)
    while True:
        sign = random.choice(tuple(_OPERATIONS))
        a, b = random.randint(0, max_operand), random.randint(0, max_operand)
        if held_out(("arithmetic", sign, a, b), TEST_EVERY) == (split == "test"):
            break
    question = random.choice(_TEMPLATES).format(a=a, b=b, sign=sign, word=_WORDS[sign])
    result = str(_OPERATIONS[sign](a, b))
    return exchange_with_tool(question, f"{a}{sign}{b}", result, f"The answer is {result}.")
