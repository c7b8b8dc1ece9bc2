"""A1111's syntax of prompts: weights, breaks and LoRA tags, as text becomes pieces.

``(word)`` weighs 1.1 times, ``[word]`` 1 / 1.1 times, ``(word:1.3)`` 1.3 times; brackets nest, and
one that is not closed reaches to the end. A backslash makes a bracket a character. ``BREAK`` begins
the next window of the text encoder. ``<lora:name:0.8>`` names a LoRA and its scale; it is taken out
of a prompt before its pieces are read, and in a negative prompt it is text.

Untrusted text: nothing here recurses, and all of it is linear, however brackets nest.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from handler.api.lora_names import scale_in
from handler.messages import show

__all__ = ["MAX_WEIGHT", "Piece", "pieces_of", "take_loras", "weight_problem"]

MAX_WEIGHT = 10.0
"""How far from nothing a weight may be, to either side."""

_ROUND, _SQUARE = 1.1, 1 / 1.1
_TOKEN = re.compile(
    r"(?P<escaped>\\[()\[\]\\])"
    r"|(?P<weight>:\s{0,8}(?P<number>[+-]?(?:[0-9]{1,9}\.?[0-9]{0,9}|\.[0-9]{1,9}))\s{0,8}\))"
    r"|(?P<bracket>[()\[\]])"
    r"|(?P<text>[^\\()\[\]:]+|[\\:])"
)
_BREAK = re.compile(r"\s*\bBREAK\b\s*")
_LORA = re.compile(r"<lora:(?P<name>[^<>:]{1,200})(?::(?P<scale>[^<>]{0,200}))?>")


@dataclass(frozen=True, slots=True)
class Piece:
    """Text of one weight, or a break, whose text is None."""

    text: str | None
    weight: float = 1.0


def pieces_of(prompt: str) -> list[Piece]:
    """The pieces of a prompt in their order; neighbours of one weight are one piece."""
    tokens = list(_TOKEN.finditer(prompt))
    factors, closings = _brackets(tokens)
    # What all open brackets of a kind make together, that of each below it.
    products = {"(": [1.0], "[": [1.0]}
    texts: list[tuple[str | None, float]] = []
    for place, token in enumerate(tokens):
        text = token.group()
        weight = products["("][-1] * products["["][-1]
        if place in factors:
            products[text].append(products[text][-1] * factors[place])
        elif place in closings:
            products["(" if text.endswith(")") else "["].pop()
        elif token.lastgroup == "escaped":
            texts.append((text[1], weight))
        else:
            for number, part in enumerate(_BREAK.split(text)):
                if number:
                    texts.append((None, weight))
                texts.append((part, weight))
    return _joined(texts)


def _brackets(tokens: list[re.Match[str]]) -> tuple[dict[int, float], set[int]]:
    """The factor of each token that opens a bracket, by its place, and the places that close one.

    What closes nothing is text. What nothing closes counts as if a bracket stood at the end.
    """
    opened: dict[str, list[int]] = {"(": [], "[": []}
    factors: dict[int, float] = {}
    closings: set[int] = set()
    for place, token in enumerate(tokens):
        text = token.group()
        if text in opened:
            opened[text].append(place)
            factors[place] = _ROUND if text == "(" else _SQUARE
        elif token["weight"] is not None and opened["("]:
            factors[opened["("].pop()] = float(token["number"])
            closings.add(place)
        elif (text == ")" and opened["("]) or (text == "]" and opened["["]):
            opened["(" if text == ")" else "["].pop()
            closings.add(place)
    return factors, closings


def _joined(texts: list[tuple[str | None, float]]) -> list[Piece]:
    runs: list[tuple[list[str] | None, float]] = []
    for text, weight in texts:
        if text is None:
            runs.append((None, 1.0))
        elif runs and runs[-1][0] is not None and runs[-1][1] == weight:
            runs[-1][0].append(text)
        elif text:
            runs.append(([text], weight))
    pieces = [Piece(None if run is None else "".join(run), weight) for run, weight in runs]
    return pieces or [Piece("")]


def weight_problem(prompt: str) -> str | None:
    """What is wrong with the weights of a prompt; None where nothing is."""
    for piece in pieces_of(prompt):
        if not -MAX_WEIGHT <= piece.weight <= MAX_WEIGHT:
            return (
                f"a weight of {piece.weight:.3g} is out of range; allowed:"
                f" {-MAX_WEIGHT:g} to {MAX_WEIGHT:g}, brackets multiplied"
            )
    return None


def take_loras(prompt: str) -> tuple[str, dict[str, float]]:
    """The prompt without its LoRA tags, and the scale of each LoRA that they name.

    Raises:
        ValueError: a tag has no number for its scale, or one LoRA has two.
    """
    loras: dict[str, float] = {}
    for tag in _LORA.finditer(prompt):
        name, written = tag["name"].strip(), tag["scale"]
        scale = 1.0 if written is None else scale_in(written)
        if scale is None:
            raise ValueError(f"the scale of <lora:{name[:40]}:…> is {show(written)}, not a number")
        if loras.setdefault(name, scale) != scale:
            raise ValueError(f"<lora:{name[:40]}:…> stands there twice, with two scales")
    return _LORA.sub("", prompt).strip(), loras
