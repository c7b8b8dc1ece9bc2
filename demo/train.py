"""Train the demo pipeline on pictures that it renders itself: `python -m demo.train`.

First the text encoder learns to read, then the UNet learns to draw with the text encoder as it is:
in the first half of the training from many noisy pictures, each seen once; in the second half from
each seen twice, with its prompt and without, and from where sampling under guidance leads.

Every worker is a process with one thread: a step waits for the others once, not in every layer.
Every example is drawn from (seed, worker, step), so a stopped run goes on unchanged.
"""

import argparse
import copy
import os
import random
import shutil
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.multiprocessing.spawn import spawn
from tqdm import tqdm

from demo.build import NUM_LATENT_CHANNELS, build_pipeline, save_pipeline
from demo.grammar import MOSTLY_NAMED, OFTEN_OPEN, Openness
from demo.lesson import (
    Batch,
    draw_batch,
    drop_prompts,
    exact_targets,
    free_wishes,
    guided_loss,
    plain_loss,
    prompted_wishes,
    rollout_batch,
)
from demo.muon import Muon
from demo.rollout import Rollout
from demo.teach import teach, tokenize

NUM_WARMUP_STEPS = 100
TEXT_ENCODER_FILE = "text_encoder.safetensors"
ADAM_LR_SHARE = 0.6
NUM_LOG_STEPS = 50
# The end of the training, in which guidance counts: a network that cannot draw yet is led nowhere.
SHARE_GUIDED = 0.5
# The end of the training, in which prompts often leave terms open.
SHARE_OFTEN_OPEN = 0.2


@dataclass(frozen=True, slots=True)
class Settings:
    """What makes a run; `batch_size` is of all workers together."""

    out: Path
    num_steps: int
    num_decay_steps: int
    batch_size: int
    num_workers: int
    lr: float
    ema_decay: float
    seed: int
    num_checkpoint_steps: int


def learning_rate_share(step: int, settings: Settings) -> float:
    """Rise, stay, fall linearly at the end."""
    rise = (step + 1) / NUM_WARMUP_STEPS
    fall = (settings.num_steps - step) / max(settings.num_decay_steps, 1)
    return max(0.0, min(1.0, rise, fall))


def is_guided_at(step: int, settings: Settings) -> bool:
    """First what single noisy pictures show is learned, then where guidance leads."""
    return step >= (1 - SHARE_GUIDED) * settings.num_steps


def openness_at(step: int, settings: Settings) -> Openness:
    """First whatever prompts name is learned, then what to do where they name little."""
    is_late = step >= (1 - SHARE_OFTEN_OPEN) * settings.num_steps
    return OFTEN_OPEN if is_late else MOSTLY_NAMED


def make_optimizers(
    model: nn.Module, rank: int, num_workers: int
) -> list[tuple[torch.optim.Optimizer, float]]:
    """Muon for the matrices in the middle, Adam for embeddings, ends, gains and biases.

    Each with its share of the learning rate.
    """
    matrices: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for name, param in model.named_parameters():
        is_end = any(part in name for part in ("conv_in", "conv_out", "embedding", "norm"))
        (others if is_end or param.ndim < 2 else matrices).append(param)
    adam = torch.optim.AdamW(others, betas=(0.9, 0.99), weight_decay=0.0)
    muon = Muon(
        matrices,
        lr=0.0,
        weight_decay=0.05,
        rank=rank,
        num_workers=num_workers,
        total=dist.all_reduce if num_workers > 1 else lambda tensor: tensor,
    )
    return [(muon, 1.0), (adam, ADAM_LR_SHARE)]


def average_gradients(model: nn.Module, loss: Tensor, num_workers: int) -> float:
    """Replace every gradient by its mean over the workers; return the mean loss."""
    if num_workers == 1:
        return loss.item()
    grads = [param.grad for param in model.parameters() if param.grad is not None]
    flat = torch.cat([*(grad.flatten() for grad in grads), loss.detach().view(1)])
    dist.all_reduce(flat)
    flat /= num_workers
    offset = 0
    for grad in grads:
        grad.copy_(flat[offset : offset + grad.numel()].view_as(grad))
        offset += grad.numel()
    return flat[-1].item()


@torch.no_grad()
def update_average(average: nn.Module, model: nn.Module, step: int, max_decay: float) -> None:
    """Move the running average of the weights towards `model`, quickly at first."""
    decay = min(max_decay, (1 + step) / (10 + step))
    ours: list[Tensor] = list(average.parameters())
    theirs: list[Tensor] = list(model.parameters())
    torch._foreach_lerp_(ours, theirs, 1 - decay)


class Trainer:
    """One worker's UNet, running average and optimizers, and the text encoder that has learned."""

    def __init__(self, rank: int, settings: Settings) -> None:
        self.rank = rank
        self.settings = settings
        self.pipeline = build_pipeline(settings.seed)
        self.text_encoder = self.pipeline.text_encoder.requires_grad_(False)
        self.text_encoder.load_state_dict(load_file(settings.out / TEXT_ENCODER_FILE))
        self.alphas = self.pipeline.scheduler.alphas_cumprod
        self.snr = self.alphas / (1 - self.alphas)
        self.unet = self.pipeline.unet.train()
        self.average = copy.deepcopy(self.unet).requires_grad_(False)
        self.optimizers = make_optimizers(self.unet, rank, settings.num_workers)
        self.rollout: Rollout | None = None

    def step(self, step: int) -> float:
        """Learn from one batch; return the loss."""
        settings = self.settings
        seed = (settings.seed * settings.num_workers + self.rank) * 10_000_000 + step
        lesson = self.guided_lesson if is_guided_at(step, settings) else self.plain_lesson
        loss = lesson(step, random.Random(seed))
        torch.autograd.backward(loss)
        mean_loss = average_gradients(self.unet, loss, settings.num_workers)
        for optimizer, share in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = settings.lr * share * learning_rate_share(step, settings)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        update_average(self.average, self.unet, step, settings.ema_decay)
        return mean_loss

    def plain_lesson(self, step: int, rng: random.Random) -> Tensor:
        """Noisy pictures, each seen once, a few of them without their prompt: the loss."""
        num = self.settings.batch_size // self.settings.num_workers
        batch = draw_batch(rng, num, self.alphas, openness_at(step, self.settings))
        batch = drop_prompts(rng, batch)
        predicted = self.predict(batch.noisy, batch.times, [e.prompt for e in batch.examples])
        target = exact_targets(batch, prompted_wishes(batch), self.alphas)
        return plain_loss(predicted, target, self.snr[batch.times])

    def guided_lesson(self, step: int, rng: random.Random) -> Tensor:
        """Noisy pictures, each seen with its prompt and without: the loss. The rollout goes on."""
        batch = self.draw_guided(step, rng)
        num = len(batch.examples)
        prompts = [example.prompt for example in batch.examples] + [""] * num
        predicted = self.predict(batch.noisy.repeat(2, 1, 1, 1), batch.times.repeat(2), prompts)
        with_prompt, without = predicted.chunk(2)
        assert self.rollout is not None
        num_walked = len(self.rollout.trajectories)
        self.rollout.advance(with_prompt[:num_walked].detach(), without[:num_walked].detach())
        targets = (
            exact_targets(batch, prompted_wishes(batch), self.alphas),
            exact_targets(batch, free_wishes(batch), self.alphas),
        )
        return guided_loss((with_prompt, without), targets, self.snr[batch.times])

    def draw_guided(self, step: int, rng: random.Random) -> Batch:
        """This worker's examples: first those that the rollout has reached, as many drawn anew."""
        settings = self.settings
        num_pairs = settings.batch_size // settings.num_workers // 2
        # Begun anew with every checkpoint, so that a resumed run needs no trajectories from before.
        openness = openness_at(step, settings)
        if step % settings.num_checkpoint_steps == 0 or self.rollout is None:
            self.rollout = Rollout(num_pairs // 2, rng.getrandbits(60), self.alphas, openness)
        self.rollout.openness = openness
        walked = rollout_batch(self.rollout)
        drawn = draw_batch(rng, num_pairs - len(walked.examples), self.alphas, openness)
        return Batch(
            torch.cat([walked.noisy, drawn.noisy]),
            torch.cat([walked.times, drawn.times]),
            walked.examples + drawn.examples,
        )

    def predict(self, noisy: Tensor, times: Tensor, prompts: list[str]) -> Tensor:
        """The v, (N, 3, 24, 24), that the network says of noisy pictures with these prompts.

        The fourth latent channel is zero, and what the network says there is not read: so its
        weights get no gradient, and stay zero.
        """
        with torch.no_grad():
            states = self.text_encoder(tokenize(self.pipeline.tokenizer, prompts))[0]
        latents = nn.functional.pad(noisy, (0, 0, 0, 0, 0, NUM_LATENT_CHANNELS - noisy.shape[1]))
        with torch.autocast("cpu", torch.bfloat16):
            v: Tensor = self.unet(latents, times, states, return_dict=False)[0]
        return v[:, : noisy.shape[1]].float()

    def save(self, num_done: int) -> None:
        """Write the averaged weights as a pipeline folder, then what resuming needs.

        In this order: a run that is stopped in between does these steps again.
        """
        out = self.settings.out
        export = copy.copy(self.pipeline)
        export.unet = copy.deepcopy(self.average)
        save_pipeline(export, out / "pipeline.part")
        shutil.rmtree(out / "pipeline", ignore_errors=True)
        os.replace(out / "pipeline.part", out / "pipeline")
        state = {
            "step": num_done,
            "unet": self.unet.state_dict(),
            "average": self.average.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer, _ in self.optimizers],
        }
        torch.save(state, out / "state.pt.part")
        os.replace(out / "state.pt.part", out / "state.pt")

    def restore(self) -> int:
        """Go on from the last checkpoint, if there is one; return how many steps are done."""
        path = self.settings.out / "state.pt"
        if not path.exists():
            return 0
        state = torch.load(path, weights_only=True)
        self.unet.load_state_dict(state["unet"])
        self.average.load_state_dict(state["average"])
        for (optimizer, _), saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        num_done: int = state["step"]
        return num_done


def teach_text_encoder(settings: Settings) -> None:
    """Teach a fresh text encoder, and write it beside the checkpoints."""
    torch.backends.cuda.enable_flash_sdp(False)
    pipeline = build_pipeline(settings.seed)
    right = teach(
        pipeline.text_encoder,
        pipeline.tokenizer,
        settings.seed,
        is_quiet=not sys.stderr.isatty(),
    )
    print(f"text encoder: {100 * right:.1f} % of the prompts' terms read right")
    save_file(pipeline.text_encoder.state_dict(), settings.out / TEXT_ENCODER_FILE)


def work(rank: int, settings: Settings, port: int) -> None:
    """Run one worker to the end of the training."""
    torch.set_num_threads(1)
    # Fused attention's backward pass takes a third of the step on CPUs, plain matrix products a
    # tenth (torch 2.13, bfloat16, 144 tokens).
    torch.backends.cuda.enable_flash_sdp(False)
    if settings.num_workers > 1:
        dist.init_process_group(
            "gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=settings.num_workers
        )
    trainer = Trainer(rank, settings)
    first = trainer.restore()
    is_quiet = rank > 0 or not sys.stderr.isatty()
    losses: list[float] = []
    since_s = time.monotonic()
    for step in tqdm(
        range(first, settings.num_steps),
        initial=first,
        total=settings.num_steps,
        disable=is_quiet,
    ):
        losses.append(trainer.step(step))
        num_done = step + 1
        if rank == 0 and num_done % NUM_LOG_STEPS == 0:
            step_s = (time.monotonic() - since_s) / len(losses)
            line = f"{num_done},{sum(losses) / len(losses):.5f},{step_s:.3f}"
            with (settings.out / "log.csv").open("a") as file:
                file.write(line + "\n")
            losses, since_s = [], time.monotonic()
        is_due = num_done % settings.num_checkpoint_steps == 0 or num_done == settings.num_steps
        if rank == 0 and is_due:
            trainer.save(num_done)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m demo.train", description=__doc__)
    parser.add_argument(
        "--out", type=Path, default=Path("demo/runs/default"), help="goes on from what is there"
    )
    parser.add_argument("--steps", type=int, default=20_000)
    parser.add_argument("--decay-steps", type=int, default=10_000, help="at the end")
    parser.add_argument("--batch-size", type=int, default=16, help="of all workers together")
    parser.add_argument("--workers", type=int, default=2, help="processes")
    parser.add_argument("--lr", type=float, default=1.5e-3)
    parser.add_argument("--ema-decay", type=float, default=0.999)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--port", type=int, default=29517, help="where the workers meet")
    parser.add_argument("--checkpoint-steps", type=int, default=250)
    args = parser.parse_args(argv)
    if args.batch_size % (4 * args.workers):
        print(
            f"error: --batch-size {args.batch_size} is no multiple of 4 x --workers {args.workers}",
            file=sys.stderr,
        )
        return 2
    settings = Settings(
        out=args.out,
        num_steps=args.steps,
        num_decay_steps=args.decay_steps,
        batch_size=args.batch_size,
        num_workers=args.workers,
        lr=args.lr,
        ema_decay=args.ema_decay,
        seed=args.seed,
        num_checkpoint_steps=args.checkpoint_steps,
    )
    args.out.mkdir(parents=True, exist_ok=True)
    if not (args.out / TEXT_ENCODER_FILE).exists():
        teach_text_encoder(settings)
    if args.workers == 1:
        work(0, settings, args.port)
    else:
        spawn(work, (settings, args.port), nprocs=args.workers)  # type: ignore[no-untyped-call]
    print(f"{args.out / 'pipeline'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
