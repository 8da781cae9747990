"""Classes given by name or number: what they stand for, and what is refused."""

from __future__ import annotations

import pytest

from pipestill import classes, config
from pipestill.errors import InputError


def test_names_and_numbers_may_be_mixed() -> None:
    assert classes.numbers(["dog", 0, "cat"], ("cat", "dog"), "here") == [1, 0, 0]


@pytest.mark.parametrize(
    ("wanted", "names", "says"),
    [
        ("cta", ("cat", "cut", "dog"), r"^here: there is no class 'cta'; did you mean 'cut' or 'cat'\?$"),
        ("zebra", ("cat", "dog"), r"there is no class 'zebra' \(there are: cat, dog\)"),
        ("?", tuple(map(str, range(40))), r"\(there are: 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, …\)"),
        (2, ("cat", "dog"), "there is no class number 2, they run from 0 to 1"),
        (1, ("1", "2"), "class number 1 is '2', but a class is named '1': write its name in quotes, '2' or '1'"),
        (2, ("1", "2"), "there is no class number 2, but a class is named '2': write its name in quotes, '2'"),
    ],
)
def test_a_class_that_is_unknown_or_ambiguous_is_refused(wanted: int | str, names: tuple[str, ...], says: str) -> None:
    with pytest.raises(InputError, match=says):
        classes.numbers([wanted], names, "here")


def test_numbers_that_are_names_too_are_unambiguous_where_both_agree() -> None:
    assert classes.numbers([10, "2"], tuple(map(str, range(11))), "here") == [10, 2]
    assert classes.numbers(["10", "2"], ("1", "2", "10"), "here") == [2, 1]


@pytest.mark.parametrize("value", ["1.5", "null", "''", "-1"])
def test_what_yaml_reads_as_neither_a_name_nor_a_number_is_refused(value: str) -> None:
    body = {"model": "m", "sigmas": "models/m", "plan": "listed", "classes": config.parse_yaml(f"[cat, {value}]")}
    with pytest.raises(InputError, match=r"classes\.1: a class is given by its name or by its number from 0; quote"):
        config.check_section(config.RunParams, body, "here")
