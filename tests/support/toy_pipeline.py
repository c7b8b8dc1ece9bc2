"""A handmade pipeline so small that thousands of requests cost seconds.

Built like the real ones: a text encoder, a denoiser with guidance, diffusers' own schedulers, a
decoder, a callback at each step. One request of three steps takes about 3 ms.

    pipeline = toy()
    image = pipeline(**toy_kwargs(seed=1)).images       # (B, 3, H/8, W/8) in [0, 1]
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import diffusers
import torch
from diffusers import DiffusionPipeline

WIDTH = 8  # of the text embedding


class ToyTextEncoder(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = torch.nn.Embedding(128, WIDTH)

    def forward(self, input_ids: torch.Tensor) -> tuple[torch.Tensor]:
        return (self.table(input_ids),)


class ToyUNet(torch.nn.Module):
    """A convolution that looks at the step, and at the text wherever a pixel likes a token."""

    def __init__(self) -> None:
        super().__init__()
        self.enter = torch.nn.Conv2d(4, WIDTH, 3, padding=1)
        self.leave = torch.nn.Conv2d(WIDTH, 4, 3, padding=1)
        self.frequencies: torch.Tensor
        self.register_buffer("frequencies", torch.linspace(0.01, 1.0, WIDTH))

    def forward(
        self,
        sample: torch.Tensor,
        timestep: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        return_dict: bool = False,
    ) -> tuple[torch.Tensor]:
        """(B, 4, H/8, W/8), a number or (B,), (B, L, 8) → (B, 4, H/8, W/8)."""
        place = torch.sin(timestep.float().reshape(-1, 1) * self.frequencies)
        hidden = self.enter(sample) + place[:, :, None, None]
        likes = torch.einsum("bchw,blc->bhwl", hidden, encoder_hidden_states).softmax(-1)
        hidden = hidden + torch.einsum("bhwl,blc->bchw", likes, encoder_hidden_states)
        return (torch.tanh(self.leave(torch.nn.functional.silu(hidden))),)


class ToyVAE(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.leave = torch.nn.Conv2d(4, 3, 1)

    def decode(self, z: torch.Tensor) -> SimpleNamespace:
        # Some schedulers end at a hundred times the latents of others.
        return SimpleNamespace(sample=torch.sigmoid(self.leave(z) / 50))


class ToyPipeline(DiffusionPipeline):
    num_timesteps = 0

    def __init__(self, text_encoder: Any, unet: Any, vae: Any, scheduler: Any) -> None:
        super().__init__()
        self.register_modules(text_encoder=text_encoder, unet=unet, vae=vae, scheduler=scheduler)

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str] = "",
        height: int = 64,
        width: int = 64,
        num_inference_steps: int = 3,
        guidance_scale: float = 5.0,
        num_images_per_prompt: int = 1,
        generator: torch.Generator | None = None,
        callback_on_step_end: Callable[..., dict[str, Any]] | None = None,
    ) -> SimpleNamespace:
        prompts = [prompt] if isinstance(prompt, str) else prompt
        num_images = len(prompts) * num_images_per_prompt
        is_guided = guidance_scale > 1.0
        embeds = self.encode(prompts).repeat_interleave(num_images_per_prompt, dim=0)
        if is_guided:
            nothing = self.encode([""]).expand(num_images, -1, -1)
            embeds = torch.cat([nothing, embeds])
        self.scheduler.set_timesteps(num_inference_steps)
        self.num_timesteps = len(self.scheduler.timesteps)
        latents = torch.randn((num_images, 4, height // 8, width // 8), generator=generator)
        latents = latents * self.scheduler.init_noise_sigma
        for i, t in enumerate(self.scheduler.timesteps):
            rows = torch.cat([latents] * 2) if is_guided else latents
            rows = self.scheduler.scale_model_input(rows, t)
            noise = self.denoise(rows, t, embeds)
            if is_guided:
                noise_uncond, noise_text = noise.chunk(2)
                noise = noise_uncond + guidance_scale * (noise_text - noise_uncond)
            # Some schedulers' step takes no generator, and none that is given draws without one.
            keywords = {"generator": generator} if self.draws_noise else {}
            latents = self.scheduler.step(noise, t, latents, return_dict=False, **keywords)[0]
            if callback_on_step_end is not None:
                latents = callback_on_step_end(self, i, t, {"latents": latents})["latents"]
        return SimpleNamespace(images=self.vae.decode(latents).sample)

    @property
    def draws_noise(self) -> bool:
        return "generator" in self.scheduler.step.__code__.co_varnames

    def encode(self, prompts: list[str]) -> torch.Tensor:
        ids = [[ord(letter) % 128 for letter in prompt[:6].ljust(6)] for prompt in prompts]
        embeds: torch.Tensor = self.text_encoder(torch.tensor(ids))[0]
        return embeds

    def denoise(self, rows: torch.Tensor, t: torch.Tensor, embeds: torch.Tensor) -> torch.Tensor:
        noise: torch.Tensor = self.unet(rows, t, encoder_hidden_states=embeds)[0]
        return noise


Denoise = Callable[[], torch.Tensor]


def toy_where(hook: Callable[[str, Denoise], torch.Tensor], **modules: Any) -> Any:
    """A pipeline that calls ``hook(prompt, denoise)`` wherever it would have called `denoise`."""

    class Hooked(ToyPipeline):
        def __call__(self, prompt: str = "", **kwargs: Any) -> SimpleNamespace:
            self.prompt = prompt
            return super().__call__(prompt, **kwargs)

        def denoise(self, *args: torch.Tensor) -> torch.Tensor:
            return hook(self.prompt, lambda: ToyPipeline.denoise(self, *args))

    return toy(Hooked, **modules)


def toy(
    kind: type[ToyPipeline] = ToyPipeline,
    *,
    unet: torch.nn.Module | None = None,
    vae: torch.nn.Module | None = None,
) -> Any:
    """Build a fresh pipeline: the same weights every time, where no module is given."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        pipeline = kind(
            ToyTextEncoder(),
            unet or ToyUNet(),
            vae or ToyVAE(),
            diffusers.DDIMScheduler(clip_sample=False, steps_offset=1),
        )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def toy_kwargs(seed: int = 0, **changes: Any) -> dict[str, Any]:
    """Arguments of one call, with a fresh generator."""
    generator = torch.Generator().manual_seed(seed)
    return {"prompt": f"toy {seed}", "generator": generator, **changes}
