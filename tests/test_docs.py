"""The site builds, and what it says of each method is whole, runs, and agrees with the code and the README."""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest

from folklora.methods import Method

ROOT = Path(__file__).resolve().parents[1]


def _descriptions() -> ModuleType:
    """What the site's hook reads of the methods; it is no part of the package."""
    spec = importlib.util.spec_from_file_location("descriptions", ROOT / "docs/hooks/descriptions.py")
    module = importlib.util.module_from_spec(spec)
    # a dataclass asks for its module
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


descriptions = _descriptions()
every_method = pytest.mark.parametrize(
    "method", descriptions.own_methods(), ids=lambda method: f"{method.room}-{method.name}"
)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the built site; a warning of MkDocs is an error."""
    pytest.importorskip("mkdocs", reason="mkdocs is not installed; it is in the extra 'dev'")
    from mkdocs.commands.build import build
    from mkdocs.config import load_config

    folder = tmp_path_factory.mktemp("site")
    config = load_config(str(ROOT / "mkdocs.yml"), site_dir=str(folder), strict=True)
    config.plugins.on_startup(command="build", dirty=False)
    build(config)
    return folder


@every_method
def test_site_has_a_page_with_drawn_equations(site: Path, method: Method) -> None:
    text = (site / "methods" / method.room / f"{method.name}.html").read_text(encoding="utf-8")
    equations = descriptions.sections(method.factory)["Equation"].splitlines()
    assert text.count("<math ") == len(equations)
    for heading in ("Equation", "Source", "When to choose it", "Example", "Options", "What it cannot do"):
        assert re.search(rf"<h2 [^>]*>{heading}<", text), f"the page of {method.name} has no section '{heading}'"
    for name in descriptions.own_fields(method.factory):
        assert f"<td><code>{name}</code></td>" in text, f"the page of {method.name} does not list '{name}'"


def test_first_page_links_every_method(site: Path) -> None:
    text = (site / "index.html").read_text(encoding="utf-8")
    for method in descriptions.own_methods():
        assert f'href="methods/{method.room}/{method.name}.html"' in text


def test_site_has_the_measured_results_with_their_pictures(site: Path) -> None:
    text = (site / "results.html").read_text(encoding="utf-8")
    headings = re.findall(r"^## (.+)$", (ROOT / "benchmarks" / "RESULTS.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert len(headings) == len(re.findall(r"<h2 ", text))
    pictures = re.findall(r'<img [^>]*src="([^"]+)"', text)
    assert len(pictures) >= 4
    assert all((site / picture).is_file() for picture in pictures)


def test_formulas_keep_their_lines_and_prose_runs_on(site: Path) -> None:
    text = (site / "methods/adapters/am-lora.html").read_text(encoding="utf-8")
    first = re.search(r'<pre class="formula">(.*?)</pre>', text, re.DOTALL)
    starts = [line.partition(" ")[0] for line in first[1].splitlines()]
    assert starts == ["h_i(x)", "e_i", "a", "y"]
    # broken to fit in the docstring
    assert "at test time nobody says which task it is: the gates tell tasks apart" in text


def test_site_loads_nothing_from_the_network(site: Path) -> None:
    loads = re.compile(r"<(?:script|img|iframe|link)\b[^>]*?(?:src|href)=[\"']?((?:https?:)?//[^\"'> ]+)")
    pages = list(site.rglob("*.html"))
    assert pages
    assert {url for path in pages for url in loads.findall(path.read_text(encoding="utf-8"))} == set()
    styles = "".join(path.read_text(encoding="utf-8") for path in site.rglob("*.css"))
    assert not re.findall(r"url\([\"']?(?:https?:)?//|@import", styles)


@every_method
def test_docstring_is_whole(method: Method) -> None:
    parts = descriptions.sections(method.factory)
    assert parts["body"], f"{method.factory.__name__} says nothing between its summary and its source"
    assert re.search(r"arXiv \d{4}\.\d{4,5}", " ".join(parts["Source"].split()))
    explained = list(descriptions.arguments(method.factory.__doc__))
    assert sorted(explained) == sorted(descriptions.own_fields(method.factory))


@every_method
def test_example_runs(method: Method, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    example = descriptions.sections(method.factory)["Example"]
    exec(compile(example, f"the example of {method.name}", "exec"), {"__name__": "__main__"})


def test_readme_has_the_table_of_methods() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    if descriptions.table() not in text:
        pytest.fail(f"README.md's table of methods must be:\n\n{descriptions.table()}", pytrace=False)


def test_sections_out_of_place_are_refused() -> None:
    class Backwards:
        """Words.

        Body.

        Example:
            pass

        Source: Someone, arXiv 2000.00000.
        """

    with pytest.raises(ValueError, match="Backwards must have"):
        descriptions.sections(Backwards)
