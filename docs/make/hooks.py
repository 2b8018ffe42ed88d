"""What the site has besides the pages of docs/: pages made of the package and of files at the top of the repository.

MkDocs calls the functions `on_*` (mkdocs.yml, `hooks`).
"""

from __future__ import annotations

import ast
import contextlib
import html
import importlib
import inspect
import io
import os
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import tyro
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(Path(__file__).parent))

import jaxcomm  # noqa: E402
from jaxcomm import converters, lmnet, protocols  # noqa: E402
from jaxcomm.evals.cli import prepare  # noqa: E402

import notebooks  # noqa: E402
from modules import GROUPS, grouped  # noqa: E402

PACKAGE = ROOT / "build" / "docs" / "jaxcomm"
"""The package as it is installed: converters/ and evals/ stand inside. mkdocstrings reads it here."""
COPIED = {"ARCHITECTURE.md": "architecture.md", "CHANGELOG.md": "changelog.md", "CONTRIBUTING.md": "contributing.md"}
"""Files at the top of the repository, and the pages they become."""
SHOWN_WHOLE = ("jaxcomm.sharding", "jaxcomm.prefixes")
"""Modules whose other names are called from outside, too."""
BEHIND = "---\nsearch:\n  boost: 0.3\n---\n"
"""Head of a page that the search lists behind the pages of docs/."""
COMMANDS = (
    "demo", "play", "read", "sweep", "select", "study", "eval", "report", "cost", "fit-map", "monitor", "lmnet train",
    "lmnet compare", "lmnet show", "lmnet control", "bridge train", "bridge compare", "convert", "train-pair",
)  # fmt: skip


def on_startup(command: str, dirty: bool) -> None:
    """Lays the package out for mkdocstrings, which reads files and imports nothing.

    It looks for the folder when it is configured, so the folder has to be there before (`on_config` is too late).

    Args:
        command: What MkDocs does.
        dirty: Whether it builds changed pages only.
    """
    os.environ["COLUMNS"] = "80"  # of what commands print
    shutil.rmtree(PACKAGE, ignore_errors=True)
    for source, place in (("jaxcomm", "."), ("converters", "converters"), ("evals", "evals")):
        for path in (ROOT / source).rglob("*.py"):
            copy = PACKAGE / place / path.relative_to(ROOT / source)
            copy.parent.mkdir(parents=True, exist_ok=True)
            # What Google calls Example, mkdocstrings shows as code under the name Examples.
            text = re.sub(r"^( +)Example:$", r"\1Examples:", path.read_text(encoding="utf-8"), flags=re.MULTILINE)
            copy.write_text(text, encoding="utf-8")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the pages that are made.

    Args:
        files: The files of docs/.
        config: MkDocs' settings.

    Returns:
        The same files, and those that are made.
    """
    for page, text in made():
        files.append(File.generated(config, page, content=text))
    for page, content in notebooks.pages(ROOT / "docs" / "tutorials"):
        files.append(File.generated(config, f"tutorials/{page}", content=content))
    return files


def on_page_content(content: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Marks what must not be broken into lines, and what needs room: cells of tables that hold a number, or a number with
    its interval; options of commands; cells that hold a long text.

    Args:
        content: HTML of the page.
        page: The page.
        config: MkDocs' settings.
        files: All files.

    Returns:
        HTML of the page.
    """
    content = re.sub(
        r"<td((?: style=\"[^\"]*\")?)>(?=[-+]?[\d.,^]+(?: \[[^\]<]+\])?(?: (?:%|s|GiB|MiB))?</td>)",
        r'<td\1 class="number">',
        content,
    )
    content = re.sub(r"<code>(?=--[\w-]{1,24}</code>)", '<code class="option">', content)
    return re.sub(r"<td((?: style=\"[^\"]*\")?)>(?=[^<]{120,}</td>)", r'<td\1 class="long">', content)


def made() -> Iterator[tuple[str, str]]:
    """Makes pages of the package and of the files at the top of the repository.

    Yields:
        Each page's path within the site, and its text in Markdown.
    """
    for source, page in COPIED.items():
        yield page, relinked((ROOT / source).read_text(encoding="utf-8"))
    yield "reference/cli.md", command_line()
    for group in GROUPS:
        yield f"reference/{group.page}.md", reference(group.title, group.about, grouped(group))


def relinked(text: str) -> str:
    """Makes the links of a file at the top of the repository those of a page in docs/."""
    return re.sub(r"\]\(docs/", "](", text)


def reference(title: str, about: str, modules: list[str]) -> str:
    """Writes a page of the reference: for every module a directive that mkdocstrings fills in."""
    parts = [BEHIND, f"# {title}\n", f"{about}\n"]
    for module in modules:
        parts.append(f"::: jaxcomm.{module}\n")
        if shown := exported(f"jaxcomm.{module}"):
            parts[-1] += f"    options:\n      members: {shown}\n"
    return "\n".join(parts)


def exported(module: str) -> list[str]:
    """Finds what packages export of a module: helpers beside it are not shown. Nothing: everything public is."""
    if module.startswith("jaxcomm.evals.") or module in SHOWN_WHOLE:
        return []
    names = {name for room in (jaxcomm, protocols, lmnet, converters) for name in room.__all__}
    tree = ast.parse(inspect.getsource(importlib.import_module(module)))
    made = []
    for node in tree.body:
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", node)]
        made += [getattr(target, "name", getattr(target, "id", None)) for target in targets]
    return [name for name in made if name in names]


def command_line() -> str:
    """Writes the page of all commands: what `jaxcomm COMMAND --help` prints."""
    parts = [
        BEHIND,
        "# Command line\n",
        "What `jaxcomm COMMAND --help` prints. `pip install 'jaxcomm[cli]'` installs the command.\n",
    ]
    for command in COMMANDS:
        parts.append(f"## jaxcomm {command} {{ #{command.replace(' ', '-')} }}\n")
        parts.append(f'<pre class="help"><code>{html.escape(help_of(command))}</code></pre>\n')
    return "\n".join(parts)


def help_of(command: str) -> str:
    """Asks the parser of the command line what `jaxcomm COMMAND --help` prints."""
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.suppress(SystemExit):
        tyro.cli(prepare, prog="jaxcomm", args=[*command.split(), "--help"])
    return re.sub(r"\x1b\[[0-9;]*m", "", said.getvalue()).strip()
