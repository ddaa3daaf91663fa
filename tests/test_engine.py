"""The engine: many replies at once are what each would be alone, whatever the memory, and whoever comes and goes."""

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nanochat_ray.engine.engine import Engine
from nanochat_ray.engine.sampler import SamplingParams
from nanochat_ray.errors import UserError
from nanochat_ray.model.gpt import GPT, GPTConfig
from nanochat_ray.model.ragged import BLOCK
from nanochat_ray.model.torch_step import TorchStep
from tests.exact_model import TOKENIZER, ExactModel, slow_reply

CONTEXT = 160
PROMPT = [TOKENIZER.bos, TOKENIZER.special("user_start"), *b"hi", TOKENIZER.special("assistant_start")]


def tokens(pieces) -> list[int]:
    return [token for piece in pieces for token in piece.tokens]


def engine_with(windows=(), contexts=None, max_running=4, step_tokens=32, model=None) -> Engine:
    """An engine with memory for so many full contexts; None for as many as may run."""
    model = model or ExactModel(CONTEXT, windows)
    one = Engine(model, TOKENIZER, 1, max(step_tokens, max_running)).scheduler.blocks
    bytes_of_one = sum(pool.blocks * model.block_bytes(group) for group, pool in enumerate(one.pools))
    kv_bytes = None if contexts is None else int(contexts * bytes_of_one)
    return Engine(model, TOKENIZER, max_running, step_tokens, kv_bytes)


class Reply:
    """A request and what came of it."""

    def __init__(self, prompt, params, said=(), cancel_after=None):
        self.prompt, self.params, self.said = prompt, params, list(said)
        self.cancel_after = cancel_after  # so many pieces
        self.pieces, self.error, self.running = [], None, None

    @property
    def over(self):
        return self.running is not None and self.running.finished


def run_all(engine: Engine, arrivals: list[list[Reply]]) -> list[Reply]:
    """Each list of replies arrives with a step; goes on until all are over, and checks the blocks after each step."""
    replies = [reply for arrived in arrivals for reply in arrived]
    steps = 0
    while steps < len(arrivals) or engine.busy:
        for reply in arrivals[steps] if steps < len(arrivals) else []:
            reply.running = engine.add(reply.prompt, reply.params, reply.said)
            if reply.cancel_after == 0:
                engine.cancel(reply.running)
        for running, outcome in engine.step():
            reply = next(reply for reply in replies if reply.running is running)
            if isinstance(outcome, Exception):
                reply.error = outcome
                continue
            reply.pieces += outcome
            if reply.cancel_after is not None and len(reply.pieces) >= reply.cancel_after:
                engine.cancel(running)
        engine.scheduler.check_integrity()
        steps += 1
        assert steps < 20 * CONTEXT * len(replies), "the engine does not come to an end"
    assert engine.scheduler.blocks.held == 0
    assert all(reply.over for reply in replies)
    return replies


# --- whatever comes --------------------------------------------------------------------------------------------------

prompts = st.builds(
    lambda start, shared, own: [*[start] * shared, *(10 + i for i in range(own))],
    st.sampled_from([65, 65, 65, 66]),  # most begin alike
    st.integers(0, 70),
    st.integers(1, 50),
)
params = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0.0, 0.7, 1.0]),
    top_k=st.sampled_from([None, 50, 3]),
    top_p=st.sampled_from([1.0, 0.9]),
    min_p=st.sampled_from([0.0, 0.05]),
    repetition_penalty=st.sampled_from([1.0, 1.3]),
    presence_penalty=st.sampled_from([0.0, 0.5]),
    frequency_penalty=st.sampled_from([0.0, 0.2]),
    seed=st.integers(0, 2**40),
    max_tokens=st.integers(1, 50),
    stop=st.sampled_from([(), ("ab",), ("日", "bé")]),
    logprobs=st.sampled_from([None, 0, 3]),
)
requests = st.builds(Reply, prompts, params, cancel_after=st.sampled_from([None, None, None, 0, 1, 5]))
engines = st.builds(
    engine_with,
    windows=st.sampled_from([(), (16,), (5, 40)]),
    contexts=st.none() | st.floats(1.0, 2.5),
    max_running=st.integers(1, 6),
    step_tokens=st.integers(1, 64),
)


def check_every_reply_is_its_own(engine, arrivals):
    expected = {}
    for reply in (reply for arrived in arrivals for reply in arrived):
        whole = expected[reply] = list(slow_reply(reply.prompt, reply.params, CONTEXT))
        if len(whole) > 6 and len(whole) % 3 == 0:  # every third long one goes on in the middle
            reply.said, expected[reply] = tokens(whole[:5]), whole[5:]
    for reply in run_all(engine, arrivals):
        assert reply.error is None
        if reply.cancel_after is None or reply.cancel_after > len(expected[reply]):
            assert reply.pieces == expected[reply]
        else:
            assert reply.pieces == expected[reply][: len(reply.pieces)]
    most = max(engine.scheduler.step_tokens, engine.scheduler.max_running)
    assert all(len(batch.ids) <= most for batch in engine.model.batches)


@given(engines, st.lists(st.lists(requests, max_size=3), min_size=1, max_size=6).filter(any))
@settings(max_examples=40)
def test_every_reply_of_any_mix_is_the_reply_alone(engine, arrivals):
    check_every_reply_is_its_own(engine, arrivals)


@pytest.mark.slow
@given(engines, st.lists(st.lists(requests, max_size=4), min_size=1, max_size=20).filter(any))
@settings(max_examples=250)
def test_every_reply_of_any_long_mix_is_the_reply_alone(engine, arrivals):
    check_every_reply_is_its_own(engine, arrivals)


def test_logits_are_asked_for_only_where_a_token_is_chosen():
    engine = engine_with((16,), contexts=1.0, step_tokens=20)
    wanted = [SamplingParams(temperature=1.0, seed=seed, max_tokens=40, logprobs=0) for seed in range(6)]
    replies = run_all(engine, [[Reply([65] * 60, params) for params in wanted]])
    chosen = sum(len(piece.logprobs) for reply in replies for piece in reply.pieces)
    assert sum(len(batch.wanted) for batch in engine.model.batches) == chosen


# --- with a real network ---------------------------------------------------------------------------------------------


def grouped_windowed_model() -> GPT:
    """Four heads on two key heads, windows of 128 and 512, value embeddings, smear; nothing in it is zero."""
    config = GPTConfig(
        sequence_len=512, vocab_size=320, n_layer=3, n_head=4, n_kv_head=2, n_embd=32, window_pattern="SL"
    )
    model = GPT(config)
    model.init_weights(0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in model.parameters():
            weight += 0.2 * torch.randn(weight.shape, generator=generator)
    return model.eval()


NETWORK = grouped_windowed_model()


@torch.inference_mode()
def check_greedy(engine, arrivals):
    for reply in run_all(engine, arrivals):
        assert reply.error is None
        said = tokens(reply.pieces)
        logits_TV = NETWORK(torch.tensor([[*reply.prompt, *said]]))[0, len(reply.prompt) - 1 : -1]
        chosen_T = logits_TV.gather(1, torch.tensor(said).unsqueeze(1))[:, 0]
        # Thirty times what fp32 moves these logits by: torch rounds products of other shapes otherwise.
        assert torch.all(chosen_T >= logits_TV.max(dim=1).values - 1e-4)


greedy = st.builds(
    lambda seed, shared, own, count: Reply(
        torch.cat(
            [
                torch.randint(0, 256, (size,), generator=torch.Generator().manual_seed(number))
                for number, size in ((seed % 2, shared), (seed, own))
            ]
        ).tolist(),
        SamplingParams(temperature=0.0, max_tokens=count),
    ),
    st.integers(0, 50),
    st.integers(0, 200),
    st.integers(1, 100),
    st.integers(1, 40),
)
real_engines = st.builds(
    lambda **options: engine_with(model=TorchStep(NETWORK), **options),
    contexts=st.floats(1.0, 1.6),
    max_running=st.integers(1, 5),
    step_tokens=st.sampled_from([7, 33, 100, 400]),
)


@given(real_engines, st.lists(st.lists(greedy, min_size=1, max_size=3), min_size=1, max_size=3))
@settings(max_examples=6)
def test_a_network_says_what_it_says_without_engine_and_cache(engine, arrivals):
    check_greedy(engine, arrivals)


@pytest.mark.slow
@given(real_engines, st.lists(st.lists(greedy, max_size=3), min_size=1, max_size=8).filter(any))
@settings(max_examples=30)
def test_a_network_says_in_long_mixes_what_it_says_without_engine_and_cache(engine, arrivals):
    check_greedy(engine, arrivals)


# --- continuing ------------------------------------------------------------------------------------------------------


@given(params, st.integers(0, 2**30))
def test_a_reply_is_continued_from_any_token_on_another_engine(params, seed):
    params = dataclasses.replace(params, seed=seed, max_tokens=40)
    pieces = list(slow_reply(PROMPT, params))
    said = tokens(pieces)
    replies = run_all(
        engine_with((16,), contexts=2.0), [[Reply(PROMPT, params, said[:cut]) for cut in range(len(said))]]
    )
    assert [reply.pieces for reply in replies] == [pieces[cut:] for cut in range(len(said))]


def with_finish(finish: str, **options) -> tuple[SamplingParams, list]:
    """The first reply that ends like this."""
    every = (SamplingParams(temperature=1.0, top_k=None, seed=seed, **options) for seed in range(200))
    return next((one, pieces) for one in every if (pieces := list(slow_reply(PROMPT, one)))[-1].finish == finish)


def test_what_was_said_may_fill_max_tokens_already():
    params, pieces = with_finish("length", max_tokens=9, stop=("abab",))
    engine = engine_with()
    rest = list(engine.stream(PROMPT, params, tokens(pieces)))
    assert [(piece.tokens, piece.finish) for piece in rest] == [((), "length")]
    assert not engine.busy
    assert not engine.model.batches, "the model was asked although nothing can be added"
    [reply] = run_all(engine, [[Reply(PROMPT, params, tokens(pieces))]])
    assert reply.pieces == rest
    [shorter] = run_all(engine, [[Reply(PROMPT, dataclasses.replace(params, max_tokens=3), tokens(pieces))]])
    assert shorter.pieces == rest


def test_text_that_was_held_back_is_shown_when_what_was_said_fills_max_tokens():
    params = SamplingParams(max_tokens=3, stop=("abcd",))
    assert [piece.text for piece in engine_with().stream(PROMPT, params, list(b"xab"))] == ["ab"]


def test_what_was_said_may_fill_the_context():
    said = [97] * (CONTEXT - len(PROMPT))
    assert [piece.finish for piece in engine_with().stream(PROMPT, SamplingParams(max_tokens=999), said)] == ["length"]
    assert len(list(engine_with().stream(PROMPT, SamplingParams(max_tokens=999), said[1:]))) == 1


def test_what_was_said_may_end_within_a_tool_result_that_fills_max_tokens():
    said = [TOKENIZER.special("python_start"), *b"12*7", TOKENIZER.special("python_end")]
    forced = [TOKENIZER.special("output_start"), *b"84", TOKENIZER.special("output_end")]
    pieces = list(engine_with().stream(PROMPT, SamplingParams(max_tokens=9), [*said, *forced[:1]]))
    assert (tokens(pieces), pieces[-1].finish) == (forced[1:3], "length")


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ([97, TOKENIZER.special("assistant_end")], "already end"),
        ([97, TOKENIZER.special("assistant_end"), 97], "already end"),
        ([TOKENIZER.special("python_start"), 49, TOKENIZER.special("python_end"), 97], "forced to come next"),
    ],
)
def test_what_cannot_have_been_said_is_refused(said, message):
    engine = engine_with()
    with pytest.raises(UserError, match=f"cannot be continued.*{message}"):
        engine.add(PROMPT, SamplingParams(), said)
    assert not engine.busy


# --- what is refused, what fails -------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [-1, 320, 2**40])
def test_ids_that_are_no_tokens_are_refused(bad):
    for prompt, said in (([65, bad], []), ([65], [66, bad])):
        with pytest.raises(UserError, match="no tokens of this model, which has 320"):
            engine_with().add(prompt, SamplingParams(), said)


def test_a_prompt_that_is_empty_or_fills_the_context_is_refused():
    engine = engine_with()
    with pytest.raises(UserError, match="empty"):
        engine.add([], SamplingParams())
    with pytest.raises(UserError, match=r"160 tokens.*context is 160"):
        engine.add([65] * CONTEXT, SamplingParams())
    [reply] = run_all(engine, [[Reply([65] * (CONTEXT - 1), SamplingParams())]])
    assert len(tokens(reply.pieces)) == 1


def test_memory_for_less_than_one_context_is_refused_and_for_one_is_enough():
    with pytest.raises(UserError, match="one context take"):
        engine_with((16,), contexts=0.99)
    assert run_all(engine_with((16,), contexts=1.0), [[Reply([65] * 150, SamplingParams(max_tokens=99))]])


def test_by_default_there_is_room_for_a_full_context_of_everyone():
    engine = engine_with((16,), max_running=5, step_tokens=20)
    run_all(engine, [[Reply([60 + i] * 150, SamplingParams(max_tokens=99)) for i in range(5)]])
    assert engine.scheduler.tally.preempted == 0


@pytest.mark.parametrize("damage", ["raise", "nan"])
@pytest.mark.parametrize("contexts", [1.0, None])
def test_only_the_reply_on_which_the_model_fails_fails(damage, contexts):
    engine = engine_with((16,), contexts, model=ExactModel(CONTEXT, (16,), damaged={33: damage}))
    params = SamplingParams(seed=5, max_tokens=30)
    good = [Reply([65] * 40 + [i], params) for i in range(3)]
    run_all(engine, [[good[0], Reply([65] * 40 + [33], params), good[1]], [good[2]]])
    for reply in good:
        assert reply.error is None
        assert reply.pieces == list(slow_reply(reply.prompt, params))


def test_a_failure_in_the_middle_says_what_happened_after_the_pieces_that_were_there():
    params, whole = with_finish("length", max_tokens=20)
    said = tokens(whole)
    last = next(i for i, token in enumerate(said) if i >= 2 and token not in said[:i])
    for damage, error in (("raise", RuntimeError), ("nan", UserError)):
        model = ExactModel(damaged={said[last]: damage})
        [reply] = run_all(engine_with(model=model), [[Reply(PROMPT, params)]])
        assert isinstance(reply.error, error)
        assert reply.pieces == whole[: last + 1]
        with pytest.raises(error):
            list(engine_with(model=model).stream(PROMPT, params))


# --- streams, cancelling, reuse --------------------------------------------------------------------------------------


def test_a_stream_that_is_left_frees_its_blocks():
    engine = engine_with()
    stream = engine.stream(PROMPT, SamplingParams(seed=3))
    next(stream)
    assert engine.scheduler.blocks.held
    stream.close()
    assert engine.scheduler.blocks.held == 0
    assert not engine.busy


def test_a_cancelled_reply_that_was_over_before_it_began_brings_nothing():
    engine = engine_with()
    engine.cancel(engine.add(PROMPT, SamplingParams(max_tokens=1), [97]))
    assert not engine.busy
    assert engine.step() == []


def test_the_next_turn_of_a_conversation_reads_only_what_is_new():
    engine = engine_with((16,))
    params, _ = with_finish("stop", max_tokens=50)
    first = run_all(engine, [[Reply([*PROMPT * 10], params)]])[0]
    before = engine.scheduler.tally.prompt_tokens
    history = [*PROMPT * 10, *tokens(first.pieces)]
    follow_up = [*history, *PROMPT]
    run_all(engine, [[Reply(follow_up, params)]])
    tally = engine.scheduler.tally
    assert tally.prompt_tokens - before == len(follow_up)
    # The last token of a reply was never read.
    assert tally.reused_tokens == (len(history) - 1) // BLOCK * BLOCK


def test_samples_with_different_seeds_share_the_prompt():
    engine = engine_with(max_running=8)
    prompt = [65] * 100
    wanted = [SamplingParams(temperature=1.0, top_k=None, seed=seed, max_tokens=20) for seed in range(8)]
    replies = run_all(engine, [[Reply(prompt, one) for one in wanted]])
    assert engine.scheduler.tally.reused_tokens == 7 * 96
    assert [reply.pieces for reply in replies] == [list(slow_reply(prompt, one)) for one in wanted]
    assert len({tuple(tokens(reply.pieces)) for reply in replies}) == 8
