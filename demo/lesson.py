"""What the UNet is shown, what a perfect one would answer, and how an answer is marked."""

import random
from dataclasses import dataclass

import torch
from torch import Tensor

from demo import grammar
from demo.exact import posterior_mean
from demo.rollout import Rollout, noised, picture_of

MAX_SNR_WEIGHT = 15.0
TIME_POWER = 0.8
# How much the difference that guidance multiplies counts beside the two predictions themselves.
DIFFERENCE_WEIGHT = 2.0
# Below this time the noise leaves no doubt about the picture, and a prompt adds nothing to it.
MIN_OPEN_TIME = 250


@dataclass(frozen=True, slots=True)
class Batch:
    """Noisy pictures (N, 3, 24, 24), their times (N,), and what each is to become."""

    noisy: Tensor
    times: Tensor
    examples: list[grammar.Example]


def draw_batch(rng: random.Random, num: int, alphas: Tensor, openness: grammar.Openness) -> Batch:
    """Rendered pictures, noised; times spread evenly, which varies less than independent draws."""
    triples = grammar.combinations(held_out=False)
    examples = [grammar.sample(rng, triples, openness) for _ in range(num)]
    noise_of = torch.Generator().manual_seed(rng.getrandbits(60))
    spread = (torch.arange(num) + torch.rand(1, generator=noise_of)) / num
    # A few more of the noisy ones, where the picture is decided.
    times = (spread**TIME_POWER * len(alphas)).long().clamp(max=len(alphas) - 1)
    noisy = [
        noised(picture_of(example.sprite), alphas[time_], noise_of)
        for example, time_ in zip(examples, times, strict=True)
    ]
    return Batch(torch.stack(noisy), times, examples)


def rollout_batch(rollout: Rollout) -> Batch:
    """Where the trajectories are now."""
    return Batch(
        torch.stack([trajectory.latents for trajectory in rollout.trajectories]),
        torch.tensor([trajectory.times[0] for trajectory in rollout.trajectories]),
        [trajectory.example for trajectory in rollout.trajectories],
    )


def exact_targets(batch: Batch, alphas: Tensor) -> tuple[Tensor, Tensor]:
    """The v, each (N, 3, 24, 24), that a perfect network says with the prompt and without."""
    with_prompt, without = [], []
    for noisy, time_, example in zip(
        batch.noisy, batch.times.tolist(), batch.examples, strict=True
    ):
        alpha = alphas[time_]
        mean = posterior_mean(example.wish, noisy, alpha)
        is_open = time_ >= MIN_OPEN_TIME
        free_mean = posterior_mean(grammar.Wish(), noisy, alpha) if is_open else mean
        for means, value in ((with_prompt, mean), (without, free_mean)):
            means.append((alpha.sqrt() * noisy - value) / (1 - alpha).sqrt())
    return torch.stack(with_prompt), torch.stack(without)


def guided_loss(
    predicted: tuple[Tensor, Tensor], targets: tuple[Tensor, Tensor], snr: Tensor
) -> Tensor:
    """Squared error of v, with the prompt, without, and of the difference of the two: a scalar.

    Each prediction and target is (N, 3, 24, 24); `snr` (N,) is the pictures' signal over noise.

    Guidance multiplies the error of the difference. Weighted by the noise level as in min-SNR (Hang
    et al., 2023), but never to zero.
    """
    with_prompt, without = (p - t for p, t in zip(predicted, targets, strict=True))
    squares = with_prompt.square() + without.square()
    squares = squares + DIFFERENCE_WEIGHT * (with_prompt - without).square()
    weight = (snr.clamp(max=MAX_SNR_WEIGHT) + 1) / (snr + 1)
    return (weight * squares.mean(dim=(1, 2, 3))).mean() / 2
