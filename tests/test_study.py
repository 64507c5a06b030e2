"""docs/norms.md says of the study what the published files say."""

import re
import runpy

import pytest
from conftest import ROOT

READ = runpy.run_path(str(ROOT / "docs" / "norm-study" / "read.py"))
PAGE = (ROOT / "docs" / "norms.md").read_text("utf-8")


def plain(markdown):
    """On one line, and without what makes words bold."""
    return re.sub(r"\s+", " ", markdown.replace("**", ""))


@pytest.mark.parametrize("section", READ["SECTIONS"].values(), ids=READ["SECTIONS"])
def test_the_page_has_each_figure_that_the_files_give(section):
    figures = list(section())
    assert figures
    assert not [f"{what}: {text}" for what, text in figures if text not in plain(PAGE)]
