"""What training is made of: exact targets, trajectories, Muon, the reading lesson, resuming."""

import random
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import CLIPTextConfig, CLIPTextModel

from demo import train as training
from demo.build import build_pipeline, build_scheduler
from demo.exact import posterior_mean, templates
from demo.grammar import (
    HELD_OUT,
    MOSTLY_NAMED,
    OFTEN_OPEN,
    Example,
    Wish,
    combinations,
    fulfil,
    place,
    sample,
    vocabulary,
)
from demo.judge import judge_grid, score
from demo.lesson import (
    DIFFERENCE_WEIGHT,
    MAX_SNR_WEIGHT,
    MIN_OPEN_TIME,
    PROMPT_DROPOUT,
    draw_batch,
    drop_prompts,
    exact_targets,
    free_wishes,
    guided_loss,
    plain_loss,
    prompted_wishes,
    rollout_batch,
)
from demo.muon import Muon, orthogonalize
from demo.rollout import Rollout
from demo.sprites import coverage, render
from demo.teach import teach
from demo.tokens import build_tokenizer
from demo.train import Settings, Trainer, is_guided_at, learning_rate_share, openness_at

WISH = Wish("star", "red", "blue", "small", "top")


def settings(out: Path, **changes: object) -> Settings:
    made = {
        "out": out,
        "num_steps": 100,
        "num_decay_steps": 20,
        "batch_size": 4,
        "num_workers": 1,
        "lr": 1e-3,
        "ema_decay": 0.9,
        "seed": 3,
        "num_checkpoint_steps": 10,
    }
    return Settings(**{**made, **changes})  # type: ignore[arg-type]


def test_without_signal_the_exact_mean_is_the_mean_of_what_is_drawn() -> None:
    rng = random.Random(0)
    drawn = [render(fulfil(rng, WISH, ("red", "star", "blue"))) for _ in range(4_000)]
    mean = torch.from_numpy(np.mean(drawn, axis=0)).permute(2, 0, 1)
    exact = posterior_mean(WISH, torch.zeros(3, 24, 24), torch.tensor(0.0))
    assert (exact - mean).abs().max() < 0.08
    other = posterior_mean(
        Wish("star", "red", "blue", "small", "left"), torch.zeros(3, 24, 24), torch.tensor(0.0)
    )
    assert (other - mean).abs().max() > 0.3


def test_with_little_noise_the_exact_mean_is_the_picture() -> None:
    rng = random.Random(1)
    noise_of = torch.Generator().manual_seed(0)
    alpha = torch.tensor(0.9)
    for triple in rng.sample(combinations(held_out=False), 10):
        color, shape, background = triple
        wish = Wish(shape, color, background)
        truth = torch.from_numpy(render(fulfil(rng, wish, triple))).permute(2, 0, 1)
        noise = torch.randn(truth.shape, generator=noise_of)
        noisy = alpha.sqrt() * truth + (1 - alpha).sqrt() * noise
        assert (posterior_mean(wish, noisy, alpha) - truth).abs().mean() < 0.02


def test_what_a_wish_leaves_open_is_summed_over() -> None:
    rng = random.Random(2)
    triples = [t for t in combinations(held_out=False) if t[1] == "ring" and t[2] == "gray"]
    wish = Wish(shape="ring", background="gray")
    drawn = [render(fulfil(rng, wish, rng.choice(triples))) for _ in range(6_000)]
    mean = torch.from_numpy(np.mean(drawn, axis=0)).permute(2, 0, 1)
    exact = posterior_mean(wish, torch.zeros(3, 24, 24), torch.tensor(0.0))
    assert (exact - mean).abs().max() < 0.05


def test_held_out_combinations_are_no_answer_unless_asked_for() -> None:
    color, shape, background = sorted(HELD_OUT)[0]
    wish = Wish(shape, color, background)
    truth = torch.from_numpy(render(fulfil(random.Random(0), wish, (color, shape, background))))
    truth = truth.permute(2, 0, 1)
    alpha = torch.tensor(0.9)
    assert (posterior_mean(wish, alpha.sqrt() * truth, alpha) - truth).abs().max() < 0.01
    for open_wish in (Wish(), Wish(shape, color), Wish(None, color, background)):
        assert (posterior_mean(open_wish, alpha.sqrt() * truth, alpha) - truth).abs().max() > 0.2


def test_a_trajectory_goes_where_the_scheduler_goes() -> None:
    scheduler = build_scheduler()
    rollout = Rollout(8, 0, scheduler.alphas_cumprod)
    v = torch.randn(2, 8, 3, 24, 24, generator=torch.Generator().manual_seed(0))
    expected = {}
    for row, trajectory in enumerate(rollout.trajectories):
        if len(trajectory.times) > 1:
            now, then = trajectory.times[:2]
            scheduler.set_timesteps(1000 // (now - then))
            guided = v[1][row] + trajectory.guidance_scale * (v[0][row] - v[1][row])
            expected[row] = scheduler.step(guided, now, trajectory.latents).prev_sample
    rollout.advance(v[0], v[1])
    assert len(expected) > 4
    for row, latents in expected.items():
        assert torch.allclose(rollout.trajectories[row].latents, latents, atol=1e-5)


def test_with_exact_answers_guided_trajectories_end_in_clean_pictures() -> None:
    """What training aims at can be reached: nothing but the network's error makes a picture bad."""
    alphas = build_scheduler().alphas_cumprod
    rollout = Rollout(4, 5, alphas)
    judged = 0
    for _ in range(50):
        for trajectory in rollout.trajectories:
            if len(trajectory.times) == 1:
                wish, (time_,) = trajectory.example.wish, trajectory.times
                picture = posterior_mean(wish, trajectory.latents, alphas[time_])
                grid = ((picture + 1) * 127.5).clamp(0, 255).permute(1, 2, 0).numpy()
                verdict = judge_grid(grid)
                assert score(wish, verdict).is_right, trajectory.example.prompt
                assert verdict.misfit < 0.02, trajectory.example.prompt
                judged += 1
        batch = rollout_batch(rollout)
        both = (prompted_wishes(batch), free_wishes(batch))
        rollout.advance(*(exact_targets(batch, wishes, alphas) for wishes in both))
    assert judged >= 4


def test_prompts_are_often_open_in_the_end_alone(tmp_path: Path) -> None:
    run = settings(tmp_path, num_steps=100)
    stages = [openness_at(step, run) for step in range(100)]
    assert stages == [MOSTLY_NAMED] * 80 + [OFTEN_OPEN] * 20
    triples = combinations(held_out=False)
    for openness in (MOSTLY_NAMED, OFTEN_OPEN):
        rng = random.Random(0)
        wishes = [sample(rng, triples, openness).wish for _ in range(4_000)]
        for term in ("shape", "color", "background"):
            share = sum(getattr(wish, term) is None for wish in wishes) / len(wishes)
            assert share == pytest.approx(getattr(openness, term), abs=0.03)


def test_guidance_comes_in_the_second_half(tmp_path: Path) -> None:
    run = settings(tmp_path, num_steps=100)
    assert [is_guided_at(step, run) for step in range(100)] == [False] * 50 + [True] * 50


def test_a_dropped_prompt_asks_for_anything_with_the_picture_as_it_was() -> None:
    rng = random.Random(0)
    alphas = build_scheduler().alphas_cumprod
    batch = draw_batch(rng, 2_000, alphas, MOSTLY_NAMED)
    dropped = drop_prompts(rng, batch)
    pairs = list(zip(batch.examples, dropped.examples, strict=True))
    empty = [(before, after) for before, after in pairs if before != after]
    assert len(empty) / len(pairs) == pytest.approx(PROMPT_DROPOUT, abs=0.03)
    assert all(after == Example("", Wish(), before.sprite) for before, after in empty)
    assert torch.equal(dropped.noisy, batch.noisy)


def test_without_a_prompt_nothing_is_asked_for_where_noise_hides_the_picture() -> None:
    alphas = build_scheduler().alphas_cumprod
    batch = draw_batch(random.Random(0), 40, alphas, MOSTLY_NAMED)
    for time_, wish, example in zip(
        batch.times.tolist(), free_wishes(batch), batch.examples, strict=True
    ):
        assert wish == (Wish() if time_ >= MIN_OPEN_TIME else example.wish)


def test_the_plain_loss_counts_clear_pictures_less_but_never_nothing() -> None:
    zeros, ones = torch.zeros(1, 3, 24, 24), torch.ones(1, 3, 24, 24)
    snrs = torch.tensor([0.0, 1.0, MAX_SNR_WEIGHT, 100.0, 10_000.0])
    losses = [plain_loss(ones, zeros, snr[None]).item() for snr in snrs]
    assert losses[:3] == [1.0, 1.0, 1.0]
    assert losses[2] > losses[3] > losses[4] > 0
    assert plain_loss(ones, ones, snrs[:1]) == 0


def test_the_loss_counts_what_guidance_multiplies() -> None:
    targets = (torch.zeros(2, 3, 24, 24), torch.zeros(2, 3, 24, 24))
    ones, snr = torch.ones(2, 3, 24, 24), torch.tensor([0.5, 0.5])
    together = guided_loss((ones, ones), targets, snr)
    apart = guided_loss((ones, -ones), targets, snr)
    assert guided_loss(targets, targets, snr) == 0
    assert apart == (1 + 2 * DIFFERENCE_WEIGHT) * together


@pytest.mark.parametrize("size", [None, "small", "large"])
@pytest.mark.parametrize("position", [None, "left", "bottom right", "center"])
def test_the_templates_are_all_that_can_be_drawn(size: str | None, position: str | None) -> None:
    wish = Wish("heart", "red", "blue", size, position)
    masks, log_prior, *_ = templates("heart", size, position)
    assert log_prior.exp().sum() == pytest.approx(1, abs=1e-4)
    known = {mask.tobytes() for mask in masks.numpy()}
    rng = random.Random(4)
    for _ in range(50):
        assert coverage("heart", *place(rng, wish)).ravel().tobytes() in known


def test_orthogonalizing_makes_singular_values_alike() -> None:
    matrices = torch.randn(3, 20, 50, generator=torch.Generator().manual_seed(0))
    for given in (matrices, matrices.mT):
        values = torch.linalg.svdvals(orthogonalize(given).float())
        assert values.min() > 0.5
        assert values.max() < 1.4


def test_shared_out_muon_takes_the_same_step() -> None:
    generator = torch.Generator().manual_seed(0)
    starts = [torch.randn(shape, generator=generator) for shape in ((8, 4, 3, 3),) * 3 + ((20, 8),)]
    grads = [torch.randn(start.shape, generator=generator) for start in starts]

    def fresh() -> list[torch.nn.Parameter]:
        params = [torch.nn.Parameter(start.clone()) for start in starts]
        for param, grad in zip(params, grads, strict=True):
            param.grad = grad.clone()
        return params

    alone, shared, other = fresh(), fresh(), fresh()
    Muon(alone, lr=0.1).step()
    sent: list[torch.Tensor] = []
    Muon(other, lr=0.1, rank=1, num_workers=2, total=lambda t: sent.append(t.clone())).step()
    Muon(shared, lr=0.1, rank=0, num_workers=2, total=lambda t: t.add_(sent[0])).step()
    for one, two, start in zip(alone, shared, starts, strict=True):
        assert torch.allclose(one, two, atol=1e-6)
        assert not torch.allclose(one, start, atol=1e-3)


def test_the_learning_rate_rises_stays_and_falls(tmp_path: Path) -> None:
    run = settings(tmp_path, num_steps=1_000, num_decay_steps=200)
    shares = [learning_rate_share(step, run) for step in range(1_000)]
    assert shares[0] < 0.02
    assert shares[training.NUM_WARMUP_STEPS : 800] == [1.0] * (800 - training.NUM_WARMUP_STEPS)
    assert shares[900] == pytest.approx(0.5)
    assert 0 < shares[-1] < 0.01


def test_the_reading_lesson_teaches() -> None:
    """A few steps read better than none do; the whole lesson is what ships."""
    tokenizer = build_tokenizer(vocabulary())
    torch.manual_seed(0)
    encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            eos_token_id=tokenizer.eos_token_id,
            bos_token_id=tokenizer.bos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    before = teach(encoder, tokenizer, 0, num_steps=1, batch_size=32)
    after = teach(encoder, tokenizer, 1, num_steps=60, batch_size=32, lr=1e-2)
    assert after > before + 0.15


@pytest.mark.parametrize("first", [0, 60], ids=["plain", "guided"])
def test_a_stopped_run_goes_on_unchanged(tmp_path: Path, first: int) -> None:
    runs = []
    pipeline = build_pipeline(3)
    for name in ("whole", "stopped"):
        out = tmp_path / name
        out.mkdir()
        save_file(pipeline.text_encoder.state_dict(), out / training.TEXT_ENCODER_FILE)
        trainer = Trainer(0, settings(out, num_checkpoint_steps=2))
        losses = [trainer.step(first + step) for step in range(2)]
        if name == "stopped":
            trainer.save(first + 2)
            trainer = Trainer(0, settings(out, num_checkpoint_steps=2))
            assert trainer.restore() == first + 2
            saved = load_file(out / "pipeline" / "unet" / "diffusion_pytorch_model.safetensors")
            assert {tensor.dtype for tensor in saved.values()} == {torch.float16}
        losses.append(trainer.step(first + 2))
        runs.append((losses, trainer.average.state_dict()))
    assert runs[0][0] == runs[1][0]
    weights = runs[0][1]
    for name, value in weights.items():
        assert torch.equal(value, runs[1][1][name]), name
    # Nothing is learned of the fourth latent channel, which stands for nothing.
    assert weights["conv_in.weight"].shape[1] == weights["conv_out.weight"].shape[0] == 4
    assert not weights["conv_in.weight"][:, 3].any()
    assert not weights["conv_out.weight"][3].any()
    assert not weights["conv_out.bias"][3].any()
    assert weights["conv_out.weight"][:3].any()


def test_the_scheduler_ends_in_pure_noise() -> None:
    """What the templates' prior is for: at the last time nothing of the picture is left."""
    assert build_scheduler().alphas_cumprod[-1] == 0
