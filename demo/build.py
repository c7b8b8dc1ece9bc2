"""Put the demo pipeline together: architecture, exact autoencoder, untrained weights."""

import argparse
import sys
from pathlib import Path

import torch
from diffusers import (
    AutoencoderTiny,
    DDIMScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from demo.grammar import vocabulary
from demo.sprites import SIZE_PX
from demo.tokens import MAX_TOKENS, build_tokenizer

TEXT_WIDTH = 128
NUM_VAE_LEVELS = 6
# A power of two, and large: the decoder's tanh clamp is linear to 1e-5 for latents this small.
LATENT_SCALE = 64.0
NUM_COLOR_CHANNELS = 3
# diffusers' inpainting takes latents of four channels, or nine. The fourth is zero.
NUM_LATENT_CHANNELS = 4


def build_scheduler() -> DDIMScheduler:
    """DDIM with zero terminal SNR and trailing steps, so that flat backgrounds come out flat.

    Without clipping: DDIM clips the predicted picture but not the predicted noise, and at guidance
    7.5 the difference turns colours into their complements.
    """
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
        clip_sample=False,
        steps_offset=1,
    )


def build_autoencoder() -> AutoencoderTiny:
    """An analytic autoencoder: encoding averages 32×32 pixels, decoding repeats them, exactly.

    It writes zeros into the fourth latent channel and does not read it.
    """
    width = 4
    vae = AutoencoderTiny(
        encoder_block_out_channels=(width,) * NUM_VAE_LEVELS,
        decoder_block_out_channels=(width,) * NUM_VAE_LEVELS,
        num_encoder_blocks=(0,) * NUM_VAE_LEVELS,
        num_decoder_blocks=(0,) * NUM_VAE_LEVELS,
        latent_channels=NUM_LATENT_CHANNELS,
        scaling_factor=LATENT_SCALE,
    )
    encoder = [layer for layer in vae.encoder.layers if isinstance(layer, nn.Conv2d)]
    decoder = [layer for layer in vae.decoder.layers if isinstance(layer, nn.Conv2d)]
    with torch.no_grad():
        for conv in (*encoder, *decoder):
            conv.weight.zero_()
            if conv.bias is not None:
                conv.bias.zero_()
            for channel in range(NUM_COLOR_CHANNELS):
                if conv.stride == (2, 2):
                    conv.weight[channel, channel, 1:, 1:] = 0.25
                else:
                    conv.weight[channel, channel, 1, 1] = 1.0
        # The layers work on [0, 1]; latents are [-1, 1] / LATENT_SCALE.
        encoder[-1].weight.mul_(2 / LATENT_SCALE)
        encoder[-1].get_parameter("bias")[:NUM_COLOR_CHANNELS] = -1 / LATENT_SCALE
        decoder[0].weight.mul_(LATENT_SCALE / 2)
        decoder[0].get_parameter("bias")[:NUM_COLOR_CHANNELS] = 0.5
    return vae.eval()


def build_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """Two layers: enough to tell a shape's colour from its background's."""
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=TEXT_WIDTH,
        intermediate_size=2 * TEXT_WIDTH,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=MAX_TOKENS,
        projection_dim=TEXT_WIDTH,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return CLIPTextModel(config).eval()


def build_unet() -> UNet2DConditionModel:
    """24×24 with convolutions only, then 12×12 and 6×6 with attention.

    The prompt comes in twice: by cross-attention, and pooled and added to the time embedding, which
    reaches every layer and is quick to learn.
    """
    unet = UNet2DConditionModel(
        sample_size=SIZE_PX,
        in_channels=NUM_COLOR_CHANNELS,
        out_channels=NUM_COLOR_CHANNELS,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(64, 96, 96),
        layers_per_block=1,
        cross_attention_dim=TEXT_WIDTH,
        attention_head_dim=4,
        norm_num_groups=8,
        resnet_time_scale_shift="scale_shift",
        addition_embed_type="text",
        addition_embed_type_num_heads=4,
    )
    with torch.no_grad():
        # Start as the function that predicts nothing: the first steps are then not spent on undoing
        # what random weights draw.
        unet.conv_out.weight.zero_()
        unet.conv_out.bias.zero_()
    widen_unet(unet)
    return unet.eval()


def widen_unet(unet: UNet2DConditionModel) -> None:
    """Add latent channels of zero weights, as many as are missing. Mutates `unet`.

    It reads nothing from them, and its v is zero there: no step of a sampler then makes the noise
    that they begin with larger.
    """
    old_in, old_out = unet.conv_in, unet.conv_out
    with torch.device("meta"):
        new_in = nn.Conv2d(NUM_LATENT_CHANNELS, old_in.out_channels, 3, padding=1)
        new_out = nn.Conv2d(old_out.in_channels, NUM_LATENT_CHANNELS, 3, padding=1)
    new_in.weight, new_in.bias = _zero_padded(old_in.weight, dim=1), old_in.bias
    new_out.weight = _zero_padded(old_out.weight, dim=0)
    new_out.bias = _zero_padded(old_out.bias, dim=0)
    unet.conv_in, unet.conv_out = new_in, new_out
    unet.register_to_config(in_channels=NUM_LATENT_CHANNELS, out_channels=NUM_LATENT_CHANNELS)


def _zero_padded(weight: nn.Parameter, dim: int) -> nn.Parameter:
    shape = list(weight.shape)
    shape[dim] = NUM_LATENT_CHANNELS - shape[dim]
    return nn.Parameter(torch.cat([weight.detach(), weight.detach().new_zeros(shape)], dim=dim))


def build_pipeline(seed: int = 0) -> StableDiffusionPipeline:
    """The whole pipeline with random weights drawn from `seed`."""
    torch.manual_seed(seed)
    tokenizer = build_tokenizer(vocabulary())
    return StableDiffusionPipeline(
        vae=build_autoencoder(),
        text_encoder=build_text_encoder(tokenizer),
        tokenizer=tokenizer,
        unet=build_unet(),
        scheduler=build_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def save_pipeline(pipeline: StableDiffusionPipeline, folder: Path) -> None:
    """Write `pipeline` with its UNet in float16, half the size. Mutates the UNet's dtype."""
    pipeline.unet.half()
    pipeline.save_pretrained(folder, safe_serialization=True)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m demo.build", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--seed", type=int, default=0, help="of the random weights")
    parser.add_argument("--force", action="store_true", help="write into a folder that exists")
    args = parser.parse_args(argv)
    if args.out.exists() and any(args.out.iterdir()) and not args.force:
        print(f"error: {args.out} is not empty; --force writes into it", file=sys.stderr)
        return 1
    save_pipeline(build_pipeline(args.seed), args.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
