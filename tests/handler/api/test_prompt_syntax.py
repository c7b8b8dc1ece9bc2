"""A1111's syntax: weights as its documentation defines them, breaks, and LoRA tags."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from handler.api.prompt_syntax import Piece, pieces_of, take_loras, weight_problem


def pieces(prompt: str) -> list[tuple[str | None, float]]:
    return [(piece.text, round(piece.weight, 6)) for piece in pieces_of(prompt)]


@pytest.mark.parametrize(
    ("prompt", "wanted"),
    [
        ("a red ring", [("a red ring", 1.0)]),
        ("", [("", 1.0)]),
        ("a (red) ring", [("a ", 1.0), ("red", 1.1), (" ring", 1.0)]),
        ("a ((red)) ring", [("a ", 1.0), ("red", 1.21), (" ring", 1.0)]),
        ("a [red] ring", [("a ", 1.0), ("red", round(1 / 1.1, 6)), (" ring", 1.0)]),
        ("a (red:1.3) ring", [("a ", 1.0), ("red", 1.3), (" ring", 1.0)]),
        ("(red: .5 )", [("red", 0.5)]),
        ("(red:-1)", [("red", -1.0)]),
        ("(a (red:2) ring:0.5)", [("a ", 0.5), ("red", 1.0), (" ring", 0.5)]),
        ("((a) b)", [("a", 1.21), (" b", 1.1)]),
        (r"a \(red\) ring", [("a (red) ring", 1.0)]),
        (r"\[a\] \\", [("[a] \\", 1.0)]),
        (r"(a\):1.5)", [("a)", 1.5)]),
        ("a (red", [("a ", 1.0), ("red", 1.1)]),
        ("a [red", [("a ", 1.0), ("red", round(1 / 1.1, 6))]),
        ("a red) ring]", [("a red) ring]", 1.0)]),
        ("a:1.3) b", [("a:1.3) b", 1.0)]),
        ("[a:1.3)", [("a:1.3)", round(1 / 1.1, 6))]),
        ("time 10:30", [("time 10:30", 1.0)]),
        ("a BREAK b", [("a", 1.0), (None, 1.0), ("b", 1.0)]),
        ("(a BREAK b:2)", [("a", 2.0), (None, 1.0), ("b", 2.0)]),
        ("BREAK a", [(None, 1.0), ("a", 1.0)]),
        ("BREAKFAST", [("BREAKFAST", 1.0)]),
        ("(a:1.2.3)", [("a:1.2.3", 1.1)]),
        ("()", [("", 1.0)]),
        ("(a [b) c] d", [("a ", 1.1), ("b", 1.0), (" c", round(1 / 1.1, 6)), (" d", 1.0)]),
        ("(a (b", [("a ", 1.1), ("b", 1.21)]),
    ],
)
def test_pieces(prompt: str, wanted: list[tuple[str | None, float]]) -> None:
    assert pieces(prompt) == wanted


@given(st.text(alphabet=r"ab ()[]:\1.", max_size=60))
def test_any_text_has_pieces(prompt: str) -> None:
    found = pieces_of(prompt)
    assert found
    plain = "".join(piece.text or "" for piece in found)
    assert set(plain) <= set(prompt)


@pytest.mark.parametrize(
    ("prompt", "text"),
    [
        ("(a" * 100_000, "a" * 100_000),
        ("(a" * 100_000 + ":1)" * 100_000, "a" * 100_000),
        ("[(a" * 50_000 + ")]" * 50_000, "a" * 50_000),
        (":" * 100_000, ":" * 100_000),
    ],
)
def test_brackets_may_nest_as_deep_as_they_like(prompt: str, text: str) -> None:
    """To look at all that is inside of each would take hours."""
    assert "".join(piece.text or "" for piece in pieces_of(prompt)) == text


def test_text_without_syntax_is_one_piece() -> None:
    assert pieces_of("a cat, 50% off\nüñí") == [Piece("a cat, 50% off\nüñí")]


@pytest.mark.parametrize("prompt", ["(a:11)", "(a:-11)", "(" * 2000 + "a", "(((a:9):9):9)"])
def test_a_weight_out_of_range_is_a_problem(prompt: str) -> None:
    assert "allowed: -10 to 10" in str(weight_problem(prompt))


def test_weights_within_the_range_are_none() -> None:
    assert weight_problem("(a:10) (b:-10) [c] ((d)) (e:0)") is None


@pytest.mark.parametrize(
    ("prompt", "text", "loras"),
    [
        ("a <lora:ink:0.8> b", "a  b", {"ink": 0.8}),
        ("<lora:ink>", "", {"ink": 1.0}),
        ("<lora:a:1><lora:b:-0.5> x", "x", {"a": 1.0, "b": -0.5}),
        ("<lora:a:1> <lora:a:1.0>", "", {"a": 1.0}),
        ("a <b> c", "a <b> c", {}),
    ],
)
def test_loras_are_taken_out(prompt: str, text: str, loras: dict[str, float]) -> None:
    assert take_loras(prompt) == (text, loras)


@pytest.mark.parametrize(
    "prompt",
    [
        "<lora:a:x>",
        "<lora:a:1> <lora:a:2>",
        "<lora:a:nan>",
        "<lora:a:1_0>",
        "<lora:a:>",
        "<lora:a:1:1>",
        "<lora:a:１>",
    ],
)
def test_a_lora_without_one_scale_is_a_problem(prompt: str) -> None:
    with pytest.raises(ValueError, match="<lora:a:"):
        take_loras(prompt)
