"""Rows as TorchServe delivers them, and bodies that cannot be read."""

from __future__ import annotations

import pytest

from handler.api.body import HOW_TO_SEND, MAX_FIELDS, Payload, media_type, open_body
from handler.api.foreign_names import HOW_PICTURES_ARE_SENT
from handler.errors import InvalidRequest, TooLarge
from tests.support.pictures import encoded

JSON = {"content-type": "application/json"}
TEXT = {"content-type": "text/plain; charset=utf-8"}


def read(row: dict[str, object], headers: dict[str, str] | None = None) -> Payload:
    return open_body(row, headers or {}, max_body_bytes=1000)


def problem(row: dict[str, object], headers: dict[str, str] | None = None) -> dict[str, str]:
    with pytest.raises(InvalidRequest) as caught:
        read(row, headers)
    return caught.value.fields


@pytest.mark.parametrize(
    ("row", "headers"),
    [
        ({"body": "a cat"}, TEXT),
        ({"body": "a cat"}, JSON),  # the JSON string "a cat", parsed by the frontend
        ({"body": bytearray(b"a cat")}, {}),  # -T file
        ({"body": b"\xef\xbb\xbfa cat"}, {}),  # from an editor that writes a byte order mark
        ({"body": memoryview(b"a cat")}, {"content-type": "application/octet-stream"}),
        ({"body": bytearray(b'"a cat"')}, {"content-type": "Application/JSON"}),
    ],
)
def test_a_bare_prompt(row: dict[str, object], headers: dict[str, str]) -> None:
    assert read(row, headers) == Payload({"prompt": "a cat"}, is_form=False)


@pytest.mark.parametrize(
    "headers",
    [{}, {"content-type": "Application/JSON; charset=utf-8"}, {"content-type": "a/b+json"}],
)
def test_json_that_the_frontend_did_not_parse(headers: dict[str, str]) -> None:
    payload = read({"body": bytearray(b' {"prompt": "a cat", "seed": 5}')}, headers)
    assert payload == Payload({"prompt": "a cat", "seed": 5}, is_form=False)


@pytest.mark.parametrize("prompt", ["{cat|dog} on a mat", '"a cat"', "[a cat]", "5", "null"])
def test_text_that_is_no_json_object_is_a_prompt(prompt: str) -> None:
    assert read({"body": prompt.encode()}).fields == {"prompt": prompt}


def test_declared_text_stays_text() -> None:
    assert read({"body": b'{"colour": 1}'}, TEXT).fields == {"prompt": '{"colour": 1}'}


def test_a_form_is_decoded() -> None:
    row: dict[str, object] = {"prompt": bytearray("Kätzchen".encode()), "seed": "5", "n": 2}
    assert read(row) == Payload({"prompt": "Kätzchen", "seed": "5", "n": 2}, is_form=True)


@pytest.mark.parametrize("media", ["application/x-www-form-urlencoded", "multipart/form-data"])
def test_a_form_field_may_be_called_body(media: str) -> None:
    found = read({"body": b"a ring"}, {"content-type": f"{media}; boundary=x"})
    assert found == Payload({"body": "a ring"}, is_form=True)


def test_form_fields_that_are_not_utf8_are_all_named() -> None:
    payload = read({"prompt": b"\xff", "negative_prompt": b"ab\xfe", "seed": b"5"})
    assert payload.fields == {"seed": "5"}
    assert payload.problems == {
        "prompt": "is not UTF-8 text (byte 0xff at 0)",
        "negative_prompt": "is not UTF-8 text (byte 0xfe at 2)",
    }


def test_the_form_decoders_leftovers_say_how_to_send_a_prompt() -> None:
    assert problem({}) == {"prompt": HOW_TO_SEND}
    assert "curl -H 'Content-Type: text/plain' -d 'a prompt'" in HOW_TO_SEND
    assert "--data-urlencode 'prompt=a prompt'" in HOW_TO_SEND


def test_broken_json_says_where() -> None:
    assert "line 1 column 12" in problem({"body": b'{"prompt": a}'}, JSON)["body"]
    hint = problem({"body": b'{"prompt": a}'})["body"]
    assert "is sent as text/plain" in hint


@pytest.mark.parametrize(
    ("row", "headers", "complaint"),
    [
        ({"body": None}, JSON, "null is neither"),
        ({"body": 5}, JSON, "5 is neither"),
        ({"body": True}, JSON, "true is neither"),
        ({"body": ["a", "b"]}, JSON, '{"instances": ['),
        ({"body": b"ab\xff"}, {}, "byte 0xff at 2"),
        ({"body": b"\xff"}, JSON, "byte 0xff at 0"),
        ({"body": b"[" * 900}, JSON, "is not JSON"),
        ({"body": b"9" * 900 + b"e"}, JSON, "is not JSON"),
    ],
)
def test_bodies_that_cannot_be_read(
    row: dict[str, object], headers: dict[str, str], complaint: str
) -> None:
    assert complaint in problem(row, headers)["body"]


def test_json_nested_beyond_the_interpreters_stack() -> None:
    for body in (b"[" * 200_000, b'{"a":' * 200_000, b"[" * 200_000 + b"]" * 200_000):
        with pytest.raises(InvalidRequest, match="JSON"):
            open_body({"body": body}, JSON, max_body_bytes=2**30)


def test_integers_of_more_digits_than_python_reads() -> None:
    with pytest.raises(InvalidRequest, match="is not JSON: a number is too long"):
        open_body({"body": b"1" * 5000}, JSON, max_body_bytes=2**30)


@pytest.mark.parametrize("media", ["application/pdf", "application/xml", "nonsense"])
def test_other_content_types_are_refused(media: str) -> None:
    assert media in problem({"body": b"a cat"}, {"content-type": media})["Content-Type"]


@pytest.mark.parametrize(
    "row",
    [
        {"body": b"a" * 1001},
        {"body": memoryview(b"a" * 1001)},
        {"body": "a" * 1001},
        {"body": {"prompt": "a" * 1001}},
        {"body": {"a" * 1001: 1}},
        {"body": {"instances": [{"prompt": "a" * 300}] * 4}},
        {"body": [0] * 1001},
        {"body": {"prompt": 10**4000}},
        {"prompt": b"a" * 500, "negative_prompt": b"a" * 501},
    ],
)
def test_bodies_that_are_too_large(row: dict[str, object]) -> None:
    with pytest.raises(TooLarge, match="allowed are 1000"):
        read(row)


def test_the_declared_length_counts() -> None:
    with pytest.raises(TooLarge, match="1001 bytes"):
        read({"body": {"prompt": "a"}}, {"content-length": "1001"})
    assert read({"body": "a"}, {"content-length": "1000"}).fields
    assert read({"body": "a"}, {"content-length": "many"}).fields


def test_a_body_of_the_largest_size_is_read() -> None:
    assert read({"body": b"a" * 1000}).fields["prompt"] == "a" * 1000


def test_deep_values_are_measured_without_recursion() -> None:
    deep: object = "a"
    for _ in range(100_000):
        deep = [deep]
    with pytest.raises(TooLarge):
        read({"body": {"prompt": deep}})


def test_media_type() -> None:
    assert media_type({"content-type": " Text/Plain ; charset=x"}) == "text/plain"
    assert media_type({}) == ""


@pytest.mark.parametrize(
    "text", ['{"prompt": "a cat", "seed": 7}', ' {"inputs": "a cat"}', '{"instances": ["a cat"]}']
)
def test_json_that_says_it_is_text_is_not_drawn_as_text(text: str) -> None:
    for content in (text, text.encode()):
        problems = problem({"body": content}, TEXT)
        assert "send Content-Type: application/json" in problems["Content-Type"]


@pytest.mark.parametrize("text", ["{a cat}", '{"colour": "red"}', '{"prompt": broken', "[1, 2]"])
def test_a_prompt_may_look_like_json(text: str) -> None:
    assert read({"body": text}, TEXT).fields == {"prompt": text}


def test_text_json_is_json() -> None:
    headers = {"content-type": "text/json"}
    assert read({"body": b'{"prompt": "a cat"}'}, headers).fields == {"prompt": "a cat"}


@pytest.mark.parametrize("row", [{"body": {}}, {}], ids=["JSON", "form"])
def test_more_fields_than_any_request_has_are_refused_unread(row: dict[str, object]) -> None:
    many: dict[str, object] = {f"image_{i}": "a" for i in range(MAX_FIELDS + 1)}
    row = {"body": many} if row else many
    with pytest.raises(InvalidRequest) as caught:
        open_body(row, {}, max_body_bytes=10**6)
    assert caught.value.fields == {"body": f"has {MAX_FIELDS + 1} fields; allowed are {MAX_FIELDS}"}


def test_a_file_under_a_name_that_is_no_field_is_told_where_pictures_go() -> None:
    file = encoded((8, 8))
    row: dict[str, object] = {"prompt": file, "file": file, "notes": b"\xff"}
    problems = read(row).problems
    assert problems["file"] == HOW_PICTURES_ARE_SENT
    assert problems["prompt"] == "is not UTF-8 text (byte 0x89 at 0)"
    assert problems["notes"] == "is not UTF-8 text (byte 0xff at 0)"


def test_an_encoded_body_is_told_what_it_is() -> None:
    headers = {"content-type": "application/json", "content-encoding": "gzip"}
    found = problem({"body": b"\x1f\x8b\x08"}, headers)
    assert found == {"Content-Encoding": "'gzip' cannot be read; send the body as it is"}
    plain = {**headers, "content-encoding": "identity"}
    assert read({"body": b'{"prompt": "a"}'}, plain).fields == {"prompt": "a"}
