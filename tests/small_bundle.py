"""A bundle of CORE's questions with one task of each type, made in a moment; and the tasks of ChatCORE, as small."""

import io
import json
import zipfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

ITEMS = 12
COLOURS = "red green blue black white brown grey pink gold violet orange silver".split()
THINGS = "fox dog tree house river stone cloud bird fish horse apple coin".split()
FILES = {"colours": "world/colours.jsonl", "pronouns": "words/pronouns.jsonl", "endings": "words/endings.jsonl"}
# The shots are such that 3 questions of each are the fewest that can be asked.
INDEX = """\
icl_tasks:
- {label: colours, dataset_uri: world/colours.jsonl, num_fewshot: [2], icl_task_type: multiple_choice,
   continuation_delimiter: "\\nAnswer: "}
- {label: pronouns, dataset_uri: words/pronouns.jsonl, num_fewshot: [0], icl_task_type: schema}
- {label: endings, dataset_uri: words/endings.jsonl, num_fewshot: [1], icl_task_type: language_modeling}
"""
BASELINES = "Eval Task,Task Category,Random baseline\ncolours,a,25\npronouns,b,50\nendings,c,0\nanother,c,10\n"
REFERENCE = (
    "Task      , Accuracy  , Centered\ncolours , 0.400000 , 0.200000\npronouns , 0.600000 , 0.200000\n"
    "endings , 0.050000 , 0.050000\nCORE ,  , 0.150000\n"
)


def items() -> dict[str, list[dict[str, Any]]]:
    """ITEMS questions of each task."""
    pairs = list(zip(THINGS, COLOURS, strict=True))
    return {
        "colours": [
            {
                "query": f"Question: The {thing} is {colour}. What is its colour?",
                "choices": [COLOURS[(number + away) % ITEMS] for away in (3, 0, 5, 7)],
                "gold": 1,
            }
            for number, (thing, colour) in enumerate(pairs)
        ],
        "pronouns": [
            {
                "context_options": [f"The {thing} saw a man because the {thing}", f"The {thing} saw a man because he"],
                "continuation": f"was {colour}.",
                "gold": number % 2,
            }
            for number, (thing, colour) in enumerate(pairs)
        ],
        "endings": [{"context": f"a {colour} {thing}, a {colour}", "continuation": thing} for thing, colour in pairs],
    }


def bundle_files() -> dict[str, str]:
    """The files of the bundle by their paths in it."""
    data = {
        f"eval_data/{FILES[task]}": "".join(json.dumps(item) + "\n" for item in found)
        for task, found in items().items()
    }
    return {
        "core.yaml": INDEX,
        "eval_meta_data.csv": BASELINES,
        "openai-community-gpt2.csv": REFERENCE,
        **data,
    }


def write_bundle(folder: Path) -> Path:
    """The bundle as a folder; returns it."""
    for name, content in bundle_files().items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(content)
    return folder


def zipped(files: dict[str, str], top: str = "eval_bundle/") -> bytes:
    """Files as the archive that is published."""
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as content:
        for name, text in files.items():
            content.writestr(top + name, text)
    return archive.getvalue()


def write_tasks(folder: Path, questions: int = 4) -> Path:
    """ChatCORE's five sets in the hub's layout; returns the folder."""
    letters = [
        {
            "question": f"What is {number} + 1?",
            "choices": {"text": [str(number), str(number + 1), "none"], "label": ["A", "B", "C"]},
            "answerKey": "B",
        }
        for number in range(questions)
    ]
    indexed = [
        {"question": f"{row['question']} Say it.", "choices": row["choices"]["text"], "answer": 1} for row in letters
    ]
    problems = [
        {"question": f"He has {number} eggs and 1 more. How many?", "answer": f"<<{number}+1={number + 1}>>. #### 9"}
        for number in range(questions)
    ]
    programs = [
        {
            "task_id": f"HumanEval/{number}",
            "prompt": f'def more{number}(x):\n    """x + {number}"""\n',
            "canonical_solution": f"    return x + {number}\n",
            "test": f"def check(candidate):\n    assert candidate(1) == {number + 1}\n",
            "entry_point": f"more{number}",
        }
        for number in range(questions)
    ]
    for place, rows in {
        "arc/ARC-Easy": letters,
        "arc/ARC-Challenge": letters[::-1],
        "mmlu/all": indexed,
        "gsm8k/main": problems,
        "humaneval/openai_humaneval": programs,
    }.items():
        (folder / place).mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.Table.from_pylist(rows), folder / place / "test-00000-of-00001.parquet")
    return folder
