"""What mkdocs adds to the pages of this folder: a home page (the README), files that pages link to, formulas.

Pages are written for the repository, where their links go to files; here those links become links of the site.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert
from mkdocs.structure.files import File

ROOT = Path(__file__).parents[1]
LINK = re.compile(r"(\]\()([^)#\s:]+)((?:#[^)\s]*)?\))")
FORMULA = re.compile(r'class="arithmatex">\\([(\[])(.*?)\\[)\]]', re.DOTALL)


def place(path: str) -> str:
    """Where a file of the repository, or a page of docs/, stands in the site."""
    if path == "README.md":
        return "index.md"
    return (path.removesuffix(".py") + ".md" if path.endswith(".py") else path).removeprefix("docs/")


def linked(path: str, text: str) -> set[str]:
    """Files of the repository, by their paths from its root, that the page `path` links to."""
    return {_target(path, match[2]) for match in LINK.finditer(text)}


def on_files(files: Any, config: Any) -> Any:
    """Add the home page and, link by link, all that is to be seen outside docs/."""
    texts = {f"docs/{page.src_uri}": page.content_string for page in files.documentation_pages()}
    texts["README.md"] = ""
    config.sources = {place(path): path for path in texts}
    waiting = ["README.md", "CHANGELOG.md", *(target for path, text in texts.items() for target in linked(path, text))]
    seen = set(texts) - {"README.md"}
    while waiting:
        path = waiting.pop()
        if path in seen or not (ROOT / path).is_file():
            continue
        seen.add(path)
        config.sources[place(path)] = path
        if path.endswith((".md", ".py")):
            text = (ROOT / path).read_text()
            waiting += linked(path, text) if path.endswith(".md") else ()
            page = text if path.endswith(".md") else f"# {Path(path).name}\n\n```python\n{text}```\n"
            files.append(File.generated(config, place(path), content=page))
        else:
            files.append(File.generated(config, place(path), abs_src_path=str(ROOT / path)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Links to files of the repository become links to where those stand in the site."""
    path = config.sources[page.file.src_uri]
    if path.endswith(".py"):
        return markdown

    def moved(match: re.Match[str]) -> str:
        here = posixpath.dirname(page.file.src_uri)
        return match[1] + posixpath.relpath(place(_target(path, match[2])), here or ".") + match[3]

    return LINK.sub(moved, markdown)


def on_page_content(html: str, page: Any, config: Any, files: Any) -> str:
    """Formulas become MathML: no script has to run for them."""

    def formula(match: re.Match[str]) -> str:
        text = match[2].replace("&amp;", "&").replace("&lt;", "<").replace("&gt;", ">")
        return f'class="formula">{convert(text, display="inline" if match[1] == "(" else "block")}'

    return FORMULA.sub(formula, html)


def _target(path: str, link: str) -> str:
    return posixpath.normpath(posixpath.join(posixpath.dirname(path), link))
