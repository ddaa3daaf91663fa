"""The sections of the report that are not about training: tokenizer, evaluations, time, machine, what was not run."""

from typing import Any

from nanochat_ray.machine import describe_machine
from nanochat_ray.plan import duration
from nanochat_ray.report.document import Block, Sample, Samples, Section, Table, Text, printable
from nanochat_ray.report.training import Training

Json = dict[str, Any]


def tokenizer_section(facts: Json | None, evaluation: Json | None) -> Section | None:
    """Size and training text, then bytes per token beside other encodings."""
    blocks: list[Block] = []
    if facts:
        training = facts.get("training", {})
        counts = (("documents", "documents"), ("chars", "characters"))
        read = ", ".join(f"{training[name]:,} {words}" for name, words in counts if name in training)
        source = f", trained on {read}" if read else ""
        blocks.append(Text(f"{facts['vocab_size']:,} tokens{source}. Fingerprint {facts['fingerprint'][:16]}."))
    if evaluation:
        blocks += _compression(evaluation)
    return Section("Tokenizer", tuple(blocks)) if blocks else None


def _compression(evaluation: Json) -> list[Block]:
    found = {(row["text"], row["encoding"]): row["bytes_per_token"] for row in evaluation["rows"]}
    encodings = list(dict.fromkeys(encoding for _, encoding in found))
    texts = dict.fromkeys(text for text, _ in found)
    rows = [
        (text, *(f"{found[text, name]:.2f}" if (text, name) in found else "" for name in encodings)) for text in texts
    ]
    sizes = {"ours": evaluation["vocab_size"], **evaluation.get("references", {})}
    columns = ("bytes per token (more is better)", *(f"{name}, {sizes[name]:,} tokens" for name in encodings))
    encode = evaluation.get("encode_mb_per_s", {})
    speeds = [
        f"encodes {speed} MB/s with {threads} {'thread' if threads == '1' else 'threads'}"
        for threads, speed in encode.items()
    ]
    if "decode_mb_per_s" in evaluation:
        speeds.append(f"decodes {evaluation['decode_mb_per_s']} MB/s")
    absent = [name for name, size in evaluation.get("references", {}).items() if size is None]
    remarks = [", ".join(speeds)] if speeds else []
    remarks += [f"{' and '.join(absent)} not available offline"] if absent else []
    remarks += ["round trip exact on every text"] if evaluation.get("round_trip") else []
    table = Table(columns, tuple(rows), right=tuple(range(1, len(columns))))
    return [table, Text("; ".join(remarks) + ".")] if remarks else [table]


def bpb_section(base: Training | None, base_eval: Json | None, sft: Training | None) -> Section | None:
    """Bits per byte of every stage that measured it. The finetuning figure is on conversations, not on the corpus."""
    rows: list[tuple[str, str, str]] = []
    for stage, training in (("base", base), ("sft", sft)):
        text = "corpus, validation" if stage == "base" else "conversations, held out"
        rows += [
            (f"{stage}, step {event['step']:,}", text, f"{event['val_bpb']:.4f}")
            for event in (training.evals[:: max(1, len(training.evals) - 1)] if training else [])
        ]
        if stage == "base" and base_eval:
            step = f"base, evaluated at step {base_eval['step']:,}"
            splits = (("train_bpb", "corpus, training"), ("val_bpb", "corpus, validation"))
            rows += [(step, words, f"{base_eval[key]:.4f}") for key, words in splits if base_eval.get(key) is not None]
    if not rows:
        return None
    return Section("Bits per byte", (Table(("stage", "text", "bits per byte"), tuple(rows), right=(2,)),))


def base_samples_section(base_eval: Json | None) -> Section | None:
    """Continuations of held-out openings."""
    if not base_eval or not base_eval.get("samples"):
        return None
    samples = [
        Sample("held-out opening, greedy continuation", printable(sample["prompt"]), printable(sample["text"]))
        for sample in base_eval["samples"]
    ]
    return Section("What the base model says", (Samples(tuple(samples)),))


def chat_section(evaluation: Json | None) -> Section | None:
    """Scores per kind of question, then answers as they came."""
    if not evaluation or not evaluation.get("tasks"):
        return None
    columns = ("held-out questions", "right", "asked", "tool calls")
    rows = tuple(
        (name, _share(task.get("accuracy")), f"{task['examples']:,}", f"{task.get('tool_calls', 0):,}")
        for name, task in evaluation["tasks"].items()
    )
    blocks: list[Block] = [Table(columns, rows, right=(1, 2, 3))]
    if evaluation.get("samples"):
        items = [
            Sample(sample["source"], printable(sample["question"]), printable(sample["answer"]))
            for sample in evaluation["samples"]
        ]
        blocks.append(Samples(tuple(items)))
    return Section("Chat", tuple(blocks))


def _share(value: float | None) -> str:
    return "not scored" if value is None else f"{value:.1%}"


def time_section(stages: list[Json] | None) -> Section | None:
    """Wall time of each stage and their sum."""
    if not stages:
        return None
    rows = [(entry["stage"], duration(entry["seconds"]), entry.get("status", "")) for entry in stages]
    rows.append(("together", duration(sum(entry["seconds"] for entry in stages)), ""))
    return Section("Wall time", (Table(("stage", "time", ""), tuple(rows), right=(1,)),))


def machine_section() -> Section:
    """Where the report was written; the workers may have been elsewhere."""
    note = Text("The machine that wrote this report. Workers of a larger cluster may be others.")
    return Section("Machine and versions", (Table(("", ""), tuple(describe_machine())), note))


def missing_section(missing: list[tuple[str, str]]) -> Section | None:
    """What has not been run, with the command that would."""
    if not missing:
        return None
    return Section("Not run", (Table(("what", "to run it"), tuple(missing)),))
