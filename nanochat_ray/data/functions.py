"""Well-known standard-library functions and what each does in one sentence, for questions a demo model can answer.

Read with `ast` from the installed Python, so the sentences are those of the demo corpus.
"""

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass

from nanochat_ray.data import docstrings

# Public name → source files below the standard library, where the two differ.
_FILES = {
    "os.path": ("posixpath.py", "genericpath.py"),
    "json": ("json/__init__.py",),
    "collections": ("collections/__init__.py",),
    "asyncio": ("asyncio/runners.py", "asyncio/tasks.py"),
    "importlib": ("importlib/__init__.py",),
    "logging": ("logging/__init__.py",),
    "concurrent.futures": ("concurrent/futures/_base.py",),
}

MODULES = """
    ast asyncio base64 bisect calendar cmd codecs collections compileall concurrent.futures configparser contextlib
    copy csv dataclasses datetime difflib dis doctest email.utils enum filecmp fileinput fnmatch fractions ftplib
    functools getpass glob graphlib gzip hashlib heapq hmac http.client http.cookies imaplib importlib inspect
    ipaddress json linecache locale logging lzma mailbox mimetypes operator os os.path pathlib pdb pickle pkgutil
    platform plistlib poplib pprint queue quopri random runpy sched secrets selectors shelve shlex shutil smtplib
    socket ssl stat statistics string subprocess sysconfig tarfile tempfile textwrap threading timeit tokenize
    traceback types typing unittest.mock urllib.parse urllib.request uuid warnings weakref webbrowser
    xml.etree.ElementTree xml.sax.saxutils zipapp zipfile
""".split()

_SENTENCE = re.compile(r"[A-Z][A-Za-z]+ [ -~]*[^.!?:]\.")  # printable ASCII, starts like a sentence, ends like one
_NOT_PROSE = re.compile(r"->|>>>|\\|https?:|[({]$")


@dataclass(frozen=True)
class DocumentedFunction:
    """`qualname` within `module`: `dedent`, or `Path.exists` for a method; `first_line`: one sentence, 20–120 chars."""

    module: str
    qualname: str
    signature: str  # "dedent(text)", "Path.exists()": without self
    first_line: str


def documented_functions() -> list[DocumentedFunction]:
    """Public functions and methods of MODULES whose docstring starts with a clean sentence; sorted, no name twice.

    Modules that this Python came without are left out.
    """
    found: dict[tuple[str, str], DocumentedFunction] = {}
    for module in MODULES:
        for file in _FILES.get(module, (module.replace(".", "/") + ".py",)):
            tree = docstrings.parse(str(docstrings.standard_library() / file))
            for function in _functions(module, tree) if tree else ():
                found.setdefault((function.module, function.qualname), function)
    return [found[key] for key in sorted(found)]


def _functions(module: str, tree: ast.Module) -> Iterator[DocumentedFunction]:
    aliases = _aliases(tree)
    for name, node in docstrings.documented(tree):
        name = aliases.get(name, name)
        if isinstance(node, ast.ClassDef) or _is_property(node) or any(part[0] == "_" for part in name.split(".")):
            continue
        if sentence := first_sentence(ast.get_docstring(node) or ""):
            yield DocumentedFunction(module, name, f"{name}({_arguments(node)})", sentence)


def first_sentence(docstring: str) -> str | None:
    """The first sentence of a docstring when it is clean prose of 20 to 120 characters, else None."""
    paragraph = " ".join(docstring.strip().split("\n\n")[0].split()).replace("``", "`")
    sentence = re.split(r"(?<=[^.][.])\s+(?=[A-Z`'\"(])", paragraph)[0]
    clean = _SENTENCE.fullmatch(sentence) and not _NOT_PROSE.search(sentence)
    return sentence if clean and 20 <= len(sentence) <= 120 else None


def _aliases(tree: ast.Module) -> dict[str, str]:
    """{"Random.choice": "choice"} for a module that ends in `_inst = Random()` and `choice = _inst.choice`."""
    classes: dict[str, str] = {}
    aliases: dict[str, str] = {}
    for node in tree.body:
        match node:
            case ast.Assign(targets=[ast.Name(id=name)], value=ast.Call(func=ast.Name(id=class_name))):
                classes[name] = class_name
            case ast.Assign(targets=[ast.Name(id=name)], value=ast.Attribute(value=ast.Name(id=owner), attr=method)):
                if owner in classes:
                    aliases[f"{classes[owner]}.{method}"] = name
    return aliases


def _is_property(node: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    return any(
        "property" in ast.unparse(decorator) or "setter" in ast.unparse(decorator) for decorator in node.decorator_list
    )


def _arguments(node: ast.FunctionDef | ast.AsyncFunctionDef) -> str:
    arguments = ast.unparse(node.args)
    return re.sub(r"^(self|cls)(, (/, )?|$)", "", arguments)
