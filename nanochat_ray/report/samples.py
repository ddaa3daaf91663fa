"""The section of what a model said to the same prompts while it learned, from the stage's events."""

from nanochat_ray.report.document import Section, Table, Text, printable
from nanochat_ray.report.training import Training


def samples_section(title: str, training: Training) -> Section | None:
    """The first, a middle and the last set of samples beside each other; None where there are none."""
    by_step = {event["step"]: event["samples"] for event in training.samples if event["samples"]}
    steps = list(by_step)
    if not steps:
        return None
    shown = sorted({steps[0], steps[len(steps) // 2], steps[-1]})
    said = {step: {sample["prompt"]: printable(sample["text"]) for sample in by_step[step]} for step in shown}
    prompts = dict.fromkeys(prompt for step in shown for prompt in said[step])
    rows = tuple((printable(prompt), *(said[step].get(prompt, "") for step in shown)) for prompt in prompts)
    columns = ("prompt", *(f"after {step:,} steps" for step in shown))
    return Section(title, (Text("Greedy continuations, as they came."), Table(columns, rows)), folded=True)
