"""The links between the READMEs lead somewhere, and their pictures can be drawn."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from sandbox import READMES, ROOT


def anchors(path: Path) -> set[str]:
    """The anchors that GitHub makes of the headings."""
    headings = re.findall(r"^#+ (.+)$", path.read_text("utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def broken(readme: Path) -> Iterator[str]:
    text = re.sub(r"^```.*?^```", "", readme.read_text("utf-8"), flags=re.DOTALL | re.MULTILINE)
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        name, _, anchor = link.partition("#")
        target = readme.parent / name if name else readme
        if "://" in link:
            continue
        if not target.exists() or (anchor and anchor not in anchors(target)):
            yield link


@pytest.mark.parametrize("readme", READMES, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(readme: Path) -> None:
    assert list(broken(readme)) == []


@pytest.mark.parametrize("readme", READMES, ids=lambda path: str(path.relative_to(ROOT)))
def test_pictures_have_no_semicolon(readme: Path) -> None:
    """At one mermaid ends a statement, and then draws nothing."""
    text = readme.read_text("utf-8")
    pictures = re.findall(r"^```mermaid$(.*?)^```$", text, flags=re.DOTALL | re.MULTILINE)
    assert [line for picture in pictures for line in picture.splitlines() if ";" in line] == []
