"""Train the demo pipeline on pictures that it renders itself: `python -m demo.train`.

First the text encoder learns to read, then the UNet learns to draw with the text encoder as it is.

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

import numpy as np
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm import tqdm

from demo import grammar, sprites
from demo.build import build_pipeline, save_pipeline
from demo.exact import cached_coverage, posterior_mean
from demo.muon import Muon
from demo.teach import teach, tokenize

PROMPT_DROPOUT = 0.1
MAX_SNR_WEIGHT = 5.0
NUM_WARMUP_STEPS = 100
TEXT_ENCODER_FILE = "text_encoder.safetensors"
ADAM_LR_SHARE = 0.6
NUM_LOG_STEPS = 50
TIME_POWER = 0.8
# Below this time the noise leaves no doubt about the picture, and the exact mean is the picture.
MIN_EXACT_TIME = 250


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
    """Rise, stay, fall linearly at the end. A run can be given its end at any time."""
    rise = (step + 1) / NUM_WARMUP_STEPS
    fall = (settings.num_steps - step) / max(settings.num_decay_steps, 1)
    return max(0.0, min(1.0, rise, fall))


def draw_batch(
    step: int, rank: int, settings: Settings, triples: list[tuple[str, str, str]]
) -> tuple[list[grammar.Example], Tensor, torch.Generator]:
    """This worker's examples, their pictures (B, 3, 24, 24) in [-1, 1], and its noise source."""
    seed = (settings.seed * settings.num_workers + rank) * 10_000_000 + step
    rng = random.Random(seed)
    examples, pictures = [], []
    for _ in range(settings.batch_size // settings.num_workers):
        example = grammar.sample(rng, triples)
        if rng.random() < PROMPT_DROPOUT:
            example = grammar.Example("", grammar.Wish(), example.sprite)
        sprite = example.sprite
        alpha = cached_coverage(sprite.shape, sprite.radius_px, sprite.x_px, sprite.y_px)
        examples.append(example)
        pictures.append(sprites.paint(alpha, sprite.color, sprite.background))
    latents = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).contiguous()
    return examples, latents, torch.Generator().manual_seed(seed)


def expected_pictures(
    examples: list[grammar.Example], latents: Tensor, noisy: Tensor, times: Tensor, alphas: Tensor
) -> Tensor:
    """`latents`, with the exact mean in its place wherever that is at hand and differs."""
    expected = latents.clone()
    for row, (example, time_) in enumerate(zip(examples, times.tolist(), strict=True)):
        wish = example.wish
        if time_ >= MIN_EXACT_TIME and wish.shape and wish.color and wish.background:
            expected[row] = posterior_mean(wish, noisy[row], alphas[time_])
    return expected


def diffusion_loss(
    unet: nn.Module,
    states: Tensor,
    examples: list[grammar.Example],
    alphas: Tensor,
    latents: Tensor,
    noise_of: torch.Generator,
) -> Tensor:
    """Squared error of v, weighted as in min-SNR (Hang et al., 2023) but never to zero."""
    num, num_times = len(latents), len(alphas)
    # Times spread evenly over the batch: less variance than independent draws.
    spread = (torch.arange(num) + torch.rand(1, generator=noise_of)) / num
    # A few more of the noisy ones, where the picture is decided.
    times = (spread**TIME_POWER * num_times).long().clamp(max=num_times - 1)
    alpha = alphas[times].view(-1, 1, 1, 1)
    noise = torch.randn(latents.shape, generator=noise_of)
    noisy = alpha.sqrt() * latents + (1 - alpha).sqrt() * noise
    expected = expected_pictures(examples, latents, noisy, times, alphas)
    target = (alpha.sqrt() * noisy - expected) / (1 - alpha).sqrt()
    with torch.autocast("cpu", torch.bfloat16):
        prediction = unet(noisy, times, states, return_dict=False)[0]
    snr = alphas[times] / (1 - alphas[times])
    weight = (snr.clamp(max=MAX_SNR_WEIGHT) + 1) / (snr + 1)
    errors = (prediction.float() - target).square().mean(dim=(1, 2, 3))
    return (weight * errors).mean()


def make_optimizers(
    model: nn.Module, rank: int, num_workers: int
) -> list[tuple[torch.optim.Optimizer, float]]:
    """Muon for the matrices in the middle, Adam for embeddings, ends, gains and biases.

    Each with its share of the learning rate.
    """
    matrices, others = [], []
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
    ours, theirs = list(average.parameters()), list(model.parameters())
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
        self.unet = self.pipeline.unet.train()
        self.average = copy.deepcopy(self.unet).requires_grad_(False)
        self.optimizers = make_optimizers(self.unet, rank, settings.num_workers)
        self.triples = grammar.combinations(held_out=False)

    def step(self, step: int) -> float:
        """Draw one batch and learn from it; return the loss."""
        examples, latents, noise_of = draw_batch(step, self.rank, self.settings, self.triples)
        prompts = [example.prompt for example in examples]
        with torch.no_grad():
            states = self.text_encoder(tokenize(self.pipeline.tokenizer, prompts))[0]
        loss = diffusion_loss(self.unet, states, examples, self.alphas, latents, noise_of)
        loss.backward()
        mean_loss = average_gradients(self.unet, loss, self.settings.num_workers)
        for optimizer, share in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = self.settings.lr * share * learning_rate_share(step, self.settings)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        update_average(self.average, self.unet, step, self.settings.ema_decay)
        return mean_loss

    def save(self, num_done: int) -> None:
        """Write what resuming needs, and the averaged weights as a pipeline folder."""
        out = self.settings.out
        state = {
            "step": num_done,
            "unet": self.unet.state_dict(),
            "average": self.average.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer, _ in self.optimizers],
        }
        torch.save(state, out / "state.pt.part")
        os.replace(out / "state.pt.part", out / "state.pt")
        export = copy.copy(self.pipeline)
        export.unet = copy.deepcopy(self.average)
        save_pipeline(export, out / "pipeline.part")
        shutil.rmtree(out / "pipeline", ignore_errors=True)
        os.replace(out / "pipeline.part", out / "pipeline")

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
    parser.add_argument("--steps", type=int, default=12_000)
    parser.add_argument("--decay-steps", type=int, default=1_500, help="at the end")
    parser.add_argument("--batch-size", type=int, default=16, help="of all workers together")
    parser.add_argument("--workers", type=int, default=2, help="processes")
    parser.add_argument("--lr", type=float, default=1.5e-3)
    parser.add_argument("--ema-decay", type=float, default=0.999)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--port", type=int, default=29517, help="where the workers meet")
    parser.add_argument("--checkpoint-steps", type=int, default=250)
    args = parser.parse_args(argv)
    if args.batch_size % args.workers:
        print(
            f"error: --batch-size {args.batch_size} is no multiple of --workers {args.workers}",
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
        torch.multiprocessing.spawn(work, (settings, args.port), nprocs=args.workers)
    print(f"{args.out / 'pipeline'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
