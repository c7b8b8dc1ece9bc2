"""Teach the text encoder to read: every term of the prompt, linearly, from every state at its end.

Learning this together with the picture takes the UNet's whole training, since a word that moves a
shape changes few pixels. Learning it first, from prompts alone, takes minutes. The states after
the prompt's end are most of what cross-attention sees, so all of them are taught.
"""

import random

import torch
from torch import Tensor, nn
from tqdm import tqdm
from transformers import CLIPTextModel, CLIPTokenizer

from demo.grammar import POSITIONS, SIZES, Wish, combinations, sample
from demo.sprites import COLORS, SHAPES

TERMS: dict[str, tuple[str | None, ...]] = {
    "shape": (None, *SHAPES),
    "color": (None, *COLORS),
    "background": (None, *COLORS),
    "size": (None, *SIZES),
    "position": (None, *POSITIONS),
}
EMPTY_SHARE = 0.05


def tokenize(tokenizer: CLIPTokenizer, prompts: list[str]) -> Tensor:
    """Token ids (B, 77), padded as the pipeline does it."""
    tokens: Tensor = tokenizer(
        prompts,
        padding="max_length",
        truncation=True,
        max_length=tokenizer.model_max_length,
        return_tensors="pt",
    ).input_ids
    return tokens


def _draw(rng: random.Random, num: int) -> tuple[list[str], list[Wish]]:
    triples = combinations(held_out=False)
    prompts, wishes = [], []
    for _ in range(num):
        example = sample(rng, triples)
        is_empty = rng.random() < EMPTY_SHARE
        prompts.append("" if is_empty else example.prompt)
        wishes.append(Wish() if is_empty else example.wish)
    return prompts, wishes


def teach(
    encoder: CLIPTextModel,
    tokenizer: CLIPTokenizer,
    seed: int,
    num_steps: int = 1500,
    batch_size: int = 32,
    lr: float = 2e-3,
    is_quiet: bool = True,
) -> float:
    """Train `encoder` in place; return the share of terms that the last states got right."""
    rng = random.Random(seed)
    torch.manual_seed(seed)
    width = encoder.config.hidden_size
    heads = nn.ModuleDict({term: nn.Linear(width, len(names)) for term, names in TERMS.items()})
    params = [*encoder.parameters(), *heads.parameters()]
    optimizer = torch.optim.AdamW(params, lr, betas=(0.9, 0.99), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, num_steps, pct_start=0.1)
    right = 0.0
    encoder.train()
    for step in tqdm(range(num_steps), desc="text encoder", disable=is_quiet):
        prompts, wishes = _draw(rng, batch_size)
        tokens = tokenize(tokenizer, prompts)
        with torch.autocast("cpu", torch.bfloat16):
            states = encoder(tokens)[0].float()
        is_end = tokens == tokenizer.eos_token_id
        ends = states[is_end]
        owners = is_end.nonzero()[:, 0]
        loss = torch.zeros(())
        num_right = 0.0
        for term, names in TERMS.items():
            truth = torch.tensor([names.index(getattr(wish, term)) for wish in wishes])[owners]
            logits = heads[term](ends)
            loss = loss + nn.functional.cross_entropy(logits, truth)
            num_right += (logits.argmax(dim=1) == truth).float().mean().item() / len(TERMS)
        torch.autograd.backward(loss)
        nn.utils.clip_grad_norm_(params, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        schedule.step()
        right += (num_right - right) * (0.02 if step else 1.0)
        if step % 100 == 99 and is_quiet:
            print(f"text encoder: step {step + 1}, {100 * right:.2f} % of terms right", flush=True)
    encoder.eval()
    return right
