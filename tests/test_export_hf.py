"""Bundles in Hugging Face's hands: logits, generation and chats as here, in transformers and in lm-eval."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from jobs import export as export_job
from nanochat_ray.chat import render, render_prompt
from nanochat_ray.eval.core import MULTIPLE_CHOICE, CoreTask, core_questions
from nanochat_ray.eval.exam import CONTEXT_TIMES
from nanochat_ray.eval.hugging_face import HuggingFaceScorer
from nanochat_ray.eval.question import as_question, judge
from nanochat_ray.eval.scorer import StepScorer
from nanochat_ray.model.torch_step import TorchStep
from nanochat_ray.storage import run_folder
from tests.tiny_runs import JULY, OCTOBER, VOCAB_SIZE, make_run, tiny_tokenizer

pytestmark = pytest.mark.slow  # importing transformers alone takes seconds

SHAPES = {
    "July 2026": JULY,
    "one layer, one key head": replace(JULY, n_layer=1, n_kv_head=1),
    "no smear, no scalars": replace(JULY, smear=False, layer_scalars=False, window_pattern="SSSL", n_layer=5),
    "no backout, no value embeddings": replace(JULY, backout=False, value_embeddings=False, query_key_scale=1.0),
    "windows as wide as the context": replace(JULY, sequence_len=128),
    "October 2025": OCTOBER,
    "October 2025, another base": replace(OCTOBER, rotary_base=50_000.0, n_kv_head=4),
}
NEVER = {"eos_token_id": VOCAB_SIZE, "pad_token_id": VOCAB_SIZE}  # no id: what is generated has a known length
GREEDY = {"do_sample": False, **NEVER}
CONVERSATION = [
    {"role": "system", "content": "Answer briefly. <|assistant_end|>"},
    {"role": "user", "content": "What is 12*7? <|bos|><|user_end|>"},
    {
        "role": "assistant",
        "content": [
            {"type": "text", "text": "I'll "},
            {"type": "text", "text": "compute: "},
            {"type": "python", "text": "12*7"},
            {"type": "python_output", "text": "84"},
            {"type": "text", "text": "It is 84."},
        ],
    },
    {"role": "user", "content": [{"type": "text", "text": "Thanks\n\n  "}]},
]


@pytest.fixture(scope="module")
def transformers(tmp_path_factory):
    """The library, with its caches out of the way, and no network."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")
        patch.setenv("HF_MODULES_CACHE", str(tmp_path_factory.mktemp("modules")))
        patch.setenv("HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("datasets")))
        import transformers

        transformers.utils.logging.disable_progress_bar()
        yield transformers


def exported(storage: Path, shape, *flags: str) -> tuple[str, torch.nn.Module]:
    model = make_run(run_folder(str(storage), "r"), shape)
    args = export_job.build_parser().parse_args(["--run", "r", "--storage", str(storage), *flags])
    return export_job.main(args)["artifacts"]["bundle"], model


@pytest.fixture(scope="module", params=SHAPES)
def pair(request, transformers, tmp_path_factory):
    """A model in both hands."""
    folder, ours = exported(tmp_path_factory.mktemp("storage"), SHAPES[request.param])
    remote = Path(folder, "modeling_nanochat_ray.py").exists()
    assert remote == ("October" not in request.param)
    load = transformers.AutoModelForCausalLM.from_pretrained
    theirs = load(folder, trust_remote_code=True) if remote else load(folder)
    assert type(theirs).__name__ == ("NanochatRayForCausalLM" if remote else "NanoChatForCausalLM")
    length = min(400, SHAPES[request.param].sequence_len)
    ids = torch.randint(0, VOCAB_SIZE, (2, length), generator=torch.Generator().manual_seed(5))
    return SimpleNamespace(ours=ours, theirs=theirs.eval(), ids=ids, folder=folder)


@pytest.fixture(scope="module")
def july(transformers, tmp_path_factory):
    folder, ours = exported(tmp_path_factory.mktemp("storage"), JULY)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
    return SimpleNamespace(ours=ours, theirs=theirs, folder=folder)


@torch.inference_mode()
def test_logits_are_ours_whole_and_in_parts(pair):
    from transformers.modeling_outputs import CausalLMOutputWithPast

    expected = pair.ours(pair.ids)
    torch.testing.assert_close(pair.theirs(pair.ids).logits, expected, atol=1e-4, rtol=0)
    field = "cache" if "cache" in CausalLMOutputWithPast.__dataclass_fields__ else "past_key_values"
    cache, parts = None, []
    for part in pair.ids.split([60, 1, 40, pair.ids.shape[1] - 101], dim=1):
        out = pair.theirs(part, use_cache=True, **{field: cache})
        cache = out[field]
        parts.append(out.logits)
    torch.testing.assert_close(torch.cat(parts, dim=1), expected, atol=1e-4, rtol=0)


def test_greedy_generation_is_ours(pair):
    start = pair.ids[:1, : pair.ids.shape[1] - 50]
    written = pair.theirs.generate(start, attention_mask=torch.ones_like(start), max_new_tokens=50, **GREEDY)
    assert written[0, start.shape[1] :].tolist() == list(pair.ours.generate(start[0].tolist(), 50, temperature=0.0))


def test_a_batch_padded_on_the_left_is_written_as_each_row_alone(pair):
    longest = pair.ids.shape[1] - 40
    lengths = (longest, longest // 2)
    batch, mask = torch.full((2, longest), 3), torch.zeros(2, longest, dtype=torch.long)
    for row, length in enumerate(lengths):
        batch[row, longest - length :] = pair.ids[row, :length]
        mask[row, longest - length :] = 1
    written = pair.theirs.generate(batch, attention_mask=mask, max_new_tokens=40, **GREEDY)[:, longest:]
    for row, length in enumerate(lengths):
        assert written[row].tolist() == list(pair.ours.generate(pair.ids[row, :length].tolist(), 40, temperature=0.0))


def test_beams_that_change_places_take_their_cache_along(pair):
    start = pair.ids[:1, :100]
    options = {"attention_mask": torch.ones_like(start), "max_new_tokens": 20, "num_beams": 3, **GREEDY}
    assert torch.equal(pair.theirs.generate(start, **options), pair.theirs.generate(start, use_cache=False, **options))


def test_the_loss_is_ours_and_every_parameter_learns(july):
    ids = torch.randint(0, VOCAB_SIZE, (2, 60), generator=torch.Generator().manual_seed(6))
    loss = july.theirs(ids, labels=ids).loss
    torch.testing.assert_close(loss, july.ours(ids[:, :-1], ids[:, 1:]), atol=1e-5, rtol=0)
    loss.backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in july.theirs.parameters())
    july.theirs.zero_grad()


def test_what_the_model_cannot_do_is_refused(july):
    ids = torch.zeros(1, 4, dtype=torch.long)
    with pytest.raises(ValueError, match="reads input_ids"):
        july.theirs(inputs_embeds=torch.zeros(1, 4, 64))
    with pytest.raises(ValueError, match=r"attention_mask has shape \(1, 3\); expected \(1, 4\)"):
        july.theirs(ids, attention_mask=torch.ones(1, 3))
    with pytest.raises(ValueError, match="cache of fixed size"):
        july.theirs.generate(ids, max_new_tokens=2, cache_implementation="static")


def test_bfloat16_is_loaded_as_such_with_scalars_in_fp32(transformers, tmp_path):
    folder, ours = exported(tmp_path, JULY, "--dtype", "bfloat16")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
    assert theirs.lm_head.weight.dtype == torch.bfloat16
    assert theirs.resid_lambdas.dtype == torch.float32
    ids = torch.arange(100).unsqueeze(0)
    with torch.inference_mode():
        close = (theirs(ids).logits - ours.freeze(torch.bfloat16)(ids)).abs().mean()
    assert close < 0.02


def test_what_transformers_saves_it_loads_again(transformers, july, tmp_path):
    july.theirs.save_pretrained(tmp_path)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, trust_remote_code=True).eval()
    ids = torch.arange(50).unsqueeze(0)
    with torch.inference_mode():
        assert torch.equal(again(ids).logits, july.theirs(ids).logits)


def test_chats_have_the_ids_of_our_renderer(transformers, july):
    tokenizer = transformers.AutoTokenizer.from_pretrained(july.folder, trust_remote_code=True)
    ours = tiny_tokenizer()
    found = tokenizer.apply_chat_template(CONVERSATION[:3])["input_ids"]
    assert found == render(ours, CONVERSATION[:3])[0]
    prompt = tokenizer.apply_chat_template(CONVERSATION, add_generation_prompt=True)["input_ids"]
    assert prompt == render_prompt(ours, CONVERSATION)
    assert tokenizer.decode(prompt) == ours.decode(prompt)
    begun = [CONVERSATION[1], {"role": "assistant", "content": "It is"}]
    going_on = tokenizer.apply_chat_template(begun, continue_final_message=True)["input_ids"]
    assert going_on == render(ours, begun)[0][:-1]
    assert (tokenizer.bos_token_id, tokenizer.eos_token) == (ours.bos, "<|assistant_end|>")


def test_plain_text_has_our_ids_and_special_tokens_where_they_are_wanted(transformers, july):
    tokenizer, ours = transformers.AutoTokenizer.from_pretrained(july.folder, trust_remote_code=True), tiny_tokenizer()
    text = "It's 1234  <b>naïve</b>\n\n\t🙂 "
    assert tokenizer(text).input_ids == ours.encode(text)
    assert tokenizer("<|bos|>" + text).input_ids == [ours.bos, *ours.encode(text)]
    assert tokenizer("<|bos|>" + text, split_special_tokens=True).input_ids == ours.encode("<|bos|>" + text)


def test_a_reply_ends_where_ours_does(transformers, july):
    ours = tiny_tokenizer()
    ends = ("assistant_end", "bos", "user_start", "user_end", "assistant_start")
    assert july.theirs.generation_config.eos_token_id == [ours.special(name) for name in ends]


def test_core_is_asked_of_an_export_as_of_its_run_beyond_the_context_of_training_too(july):
    theirs, ours = july.theirs, july.ours
    context = ours.config.sequence_len
    ids = torch.randint(0, 256, (2 * context,), generator=torch.Generator().manual_seed(1)).tolist()
    questions = [
        as_question("t", length, ["x"], [[*ids[:length], a, b] for a, b in ((1, 2), (3, 4))], [length] * 2, 0, None)
        for length in (20, 2 * context)
    ]
    export, run = HuggingFaceScorer(theirs), StepScorer(TorchStep(ours, CONTEXT_TIMES * context))
    assert export.limit == run.limit
    for (_, found), (_, expected) in zip(export.score(questions), run.score(questions), strict=True):
        for end, other in zip(found, expected, strict=True):
            assert end.nats == pytest.approx(other.nats, abs=1e-4)


def test_lm_eval_agrees_with_ours(transformers, tmp_path):
    import lm_eval
    from lm_eval.tasks import TaskManager

    folder, model = exported(tmp_path / "storage", JULY)
    tokenizer = tiny_tokenizer()
    items = tuple(
        {"query": f"The ferry left {hours} hours late, and it was", "choices": [" a", " b", " c"], "gold": hours % 3}
        for hours in range(2, 32)
    )
    assert len({len(tokenizer.encode(" was" + choice)) for choice in items[0]["choices"]}) == 1  # sum and mean agree
    data, task = tmp_path / "ferry.jsonl", tmp_path / "tasks" / "ferry.yaml"
    data.write_text("\n".join(map(json.dumps, items)))
    task.parent.mkdir()
    settings = {
        "task": "ferry",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{query}}",
        "doc_to_choice": "choices",
        "doc_to_target": "gold",
        "target_delimiter": "",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }
    task.write_text(json.dumps(settings))  # JSON is YAML
    found = lm_eval.simple_evaluate(
        model="hf",
        model_args=f"pretrained={folder},trust_remote_code=True,add_bos_token=True",
        tasks=["ferry"],
        task_manager=TaskManager(include_path=str(task.parent), include_defaults=False),
        device="cpu",
        batch_size=4,
        bootstrap_iters=0,
    )

    questions = core_questions(
        CoreTask("ferry", MULTIPLE_CHOICE, 0, "", 1 / 3, items), range(len(items)), tokenizer, JULY.sequence_len
    )
    verdicts = [
        judge(question, ends, tokenizer.decode) for question, ends in StepScorer(TorchStep(model)).score(questions)
    ]
    right = sum(verdict.correct for verdict in verdicts) / len(items)
    assert found["results"]["ferry"]["acc,none"] == pytest.approx(right)
    assert 0 < right < 1
    for sample in found["samples"]["ferry"]:
        prompt = [tokenizer.bos, *tokenizer.encode(sample["doc"]["query"])]
        for choice, ((likelihood, _),) in zip(sample["doc"]["choices"], sample["resps"], strict=True):
            ids = torch.tensor([tokenizer.bos, *tokenizer.encode(sample["doc"]["query"] + choice)])
            with torch.inference_mode():
                losses = model(ids[None, :-1], ids[None, 1:], reduction="none")[0]
            assert float(likelihood) == pytest.approx(-losses[len(prompt) - 1 :].sum().item(), abs=1e-4)


def test_transformers_works_from_the_repository_root_beside_our_folder_called_kernels(tmp_path):
    folder, _ = exported(tmp_path, OCTOBER)
    code = (
        "import sys, torch, transformers\n"
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n"
        "model = AutoModelForCausalLM.from_pretrained(sys.argv[1])\n"
        "import kernels\n"
        "print(type(model).__name__, model(torch.arange(9)[None]).logits.shape[1], kernels.__file__)\n"
    )
    root = Path(__file__).parents[1]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(root)}
    run = subprocess.run(
        [sys.executable, "-c", code, folder], cwd=root, env=environment, capture_output=True, text=True, timeout=120
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.split() == ["NanoChatForCausalLM", "9", str(root / "kernels" / "__init__.py")]
