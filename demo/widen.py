"""Add the fourth latent channel to a demo pipeline of three: `python -m demo.widen IN --out OUT`.

Pipelines that were trained before `demo.build` made four are widened so, without training.
"""

import argparse
import sys
from pathlib import Path

from diffusers import StableDiffusionPipeline

from demo.build import NUM_COLOR_CHANNELS, build_pipeline, save_pipeline, widen_unet


def widen(pipeline: StableDiffusionPipeline) -> StableDiffusionPipeline:
    """A pipeline as `demo.build` makes it, with this one's weights. Mutates `pipeline`'s UNet.

    Raises:
        ValueError: its latents do not have three channels.
    """
    num_channels = pipeline.unet.config.in_channels
    if num_channels != NUM_COLOR_CHANNELS:
        raise ValueError(f"its latents have {num_channels} channels, not {NUM_COLOR_CHANNELS}")
    widen_unet(pipeline.unet)
    wide = build_pipeline()
    for part in ("unet", "text_encoder"):
        getattr(wide, part).load_state_dict(getattr(pipeline, part).state_dict())
    return wide


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m demo.widen", description=__doc__)
    parser.add_argument("folder", type=Path, help="pipeline folder of three latent channels")
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--force", action="store_true", help="write into a folder that exists")
    args = parser.parse_args(argv)
    if args.out.exists() and any(args.out.iterdir()) and not args.force:
        print(f"error: {args.out} is not empty; --force writes into it", file=sys.stderr)
        return 1
    try:
        pipeline = widen(StableDiffusionPipeline.from_pretrained(args.folder))
    except ValueError as error:
        print(f"error: {args.folder}: {error}", file=sys.stderr)
        return 1
    save_pipeline(pipeline, args.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
