"""The files of the chat page: vendored ones are what their README says, our own are whole and load no strangers."""

import hashlib
import re
from pathlib import Path

import pytest

from tests.serving import ROOT

PAGE = ROOT / "nanochat_ray" / "serve" / "page"
OWN = sorted(path for path in PAGE.iterdir() if path.suffix in (".js", ".css", ".html"))
MODULES = [path for path in OWN if path.suffix == ".js" and path.name != "theme.js"]


@pytest.mark.parametrize("folder", [PAGE / "vendor", ROOT / "tests" / "vendor"], ids=["page", "tests"])
def test_every_vendored_file_is_listed_with_its_hash_and_unchanged(folder: Path):
    told = dict(
        re.findall(r"^\| `([0-9a-f]{64})` \| `([\w./]+)` \|$", (folder / "README.md").read_text(), re.MULTILINE)
    )
    listed = {name: digest for digest, name in told.items()}
    present = {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file() and path.name != "README.md"
    }
    assert present == listed


def test_versions_told_are_those_in_the_files():
    text = (PAGE / "vendor" / "README.md").read_text()
    for name, banner in (
        ("marked", r"marked v([\d.]+)"),
        ("dompurify", r"DOMPurify ([\d.]+)"),
        ("@highlightjs/cdn-assets", r"Highlight.js v([\d.]+)"),
    ):
        row = next(line for line in text.splitlines() if f"[{name}]" in line)
        head = (PAGE / "vendor" / re.match(r"\| `([\w.]+)`", row)[1]).read_text()[:400]
        assert re.search(banner, head)[1] in row


@pytest.mark.parametrize("path", OWN, ids=lambda path: path.name)
def test_our_files_are_short_and_load_nothing_from_elsewhere(path: Path):
    text = path.read_text()
    lines = text.splitlines()
    assert len(lines) < 400
    assert max(map(len, lines)) <= 120 or path.name == "index.html"
    outside = set(re.findall(r"https?://[\w.]+", text)) - {"http://www.w3.org"}
    assert outside == set()
    for sink in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval(", "new Function"):
        assert sink not in text
    if path.suffix == ".js":
        assert text.startswith("// "), "say what the module owns"


def test_the_page_names_every_module_so_that_none_waits_for_another():
    html = (PAGE / "index.html").read_text()
    preloaded = set(re.findall(r'rel="modulepreload" href="page/([\w./]+)"', html))
    assert preloaded == {path.name for path in MODULES} - {"app.js"} | {"vendor/marked.js", "vendor/purify.js"}
    assert 'src="page/app.js"' in html
    assert not re.search(r"<script>|<style|\sstyle=|\son\w+=", html), "the policy would refuse it"


def test_every_import_leads_to_a_file_and_every_language_is_there():
    for path in MODULES:
        for name in re.findall(r'from "\./([\w./]+)"', path.read_text()):
            assert (PAGE / name).is_file(), f"{path.name} imports {name}"
    table = (PAGE / "code.js").read_text().split("const LANGUAGES = {")[1].split("};")[0]
    languages = set(re.findall(r"^  (\w+): \[", table, re.MULTILINE))
    assert languages == {path.stem for path in (PAGE / "vendor" / "languages").iterdir()}


def test_every_id_the_scripts_ask_for_is_in_the_page():
    ids = re.findall(r'\bid="([\w-]+)"', (PAGE / "index.html").read_text())
    assert len(ids) == len(set(ids))
    asked = {name for path in MODULES for name in re.findall(r'\$\("([\w-]+)"\)', path.read_text())}
    assert asked <= set(ids)
