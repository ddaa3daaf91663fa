"""The generated sets: right answers, no test question in training, equal on every machine."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanochat_ray.chat import check_conversation
from nanochat_ray.data.functions import DocumentedFunction
from nanochat_ray.engine.calculator import calculate
from nanochat_ray.tasks.arithmetic import arithmetic
from nanochat_ray.tasks.conversations import parts_of, spoken_text
from nanochat_ray.tasks.documentation import choose_functions, documentation, name_of
from nanochat_ray.tasks.identity import IDENTITY, SMALL_TALK, identity, small_talk
from nanochat_ray.tasks.spelling import counting, spelling
from nanochat_ray.tasks.words import WORDS

FUNCTIONS = [
    DocumentedFunction("textwrap", "dedent", "dedent(text)", "Remove any common leading whitespace from every line."),
    DocumentedFunction("textwrap", "TextWrapper.fill", "TextWrapper.fill(text)", "Reformat the single paragraph."),
    DocumentedFunction("zzz", "rare", "rare()", "Do something that is rarely asked for."),
    DocumentedFunction("zzz", "twin", "twin()", "Do something that is rarely asked for."),
    DocumentedFunction("json", "dumps", "dumps(obj)", "Serialize the object to a JSON formatted string."),
]

GENERATORS = {
    "arithmetic": arithmetic,
    "spelling": lambda seed, split, count: spelling(seed, split, count, WORDS),
    "counting": lambda seed, split, count: counting(seed, split, count, WORDS),
    "identity": identity,
    "small talk": small_talk,
    "documentation": lambda seed, split, count: documentation(choose_functions(FUNCTIONS, 3), seed, split, count),
}


@pytest.mark.parametrize("name", GENERATORS)
def test_every_generated_conversation_is_well_formed(name):
    for split in ("train", "test"):
        for chat in GENERATORS[name](1, split, 100):
            check_conversation(chat)


@pytest.mark.parametrize("name", GENERATORS)
def test_an_item_depends_only_on_seed_split_and_index(name):
    generate = GENERATORS[name]
    assert generate(5, "train", 60)[:20] == generate(5, "train", 20)
    if name != "documentation":  # its questions take turns
        assert generate(5, "train", 60) != generate(6, "train", 60)


@pytest.mark.parametrize("name", GENERATORS)
def test_no_test_question_is_ever_trained_on(name):
    generate = GENERATORS[name]
    trained = {chat[0]["content"] for seed in (1, 2) for chat in generate(seed, "train", 2000)}
    tested = {chat[0]["content"] for seed in (1, 2) for chat in generate(seed, "test", 100)}
    assert tested
    assert not trained & tested


@pytest.mark.parametrize("name", ["arithmetic", "counting"])
def test_the_calculator_agrees_with_every_written_result(name):
    for chat in GENERATORS[name](3, "train", 300):
        call, output, said = parts_of(chat[1]["content"])
        assert calculate(call["text"]).text == output["text"]
        assert output["text"] in said["text"]


@given(st.integers(0, 10**6), st.integers(1, 10**6))
def test_a_tool_call_copies_the_numbers_of_the_question(seed, largest):
    (chat,) = arithmetic(seed, "train", 1, max_operand=largest)
    asked = re.findall(r"\d+", chat[0]["content"])
    assert re.findall(r"\d+", parts_of(chat[1]["content"])[0]["text"]) == asked
    assert all(int(number) <= largest for number in asked)


def test_test_operands_never_train_in_another_wording():
    def calls(split):
        return {parts_of(chat[1]["content"])[0]["text"] for chat in arithmetic(1, split, 3000, max_operand=20)}

    assert not calls("train") & calls("test")


def test_a_spelling_is_the_letters_of_the_word_asked_about():
    for chat in GENERATORS["spelling"](1, "train", 100):
        word = chat[1]["content"].replace(", ", "")
        assert word in WORDS
        assert word in chat[0]["content"]


def test_every_intent_is_asked_equally_often():
    answers = [chat[1]["content"] for chat in identity(1, "train", 10 * len(IDENTITY))]
    assert {answers.count(intent.answer) for intent in IDENTITY} == {10}


def test_identity_questions_are_many_and_in_their_wordings_distinct():
    questions = [question for intent in IDENTITY + SMALL_TALK for question in intent.asked + intent.asked_in_test]
    assert len(questions) == len(set(questions)) > 80


def test_words_are_distinct_lowercase_words():
    assert len(set(WORDS)) == len(WORDS) > 400
    assert all(re.fullmatch("[a-z]{3,}", word) for word in WORDS)


def test_functions_are_chosen_well_known_first_without_methods_or_twins():
    assert [name_of(function) for function in choose_functions(FUNCTIONS, 10)] == [
        "textwrap.dedent",
        "json.dumps",
        "zzz.rare",
    ]


def test_a_documentation_answer_is_the_docstrings_first_line():
    functions = choose_functions(FUNCTIONS, 10)
    by_name = {name_of(function): function.first_line for function in functions}
    chats = documentation(functions, 1, "train", 8 * len(functions))
    for chat in chats:
        (name,) = (name for name in by_name if name in chat[0]["content"])
        assert spoken_text(chat[1]["content"]) == by_name[name]
    assert len({chat[0]["content"] for chat in chats}) == len(chats)  # every phrasing of every function
