"""Say in English what a picture shows: the prompts of training and judging."""

import random
from collections.abc import Mapping
from dataclasses import dataclass, replace

from demo.sprites import (
    COLORS,
    GRID_PX,
    LARGE_RADII_PX,
    MARGIN_PX,
    RADII_PX,
    SHAPES,
    SIZE_PX,
    SMALL_RADII_PX,
    Sprite,
)

# Where the centre may lie, as shares of the free room: (x low, x high), (y low, y high).
_LOW, _MID, _HIGH, _ANY = (-1.0, -0.7), (-0.3, 0.3), (0.7, 1.0), (-1.0, 1.0)
POSITIONS = {
    "left": (_LOW, _MID),
    "right": (_HIGH, _MID),
    "top": (_MID, _LOW),
    "bottom": (_MID, _HIGH),
    "center": (_MID, _MID),
    "top left": (_LOW, _LOW),
    "top right": (_HIGH, _LOW),
    "bottom left": (_LOW, _HIGH),
    "bottom right": (_HIGH, _HIGH),
}
ANYWHERE = (_ANY, _ANY)
SIZES = {"small": SMALL_RADII_PX, "large": LARGE_RADII_PX}

SIZE_WORDS = {
    "small": ("small", "small", "little", "tiny"),
    "large": ("large", "large", "big", "huge"),
}
COLOR_WORDS = {"gray": ("gray", "grey"), "purple": ("purple", "purple", "violet")}
SHAPE_WORDS = {
    "circle": ("circle", "circle", "circle", "disc", "dot"),
    "square": ("square", "square", "square", "box"),
    "ring": ("ring", "ring", "ring", "donut"),
    "cross": ("cross", "cross", "plus"),
    "moon": ("moon", "moon", "crescent"),
}
EDGE_PHRASES = ("at the {}", "on the {}", "at the {}", "on the {} side", "near the {}", "{}")
SIDE_PHRASES = ("on the {}", "on the {}", "at the {}", "to the {}", "on the {} side", "{}")
CENTER_PHRASES = ("in the middle", "in the center", "in the centre", "at the center", "centered")
CORNER_PHRASES = ("in the {} corner", "at the {}", "in the {}", "on the {}", "{}")
PREFIXES = (
    *("pixel art of", "a picture of", "an image of", "a drawing of", "draw", "a photo of"),
    *("a painting of", "an illustration of", "please draw", "there is"),
)
SUFFIXES = ("pixel art", "flat colors", "simple", "minimal", "sprite", "icon", "high quality")
# Words that mean nothing here, so that the model learns that such words do no harm.
_FILLER_TEXT = """
beautiful nice lovely cute pretty bright shiny simple plain solid flat clean perfect single
very just only really quite cat dog astronaut horse riding castle photo portrait painting
detailed sharp style artistic masterpiece best quality digital modern retro game world
happy great new old good this that is it my your some here and for in by from like
"""
# Kept as whole tokens for later training; today they count as fillers.
_RESERVED_TEXT = """
house tree fish smiley face sun flower two three next above below beside between
"""
FILLERS = tuple(_FILLER_TEXT.split())
RESERVED = tuple(_RESERVED_TEXT.split())


@dataclass(frozen=True, slots=True)
class Wish:
    """What a prompt asks for; None where it leaves the choice open."""

    shape: str | None = None
    color: str | None = None
    background: str | None = None
    size: str | None = None
    position: str | None = None


def _held_out() -> frozenset[tuple[str, str, str]]:
    """The 100 (colour, shape, background) combinations that training never shows, ten a shape."""
    rng = random.Random(24)
    kept = []
    for shape in SHAPES:
        pairs = [(c, shape, b) for c in COLORS for b in COLORS if c != b]
        kept += rng.sample(pairs, 100 // len(SHAPES))
    return frozenset(kept)


HELD_OUT = _held_out()


def combinations(held_out: bool) -> list[tuple[str, str, str]]:
    """Every (colour, shape, background) of two different colours, on one side of the split."""
    every = ((c, s, b) for c in COLORS for s in SHAPES for b in COLORS if c != b)
    return [triple for triple in every if (triple in HELD_OUT) == held_out]


def place(rng: random.Random, wish: Wish) -> tuple[float, float, float]:
    """Choose a radius and a centre, in pixels, that fulfil `wish`."""
    radius = rng.choice(RADII_PX if wish.size is None else SIZES[wish.size])
    room = SIZE_PX / 2 - radius - MARGIN_PX
    spans = ANYWHERE if wish.position is None else POSITIONS[wish.position]
    x, y = (round((SIZE_PX / 2 + rng.uniform(*span) * room) / GRID_PX) * GRID_PX for span in spans)
    return radius, x, y


def fulfil(rng: random.Random, wish: Wish, triple: tuple[str, str, str]) -> Sprite:
    """Draw at random what `wish` leaves open, with the combination `triple`."""
    color, shape, background = triple
    radius, x, y = place(rng, wish)
    return Sprite(shape, color, background, radius, x, y)


@dataclass(frozen=True, slots=True)
class Example:
    """One training example: a prompt, what it says, and a picture that it describes."""

    prompt: str
    wish: Wish
    sprite: Sprite


@dataclass(frozen=True, slots=True)
class Openness:
    """How often prompts leave a term open."""

    shape: float
    color: float
    background: float


MOSTLY_NAMED = Openness(shape=0.03, color=0.05, background=0.1)
OFTEN_OPEN = Openness(shape=0.06, color=0.3, background=0.35)


def sample(
    rng: random.Random, triples: list[tuple[str, str, str]], openness: Openness = MOSTLY_NAMED
) -> Example:
    """Draw an example of one of the combinations `triples`."""
    triple = rng.choice(triples)
    color, shape, background = triple
    wish = Wish(
        shape=shape if rng.random() < 1 - openness.shape else None,
        color=color if rng.random() < 1 - openness.color else None,
        background=background if rng.random() < 1 - openness.background else None,
        size=rng.choice(tuple(SIZES)) if rng.random() < 0.5 else None,
        position=rng.choice(tuple(POSITIONS)) if rng.random() < 0.55 else None,
    )
    return Example(phrase(rng, wish), wish, fulfil(rng, wish, triple))


def full_wish(rng: random.Random, triple: tuple[str, str, str]) -> Wish:
    """A wish that names the combination, and every so often a size and a place."""
    color, shape, background = triple
    wish = Wish(shape, color, background)
    if rng.random() < 0.5:
        wish = replace(wish, size=rng.choice(tuple(SIZES)))
    if rng.random() < 0.5:
        wish = replace(wish, position=rng.choice(("left", "right", "top", "bottom")))
    return wish


def phrase(rng: random.Random, wish: Wish, plain: bool = False) -> str:
    """Say `wish` in one of many ways; `plain` leaves out tag lists, fillers and odd endings."""
    words = [
        _either(rng, SIZE_WORDS, wish.size),
        _either(rng, COLOR_WORDS, wish.color),
        _either(rng, SHAPE_WORDS, wish.shape) or ("shape" if wish.color or wish.size else None),
    ]
    background = _either(rng, COLOR_WORDS, wish.background)
    where = _where(rng, wish.position)
    if not plain and rng.random() < 0.06:
        tags = [w for w in (*words, where, background and f"{background} background") if w]
        rng.shuffle(tags)
        text = ", ".join(tags) if rng.random() < 0.5 else " ".join(tags)
    else:
        thing = _article(rng, " ".join(w for w in words if w))
        text = _sentence(rng, thing, where, background)
        if rng.random() < 0.15:
            text = f"{rng.choice(PREFIXES)} {text}".strip()
    return text if plain else _roughen(rng, text)


def vocabulary() -> list[str]:
    """Every word that prompts are made of, each of which is one token."""
    texts: list[str] = [*COLORS, *SHAPES, *POSITIONS, *PREFIXES, *SUFFIXES, *FILLERS, *RESERVED]
    for table in (SIZE_WORDS, COLOR_WORDS, SHAPE_WORDS):
        texts += [word for words in table.values() for word in words]
    texts += [*EDGE_PHRASES, *SIDE_PHRASES, *CENTER_PHRASES, *CORNER_PHRASES]
    texts += ["a an the one something shape with of on over against front background backdrop"]
    return sorted({word for text in texts for word in text.split() if word.isalpha()})


def _either(
    rng: random.Random, words: Mapping[str, tuple[str, ...]], name: str | None
) -> str | None:
    return None if name is None else rng.choice(words.get(name, (name,)))


def _article(rng: random.Random, noun: str) -> str:
    if not noun:
        return rng.choice(("", "something", "a shape"))
    article = rng.choices(("a", "the", "one", ""), (6, 2, 0.5, 1.5))[0]
    if article == "a" and noun[0] in "aeiou":
        article = "an"
    return f"{article} {noun}".strip()


def _where(rng: random.Random, position: str | None) -> str:
    if position is None:
        return ""
    if position == "center":
        return rng.choice(CENTER_PHRASES)
    if position in ("left", "right"):
        return rng.choice(SIDE_PHRASES).format(position)
    return rng.choice(EDGE_PHRASES if " " not in position else CORNER_PHRASES).format(position)


def _sentence(rng: random.Random, thing: str, where: str, background: str | None) -> str:
    placed = f"{thing} {where}".strip()
    if background is None:
        return placed
    ground = f"{background} {rng.choice(('background', 'background', 'background', 'backdrop'))}"
    ground = _article(rng, ground)
    if not thing:
        return f"{ground} {where}".strip()
    forms = [
        f"{placed} on {ground}",
        f"{placed} on {ground}",
        f"{thing} on {ground} {where}".strip(),
        f"{placed}, {ground}",
        f"{placed} on {background}",
        f"{placed} {rng.choice(('over', 'against', 'in front of', 'with', 'and'))} {ground}",
        f"{ground} with {placed}",
        f"{ground}, {placed}",
        f"on {ground}, {placed}",
        f"on {ground} {placed}",
    ]
    if where.startswith(("at", "in", "on", "near", "to")):
        forms += [f"{thing} {where} of {ground}"] * 3 + [f"{where} of {ground}, {thing}"]
    return rng.choice(forms)


def _roughen(rng: random.Random, text: str) -> str:
    """Now and then add an ending, or words that mean nothing."""
    if rng.random() < 0.06:
        text = f"{text}, {rng.choice(SUFFIXES)}"
    words = text.split()
    if rng.random() < 0.12:
        for _ in range(rng.choice((1, 1, 2, 3, 6))):
            letters = "abcdefghijklmnopqrstuvwxyz"
            nonsense = "".join(rng.choices(letters, k=rng.randint(2, 9)))
            filler = rng.choice((*FILLERS, *RESERVED)) if rng.random() < 0.6 else nonsense
            words.insert(rng.choice((0, len(words), rng.randint(0, len(words)))), filler)
    text = " ".join(words)
    return text + rng.choice((".", "!")) if rng.random() < 0.05 else text
