"""Questions about documented Python functions: what does it do → the first line of its docstring.

The finetuning set of the embedded demo corpus, whose docstrings the model has read in pretraining.
"""

from collections import Counter
from collections.abc import Iterable, Sequence

from nanochat_ray.data.functions import DocumentedFunction
from nanochat_ray.tasks.conversations import Conversation, exchange, generator

# Modules that a Python programmer is likely to ask about, the best known first; others follow in alphabetical order.
_WELL_KNOWN = """
    textwrap os.path json random shutil string glob fnmatch bisect heapq copy statistics functools os subprocess
    tempfile urllib.parse difflib base64 secrets shlex collections dataclasses contextlib calendar ast inspect
"""
WELL_KNOWN = _WELL_KNOWN.split()

MAX_PER_MODULE = 15  # variety: answers of one module are alike, and easily confused
MAX_ANSWER = 90  # characters; longer first lines are too much for a tiny model to keep

_ASKED = (
    "What does {name} do?",
    "What is {name} for?",
    "Explain {name}.",
    "What does the function {name} do?",
    "Describe {name}",
    "what does {name} do",
    "Tell me about {name}.",
    "What does {name}() do?",
)
_ASKED_IN_TEST = ("Can you tell me what {name} does?", "What does the Python function {name} do?", "Explain {name}()")


def name_of(function: DocumentedFunction) -> str:
    """`textwrap.dedent`"""
    return f"{function.module}.{function.qualname}"


def choose_functions(functions: Iterable[DocumentedFunction], count: int) -> list[DocumentedFunction]:
    """The `count` functions most worth asking about: no methods, short answers, well-known modules first.

    Each answer is taken once, so that every question has its own.
    """
    rank = {module: place for place, module in enumerate(WELL_KNOWN)}
    chosen: dict[str, DocumentedFunction] = {}
    taken: Counter[str] = Counter()
    for function in sorted(functions, key=lambda f: (rank.get(f.module, len(rank)), name_of(f))):
        is_short = "." not in function.qualname and len(function.first_line) <= MAX_ANSWER
        if is_short and function.first_line not in chosen and taken[function.module] < MAX_PER_MODULE:
            chosen[function.first_line] = function
            taken[function.module] += 1
    return list(chosen.values())[:count]


def documentation(functions: Sequence[DocumentedFunction], seed: int, split: str, count: int) -> list[Conversation]:
    """`count` questions about these functions, each function equally often; test phrasings are never trained on.

    In training the phrasings of a function take turns, from a place of its own, so that none is missed for long.
    """
    conversations = []
    for index in range(count):
        function = functions[index % len(functions)]
        if split == "test":
            template = generator(seed, "documentation", split, index).choice(_ASKED_IN_TEST)
        else:
            start = generator(seed, "documentation", split, name_of(function)).randrange(len(_ASKED))
            template = _ASKED[(start + index // len(functions)) % len(_ASKED)]
        conversations.append(exchange(template.format(name=name_of(function)), function.first_line))
    return conversations
