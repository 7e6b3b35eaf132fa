"""The pages of the site that are not written in `website/pages`: a hook of MkDocs adds them before each build.

Documents of the repository keep their paths, so that their links mean the same in the site as in a checkout. What they
link to comes along. Other pages are made from the package and from `bench/results`.
"""

import re
from pathlib import Path, PurePosixPath
from typing import Any

from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files

from website.option_tables import command_pages
from website.result_tables import results_page

ROOT = Path(__file__).parents[1]
ELSEWHERE = re.compile(r"<(?:script|link|img|iframe|source)\b[^>]*\b(?:src|href)=\"(?:https?:)?//[^>]*>")
LINK = re.compile(r"\]\(([^)#:\s]+)")  # to a file: neither an anchor alone nor another site


def on_files(files: Files, config: Any) -> Files:
    """Add every page. MkDocs calls it once a build."""
    for path in documents():
        files.append(File.generated(config, path, abs_src_path=str(ROOT / path)))
    for path, text in (command_pages() | {"benchmarks.md": results_page(ROOT / "bench" / "results")}).items():
        files.append(File.generated(config, path, content=text))
    return files


def on_post_page(output: str, page: Any, **_: Any) -> str:
    """The page as it is. PluginError where a reader's browser would fetch something from another site for it."""
    if found := ELSEWHERE.search(output):
        raise PluginError(f"{page.file.src_uri} loads something from elsewhere: {found[0]}")
    return output


def documents() -> list[str]:
    """README.md, `docs/`, the benchmarks' results, and all files of the repository that these link to, step by step."""
    results = (path for path in (ROOT / "bench" / "results").iterdir() if path.is_file())
    found = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")), *sorted(results)]
    for path in found:
        if path.suffix == ".md":
            targets = (ROOT / linked(path, link) for link in LINK.findall(path.read_text(encoding="utf-8")))
            found += [target for target in dict.fromkeys(targets) if target.is_file() and target not in found]
    return [path.relative_to(ROOT).as_posix() for path in found]


def linked(path: Path, link: str) -> PurePosixPath:
    """The file that a link of `path` names, from the root of the repository."""
    parts: list[str] = []
    for part in (path.parent.relative_to(ROOT) / link).parts:
        if part == "..":
            parts.pop()
        else:
            parts.append(part)
    return PurePosixPath(*parts)
