"""The demo, end to end, on a tiny model: every case is stopped or passed as it should be."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from rich.console import Console

pytest.importorskip("transformers")

from mmguard_plugins.demo.cases import all_cases
from mmguard_plugins.demo.run import run_demo
from tests.tiny import FAMILIES

LETS_EVERYTHING_PASS = """
version: 1
guards:
  - use: banned_text
    options: {phrases: [a phrase that nobody says]}
uninspected: allow
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("tiny-llava")
    tiny = FAMILIES["llava"]()
    tiny.model.save_pretrained(folder)
    tiny.processor.save_pretrained(folder)
    return str(folder)


def run(model: str, page: Path, config: str | None = None) -> tuple[bool, str]:
    out = io.StringIO()
    right = run_demo(model, page, config, Console(file=out, width=160))
    return right, out.getvalue()


def test_every_case_goes_as_it_should_and_the_page_shows_it(model: str, tmp_path: Path) -> None:
    page = tmp_path / "demo.html"
    right, table = run(model, page)
    assert right, table
    text = page.read_text(encoding="utf-8")
    for case in all_cases():
        assert case.name in text
    assert 'src="data:image/png;base64,' in text
    assert "http://" not in text
    assert "https://" not in text


def test_a_policy_that_stops_nothing_fails_the_demo(model: str, tmp_path: Path) -> None:
    policy = tmp_path / "mmguard.yaml"
    policy.write_text(LETS_EVERYTHING_PASS, encoding="utf-8")
    right, table = run(model, tmp_path / "demo.html", str(policy))
    assert not right
    assert "should stop at input" in table


def test_the_demo_has_the_cases_that_were_asked_for() -> None:
    cases = all_cases()
    assert len(cases) >= 14
    assert len({case.name for case in cases}) == len(cases)
    assert {case.stage for case in cases} == {"", "input", "output"}
