"""Reading values without guessing, and messages that any value may stand in."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from handler.api.fields import FieldReader
from handler.api.schema import Field, Kind
from handler.config import HandlerConfig
from handler.messages import show, shown_name, summarise

NAN, INFINITY = float("nan"), float("inf")
# Python refuses to write an integer of so many digits.
HUGE = pytest.param(10**5000, id="huge")


def form(**fields: object) -> FieldReader:
    return FieldReader(fields, allow_text=True)


def typed(**fields: object) -> FieldReader:
    return FieldReader(fields, allow_text=False)


@pytest.mark.parametrize("value", [1, 50, 100])
def test_integers(value: int) -> None:
    assert typed(n=value).integer("n", low=1, high=100) == value
    assert form(n=value).integer("n", low=1, high=100) == value
    assert form(n=f" {value} ").integer("n", low=1, high=100) == value


@pytest.mark.parametrize(
    "value", ["50", True, False, 50.0, "", "abc", [50], {"a": 1}, NAN, INFINITY, 0, 101, HUGE]
)
def test_what_is_no_integer_in_json(value: object) -> None:
    reader = typed(n=value)
    assert reader.integer("n", low=1, high=100) is None
    assert "allowed: 1 to 100" in reader.problems["n"]


@pytest.mark.parametrize(
    "value", ["", "5O", "5.0", "0x10", "1_0", "５０", "1e1", "0", "101", "9" * 99]
)
def test_what_is_no_integer_in_a_form(value: str) -> None:
    reader = form(n=value)
    assert reader.integer("n", low=1, high=100) is None
    assert "allowed: 1 to 100" in reader.problems["n"]


def test_a_quoted_number_is_told_apart() -> None:
    reader = typed(n="50", x="7.5")
    reader.integer("n", low=1, high=100)
    reader.number("x", low=0, high=10)
    assert all("without quotes" in problem for problem in reader.problems.values())


@pytest.mark.parametrize("value", [7, 7.5, "7.5", "7", ".5", "+7.", "75e-1"])
def test_numbers(value: object) -> None:
    number = form(x=value).number("x", low=0, high=10)
    assert number == float(value)  # type: ignore[arg-type]
    assert isinstance(number, float)


@pytest.mark.parametrize("value", [NAN, INFINITY, -INFINITY, HUGE, True, "7.5", [], -0.1, 10.1])
def test_what_is_no_number_in_json(value: object) -> None:
    reader = typed(x=value)
    assert reader.number("x", low=0, high=10) is None
    assert "allowed: 0 to 10" in reader.problems["x"]


@pytest.mark.parametrize("value", ["nan", "inf", "-Infinity", "1e999", "1,5", "", ".", "0x1p3"])
def test_what_is_no_number_in_a_form(value: str) -> None:
    reader = form(x=value)
    assert reader.number("x", low=0, high=10) is None
    assert "allowed: 0 to 10" in reader.problems["x"]


@pytest.mark.parametrize(("value", "meant"), [("true", True), ("FALSE", False), ("1", True)])
def test_booleans(value: str, meant: bool) -> None:
    assert form(b=value).boolean("b") is meant
    assert typed(b=meant).boolean("b") is meant
    reader = typed(b=value)
    assert reader.boolean("b") is None
    assert reader.problems["b"].endswith("is neither true nor false; write it without quotes")
    reader = typed(b="yes")
    assert reader.boolean("b") is None
    assert reader.problems["b"] == "'yes' is neither true nor false"


def test_text_is_stripped_and_checked() -> None:
    assert typed(t=" a cat\n").text("t", max_chars=5) == "a cat"
    for value, complaint in (
        ("a" * 6, "6 characters long; allowed are 5"),
        ("a\0b", "unusable character '\\x00' at 1"),
        ("ab\ud83d", "unusable character '\\ud83d' at 2"),
        (" ", "is empty"),
        (5, "must be text, not 5"),
    ):
        reader = typed(t=value)
        assert reader.text("t", min_chars=1, max_chars=5) is None
        assert complaint in reader.problems["t"]


def test_choices() -> None:
    choices = {"png": "png", "jpg": "jpeg"}
    assert typed(f=" JPG").choice("f", choices=choices) == "jpeg"
    reader = typed(f="pmg", g=3)
    assert reader.choice("f", choices=choices) is None
    assert reader.choice("g", choices=choices) is None
    assert "did you mean png?" in reader.problems["f"]
    assert "3 is not allowed; one of png, jpg" in reader.problems["g"]


def test_two_names_of_one_field() -> None:
    reader = typed(steps=5, num_inference_steps=5)
    assert reader.take("num_inference_steps", ["steps"]) is None
    assert "num_inference_steps and steps" in reader.problems["num_inference_steps"]
    assert reader.rest() == {}


@pytest.mark.parametrize(
    ("kind", "value"),
    [
        (Kind.TEXT, "a"),
        (Kind.INTEGER, 3),
        (Kind.NUMBER, 3.0),
        (Kind.BOOLEAN, True),
        (Kind.CHOICE, "png"),
        (Kind.ID, "r-1"),
        (Kind.LORAS, {"ink": 1.0}),
    ],
)
def test_a_field_of_any_kind_may_have_other_names(kind: Kind, value: object) -> None:
    each = Field(name="f", kind=kind, meaning="", aliases=("g",), maximum=9, choices={"png": "png"})
    assert typed(g=value).read(each, HandlerConfig()) == value
    reader = typed(f=value, g=value)
    assert reader.read(each, HandlerConfig()) is None
    assert reader.problems == {"f": "given more than once, as f and g: send one of them"}


def test_null_is_absent() -> None:
    reader = typed(steps=None, num_inference_steps=5)
    assert reader.take("num_inference_steps", ["steps"]) == 5
    assert reader.take("missing") is None
    assert not reader.problems


def test_unknown_fields_are_named_but_not_all_of_a_flood() -> None:
    reader = FieldReader({f"{n}": 1 for n in range(10000)} | {"widht": 1}, allow_text=False)
    reader.refuse_rest({"width", "height"})
    assert len(reader.problems) == 17
    assert reader.problems["…"] == "9985 more unknown fields"
    reader = typed(widht=1, zzz=2)
    reader.refuse_rest({"width", "height"})
    assert reader.problems["widht"] == "unknown field; did you mean width?"
    assert reader.problems["zzz"] == "unknown field; known are height, width"


def test_summary_is_short() -> None:
    assert summarise({"a": "x", "b": "y"}) == "a: x; b: y"
    assert summarise(dict.fromkeys("abcde", "x")) == "a: x; b: x; c: x; and 2 more"


ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.binary(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
)


@given(ANYTHING | st.builds(lambda sign: sign * 10**6000, st.sampled_from([1, -1])))
def test_anything_can_be_shown(value: object) -> None:
    assert len(show(value)) < 700
    assert show(value).isprintable()


@given(st.text() | st.text(min_size=100))
def test_any_name_can_be_shown(name: str) -> None:
    assert shown_name(name).isprintable() or not name
    assert len(shown_name(name)) <= 64 * 10 + 1
