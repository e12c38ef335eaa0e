"""The pages as a site: it builds without a warning, and no link leads nowhere, in the site or in the repository."""

from __future__ import annotations

import inspect
import re
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
from processes import ROOT, printed

import reflora

MARKDOWN = [p for folder in ("", "docs", "benchmarks") for p in (ROOT / folder).glob("**/*.md" if folder else "*.md")]


class Page(HTMLParser):
    """The anchors of a page, and what it refers to."""

    def __init__(self, path: Path):
        super().__init__()
        self.anchors: set[str] = set()
        self.links: list[str] = []
        self.text = path.read_text()
        self.feed(self.text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            if name in ("id", "name") and value:
                self.anchors.add(value)
            if name in ("href", "src") and value and tag not in ("link", "script"):
                self.links.append(value)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("mkdocs")
    out = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(out)]
    printed(command, NO_MKDOCS_2_WARNING="1")
    return out


@pytest.mark.xdist_group("site")
def test_no_link_of_the_site_leads_nowhere(site: Path) -> None:
    pages = {path: Page(path) for path in site.rglob("*.html")}
    assert len(pages) > 30
    lost, seen = [], 0
    for path, page in pages.items():
        for link in page.links:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc or (path.name == "404.html"):
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            target = target / "index.html" if target.is_dir() else target
            seen += 1
            if not target.is_file() or (parts.fragment and unquote(parts.fragment) not in pages[target].anchors):
                lost.append(f"{path.relative_to(site)}: {link}")
    assert lost == [] and seen > 1000


@pytest.mark.xdist_group("site")
def test_every_public_name_is_on_a_page(site: Path) -> None:
    anchors = {anchor for path in (site / "api").rglob("*.html") for anchor in Page(path).anchors}
    names = set(reflora.__all__) - {"__version__", "linalg", "reference"}
    names |= {f"linalg.{name}" for name in reflora.linalg.__all__}
    assert {name for name in names if f"reflora.{name}" not in anchors} == set()


@pytest.mark.parametrize("name", reflora.__all__)
def test_a_docstring_that_lists_arguments_lists_them_all(name: str) -> None:
    public = getattr(reflora, name)
    text = inspect.getdoc(public) or ""
    if "Args:" not in text:
        assert name not in ("RefLoRAAdamW", "create_reflora_optimizer", "refactor_", "precondition_", "find_pairs")
        return
    listed = set(re.findall(r"^ {4}\**(\w+): ", text.split("Args:")[1].split("Raises:")[0], re.MULTILINE))
    assert set(inspect.signature(public).parameters) == listed


@pytest.mark.xdist_group("site")
def test_formulas_and_the_home_page(site: Path) -> None:
    mathematics = (site / "mathematics/index.html").read_text()
    assert mathematics.count("<math") > 40 and 'class="arithmatex"' not in mathematics
    home = (site / "index.html").read_text()
    assert "overhead_cpu.png" in home and "A RefLoRA step for the price of an AdamW step" in home


@pytest.mark.parametrize("path", MARKDOWN, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_link_of_the_repository_leads_nowhere(path: Path) -> None:
    text = re.sub(r"^```.*?^```", "", path.read_text(), flags=re.MULTILINE | re.DOTALL)
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        name, _, anchor = link.partition("#")
        if "://" in name:
            continue
        target = (path.parent / name).resolve() if name else path
        assert target.exists(), link
        if anchor and target.suffix == ".md":
            assert anchor in {slug(title) for title in re.findall(r"^#+ (.*)$", target.read_text(), re.MULTILINE)}, link


def slug(title: str) -> str:
    """The anchor that GitHub, and mkdocs too for these titles, makes of a heading."""
    plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", title).lower()
    return re.sub(r"[^\w\- ]", "", plain).strip().replace(" ", "-")


def test_every_result_is_described() -> None:
    text = (ROOT / "benchmarks/results/README.md").read_text()
    for path in (ROOT / "benchmarks/results").rglob("*"):
        if path.is_file() and path.name != "README.md":
            name = path.relative_to(ROOT / "benchmarks/results").as_posix()
            assert f"`{name}`" in text or f"`{name.rpartition('.')[0]}.*`" in text, name


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) < 150
