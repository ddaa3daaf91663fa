"""The chat page: the files of the folder beside this module, read once, with their validators and policy."""

import base64
import hashlib
import re
from dataclasses import dataclass
from pathlib import Path

from starlette.responses import Response

PAGE_FOLDER = Path(__file__).with_name("page")

# Not from the machine's own tables, which differ and may be wrong.
_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".mjs": "text/javascript; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".json": "application/json",
    ".webmanifest": "application/manifest+json",
    ".svg": "image/svg+xml",
    ".png": "image/png",
    ".ico": "image/x-icon",
    ".woff2": "font/woff2",
    ".txt": "text/plain; charset=utf-8",
}


@dataclass(frozen=True)
class PageFile:
    content: bytes
    headers: dict[str, str]

    def answer(self, if_none_match: str) -> Response:
        """The file, or 304 for a client that has it."""
        known = {tag.strip().removeprefix("W/") for tag in if_none_match.split(",")}
        if self.headers["ETag"] in known or "*" in known:
            return Response(status_code=304, headers=self.headers)
        return Response(self.content, headers=self.headers)


def page_files(folder: Path = PAGE_FOLDER) -> dict[str, PageFile]:
    """The files by their path below the folder, `index.html` with its Content-Security-Policy.

    Only these can be asked for: no path of a request reaches the file system.
    """
    files = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.suffix in _TYPES:
            files[path.relative_to(folder).as_posix()] = _file(path)
    return files


def _file(path: Path) -> PageFile:
    content = path.read_bytes()
    headers = {
        "Content-Type": _TYPES[path.suffix],
        "ETag": f'"{hashlib.sha256(content).hexdigest()[:32]}"',
        "Cache-Control": "no-cache",  # kept, but asked for again: a new version shows at once
    }
    if path.suffix == ".html":
        headers["Content-Security-Policy"] = _policy(content.decode("utf-8"))
    return PageFile(content, headers)


def _policy(html: str) -> str:
    """Allows the folder's own files, and of what stands in the page itself exactly what it has now."""
    return (
        f"default-src 'none'; script-src 'self'{_hashes(html, 'script')}; style-src 'self'{_hashes(html, 'style')}; "
        "connect-src 'self'; img-src 'self' data:; font-src 'self'; manifest-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
        "require-trusted-types-for 'script'; trusted-types dompurify"
    )


def _hashes(html: str, element: str) -> str:
    contents = re.findall(rf"<{element}>(.*?)</{element}>", html, re.DOTALL)
    digests = [base64.b64encode(hashlib.sha256(content.encode()).digest()).decode() for content in contents]
    return "".join(f" 'sha256-{digest}'" for digest in digests)
