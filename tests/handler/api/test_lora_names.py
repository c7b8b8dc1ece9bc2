"""The names of LoRAs in a request: what is looked up, and how many may be sent."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator

import pytest

from handler.api.lora_names import lora_problem, read_loras


class Folder(Collection[str]):
    """Knows names; listing them all is counted."""

    def __init__(self, *names: str) -> None:
        self._names = names
        self.num_listed = 0

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def __iter__(self) -> Iterator[str]:
        self.num_listed += 1
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def test_what_there_is_is_not_listed_for_a_request_that_names_it() -> None:
    folder = Folder("ink", "style")
    assert lora_problem(["ink", "style"], folder) is None
    assert not folder.num_listed


@pytest.mark.parametrize("names", [["stile"], ["ink", "stile"]])
def test_a_name_that_there_is_not_is_told_what_there_is(names: list[str]) -> None:
    problem = str(lora_problem(names, Folder("style", "ink")))
    assert problem.startswith("'stile': no such LoRA; did you mean style? there are ink, style;")


@pytest.mark.parametrize(
    "value",
    [
        ",".join(f"l{number}" for number in range(17)),
        [f"l{number}" for number in range(17)],
        {f"l{number}": 1 for number in range(17)},
        # Nothing is said of any of them: there are too many to look at each.
        ["../x"] * 17,
    ],
)
def test_too_many_are_only_counted(value: object) -> None:
    with pytest.raises(ValueError, match="17 LoRAs are named; allowed are 16"):
        read_loras(value, low=-10, high=10)


def test_sixteen_of_the_longest_names_fit_into_text() -> None:
    names = [f"{'n' * 62}{number:02}" for number in range(16)]
    text = " , ".join(f"{name} : -9.123456789012345678" for name in names)
    assert read_loras(text, low=-10, high=10).keys() == set(names)


def test_text_of_any_length_is_refused_at_once() -> None:
    with pytest.raises(ValueError, match="is 10000000 characters long; allowed are 2048"):
        read_loras("a," * 5_000_000, low=-10, high=10)


@pytest.mark.parametrize(
    ("value", "problem"),
    [
        ("ink:1e1", "the scale of ink is '1e1', not a number"),
        ("ink:0.5:0.4", "the scale of ink is '0.5:0.4', not a number"),
        ("https://example.org/ink", "'https://example.org/ink' is not the name of a LoRA"),
        ("C:\\ink", "is not the name of a LoRA"),
        ({"name": "ink", "weight": 1}, "'weight' says nothing of a LoRA"),
        ([{"name": "ink", "weight": 1}], "'weight' says nothing of a LoRA"),
        ('{"ink": "x"}', "the scale of ink is 'x', not a number"),
        ('{"ink": 1', "is not JSON; send"),
        ("[" * 2000, "is not JSON; send"),
    ],
)
def test_what_is_wrong_is_said_of_what_it_is_of(value: object, problem: str) -> None:
    with pytest.raises(ValueError, match=re.escape(problem)):
        read_loras(value, low=-10, high=10)


@pytest.mark.parametrize(
    "text", ['{"ink": 0.5}', '["ink:0.5"]', ' [{"name": "ink", "scale": 0.5}]', "ink:0.5"]
)
def test_a_form_may_hold_json(text: str) -> None:
    assert read_loras(text, low=-10, high=10) == {"ink": 0.5}
