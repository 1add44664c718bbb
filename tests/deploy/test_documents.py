"""The documents name what exists (paths, make targets, verbs), keep lines short, date decisions.
They and the code avoid words that a reader has to read twice.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from datetime import date
from pathlib import Path

import pytest

from deploy.cli import VERBS

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / name for name in ("README.md", "DECISIONS.md", "CHANGELOG.md")]
DOCUMENTS = [*PAGES, *sorted((ROOT / "docs").glob("*.md"))]
MAX_LINE, MAX_DECISION_LINES = 120, 5

TOP = {path.name for path in ROOT.iterdir() if path.name[0] != "."} | {".ci"}
TRACKED_SUFFIXES = {".py", ".proto", ".toml", ".yml", ".yaml", ".md", ".lock"}
PLACEHOLDER = re.compile(r"[<>*{}$\s=…]|\.\.\.")
FENCE = re.compile(r"^```.*?$(.*?)^```", re.MULTILINE | re.DOTALL)
SPAN = re.compile(r"`([^`\n]+)`")
LINK = re.compile(r"\]\(([^)\s#]+)")
DECISION = re.compile(r"^## (.*)\n((?:(?!## ).*\n?)*)", re.MULTILINE)
DATED = re.compile(r".+ \((\d{4}-\d{2}-\d{2})\)")
SERVICES = ("proto", "expert_store", "compute_node", "scheduler", "deploy")
OBSCURE = re.compile(
    r"\b(told(?! apart)|whoever|at hand|so many|is not to be had|at least when)\b", re.IGNORECASE
)
COMMAND_ENDS = re.compile(r"&&|\|\||[;|]")


def spans(text: str) -> list[str]:
    """Inline code."""
    return SPAN.findall(FENCE.sub("", text))


def commands(text: str) -> Iterator[list[str]]:
    """Words of every command in code, without prompt and comment."""
    fenced = [line for block in FENCE.findall(text) for line in block.splitlines()]
    for line in [*fenced, *spans(text)]:
        for command in COMMAND_ENDS.split(line.strip().removeprefix("$ ")):
            try:
                words = shlex.split(command, comments=True)
            except ValueError:  # output or code, not a command
                continue
            if words:
                yield words


def is_repo_path(name: str) -> bool:
    """Whether a span means a file or folder of ours."""
    if PLACEHOLDER.search(name) or name.startswith(("/", "~", "-", "http")):
        return False
    path = Path(name)
    return ("/" in name and path.parts[0] in TOP) or path.suffix in TRACKED_SUFFIXES


def exists(name: str) -> bool:
    """Also `config.py` or `policies/lru.py`: written without their folder."""
    if (ROOT / name).exists():
        return True
    folders = [ROOT / top for top in TOP if (ROOT / top).is_dir()]
    return any(next(folder.rglob(name), None) for folder in folders)


def missing_paths(text: str, folder: Path = ROOT) -> list[str]:
    """Paths that do not exist. folder: that of the document, which links are relative to."""
    named = [name for name in spans(text) if is_repo_path(name)]
    links = LINK.findall(FENCE.sub("", text))
    linked = [name for name in links if not name.startswith(("/", "http:", "https:", "mailto:"))]
    missing = [name for name in named if not exists(name)]
    return missing + [name for name in linked if not (folder / name).exists()]


def long_lines(text: str) -> list[int]:
    """Numbers of the lines with more than MAX_LINE characters."""
    lines = enumerate(text.splitlines(), 1)
    return [number for number, line in lines if len(line) > MAX_LINE]


def faulty_decisions(text: str) -> list[str]:
    """Titles of the entries that have no date, or more than MAX_DECISION_LINES lines."""
    return [
        title
        for title, body in DECISION.findall(text)
        if not is_dated(title) or len(body.strip().splitlines()) > MAX_DECISION_LINES
    ]


def is_dated(title: str) -> bool:
    match = DATED.fullmatch(title)
    if match is None:
        return False
    try:
        return bool(date.fromisoformat(match[1]))
    except ValueError:
        return False


def missing_targets(text: str) -> list[str]:
    rules = (ROOT / "Makefile").read_text()
    known = set(re.findall(r"^([a-z][a-z-]*):", rules, re.MULTILINE))
    named = [
        word
        for words in commands(text)
        if words[0] == "make"
        for word in words[1:]
        if re.fullmatch(r"[a-z][a-z-]*", word)
    ]
    return [name for name in named if name not in known]


def missing_verbs(text: str) -> list[str]:
    named = [
        words[1] for words in commands(text) if len(words) > 1 and Path(words[0]).name == "flashmoe"
    ]
    return [name for name in named if re.fullmatch(r"[a-z][a-z-]*", name) and name not in VERBS]


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_paths_named_exist(document: Path) -> None:
    """Red for `expert_store/readr.py` in README."""
    assert missing_paths(document.read_text(), document.parent) == []


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_targets_named_exist(document: Path) -> None:
    """Red for `make rnu` in README."""
    assert missing_targets(document.read_text()) == []


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_verbs_named_exist(document: Path) -> None:
    """Red for `flashmoe packs DIR` in README."""
    assert missing_verbs(document.read_text()) == []


def sources() -> list[Path]:
    """Files that people wrote, with docstrings or comments."""
    found = [path for name in SERVICES for path in (ROOT / name).rglob("*.*")]
    return [p for p in found if p.suffix in {".py", ".c", ".h", ".proto"} and "_pb2" not in p.name]


def test_sentences_use_plain_words() -> None:
    """Red for a docstring that begins `Whoever asks is told`."""
    pages = [ROOT / "README.md", ROOT / "DECISIONS.md", *(ROOT / "docs").glob("*.md"), *sources()]
    obscure = {
        str(page.relative_to(ROOT)): found
        for page in pages
        if (found := OBSCURE.findall(page.read_text()))
    }
    assert obscure == {}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_lines_are_short(document: Path) -> None:
    """Red for a README with a line of 121 characters."""
    assert long_lines(document.read_text()) == []


def test_decisions_are_dated_and_short() -> None:
    """Red for a heading without a date, and for an entry of six lines."""
    text = (ROOT / "DECISIONS.md").read_text()
    assert len(DECISION.findall(text)) > 10
    assert faulty_decisions(text) == []


def test_a_long_line_is_found() -> None:
    """Red when bytes are counted: an arrow is one character."""
    assert long_lines(f"{'▶' * 120}\n{'x' * 121}\n") == [2]


@pytest.mark.parametrize(
    ("entry", "is_faulty"),
    [
        ("## A title (2026-11-22)\nOne.\nTwo.\n\n", False),
        ("## A title (2026-11-22)\n1\n2\n3\n4\n5\n\n", False),
        ("## A title (2026-11-22)\n1\n2\n3\n4\n5\n6\n", True),
        ("## A title\nOne.\n", True),
        ("## A title (2026-11-31)\nOne.\n", True),
    ],
)
def test_a_faulty_decision_is_found(entry: str, is_faulty: bool) -> None:
    """Red when a day that no calendar has passes, or only the first entry is looked at."""
    assert faulty_decisions(f"# Decisions\n\n## First (2026-11-22)\nOne.\n\n{entry}") == (
        [entry.splitlines()[0].removeprefix("## ")] if is_faulty else []
    )


@pytest.mark.parametrize(
    "name", ["docker-compose.yml", "docker-compose.helper.yml", "docker-compose.borrower.yml"]
)
def test_the_compose_files_instructions_name_what_exists(name: str) -> None:
    """Red when the verb that writes the compose file's configuration is not in the command."""
    lines = (ROOT / "deploy" / name).read_text().splitlines()
    shown = "\n".join(line.removeprefix("#   ") for line in lines if line.startswith("#   "))
    text = f"```\n{shown}\n```\n"
    assert "flashmoe" in shown
    assert missing_verbs(text) == []


@pytest.mark.parametrize(
    "text",
    [
        "see `expert_store/readr.py`",
        "see `expert_stor/reader.py`",
        "see `nowhere.toml`",
        "see [the log](tests/nowhere/LOG.md)",
        "the folder `proto/v2/`",
    ],
)
def test_a_path_that_does_not_exist_is_found(text: str) -> None:
    """Red when `exists` says yes to everything."""
    assert len(missing_paths(text)) == 1


@pytest.mark.parametrize(
    "text",
    [
        "`expert_store/io/files.py`, `files.py`, `policies/lru.py`, `proto/`, `Makefile`",
        "`/dev/shm/x.toml`, `~/flashmoe.toml`, `cache/<policy>.py`, `tokens/s`, `1/2`",
        "`gate_up_proj`, `transformers.integrations.moe`, [site](https://example.org/a.md)",
        "```\necho `nowhere.toml`\n```",
    ],
)
def test_what_exists_or_is_no_path_of_ours_passes(text: str) -> None:
    """Red when placeholders, absolute paths or fenced blocks are not left out."""
    assert missing_paths(text) == []


def test_targets_are_read_as_make_reads_them() -> None:
    """Red when a comment is read as targets."""
    text = 'Do make sense.\n```sh\n$ make rnu PROMPT="a b" && make lint tset  # make believe\n```\n'
    assert missing_targets(text + "`make check`, `make -j2 tets`") == ["rnu", "tset", "tets"]


def test_verbs_are_read_as_a_shell_reads_them() -> None:
    """Red when a path before the command hides it."""
    text = "```\n.venv/bin/flashmoe srve --model x\nflashmoe: an error\nflashmoe --help\n```\n"
    assert missing_verbs(text + "`flashmoe index A`, `flashmoe packs`") == ["srve", "packs"]
