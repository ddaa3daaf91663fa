"""The model, text and tokenizer that a benchmark works with, from the sizes that its command was given."""

from dataclasses import replace

from nanochat_ray.data.corpus import Corpus, open_corpus, read_unit
from nanochat_ray.plan import Plan, make_plan
from nanochat_ray.storage import Folder
from nanochat_ray.tokenizer import Tokenizer, train_tokenizer

Sizes = dict[str, int]
FULL: Sizes = {
    "depth": 6,
    "sequence_len": 512,
    "vocab_size": 32768,
    "micro_batch_rows": 4,
    "steps": 9,
    "megabytes": 60,
}
QUICK: Sizes = {
    "depth": 2,
    "sequence_len": 128,
    "vocab_size": 1024,
    "micro_batch_rows": 4,
    "steps": 5,
    "megabytes": 2,
}
CHECKPOINT: Sizes = {  # 100 MB of state, and steps short enough for a stall to show
    "depth": 4,
    "sequence_len": 256,
    "vocab_size": 6144,
    "micro_batch_rows": 4,
    "steps": 160,
}
MICRO_BATCHES = 4  # per step; a real plan has more of them for each update


def plan_of(sizes: Sizes, micro_batches: int = MICRO_BATCHES) -> Plan:
    """The plan of a model of these sizes."""
    rows, length = sizes["micro_batch_rows"], sizes["sequence_len"]
    return make_plan(
        depth=sizes["depth"],
        vocab_size=sizes["vocab_size"],
        sequence_len=length,
        micro_batch_rows=rows,
        batch_tokens=micro_batches * rows * length,
        steps=sizes["steps"],
    )


def corpus_and_tokenizer(spec: str, data: Folder, shards: int | None, sizes: Sizes) -> tuple[Corpus, Tokenizer]:
    """The first so many megabytes of the training units, and a tokenizer learned from them."""
    corpus = open_corpus(spec, data, shards)
    units, size = [], 0
    for unit in corpus.train:
        if size < sizes["megabytes"] * 10**6:
            units.append(unit)
            size += unit.bytes
    print(f"corpus {corpus.name}: {len(units)} units, {size / 1e6:.1f} MB; training a tokenizer", flush=True)
    tokenizer = train_tokenizer((text for unit in units for text in read_unit(unit)), sizes["vocab_size"])
    return replace(corpus, train=tuple(units)), tokenizer
