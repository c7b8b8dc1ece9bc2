"""The way to beat: a TorchServe handler that draws one request after the other, whole calls.

It does what TorchServe's own diffusers example does: unzip the pipeline beside itself, load it
with diffusers, call it, reply. It is given what makes the comparison fair (parameters of each
request, torch threads, PNG replies) unless `reply: array` asks for the example's nested lists.
"""

from __future__ import annotations

import io
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline
from ts.torch_handler.base_handler import BaseHandler


class OneAtATimeHandler(BaseHandler):  # type: ignore[misc]
    """Keys of its ``handler:`` section: `reply` (png or array), `num_threads` and `dtype`."""

    def initialize(self, context: Any) -> None:
        settings = (context.model_yaml_config or {}).get("handler") or {}
        self.reply = settings.get("reply", "png")
        if "num_threads" in settings:
            torch.set_num_threads(settings["num_threads"])
        model_dir = Path(context.system_properties["model_dir"])
        # Two workers unpack the same folder: each takes one of its own.
        folder = model_dir / f"model-{torch.initial_seed()}"
        with zipfile.ZipFile(model_dir / "model.zip") as archive:
            archive.extractall(folder)
        on_gpu = torch.cuda.is_available() and context.system_properties.get("gpu_id") is not None
        self.device = torch.device("cuda" if on_gpu else "cpu")
        default = "float16" if on_gpu else "float32"
        dtype = getattr(torch, settings.get("dtype", default))
        self.pipeline = DiffusionPipeline.from_pretrained(folder, dtype=dtype).to(self.device)
        self.pipeline.set_progress_bar_config(disable=True)
        self.initialized = True

    def preprocess(self, data: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return [row["body"] for row in data]

    def inference(self, data: list[dict[str, Any]], *args: Any, **kwargs: Any) -> list[Any]:
        return [
            self.pipeline(
                request["prompt"],
                num_inference_steps=request["steps"],
                guidance_scale=request["guidance"],
                height=request["height"],
                width=request["width"],
                generator=torch.Generator().manual_seed(request["seed"]),
            ).images[0]
            for request in data
        ]

    def postprocess(self, data: list[Any]) -> list[Any]:
        if self.reply == "array":
            return [np.array(image).tolist() for image in data]
        replies = []
        for image in data:
            buffer = io.BytesIO()
            image.save(buffer, "PNG")
            replies.append(buffer.getvalue())
        return replies
