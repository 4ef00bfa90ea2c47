"""YAML files of users: every error is one line with its place."""

from pathlib import Path

import pytest

from rorchat.errors import UsageError
from rorchat.yaml_file import read_yaml


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("a: 1\nb: 2\na: 3", "{path}:3: duplicate key 'a': remove one."),
        ("a: {b: 1, b: 2}", "{path}:1: duplicate key 'b': remove one."),
        (
            "a: 1\nb: 2024-13-45",
            "{path}:2: '2024-13-45' is not a valid value (month must be in 1..12): put it in quotes.",
        ),
        ("a: [1", "{path}:1 is not YAML: while parsing a flow sequence, expected ',' or ']', but got '<stream end>'."),
        ("- a", "{path} is not a config: it must contain `key: value` lines, but contains a list. Copy example.yaml"),
        ("", "{path} is not a config: it must contain `key: value` lines, but contains nothing. Copy example.yaml"),
        (b"\xff", "Cannot read the config {path}: "),
    ],
)
def test_an_invalid_file_raises_one_line_with_its_place(content, message, tmp_path):
    path = tmp_path / "config.yaml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UsageError) as failure:
        read_yaml(path, "config", UsageError, example=Path("example.yaml"))
    assert str(failure.value).startswith(message.format(path=path)) and "\n" not in str(failure.value)


def test_a_mapping_is_returned_with_merged_anchors(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text("a: &a {x: 1, y: 2}\nb: {<<: *a, y: 3}\n")
    assert read_yaml(path, "config") == {"a": {"x": 1, "y": 2}, "b": {"x": 1, "y": 3}}
