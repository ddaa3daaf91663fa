"""The journal: bounded in entries, tokens and age; what is being written is never forgotten."""

import pytest

from nanochat_ray.engine.reply import Piece
from nanochat_ray.engine.sampler import TokenLogprob
from nanochat_ray.serve.journal import Conflict, Entry, Journal, Written


class Writer:
    def supersede(self) -> None:
        raise AssertionError("nobody asked for it")


def entry(tokens: int = 0, request: str = "r", model: str = "m", live: Writer | None = None) -> Entry:
    written = Written()
    written.add(Piece(tuple(range(tokens))))
    return Entry(request, model, 0, (written,), live=live)


def journal(**limits) -> tuple[Journal, list[float]]:
    now = [0.0]
    return Journal(lambda: now[0], **limits), now


def key(number: int) -> tuple[str, str]:
    return "", str(number)


def test_a_key_gives_its_entry_back_and_belongs_to_one_request_of_one_owner():
    book, _ = journal()
    first = book.open(key(1), entry())
    assert book.open(key(1), entry()) is first
    assert book.open(("alice", "1"), entry(request="other")) is not first
    with pytest.raises(Conflict):
        book.open(key(1), entry(request="other"))


def test_a_replaced_model_begins_anew():
    book, _ = journal()
    first = book.open(key(1), entry())
    assert book.open(key(1), entry(model="n", request="other")) is not first


def test_the_least_recently_used_go_when_there_are_too_many():
    book, _ = journal(max_entries=3)
    kept = book.open(key(1), entry())
    for number in (2, 3, 1, 4):
        book.open(key(number), entry())
    book.trim()
    assert len(book) == 3
    assert book.open(key(1), entry()) is kept


def test_tokens_are_bounded_and_log_probabilities_count_for_their_numbers():
    book, _ = journal(max_cost=100)
    for number in range(10):
        book.open(key(number), entry(tokens=30))
    book.trim()
    assert len(book) == 3
    heavy = Written()
    heavy.add(Piece((1,), logprobs=(TokenLogprob(1, -1.0, ((1, -1.0), (2, -2.0))),)))
    assert heavy.cost == 1 + 4


def test_what_is_old_goes_and_what_is_written_stays():
    book, now = journal(max_age_s=10, max_entries=2)
    old, live = book.open(key(1), entry()), book.open(key(2), entry(live=Writer()))
    now[0] = 11
    assert book.open(key(1), entry()) is not old
    assert book.open(key(2), entry()) is live
    for number in range(3, 9):
        book.open(key(number), entry())
    book.trim()
    assert len(book) == 2
    assert book.open(key(2), entry()) is live
