"""Documentation that any Python installation carries, as text: read from source files with `ast`, nothing is imported.

One document is one module: its name, its docstring, then every documented class and function in source order, each
under a heading like `TextWrapper.fill(self, text)`. The standard library only, so that a process pool starts quickly.
"""

import ast
import importlib.util
import os
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

PACKAGES = ("torch", "ray", "numpy")  # always installed with this product, and well documented

_MIN_CHARACTERS = 100  # a module with less says nothing beyond its name
_NOT_DOCUMENTATION = {
    "__pycache__",
    "site-packages",
    "test",  # test suites
    "tests",
    "idle_test",
    "_internal",  # torch/testing/_internal: test suites under another name
    "thirdparty_files",  # other projects that ray carries along
    "_vendor",
    "pydoc_data",  # read by pydoc_topics
}

_Documented = ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


class Source(NamedTuple):
    """A Python file and the name it is imported by."""

    module: str
    path: str


def standard_library() -> Path:
    return Path(sysconfig.get_paths()["stdlib"])


def sources() -> list[Source]:
    """The documented modules of the standard library and of PACKAGES (those installed), sorted by module name."""
    found = list(_sources_below(standard_library(), ""))
    for package in PACKAGES:
        spec = importlib.util.find_spec(package)  # finds without importing: these are top-level packages
        for folder in (spec and spec.submodule_search_locations) or ():
            found += _sources_below(Path(folder), package)
    return sorted(found)


def _sources_below(root: Path, package: str) -> Iterator[Source]:
    for folder, subfolders, files in os.walk(root):
        subfolders[:] = [name for name in subfolders if name.isidentifier() and name not in _NOT_DOCUMENTATION]
        parts = [part for part in (package, *Path(folder).relative_to(root).parts) if part]
        for file in files:
            stem, suffix = os.path.splitext(file)
            is_test = stem.startswith("test_") or stem.endswith("_test") or stem == "conftest"
            if suffix == ".py" and stem.isidentifier() and not is_test:
                yield Source(".".join(parts if stem == "__init__" else [*parts, stem]), os.path.join(folder, file))


def module_document(source: Source) -> str | None:
    """The document of a module; None when it has too little documentation or is not Python of this version."""
    tree = parse(source.path)
    if tree is None:
        return None
    sections = [docstring] if (docstring := ast.get_docstring(tree)) else []
    for name, node in documented(tree):
        sections += [heading(name, node), ast.get_docstring(node) or ""]
    if sum(map(len, sections)) < _MIN_CHARACTERS:
        return None
    return "\n\n".join([f"module {source.module}", *sections]) + "\n"


def pydoc_topics() -> list[str]:
    """The reference texts behind `help("with")` and the like, one document each; none when Python came without them."""
    tree = parse(str(standard_library() / "pydoc_data" / "topics.py"))
    for statement in tree.body if tree else ():
        if isinstance(statement, ast.Assign) and isinstance(statement.value, ast.Dict):
            return [text.strip() + "\n" for _, text in sorted(ast.literal_eval(statement.value).items())]
    return []


def parse(path: str) -> ast.Module | None:
    """The tree of a source file; None when it is missing or not valid for this Python (templates, other versions)."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # other people's invalid escapes
            return ast.parse(Path(path).read_bytes())
    except (FileNotFoundError, SyntaxError, ValueError):
        return None


def documented(tree: ast.Module) -> Iterator[tuple[str, _Documented]]:
    """(qualified name, node) of the classes, methods and functions that have a docstring, in source order."""
    yield from _documented_in(tree.body, "")


def _documented_in(body: list[ast.stmt], prefix: str) -> Iterator[tuple[str, _Documented]]:
    for node in body:
        if isinstance(node, _Documented):
            if ast.get_docstring(node, clean=False):
                yield prefix + node.name, node
            if isinstance(node, ast.ClassDef):
                yield from _documented_in(node.body, f"{prefix}{node.name}.")
        elif isinstance(node, ast.If | ast.Try):  # definitions that depend on the platform
            for part in (node.body, *(handler.body for handler in getattr(node, "handlers", ())), node.orelse):
                yield from _documented_in(part, prefix)


def heading(name: str, node: _Documented) -> str:
    """`class Name(Base)` or `name(a, b=1)`."""
    if isinstance(node, ast.ClassDef):
        bases = ", ".join(ast.unparse(base) for base in node.bases)
        return f"class {name}({bases})" if bases else f"class {name}"
    return f"{name}({ast.unparse(node.args)})"
