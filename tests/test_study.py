"""docs/norms.md says of the study what the published files say."""

import re
import runpy

import pytest
from conftest import ROOT
from matplotlib.figure import Figure

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


@pytest.mark.parametrize("name", READ["PICTURES"])
def test_each_picture_on_the_page_can_be_drawn_again(name):
    assert f"norm-study/{name}" in PAGE and (ROOT / "docs" / "norm-study" / name).exists()
    _, draw = READ["PICTURES"][name]
    figure = Figure(layout="constrained")
    draw(figure)
    assert all(axes.has_data() for axes in figure.axes)
