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
# Prompts left out where a picture is seen only once.
PROMPT_DROPOUT = 0.1
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


def drop_prompts(rng: random.Random, batch: Batch) -> Batch:
    """`batch` with a tenth of its prompts left out: those examples are to become anything."""
    examples = [
        grammar.Example("", grammar.Wish(), example.sprite)
        if rng.random() < PROMPT_DROPOUT
        else example
        for example in batch.examples
    ]
    return Batch(batch.noisy, batch.times, examples)


def exact_targets(batch: Batch, wishes: list[grammar.Wish], alphas: Tensor) -> Tensor:
    """The v, (N, 3, 24, 24), that a perfect network says of each picture, given what is wished."""
    targets = []
    for noisy, alpha, wish in zip(batch.noisy, alphas[batch.times], wishes, strict=True):
        mean = posterior_mean(wish, noisy, alpha)
        targets.append((alpha.sqrt() * noisy - mean) / (1 - alpha).sqrt())
    return torch.stack(targets)


def prompted_wishes(batch: Batch) -> list[grammar.Wish]:
    """What the prompts ask for."""
    return [example.wish for example in batch.examples]


def free_wishes(batch: Batch) -> list[grammar.Wish]:
    """What is asked for without the prompts: nothing, but the picture itself where it is plain."""
    return [
        grammar.Wish() if time_ >= MIN_OPEN_TIME else example.wish
        for time_, example in zip(batch.times.tolist(), batch.examples, strict=True)
    ]


def plain_loss(predicted: Tensor, target: Tensor, snr: Tensor) -> Tensor:
    """Squared error of v, a scalar, of predictions and targets (N, 3, 24, 24).

    Weighted by `snr` (N,), the pictures' signal over noise, as in min-SNR (Hang et al., 2023), but
    never to zero.
    """
    return _weighted((predicted - target).square(), snr)


def guided_loss(
    predicted: tuple[Tensor, Tensor], targets: tuple[Tensor, Tensor], snr: Tensor
) -> Tensor:
    """Squared error of v, with the prompt, without, and of the difference of the two: a scalar.

    Each prediction and target is (N, 3, 24, 24), and weighted as in `plain_loss`. The difference is
    there because guidance multiplies its error.
    """
    with_prompt, without = (p - t for p, t in zip(predicted, targets, strict=True))
    squares = with_prompt.square() + without.square()
    squares = squares + DIFFERENCE_WEIGHT * (with_prompt - without).square()
    return _weighted(squares, snr) / 2


def _weighted(squares: Tensor, snr: Tensor) -> Tensor:
    weight = (snr.clamp(max=MAX_SNR_WEIGHT) + 1) / (snr + 1)
    return (weight * squares.mean(dim=(1, 2, 3))).mean()
