"""The names of LoRAs in a request: what is looked up, and how many may be sent."""

from __future__ import annotations

from collections.abc import Collection, Iterator

import pytest

from handler.api.lora_names import lora_problem


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
