"""`mmguard.yaml`: what it accepts, and errors that name the line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mmguard_plugins import ConfigError, Engine, load_config
from mmguard_plugins.config import json_schema, parse_config

EXAMPLE = Path(__file__).parent.parent / "mmguard.example.yaml"
GOOD = """
version: 1
guards:
  - use: banned_text
    options: {phrases: [bad word]}
"""


def test_the_example_loads() -> None:
    config = load_config(EXAMPLE)
    labels = [entry.label for entry in config.guards]
    assert labels == ["gate", "forbidden_requests", "secrets"]


def test_the_readmes_config_loads() -> None:
    readme = (EXAMPLE.parent / "README.md").read_text(encoding="utf-8")
    blocks = [block.split("```")[0] for block in readme.split("```yaml\n")[1:]]
    assert blocks
    for block in blocks:
        parse_config(block)


@pytest.mark.parametrize(
    "text, message",
    [
        ("guards: []", r"version: is missing; add it"),
        ("version: 2\n" + GOOD.split("\n", 2)[2], r"line 1: version: 2 is wrong; use 1"),
        (GOOD + "limit: {}", r"line 6: limit: is not a known setting; check the spelling"),
        (GOOD + "limits:\n  max_images: many", r"line 7: limits.max_images: 'many' is wrong"),
        (GOOD + "limits:\n  max_images: -1", r"line 7: limits.max_images: -1 is wrong"),
        (GOOD + "version: 1", r"line 2: version: is given twice; keep one \(again on line 6\)"),
        (GOOD + "  bad indent", r"line \d+: not valid YAML"),
        ("- a list", r"line 1: is not a mapping; start with `version: 1`"),
        ("", r"is not a mapping"),
        ("version: 1\nguards: []", r"line 2: guards"),
        (
            GOOD.replace("use: banned_text", "on_error: panic\n    use: banned_text"),
            r"line 4: .*panic",
        ),
        (GOOD + "  - use: banned_text", r"guard name 'banned_text' is used twice"),
        (GOOD + "uninspected: {smell: allow}", r"line 6: .*'smell' is wrong"),
        (GOOD + "uninspected: maybe", r"'maybe' is wrong"),
    ],
)
def test_an_error_names_the_line_and_what_would_be_right(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        parse_config(text, "mmguard.yaml")
    assert str(caught.value).startswith("mmguard.yaml")


@pytest.mark.parametrize(
    "text, message",
    [
        (GOOD.replace("banned_text", "baned_text"), r"line 4: .*'baned_text' is not installed; in"),
        (GOOD.replace("phrases", "phrase"), r"line 5: guards\[0\].options.phrase: is not a known"),
        (GOOD.replace("[bad word]", "['']"), r"line 5: .*an empty phrase would match everything"),
        (GOOD.replace("phrases: [bad word]", "patterns: ['(']"), r"line 5: .*pattern '\('"),
        (GOOD.replace("phrases: [bad word]", ""), r"line 5: .*nothing to look for"),
    ],
)
def test_a_guards_own_options_are_located_too(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Engine.from_config(parse_config(text, "mmguard.yaml"))


def test_every_error_is_reported_at_once() -> None:
    text = "version: 3\nguards:\n  - use: banned_text\n    tier: 99\nbreaker:\n  failures: 0\n"
    with pytest.raises(ConfigError) as caught:
        parse_config(text)
    assert [line.split(":")[0] for line in str(caught.value).splitlines()] == [
        "configuration line 1",
        "configuration line 4",
        "configuration line 6",
    ]


def test_the_variable_names_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "policy.yaml"
    file.write_text(GOOD, encoding="utf-8")
    monkeypatch.setenv("MMGUARD_CONFIG", str(file))
    assert load_config().guards[0].use == "banned_text"
    monkeypatch.setenv("MMGUARD_CONFIG", str(tmp_path / "absent.yaml"))
    with pytest.raises(ConfigError, match=r"absent.yaml' cannot be read .* MMGUARD_CONFIG"):
        load_config()


def test_a_file_that_is_not_text_is_one_clear_error(tmp_path: Path) -> None:
    file = tmp_path / "mmguard.yaml"
    file.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="cannot be read"):
        load_config(file)


def test_uninspected_takes_one_word_for_every_kind() -> None:
    config = parse_config(GOOD + "uninspected: flag")
    assert set(config.uninspected.values()) == {"flag"}


def test_the_schema_is_json_and_describes_the_settings() -> None:
    schema = json.loads(json.dumps(json_schema()))
    assert set(schema["properties"]) >= {"version", "guards", "limits", "stream", "refusals"}
    assert schema["additionalProperties"] is False


def test_telemetry_is_off_by_default() -> None:
    assert parse_config(GOOD).telemetry.enabled is False
