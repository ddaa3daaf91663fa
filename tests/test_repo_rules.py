"""The rules of the house, checked on the repository itself: layers, Ray's shells, sizes, names, help, documents."""

import ast
import re
import subprocess
import sys
import tomllib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# Data flows down this list: a module imports only from its own line and the lines above. The longest prefix counts.
LAYERS = [
    ("errors",),
    ("cli", "storage"),
    ("plan", "device", "machine", "precedence", "cluster"),
    ("data",),
    ("tokenizer", "chat", "reference_encodings", "tokenizer_samples"),
    ("tasks",),
    ("stream",),
    ("model",),
    ("eval.bpb",),  # the trainer watches it
    ("train",),
    ("engine",),
    ("eval",),  # answers that are written are the engine's
    ("exchange",),
    ("serve",),
    ("bench",),
    ("report",),
]
RAY_SHELLS = {
    "nanochat_ray/bench/spot_cluster.py",
    "nanochat_ray/cluster.py",
    "nanochat_ray/eval/pool.py",
    "nanochat_ray/stream/ray_stream.py",
    "nanochat_ray/train/elastic.py",
    "nanochat_ray/train/ray_trainer.py",
    "nanochat_ray/train/spares.py",
    "nanochat_ray/train/worker.py",
    "nanochat_ray/serve/app.py",
    "nanochat_ray/serve/cluster_backend.py",
    "nanochat_ray/serve/replica.py",
}
BANNED_NAMES = {"utils", "common", "helpers", "manager", "misc"}

LIBRARY = sorted((ROOT / "nanochat_ray").rglob("*.py"))
JOBS = sorted(path for path in (ROOT / "jobs").glob("*.py") if path.name != "__init__.py")
SOURCES = [
    *LIBRARY,
    *JOBS,
    *sorted((ROOT / "cluster").rglob("*.py")),
    *sorted((ROOT / "kernels").rglob("*.py")),
    *sorted((ROOT / "tests").rglob("*.py")),
]
DOCUMENTS = ["README.md", "CONTRIBUTING.md", "cluster/README.md", "kernels/README.md"]


def imports(path: Path) -> set[str]:
    """Full names of the modules a file imports, anywhere in it; `from package import module` counts as the module."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative imports hide the layers"
            assert node.module is not None
            found.update(_submodule(node.module, alias.name) or node.module for alias in node.names)
    return found


def _submodule(package: str, name: str) -> str | None:
    place = ROOT / Path(*package.split(".")) / name
    return f"{package}.{name}" if place.with_suffix(".py").is_file() or (place / "__init__.py").is_file() else None


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def layer(module: str) -> int:
    """Index in LAYERS; the bare package, which holds only the version, stands before all."""
    if module == "nanochat_ray":
        return -1
    short = module.removeprefix("nanochat_ray.")
    matches = [
        (len(prefix), index)
        for index, prefixes in enumerate(LAYERS)
        for prefix in prefixes
        if short == prefix or short.startswith(prefix + ".")
    ]
    assert matches, f"{module} has no place in LAYERS"
    return max(matches)[1]


@pytest.mark.parametrize("path", LIBRARY, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_module_imports_only_what_stands_before_it(path):
    own = [name for name in imports(path) if name.split(".")[0] in ("nanochat_ray", "jobs", "kernels", "tests")]
    outside = [name for name in own if name.split(".")[0] in ("jobs", "tests")]
    later = [name for name in own if name.startswith("nanochat_ray") and layer(name) > layer(module_name(path))]
    assert not outside
    assert not later


def test_the_import_graph_has_no_cycle():
    graph = {
        module_name(path): {name for name in imports(path) if name.startswith("nanochat_ray.")} for path in LIBRARY
    }
    done: set[str] = set()

    def visit(module: str, trail: tuple[str, ...]) -> None:
        assert module not in trail, f"cycle: {' → '.join((*trail, module))}"
        if module not in done:
            for name in graph.get(module, ()):
                visit(name, (*trail, module))
            done.add(module)

    for module in graph:
        visit(module, ())


def test_ray_is_imported_only_by_its_shells():
    users = {
        str(path.relative_to(ROOT)) for path in LIBRARY if any(name.split(".")[0] == "ray" for name in imports(path))
    }
    assert users <= RAY_SHELLS


def test_jobs_do_not_import_each_other():
    for path in JOBS:
        assert not [name for name in imports(path) if name.split(".")[0] == "jobs"], path


def test_the_plan_needs_only_the_standard_library():
    for path in sorted((ROOT / "nanochat_ray" / "plan").glob("*.py")):
        outside = {name.split(".")[0] for name in imports(path)} - sys.stdlib_module_names - {"nanochat_ray"}
        assert not outside, path


def test_the_kernels_package_holds_only_a_docstring():
    body = ast.parse((ROOT / "kernels" / "__init__.py").read_text()).body
    assert len(body) == 1
    assert isinstance(body[0], ast.Expr)
    assert isinstance(body[0].value, ast.Constant)


def test_no_dependency_is_called_kernels_and_each_has_both_bounds():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = [*project["dependencies"], *project["optional-dependencies"]["dev"]]
    for requirement in wanted:
        assert re.match(r"[\w-]+", requirement).group() != "kernels"
        assert "==" in requirement or (">=" in requirement and ",<" in requirement), requirement


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_are_short_and_say_what_they_own(path):
    text = path.read_text()
    limit = 150 if path in JOBS else 400
    assert len(text.splitlines()) <= limit
    assert path.stem not in BANNED_NAMES
    assert ast.get_docstring(ast.parse(text)) or not text.strip() or path.is_relative_to(ROOT / "tests")


def test_every_job_answers_help_at_once_without_torch_or_ray():
    code = (
        "import runpy, sys; name = sys.argv[1]; sys.argv = [name, '--help']\n"
        "try: runpy.run_module(name, run_name='__main__')\n"
        "except SystemExit as end: sys.exit(end.code or ', '.join({'torch', 'ray'} & set(sys.modules)) or 0)"
    )

    def ask(path: Path) -> tuple[str, subprocess.CompletedProcess[str]]:
        command = [sys.executable, "-c", code, f"jobs.{path.stem}"]
        return path.stem, subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)

    with ThreadPoolExecutor(2) as pool:
        for job, answer in pool.map(ask, JOBS):
            assert answer.returncode == 0, f"jobs.{job}: {answer.stderr}"
            assert f"usage: python -m jobs.{job}" in answer.stdout
            assert "--json" in answer.stdout


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_path_and_job_that_a_document_names_exists(document):
    text = (ROOT / document).read_text()
    tops = {path.name for path in ROOT.iterdir()}
    links = [link for link in re.findall(r"\]\(([^)#\s]+)", text) if "://" not in link]
    quoted = re.findall(r"`([\w./*-]+)`", text)
    paths = [name for name in quoted if "/" in name and name.split("/")[0] in tops]
    missing = [name for name in {*links, *paths} if not list(ROOT.glob(name.rstrip("/")))]
    jobs = {name for name in re.findall(r"python -m jobs\.(\w+)", text) if not (ROOT / "jobs" / f"{name}.py").is_file()}
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    goals = {goal for goal in re.findall(r"(?:^ *|`)make ([a-z][\w-]*)", text, re.MULTILINE) if goal not in targets}
    assert (missing, jobs, goals) == ([], set(), set())
