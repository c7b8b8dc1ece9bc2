"""Two sizes in one forward of a transformer, against a forward for each: what packing would bring.

    python -m benchmarks.mixed_sizes     # about a minute on two cores

A block of a diffusion transformer at the width of a tiny one, in the forms that its parts have:
what treats tokens one by one takes the tokens of all pictures as one long line, attention is run
picture by picture (`in turn`), or over the whole line with a mask that keeps pictures apart
(`masked`). Both give what two forwards give; what they cost is measured beside these, in turns.
"""

from __future__ import annotations

import argparse
import itertools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.functional import layer_norm, scaled_dot_product_attention

from benchmarks.report import Figure, Spread, write_report

__all__ = ["MIXES", "Mix", "TinyDiT", "measure"]

NEEDED = 1.15
DEPTH = 2
# A mask of blocks has the square of this many bits; longer lines are not tried with it.
MAX_MASKED = 4096


@dataclass(frozen=True, slots=True)
class Mix:
    """Pictures in flight: how many rows there are of which number of tokens."""

    name: str
    rows: tuple[tuple[int, int], ...]
    """Rows, and tokens of each."""


def _tokens(size_px: int) -> int:
    """Of a picture whose latents are an eighth of it, in patches of 2 x 2 of them."""
    return (size_px // 16) ** 2


MIXES = (
    Mix("2 of 256 + 2 of 128", ((2, _tokens(256)), (2, _tokens(128)))),
    Mix("2 of 512 + 2 of 256", ((2, _tokens(512)), (2, _tokens(256)))),
    Mix("2 of 512 + 2 of 640 + 2 of 768", tuple((2, _tokens(side)) for side in (512, 640, 768))),
)


class TinyDiT(nn.Module):
    """Blocks of attention and two layers between, modulated by each picture's own step."""

    def __init__(self, width: int = 256, num_heads: int = 4, depth: int = DEPTH) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.ModuleList(nn.Linear(width, 3 * width) for _ in range(depth))
        self.out = nn.ModuleList(nn.Linear(width, width) for _ in range(depth))
        self.up = nn.ModuleList(nn.Linear(width, 4 * width) for _ in range(depth))
        self.down = nn.ModuleList(nn.Linear(4 * width, width) for _ in range(depth))
        self.modulation = nn.ModuleList(nn.Linear(width, 4 * width) for _ in range(depth))

    def forward(
        self,
        x: torch.Tensor,
        steps: torch.Tensor,
        attend: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor] | None = None,
        owner: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """(B, L, W), each row's step (B, 1, W) → (B, L, W).

        Of one line of tokens, (1, L, W), `owner` (L) says whose step each token has.
        """
        attend = attend or scaled_dot_product_attention
        for layers in zip(self.qkv, self.out, self.up, self.down, self.modulation, strict=True):
            qkv, out, up, down, modulation = layers
            modulated = modulation(steps)
            if owner is not None:
                modulated = modulated[owner].transpose(0, 1)
            shift, scale, more_shift, more_scale = modulated.chunk(4, dim=-1)
            normed = layer_norm(x, x.shape[-1:]) * (1 + scale) + shift
            heads = qkv(normed).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
            x = x + out(attend(*heads.unbind(0)).transpose(1, 2).flatten(2))
            normed = layer_norm(x, x.shape[-1:]) * (1 + more_scale) + more_shift
            x = x + down(nn.functional.gelu(up(normed), approximate="tanh"))
        return x


@dataclass(frozen=True, slots=True)
class Inputs:
    """Of each size: tokens (B, L, W) and steps (B, 1, W)."""

    tokens: list[torch.Tensor]
    steps: list[torch.Tensor]


def inputs_of(mix: Mix, width: int) -> Inputs:
    draw = torch.Generator().manual_seed(0)
    return Inputs(
        [torch.randn(n, length, width, generator=draw) for n, length in mix.rows],
        [torch.randn(n, 1, width, generator=draw) for n, _ in mix.rows],
    )


def apart(model: TinyDiT, inputs: Inputs) -> list[torch.Tensor]:
    """A forward for each size, as the engine does."""
    return [model(x, s) for x, s in zip(inputs.tokens, inputs.steps, strict=True)]


def in_turn(model: TinyDiT, inputs: Inputs) -> list[torch.Tensor]:
    """All tokens as one line; attention for each size by itself."""
    shapes = [x.shape[:2] for x in inputs.tokens]
    ends = list(itertools.accumulate(n * length for n, length in shapes))

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        found = []
        for (n, length), end in zip(shapes, ends, strict=True):
            own = slice(end - n * length, end)
            query, key, value = (
                torch.unflatten(t[0, :, own], 1, (n, length)).transpose(0, 1) for t in (q, k, v)
            )
            drawn = scaled_dot_product_attention(query, key, value)
            found.append(drawn.transpose(0, 1).flatten(1, 2))
        return torch.cat(found, dim=1)[None]

    return _unpacked(model(*_packed(inputs), attend, _owner(inputs)), inputs)


def masked(model: TinyDiT, inputs: Inputs) -> list[torch.Tensor]:
    """All tokens as one line; attention over all of it, with a mask of blocks."""
    owner = _owner(inputs)
    mask = owner[:, None] == owner[None, :]

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return scaled_dot_product_attention(q, k, v, attn_mask=mask)

    return _unpacked(model(*_packed(inputs), attend, _owner(inputs)), inputs)


def _owner(inputs: Inputs) -> torch.Tensor:
    """(L), the picture that each token of the line belongs to."""
    lengths = torch.tensor([x.shape[1] for x in inputs.tokens for _ in x])
    return torch.repeat_interleave(torch.arange(len(lengths)), lengths)


def _packed(inputs: Inputs) -> tuple[torch.Tensor, torch.Tensor]:
    """The line of all tokens (1, L, W), and the step of every picture (B, 1, W)."""
    return torch.cat([x.flatten(0, 1) for x in inputs.tokens])[None], torch.cat(inputs.steps)


def _unpacked(line: torch.Tensor, inputs: Inputs) -> list[torch.Tensor]:
    counts = [x.shape[0] * x.shape[1] for x in inputs.tokens]
    parts = torch.split(line[0], counts)
    return [part.view_as(x) for part, x in zip(parts, inputs.tokens, strict=True)]


WAYS: dict[str, Callable[[TinyDiT, Inputs], list[torch.Tensor]]] = {
    "in turn": in_turn,
    "masked": masked,
}


@torch.no_grad()
def measure(
    mixes: Sequence[Mix] = MIXES,
    rounds: int = 9,
    *,
    width: int = 256,
    clock: Callable[[], float] = time.perf_counter,
) -> list[Figure]:
    """Of each mix and way: seconds of the forwards apart, by those of the packed one."""
    torch.manual_seed(0)
    model = TinyDiT(width)
    figures = []
    for mix in mixes:
        inputs = inputs_of(mix, width)
        num_tokens = sum(n * length for n, length in mix.rows)
        ways = {"apart": apart, **WAYS}
        if num_tokens > MAX_MASKED:
            del ways["masked"]
        seconds: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(rounds + 1):
            for name, way in ways.items():
                begun_s = clock()
                way(model, inputs)
                seconds[name].append(clock() - begun_s)
        for name in [*ways][1:]:
            pairs = zip(seconds["apart"][1:], seconds[name][1:], strict=True)
            ratios = Spread(tuple(a / b for a, b in pairs))
            figures.append(Figure(f"{mix.name}: apart / packed, {name}", ratios, "x", NEEDED))
        figures.append(Figure(f"{mix.name}: apart", Spread(tuple(seconds["apart"][1:])), "s"))
    return figures


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.mixed_sizes", description=__doc__)
    parser.add_argument("--rounds", type=int, default=9, help="of each way (default: 9)")
    parser.add_argument("--threads", type=int, help="of torch (default: its own choice)")
    parser.add_argument(
        "--cpu-time", action="store_true", help="count the processor's time, of one thread"
    )
    arguments = parser.parse_args(argv)
    if arguments.cpu_time or arguments.threads:
        torch.set_num_threads(arguments.threads or 1)
    clock = time.process_time if arguments.cpu_time else time.perf_counter
    figures = measure(rounds=arguments.rounds, clock=clock)
    details: dict[str, object] = {"torch_threads": torch.get_num_threads()}
    print(f"\n{write_report('mixed_sizes', figures, details)}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
