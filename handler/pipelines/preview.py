"""A cheap look at a picture that is still being drawn: latents to RGB by one small matrix."""

from __future__ import annotations

import copy
import io
import logging
from typing import Any

import torch
from PIL import Image

__all__ = ["Previewer"]

logger = logging.getLogger(__name__)

_JPEG_QUALITY = 80
_SAMPLE_SIDE = 16


class Previewer:
    """Turns latents (B, C, h, w) into a JPEG of w × h pixels, without the decoder.

    The matrix is fitted once a pipeline, by least squares against the pipeline's own decoder, so
    it suits any autoencoder. Pipelines with packed or 3-D latents get no previews, nor do those
    whose decoder takes something else: a preview is never worth the picture.
    """

    def __init__(self, pipeline: Any) -> None:
        self._pipeline = pipeline
        self._is_fitted = False
        self._fitted: torch.Tensor | None = None

    def jpeg(self, latents: torch.Tensor | None) -> bytes | None:
        """A JPEG of the first picture in `latents`; None where these cannot be shown."""
        if latents is None or latents.ndim != 4:
            return None
        matrix = self._matrix(int(latents.shape[1]))
        if matrix is None:
            return None
        try:
            shown = latents[0].float().cpu()
        except torch.OutOfMemoryError:
            return None
        pixels = _with_constant(shown) @ matrix
        rgb = (pixels.clamp(0, 1) * 255).round().to(torch.uint8).numpy()
        buffer = io.BytesIO()
        Image.fromarray(rgb).save(buffer, "JPEG", quality=_JPEG_QUALITY)
        return buffer.getvalue()

    def _matrix(self, num_channels: int) -> torch.Tensor | None:
        """(C + 1, 3): latents and a constant to RGB in [0, 1]; None if there is none."""
        if not self._is_fitted:
            self._is_fitted = True
            try:
                self._fitted = _fit(self._pipeline.vae, num_channels)
            except Exception as error:  # any family's decoder, called as those of most are
                if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
                    self._is_fitted = False  # that may pass
                logger.warning("this pipeline gives no previews: %s", error)
        fitted = self._fitted
        return fitted if fitted is not None and fitted.shape[0] == num_channels + 1 else None


def _with_constant(latents: torch.Tensor) -> torch.Tensor:
    """(C, h, w) to (h, w, C + 1), the last one all ones."""
    channels = latents.movedim(0, -1)
    return torch.cat([channels, torch.ones_like(channels[..., :1])], dim=-1)


@torch.no_grad()
def _fit(vae: Any, num_channels: int) -> torch.Tensor:
    """Decode smooth random latents and regress the shrunken picture on them."""
    if getattr(vae.config, "force_upcast", False):
        vae = copy.deepcopy(vae).float()
    generator = torch.Generator().manual_seed(0)
    side = _SAMPLE_SIDE
    coarse = torch.randn(1, num_channels, side // 4, side // 4, generator=generator)
    latents = torch.nn.functional.interpolate(coarse, size=side, mode="bicubic")
    scaled = latents / vae.config.scaling_factor + (getattr(vae.config, "shift_factor", None) or 0)
    weight = next(vae.parameters())
    picture = type(vae).decode(vae, scaled.to(weight), return_dict=False)[0].float().cpu()
    shrunken = torch.nn.functional.adaptive_avg_pool2d(picture / 2 + 0.5, side)[0]
    features = _with_constant(latents[0]).reshape(-1, num_channels + 1)
    fitted: torch.Tensor = torch.linalg.lstsq(
        features, shrunken.movedim(0, -1).reshape(-1, 3)
    ).solution
    if not fitted.isfinite().all():
        raise ValueError("the decoder gives no finite numbers")
    return fitted
