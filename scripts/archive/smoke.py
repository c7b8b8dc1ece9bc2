"""The smoke test: loads an archive as a worker does, and draws one small picture."""

from __future__ import annotations

import math
import sys
from contextlib import AbstractContextManager, closing
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from handler.config import HandlerConfig
from handler.errors import EngineFault, RequestError, ServingError
from handler.loading.contents import LORA_FOLDER
from handler.loading.model_dir import OpenedPipeline, open_pipeline, open_zip
from scripts.archive.checks import read_config, read_manifest
from scripts.archive.reader import ArchiveView

if TYPE_CHECKING:
    from PIL import Image

    from handler.api.result import Result
    from handler.api.traits import PipelineTraits

__all__ = ["draw_smoke_picture", "smoke_problems"]

_SMOKE_PROMPT = "a photograph of a cat"
_SMOKE_SIDE_PX = 64


def draw_smoke_picture(view: ArchiveView) -> Image.Image:
    """Return the picture of `_draw`."""
    return _draw(view).images[0]


def _draw(view: ArchiveView) -> Result:
    """Load the pipeline as a worker does and draw one small picture, as a request for it would be.

    On this machine's device and in its precision, with no warm-up, and with ``speed: safe`` where
    the archive says ``max``, which would compile for minutes.

    Raises:
        ServingError: the archive cannot be served, or such a request fails.
    """
    from handler.assembly import assemble, short_request
    from handler.library_logs import quiet_libraries
    from handler.loading.pipeline import load_opened

    configured = read_config(view)
    config = replace(configured, device=None, dtype=None, speed=_smoke_speed(configured))
    if config.lora_dir is not None:  # the folder is on the server
        config = replace(config, lora_dir=None, default_loras=None)
    prompt = str((read_manifest(view) or {}).get("smoke_prompt") or _SMOKE_PROMPT)
    prompt = prompt[: config.max_prompt_chars]
    with quiet_libraries():
        with _open_model(view) as opened, TemporaryDirectory(prefix="verify-") as folder:
            loaded = load_opened(opened, _copy_loras(view, Path(folder)), config, None)
        with closing(assemble(loaded, config, model_name="smoke", warm_up=False)) as service:
            size = _smoke_size(config, service.traits)
            fields = short_request(config, service.traits, prompt=prompt, size=size)
            (result,) = service.draw(service.read([{"body": fields}]))
    return result


def _smoke_speed(config: HandlerConfig) -> str:
    return "safe" if config.speed == "max" else config.speed


def _smoke_size(config: HandlerConfig, traits: PipelineTraits) -> tuple[int, int]:
    """Return the smallest height and width that a request may have, from 64 pixels on."""
    multiple = traits.size_multiple_px
    side_px = math.ceil(max(_SMOKE_SIDE_PX, config.min_size_px) / multiple) * multiple
    # The configured size is one that a request may have.
    return min(side_px, config.height), min(side_px, config.width)


def _open_model(view: ArchiveView) -> AbstractContextManager[OpenedPipeline]:
    if view.place is None:
        return open_pipeline(view.path)
    archive, start, size_bytes = view.place
    return open_zip(archive, start=start, size_bytes=size_bytes)


def smoke_problems(view: ArchiveView) -> list[str]:
    """Return what is wrong with the smoke picture, or why there is none."""
    try:
        configured = read_config(view)
        if _smoke_speed(configured) != configured.speed:
            print("drawing with speed: safe, not max, which would compile first", file=sys.stderr)
        result = _draw(view)
    except EngineFault as error:
        # A worker's log would hold the cause; here there is none.
        cause = error.__cause__ or error
        return [f"the pipeline loads, but draws nothing: {str(cause).strip() or repr(cause)}"]
    except RequestError as error:
        return [f"the pipeline loads, but draws nothing: {error}"]
    except ServingError as error:
        return [str(error)]
    except Exception as error:
        # A pipeline that fails here would fail any request; what it raises is of any kind.
        return [f"the pipeline loads, but draws nothing: {str(error).strip() or repr(error)}"]
    if any(result.flagged):
        return ["the safety checker flags the picture, which is drawn black"]
    low, high = result.images[0].convert("L").getextrema()
    return ["the picture has one colour only"] if low == high else []


def _copy_loras(view: ArchiveView, folder: Path) -> list[Path]:
    """Copy the packed LoRAs into `folder`, where the loader can map them."""
    paths = []
    outer = view.outer
    for name in sorted(outer.sizes) if outer is not None else ():
        if outer is not None and name.startswith(f"{LORA_FOLDER}/") and name.count("/") == 1:
            path = folder / name.partition("/")[2]
            with path.open("xb") as file:
                file.writelines(outer.stream(name))
            paths.append(path)
    return paths
