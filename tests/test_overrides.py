"""Parameter files and `key=value`: one grammar, one meaning for every reader of YAML, and errors that show the cure."""

from __future__ import annotations

import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from ruamel.yaml import YAML

from pipestill import config, configure
from pipestill.config import dump_yaml, parse_overrides, parse_yaml
from pipestill.errors import InputError

FOLDERS = ("Fotos/Äpfel", "Data (old)", "a, b", "a: b", "#1", "it's", 'say "so"', "100%", "a&b;c", "x=y", "[old", "- a")


def value(text: str) -> Any:
    (found,) = parse_overrides([f"k={text}"])
    return found.value


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        *((folder, folder) for folder in FOLDERS if folder[0] != "["),
        *[("", ""), (" a ", " a "), ("null", None), ("~", None), ("true", True), ("False", False)],
        *[("3", 3), ("-3", -3), ("0", 0), ("1e-4", 1e-4), ("2.5", 2.5), (".5", 0.5), ("1.", 1.0)],
        *[("[1, 2]", [1, 2]), ("[a b, 'c']", ["a b", "c"]), ("{kind: vp, steps: 9}", {"kind": "vp", "steps": 9})],
        *[('"010"', "010"), ("'yes'", "yes"), ("<<", "<<"), ("=", "="), ("---", "---"), ("1.2.3", "1.2.3")],
        *[("!x", "!x"), ("*x", "*x"), ("|", "|"), ("a\\b", "a\\b"), ("2m", "2m")],
    ],
)
def test_a_value_is_what_it_looks_like(text: str, wanted: Any) -> None:
    found = value(text)
    assert (found, type(found)) == (wanted, type(wanted))


def test_home_folders_are_expanded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    assert value("~/photos") == "/home/me/photos"
    assert value("[~/a, b/~/c]") == ["/home/me/a", "b/~/c"]
    assert value("~nobody-of-this-name/photos") == "~nobody-of-this-name/photos"
    with pytest.raises(InputError, match="write the whole path"):
        configure.compose(["data.path=~nobody-of-this-name/photos"])


@pytest.mark.parametrize("folder", FOLDERS)
def test_every_folder_can_be_named_and_survives_params_yaml(folder: str, tmp_path: Path) -> None:
    """In `config` and in stages alike; what an error shows can be pasted into a shell."""
    word = f"data.path={folder}"
    try:
        parse_overrides([word])
    except InputError as error:
        shown = str(error).rpartition("write ")[2]
        word = subprocess.run(["sh", "-c", f"printf %s {shown}"], capture_output=True, check=True).stdout.decode()
    path = tmp_path / "params.yaml"
    path.write_text(configure.render(configure.compose([word])), encoding="utf-8")
    assert config.load(path).data.path == folder
    assert config.load(path, [word]).data.path == folder
    text = path.read_text(encoding="utf-8")
    assert yaml.safe_load(text) == YAML(typ="safe").load(text) == config.load(path).plain()


@pytest.mark.parametrize(
    "text", ["010", "00", "-07", "1_000", "0b11", "0o17", "1:30", "12:30:45", "2026-01-02", "yes", "NO", "on", "Off"]
)
def test_what_readers_of_yaml_take_differently_is_refused(text: str) -> None:
    """Snakemake reads YAML 1.1, DVC 1.2: a plain value has to mean the same to both."""
    quoted = shlex.quote(f'k="{text}"')
    with pytest.raises(InputError, match=rf"k: {text} is ambiguous .*; as text write {quoted}"):
        value(text)
    with pytest.raises(InputError, match=rf"p\.yaml, line 2: {text} is ambiguous"):
        parse_yaml(f"a: 1\nb: {text}\n", "p.yaml")
    assert value(f'"{text}"') == text
    dumped = dump_yaml({"k": text})
    assert parse_yaml(dumped) == yaml.safe_load(dumped) == YAML(typ="safe").load(dumped) == {"k": text}


@pytest.mark.parametrize("text", ["1e-4", "1e5", "yes", "null", "~", "1.0", "0x1F", "", "a: b", "1:30"])
def test_texts_that_look_like_something_else_are_written_in_quotes(text: str) -> None:
    dumped = dump_yaml({"k": text})
    assert parse_yaml(dumped) == yaml.safe_load(dumped) == YAML(typ="safe").load(dumped) == {"k": text}


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("a: 1\nb: 2\na: 3\n", "params.yaml, line 3: 'a' is there twice"),
        ("a:\n  b: {c: 1, c: 1}\n", "params.yaml, line 2: 'c' is there twice"),
        ("a:\n\tb: 1\n", "params.yaml, line 2: a tab where YAML wants spaces"),
        ("a:\n  b: 1\n\tc: 2\n", "params.yaml, line 3: a tab where YAML wants spaces"),
        ("a: [1,\nb: 2\n", "params.yaml, line 3: did not find expected ',' or ']'"),
    ],
)
def test_a_mistake_in_a_parameter_file_is_named_with_its_line(text: str, says: str, tmp_path: Path) -> None:
    path = tmp_path / "params.yaml"
    path.write_text(text)
    with pytest.raises(InputError, match=r"params\.yaml, line") as caught:
        config.load(path)
    assert str(caught.value).endswith(says)


def test_words_of_a_value_that_the_shell_took_apart_are_put_together() -> None:
    with pytest.raises(InputError, match=r"if it belongs to the value before it, write 'data\.path=my photos'"):
        parse_overrides(["data.path=my", "photos"])


@pytest.mark.parametrize("word", ["photos", "=1", "a..b=1", ".a=1", "a b=1", "~a b", "++a=1"])
def test_other_words_are_no_overrides(word: str) -> None:
    with pytest.raises(InputError, match="is not KEY=VALUE"):
        parse_overrides([word])
