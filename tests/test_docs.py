"""The how-to pages: what they show is what happens."""

import doctest
import importlib
from pathlib import Path

import pytest
import torch

DOCS = Path(__file__).parent.parent / "docs"
PAGES = [page.name for page in sorted(DOCS.glob("*.md")) if ">>> " in page.read_text()]


@pytest.mark.parametrize("page", PAGES)
def test_page(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    found = doctest.testfile(str(DOCS / page), module_relative=False)
    assert found.attempted > 0 and found.failed == 0


def test_pages_are_found():
    assert "checkpoints.md" in PAGES


@pytest.mark.parametrize("name", ["glow", "sequence", "distributions", "export", "groups"])
def test_examples_in_docstrings(name):
    torch.manual_seed(0)
    found = doctest.testmod(importlib.import_module(f"flowkern.{name}"))
    assert found.attempted > 0 and found.failed == 0
