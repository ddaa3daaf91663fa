"""The README.md of a bundle: what the model is, how to run it, where it comes from. Written from facts, without a date.

The same model gives the same card, so that exporting it again changes nothing.
"""

from collections.abc import Sequence
from typing import Any

from nanochat_ray.exchange.bundle import Facts
from nanochat_ray.exchange.hf_model import is_known_to_transformers
from nanochat_ray.plan import Plan

_CHAT = """\
    messages = [{"role": "user", "content": "Why is the sky blue?"}]
    inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True, return_tensors="pt")
    reply = model.generate(**inputs, max_new_tokens=256)
    print(tokenizer.decode(reply[0, inputs["input_ids"].shape[1]:], skip_special_tokens=True))"""

_TEXT = """\
    inputs = tokenizer("<|bos|>The ferry left an hour late,", return_tensors="pt")
    print(tokenizer.decode(model.generate(**inputs, max_new_tokens=64)[0]))"""

_FORMAT = """\
Every document and every conversation begins with `<|bos|>`. The chat template puts it there, the tokenizer by itself
does not: write it in front of plain text, and give lm-eval `add_bos_token=True`.

In a conversation an optional system message comes first, then user and assistant take turns. The content of a message
is text, or a list of parts `{"type": …, "text": …}`; the assistant's parts are `text`, `python` (a call of the
calculator) and `python_output` (its answer, which has to come from the program around the model: `generate` calls no
tool).

What a message says never makes a special token, neither in nanochat_ray nor with the chat template here. The tokenizer
by itself does find special tokens in text, as every Hugging Face tokenizer: for text that others wrote, ask for
`tokenizer(text, split_special_tokens=True)`."""

_SEAL = """\
`bundle.json` has the size and the sha256 of every file here and one digest over all of them; nanochat_ray refuses a
bundle of which a file is damaged, missing or of another one. `report.md`, if it is there, is the run's report card."""


def model_card(facts: Facts, dtype: str, plan: Plan) -> str:
    """The card in Markdown, with the header that the Hugging Face hub reads."""
    source, chat = facts.source, facts.stage != "base"
    trust = "" if is_known_to_transformers(facts.shape) else ", trust_remote_code=True"
    load = [
        "    from transformers import AutoModelForCausalLM, AutoTokenizer\n",
        '    folder = "."  # this folder, or its name on the hub',
        f"    tokenizer = AutoTokenizer.from_pretrained(folder{trust})",
        f"    model = AutoModelForCausalLM.from_pretrained(folder{trust}).eval()\n",
        _CHAT if chat else _TEXT,
    ]
    remote = ",trust_remote_code=True" if trust else ""
    here = [
        "    lm_eval run --model hf --tasks arc_easy \\",
        f"        --model_args pretrained=.,add_bos_token=True{remote}             # needs `pip install lm-eval`",
        "    python -m jobs.import_nanochat --source . --run NAME                  # as a run of nanochat_ray",
    ]
    sections = [
        "---\nlibrary_name: transformers\npipeline_tag: text-generation\ntags:\n- nanochat\n- nanochat_ray\n---",
        f"# {source['run']}, {'chat' if chat else 'base'} model",
        _sentence(facts, dtype),
        "\n".join(load),
        _FORMAT,
        "\n".join(here),
        "## Model",
        _table(_shape_rows(facts)),
        "## Training",
        _table(_training_rows(source, plan)),
    ]
    if source["benchmark"]:
        sections += [f"## {source['benchmark']['name']}", *_benchmark(source["benchmark"])]
    sections += ["## Fingerprints", _table(_fingerprints(facts)), _SEAL]
    return "\n\n".join(sections) + "\n"


def _sentence(facts: Facts, dtype: str) -> str:
    kind = "A small chat model" if facts.stage != "base" else "A small base model, which continues text,"
    loads = (
        "transformers 5 has its architecture"
        if is_known_to_transformers(facts.shape)
        else "transformers 5 loads it with `modeling_nanochat_ray.py`, which is in this folder"
    )
    exact = "" if dtype == "float32" else " The weights were rounded to bfloat16 for this bundle."
    parameters = facts.shape.count_parameters().total
    return f"{kind} of {parameters:,} parameters, trained with nanochat_ray; {loads}.{exact}"


def _shape_rows(facts: Facts) -> list[tuple[str, str]]:
    shape = facts.shape
    extras = {
        "layer scalars": shape.layer_scalars,
        "smear": shape.smear,
        "backout": shape.backout,
        "value embeddings": shape.value_embeddings,
    }
    return [
        ("layers, width", f"{shape.n_layer}, {shape.n_embd:,}"),
        ("heads, key/value heads, head size", f"{shape.n_head}, {shape.n_kv_head}, {shape.head_size}"),
        ("context, vocabulary", f"{shape.sequence_len:,}, {shape.vocab_size:,}"),
        ("attention windows", ", ".join(f"{window:,}" for window in shape.windows)),
        ("rotary base, scale of queries and keys", f"{shape.rotary_base:g}, {shape.query_key_scale:g}"),
        ("extras", ", ".join(name for name, has in extras.items() if has) or "none"),
    ]


def _training_rows(source: dict[str, Any], plan: Plan) -> list[tuple[str, str]]:
    rows = [("steps, tokens", f"{source['step']:,} of {plan.steps:,}, {source['tokens']:,}")]
    if source["origin"]:
        rows.append(("weights imported from", f"{source['origin']['kind']} {source['origin']['digest']}"))
    if source["began_with"]:
        rows.append(("began with the weights", source["began_with"]))
    rows += [
        ("global batch, tokens", f"{plan.batch_tokens:,}"),
        ("peak rate of matrices, embedding, unembedding", _rates(plan)),
        ("weight decay", f"{plan.weight_decay:.4g}"),
        ("seed", f"{source['stream']['seed']}"),
    ]
    if source["val_bpb"]:
        value, step = source["val_bpb"]["value"], source["val_bpb"]["step"]
        rows.append(("validation, bits per byte", f"{value:.4f} at step {step:,}"))
    return rows


def _rates(plan: Plan) -> str:
    return f"{plan.rates.matrix:.4g}, {plan.rates.embedding:.4g}, {plan.rates.unembedding:.4g}"


def _benchmark(benchmark: dict[str, Any]) -> list[str]:
    def interval(figure: dict[str, float]) -> str:
        return f"{figure['value']:.3f} ({figure['low']:.3f} to {figure['high']:.3f})"

    limit = f", at most {benchmark['max_per_task']:,} questions of each task" if benchmark["max_per_task"] else ""
    rows = [
        (name, f"{task['examples']:,}", interval(task["accuracy"]), interval(task["centred"]))
        for name, task in benchmark["tasks"].items()
    ]
    return [
        f"{interval(benchmark['mean'])}: centred accuracy, mean of the tasks, with 95 % interval{limit}; questions of "
        f"hash `{benchmark['questions_hash']}`.",
        _table(rows, ("task", "questions", "accuracy", "centred")),
    ]


def _fingerprints(facts: Facts) -> list[tuple[str, str]]:
    source = facts.source
    rows = [
        ("weights of the checkpoint, sha256", source["weights_sha256"]),
        ("tokenizer", facts.tokenizer),
        ("corpus", source["stream"]["corpus"]),
        ("rows of the last step", source["stream_hash"]),
    ]
    return [(name, f"`{value}`") for name, value in rows if value]


def _table(rows: Sequence[tuple[str, ...]], columns: tuple[str, ...] = ("", "")) -> str:
    lines: list[Sequence[str]] = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines)
