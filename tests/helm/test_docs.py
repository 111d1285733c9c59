"""docs/kubernetes.md names what is there: files, values, ports, and each sentence with which the chart refuses."""

from __future__ import annotations

import re
from functools import reduce
from typing import Any

import pytest
import yaml

from tests.helm.render import CHART

ROOT = CHART.parents[1]
TEXT = (ROOT / "docs/kubernetes.md").read_text()
CODE = re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```", "", TEXT, flags=re.MULTILINE | re.DOTALL))
VALUES: dict[str, Any] = yaml.safe_load((CHART / "values.yaml").read_text())
# Beginnings of names that are not values.
OTHERS = ("values.", "tls.crt", "tls.key")


def anchor(title: str) -> str:
    """As GitHub makes it of a heading."""
    return re.sub(r"[^\w -]", "", title).strip().lower().replace(" ", "-")


ANCHORS = {anchor(title) for title in re.findall(r"^#+ (.*)$", TEXT, re.MULTILINE)}


def test_every_value_that_is_named_exists():
    named = {
        name
        for code in CODE
        for name in re.findall(r"(?:^|(?<=[ -]))([a-zA-Z]+(?:\.[a-zA-Z]+)+)(?=$|[:= ,])", code)
        if name.partition(".")[0] in VALUES and not name.startswith(OTHERS)
    }
    assert len(named) > 40
    for name in named:
        reduce(lambda values, key: values[key], name.split("."), VALUES)


def test_links_lead_somewhere():
    for target in re.findall(r"\]\(([^)]+)\)", TEXT):
        file, _, place = target.partition("#")
        assert not file or (ROOT / "docs" / file).exists(), target
        assert file or place in ANCHORS, target
    for path in re.findall(r"`((?:docs|helm|docker|examples|tests)/[\w./-]+)`", TEXT):
        assert (CHART / path if path.startswith("examples/") else ROOT / path).exists(), path


def refusals() -> list[str]:
    """What the chart says before it says what to set; N for a number, … for a text."""
    sentences = re.findall(r'"([^"]+?: [^"]+)"', (CHART / "templates/_checks.tpl").read_text())
    return [sentence.partition(": ")[0].replace("%d", "N").replace("%s", "…") for sentence in sentences]


@pytest.mark.parametrize("sentence", refusals())
def test_a_refusal_is_explained(sentence: str):
    assert f"| `{sentence}` |" in TEXT


def test_the_refusals_are_found():
    assert len(refusals()) > 20
