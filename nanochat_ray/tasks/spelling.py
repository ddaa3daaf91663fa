"""Generated questions about the letters of words: spelling them, and counting one letter with the calculator.

A model that reads subword tokens does not see letters; these sets teach it how the words it knows are spelled.
"""

from collections.abc import Sequence

from nanochat_ray.tasks.conversations import Conversation, exchange, exchange_with_tool, generator, held_out

TEST_EVERY = 20  # one word (spelling) or one pair of word and letter (counting) in 20 is only ever tested

_SPELL = (
    "Spell the word {word}.",
    "How do you spell {word}?",
    "Spell {word}.",
    "Please spell the word '{word}'.",
    "What are the letters of {word}?",
)
_COUNT = (
    "How many times does the letter {letter} occur in {word}?",
    "How many {letter} are in the word {word}?",
    "How many times is '{letter}' in '{word}'?",
    "Count the letter {letter} in {word}.",
    "How often does {letter} appear in the word {word}?",
)


def spelling(seed: int, split: str, count: int, words: Sequence[str]) -> list[Conversation]:
    """`count` requests to spell a word; the answer is its letters, comma-separated. Test words never train."""
    pool = [word for word in words if held_out(("spelling", word), TEST_EVERY) == (split == "test")]
    conversations = []
    for index in range(count):
        random = generator(seed, "spelling", split, index)
        word = random.choice(pool)
        conversations.append(exchange(random.choice(_SPELL).format(word=word), ", ".join(word)))
    return conversations


def counting(seed: int, split: str, count: int, words: Sequence[str]) -> list[Conversation]:
    """`count` questions how often a letter occurs in a word, answered with a `'word'.count('a')` call.

    Three letters in four are ones the word has. A pair of word and letter that is tested never trains; the word may.
    """
    return [_count_question(seed, split, index, words) for index in range(count)]


def _count_question(seed: int, split: str, index: int, words: Sequence[str]) -> Conversation:
    random = generator(seed, "counting", split, index)
    while True:
        word = random.choice(words)
        letter = random.choice(word) if random.random() < 0.75 else chr(ord("a") + random.randrange(26))
        if held_out(("counting", word, letter), TEST_EVERY) == (split == "test"):
            break
    question = random.choice(_COUNT).format(letter=letter, word=word)
    times = str(word.count(letter))
    return exchange_with_tool(question, f"'{word}'.count('{letter}')", times, f"The answer is {times}.")
