"""Noisy pictures as sampling makes them: followed from noise to picture under guidance.

Guidance leads away from the noisy pictures that noise alone makes, and a network that has only seen
those leaves grain and fringes there. So a part of every batch comes from trajectories that the
network itself walks, one step a batch.
"""

import random
from dataclasses import dataclass

import torch
from torch import Tensor

from demo import grammar
from demo.exact import cached_coverage
from demo.sprites import Sprite, paint

GUIDANCE_SCALES = (1.0, 3.0, 5.0, 7.5, 7.5, 10.0)
NUMS_STEPS = (10, 20, 25, 50)


@dataclass(slots=True)
class Trajectory:
    """One picture on its way; `times` are those still to come, noisiest first."""

    example: grammar.Example
    guidance_scale: float
    times: list[int]
    latents: Tensor


def noised(picture: Tensor, alpha: Tensor, noise_of: torch.Generator) -> Tensor:
    """`picture` with as much noise as there is at cumulative `alpha`."""
    noise = torch.randn(picture.shape, generator=noise_of)
    return alpha.sqrt() * picture + (1 - alpha).sqrt() * noise


def picture_of(sprite: Sprite) -> Tensor:
    """The rendered sprite, (3, 24, 24) in [-1, 1]."""
    alpha = cached_coverage(sprite.shape, sprite.radius_px, sprite.x_px, sprite.y_px)
    return torch.from_numpy(paint(alpha, sprite.color, sprite.background)).permute(2, 0, 1)


class Rollout:
    """`num` trajectories that go on side by side; whoever ends begins anew."""

    def __init__(
        self,
        num: int,
        seed: int,
        alphas: Tensor,
        openness: grammar.Openness = grammar.MOSTLY_NAMED,
    ) -> None:
        self.alphas = alphas
        self.openness = openness
        self.triples = grammar.combinations(held_out=False)
        self.rng = random.Random(seed)
        self.noise_of = torch.Generator().manual_seed(seed)
        # The first ones begin anywhere on the way, so that all noise levels are always there.
        self.trajectories = [self._begin(self.rng.random()) for _ in range(num)]

    def _begin(self, share_done: float = 0.0) -> Trajectory:
        example = grammar.sample(self.rng, self.triples, self.openness)
        num_steps = self.rng.choice(NUMS_STEPS)
        stride = len(self.alphas) / num_steps
        times = [round((num_steps - i) * stride) - 1 for i in range(num_steps)]
        times = times[int(share_done * num_steps) :]
        latents = noised(picture_of(example.sprite), self.alphas[times[0]], self.noise_of)
        return Trajectory(example, self.rng.choice(GUIDANCE_SCALES), times, latents)

    def advance(self, v_prompt: Tensor, v_empty: Tensor) -> None:
        """Take one deterministic DDIM step from what the network said, (num, 3, 24, 24) each."""
        for row, trajectory in enumerate(self.trajectories):
            now = trajectory.times.pop(0)
            if not trajectory.times:
                self.trajectories[row] = self._begin()
                continue
            v = v_empty[row] + trajectory.guidance_scale * (v_prompt[row] - v_empty[row])
            alpha, next_alpha = self.alphas[now], self.alphas[trajectory.times[0]]
            picture = alpha.sqrt() * trajectory.latents - (1 - alpha).sqrt() * v
            noise = (1 - alpha).sqrt() * trajectory.latents + alpha.sqrt() * v
            trajectory.latents = next_alpha.sqrt() * picture + (1 - next_alpha).sqrt() * noise
