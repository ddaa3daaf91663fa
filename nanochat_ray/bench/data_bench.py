"""From text to micro-batches: each stage by itself on one core, then the whole without and with Ray Data."""

import time
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from statistics import median
from typing import Any

import numpy as np

from nanochat_ray.bench.measurement import Line, Watch
from nanochat_ray.bench.packing_bench import measure_packing
from nanochat_ray.cluster import connect
from nanochat_ray.data.corpus import Unit, read_unit
from nanochat_ray.stream.cursor import RowId
from nanochat_ray.stream.packing import passages
from nanochat_ray.stream.ray_stream import micro_batch_dataset, read_micro_batches
from nanochat_ray.stream.rows import MicroBatch, PretrainingRows, micro_batches
from nanochat_ray.tokenizer import Tokenizer

REPEATS = 3
WARMUP_FRACTION = 5  # the first fifth of the micro-batches comes while the pipeline fills
SEED = 0
CPUS_PER_TASK = 0.5  # as in training
PACKING_GOAL = 10.0  # times the tokens/s of the scan, at no more crop waste


def measure_data(tokenizer: Tokenizer, units: Sequence[Unit], sequence_len: int, rows: int) -> dict[str, Any]:
    """Figures, JSON-able: tokens per second of wall time, medians; crop waste as a fraction of all tokens.

    Args:
        rows: of a micro-batch.
    """
    with Watch() as watch:
        stages = _measure_stages(tokenizer, units, sequence_len)
        source, size = PretrainingRows(tokenizer, sequence_len), rows * sequence_len
        count = max(2 * WARMUP_FRACTION, stages["tokens"] * 9 // 10 // size)
        plain = [_plain_seconds(source, units, rows, count)]
        with Watch() as ray_watch, connect(None, workers=1):
            began = time.perf_counter()
            dataset = micro_batch_dataset(source, units, rows, SEED, RowId(0, 0, 0), count * size, CPUS_PER_TASK)
            dataset.context.execution_options.preserve_order = True
            dataset.context.enable_progress_bars = False
            first_s, warm_s = _arrivals(read_micro_batches(dataset.iterator(), rows), count, began)
        plain.append(_plain_seconds(source, units, rows, count))
    return {
        **stages,
        "micro_batch_rows": rows,
        "micro_batches": count,
        "plain_tok_per_s": round(count * size / median(plain)),
        "ray_data_tok_per_s": round(size / warm_s),
        "ray_data_first_micro_batch_s": round(first_s, 2),
        "ray_data_tok_per_cpu_s": round(count * size / ray_watch.cpu_s),
        "machine": watch.to_dict(),
    }


def data_lines(figures: dict[str, Any]) -> list[Line]:
    """The figures as a table for people."""
    lines = [
        Line("read parquet", _speed(figures["read_tok_per_s"])),
        Line("encode, 1 thread", _speed(figures["encode_tok_per_s"]), f"{figures['encode_mb_per_s']} MB/s of text"),
        Line("cut into passages", _speed(figures["passages_tok_per_s"])),
    ]
    for name, packed in (("passages (what we train on)", "passages"), ("whole documents", "documents")):
        both, raw = figures["packing"][packed], figures["packing"]["documents"]
        lines.append(
            Line(
                f"pack {name}",
                _speed(both["tok_per_s"]),
                f"{both['speedup']:.0f}× the scan of them, {_speed(both['scan_tok_per_s'])} (goal {PACKING_GOAL:.0f}×)",
            )
        )
        lines.append(
            Line(
                f"crop waste, {name}",
                f"{both['crop_waste']:.1%}",
                f"scan of them {both['scan_crop_waste']:.1%}, of whole documents {raw['scan_crop_waste']:.1%}",
            )
        )
    lines += [
        Line(
            "read + encode + pack, 1 core",
            _speed(figures["plain_tok_per_s"]),
            f"{figures['stages_speedup_over_scan']:.1f}× the same with the scan of whole documents (from the stages)",
        ),
        Line(
            "through Ray Data, all cores",
            _speed(figures["ray_data_tok_per_s"]),
            f"{figures['ray_data_tok_per_s'] / figures['plain_tok_per_s']:.2f}× the plain loop; "
            f"{figures['ray_data_tok_per_cpu_s'] / 1e6:.2f} M tokens per CPU-second, start included",
        ),
        Line("first micro-batch through Ray Data", f"{figures['ray_data_first_micro_batch_s']:.1f} s"),
    ]
    return lines


def _measure_stages(tokenizer: Tokenizer, units: Sequence[Unit], sequence_len: int) -> dict[str, Any]:
    texts = [read_unit(unit) for unit in units]
    encoded = [tokenizer.encode_batch(documents) for documents in texts]
    tokens = sum(len(ids) + 1 for unit in encoded for ids in unit)
    size = sum(len(text.encode()) for documents in texts for text in documents)

    def cut() -> list[list[np.ndarray]]:
        return [[piece for ids in unit for piece in passages(ids, tokenizer.bos, sequence_len)] for unit in encoded]

    seconds = _medians_in_turn(
        {
            "read": lambda: [read_unit(unit) for unit in units],
            "encode": lambda: [tokenizer.encode_batch(documents) for documents in texts],
            "cut": cut,
        }
    )
    whole = [[np.array([tokenizer.bos, *ids], dtype=np.int32) for ids in unit] for unit in encoded]
    packing = {"documents": _packing(whole, sequence_len), "passages": _packing(cut(), sequence_len)}
    prepare_s = seconds["read"] + seconds["encode"]
    scan_s = prepare_s + tokens / packing["documents"]["scan_tok_per_s"]
    best_fit_s = prepare_s + seconds["cut"] + tokens / packing["passages"]["tok_per_s"]
    return {
        "tokens": tokens,
        "bytes_of_text": size,
        "vocab_size": tokenizer.vocab_size,
        "sequence_len": sequence_len,
        "read_tok_per_s": round(tokens / seconds["read"]),
        "encode_tok_per_s": round(tokens / seconds["encode"]),
        "encode_mb_per_s": round(size / seconds["encode"] / 1e6, 2),
        "passages_tok_per_s": round(tokens / seconds["cut"]),
        "packing": packing,
        "stages_speedup_over_scan": round(scan_s / best_fit_s, 2),
    }


def _packing(units: list[list[np.ndarray]], sequence_len: int) -> dict[str, float]:
    figures = measure_packing(units, sequence_len, REPEATS)
    return {
        "tok_per_s": round(figures.tokens_per_s),
        "crop_waste": round(figures.crop_waste, 5),
        "scan_tok_per_s": round(figures.scan_tokens_per_s),
        "scan_crop_waste": round(figures.scan_crop_waste, 5),
        "speedup": round(figures.speedup, 1),
    }


def _plain_seconds(source: PretrainingRows, units: Sequence[Unit], rows: int, count: int) -> float:
    began = time.perf_counter()
    for _ in islice(micro_batches(source, units, rows, RowId(0, 0, 0), SEED), count):
        pass
    return time.perf_counter() - began


def _arrivals(batches: Iterator[MicroBatch], count: int, began: float) -> tuple[float, float]:
    """Seconds from `began` to the first of `count` micro-batches, and mean seconds of one of the last four fifths."""
    times = [time.perf_counter() for _ in islice(batches, count)]
    warm = count // WARMUP_FRACTION
    return times[0] - began, (times[-1] - times[warm - 1]) / (count - warm)


def _medians_in_turn(works: dict[str, Callable[[], object]]) -> dict[str, float]:
    """Median seconds of each, all measured in every repeat: a machine that slows down slows all of them."""
    seconds: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(REPEATS):
        for name, work in works.items():
            began = time.perf_counter()
            work()
            seconds[name].append(time.perf_counter() - began)
    return {name: median(values) for name, values in seconds.items()}


def _speed(tokens_per_s: float) -> str:
    return f"{tokens_per_s / 1e6:.2f} M tok/s"
