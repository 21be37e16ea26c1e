"""MkDocs hook: one page for each method, made from its class while the site is built."""

from __future__ import annotations

import html
import itertools
import re
import textwrap
from pathlib import Path
from typing import Any

import descriptions
import latex2mathml.converter
from descriptions import Limit, Option
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

from folklora.adapters.base import AdapterConfig
from folklora.methods import Method

# a line of a docstring that is at least this long was broken to fit, a shorter one on purpose
_FULL = 108
_INDENT = 4
_FORMULA = re.compile(r"\s*\S.{0,30}? [=←] ")
_SHARED = "../../index.md#options-that-every-adapter-takes"


def on_files(files: Files, *, config: MkDocsConfig) -> Files:
    """Add the methods' pages to those that are written by hand."""
    for method in descriptions.own_methods():
        content = page(method)
        files.append(File.generated(config, f"methods/{method.room}/{method.name}.md", content=content))
    measured = (Path(config.config_file_path).parent / "benchmarks" / "RESULTS.md").read_text(encoding="utf-8")
    files.append(File.generated(config, "results.md", content=results(measured)))
    return files


def on_page_markdown(markdown: str, *, page: Any, **_: Any) -> str:
    """Put the tables into the first page."""
    if page.file.src_uri != "index.md":
        return markdown
    link = "[`{name}`](methods/{room}/{name}.md)"
    return (
        f"{markdown}\n\n## Methods\n\n{descriptions.table(link)}\n\n## Options that every adapter takes\n\n"
        f"{options_table(descriptions.shared_options())}\n"
    )


def results(measured: str) -> str:
    """The measured results as a page: pictures are the site's own, and the scripts, which are no pages, are named."""
    pictures = measured.replace("](../docs/", "](")
    return re.sub(r"\[(\w+\.py)\]\(\1\)", r"`benchmarks/\1`", pictures)


def page(method: Method) -> str:
    """One method's page in Markdown."""
    parts = descriptions.sections(method.factory)
    blocks = [
        f"# {method.name}",
        prose(parts["summary"]),
        f"<p>{_kind(method)} <code>{descriptions.import_name(method.factory)}</code>, room {method.room}.</p>",
        prose(parts["body"]),
        "## Equation",
        equations(parts["Equation"], method.name),
        "## Source",
        prose(_capital(parts["Source"])),
        "## When to choose it",
        prose(parts["When to choose"]),
        "## Example",
        f"```python\n{parts['Example']}\n```",
        "## Options",
        options_table(descriptions.options(method.factory)),
        *([f"Besides these: [the options that every adapter takes]({_SHARED})."] if _is_adapter(method) else []),
        "## What it cannot do",
        *cannot(method),
        "## What is trained",
        trained(method),
    ]
    return "\n\n".join(blocks) + "\n"


def prose(text: str) -> str:
    """A docstring's text as HTML: paragraphs run on, indented lines keep their breaks as formulas do."""
    blocks = []
    for paragraph in re.split(r"\n\s*\n", text):
        for indented, lines in _runs(_joined(paragraph.splitlines())):
            content = inline(textwrap.dedent("\n".join(lines)))
            if indented:
                blocks.append(f'<pre class="formula">{content}</pre>')
            else:
                blocks.append("<p>" + content.replace("\n", "<br>") + "</p>")
    return "\n\n".join(blocks)


def inline(text: str) -> str:
    """Text as HTML, with code between back-quotes and links to arXiv."""
    text = re.sub(r"`([^`]+)`", r"<code>\1</code>", html.escape(text, quote=False))
    return re.sub(r"arXiv (\d{4}\.\d{4,5})", r'arXiv <a href="https://arxiv.org/abs/\1">\1</a>', text)


def equations(latex: str, name: str) -> str:
    """Lines of LaTeX as MathML, which browsers draw by themselves.

    Raises:
        ValueError: A line has a command that the converter does not know.
    """
    drawn = []
    for line in filter(None, map(str.strip, latex.splitlines())):
        # the one operator of LaTeX that the converter lacks
        known = re.sub(r"\\arg\b", r"\\operatorname{arg}", line)
        math = latex2mathml.converter.convert(known, display="block")
        if "\\" in math:
            raise ValueError(f"the docstring of {name} has an equation that cannot be drawn: {line}")
        drawn.append(f'<div class="equation">{math}</div>')
    return "\n".join(drawn)


def options_table(options: list[Option]) -> str:
    """Name, default and meaning, a row each."""
    rows = "\n".join(
        f"<tr><td><code>{option.name}</code></td><td><code>{html.escape(option.default, quote=False)}</code></td>"
        f"<td>{inline(option.meaning)}</td></tr>"
        for option in options
    )
    head = "<tr><th>option</th><th>default</th><th>meaning</th></tr>"
    return f"<table>\n<thead>{head}</thead>\n<tbody>\n{rows}\n</tbody>\n</table>"


def cannot(method: Method) -> list[str]:
    """Paragraphs on what the method cannot do."""
    factory, blocks = method.factory, []
    if _is_adapter(method):
        found = "\n".join(_limit(limit) for limit in descriptions.limits(method))
        blocks = [f"<ul>\n{found}\n</ul>" if found else "It passes every check of `folklora.check_method`."]
        if factory.layer_kinds != AdapterConfig.layer_kinds:
            blocks.append(f"It adapts {' and '.join(sorted(factory.layer_kinds))} layers only.")
        if factory.needs:
            needed = " and ".join(sorted(factory.needs))
            blocks.append(
                f"It cannot be put on a model before `folklora.calibrate` found the {needed} of its layers; the stream "
                "does that by itself."
            )
    elif method.room == "continual":
        if factory.knows_task:
            blocks.append("It cannot answer without being told the task.")
        if factory.joint:
            blocks.append("It cannot learn task after task: it takes all of them at once.")
    return blocks or ["Nothing is recorded besides what is said above."]


def trained(method: Method) -> str:
    """What is trained, and how many parameters that is on a weight."""
    text = _capital(method.trains) + "."
    if _is_adapter(method):
        count = " ".join((method.factory.trainable_count.__doc__ or "").split())
        text += f" Trained parameters on a weight [out, in]: {count}"
    return f"<p>{inline(text)}</p>"


def _limit(limit: Limit) -> str:
    checks = "; ".join(f"<code>{name}</code> ({inline(ask.rstrip('.'))})" for name, ask in limit.checks.items())
    return f"<li>{inline(_capital(limit.reason))}. Checks it does not pass: {checks}.</li>"


def _capital(text: str) -> str:
    return text[0].upper() + text[1:]


def _is_adapter(method: Method) -> bool:
    return isinstance(method.factory, type) and issubclass(method.factory, AdapterConfig)


def _kind(method: Method) -> str:
    return "Class" if isinstance(method.factory, type) else "Function"


def _joined(lines: list[str]) -> list[str]:
    """The lines with those that were broken to fit put together again."""
    found: list[str] = []
    for before, line in zip([None, *lines], lines, strict=False):
        if before is not None and _continues(before, line):
            found[-1] += " " + line.strip()
        else:
            found.append(line)
    return found


def _continues(before: str, line: str) -> bool:
    """Whether a line goes on with the one before it, which had no room for its first word."""
    deeper = _depth(line) - _depth(before)
    if deeper < 0 or _INDENT + len(before) + 1 + len(line.split()[0]) <= _FULL:
        return False
    # a hanging indent goes on; what was announced, and a formula on a line of its own, does not
    if before.endswith(":") or (_depth(line) and _FORMULA.match(line)):
        return False
    return not (deeper and before.endswith("."))


def _depth(line: str) -> int:
    return len(line) - len(line.lstrip())


def _runs(lines: list[str]) -> list[tuple[bool, list[str]]]:
    """Neighbouring lines that are indented, or are not."""
    return [(indented, list(run)) for indented, run in itertools.groupby(lines, lambda line: line.startswith(" "))]
