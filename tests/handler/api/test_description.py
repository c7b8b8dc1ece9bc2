"""handler.api.description: a form of what it says offers nothing that is refused."""

from __future__ import annotations

import json
from collections.abc import Iterator

from handler.api.description import describe
from handler.api.schema import PICTURE_FIELDS
from handler.api.traits import PipelineTraits

ARGUMENTS = frozenset(
    ["prompt", "height", "width", "num_inference_steps", "guidance_scale", "generator"]
)


def fields(traits: PipelineTraits) -> set[str]:
    found = describe(traits)["fields"]
    assert isinstance(found, list)
    return set(found)


def test_a_pipeline_of_text_alone() -> None:
    traits = PipelineTraits(("DDIMScheduler",), 8, ARGUMENTS)
    described = describe(traits)
    json.dumps(described)
    assert described["schedulers"] == ["ddim"]
    assert described["tasks"] == ["text-to-image"]
    assert {"prompt", "seed", "height", "guidance_scale", "scheduler"} <= fields(traits)
    lacking = {"negative_prompt", "image", "mask_image", "control_image", "control", "strength"}
    lacking |= {"step_cache", "guidance_start", "guidance_end"}
    assert not fields(traits) & {*lacking, "task", "loras", "pag_scale", "prompt_weighting"}


def test_what_any_task_has_is_there() -> None:
    arguments = ARGUMENTS | {"image", "strength"}
    tasks = {
        "text-to-image": ARGUMENTS,
        "image-to-image": arguments,
        "inpainting": arguments | {"mask_image"},
        "text-to-image+control": ARGUMENTS | {"controlnet_conditioning_scale"},
    }
    traits = PipelineTraits(
        ("DDIMScheduler",),
        8,
        ARGUMENTS,
        tasks=tasks,
        loras=("style", "ink"),
        controls=("canny", "depth"),
        reads_weights=True,
        shortcuts={"inpainting": frozenset({"step_cache"})},
    )
    described = describe(traits)
    assert (described["loras"], described["controls"]) == (["ink", "style"], ["canny", "depth"])
    wanted = {"image", "mask_image", "control_image", "control", "strength", "task", "loras"}
    assert {*wanted, "controlnet_conditioning_scale", "prompt_weighting"} <= fields(traits)
    assert "step_cache" in fields(traits)
    assert not {"guidance_start", "guidance_end"} & fields(traits)
    assert fields(traits) <= PICTURE_FIELDS.keys()


def test_the_folder_of_loras_is_listed_once() -> None:
    class Names(tuple[str, ...]):
        listed = 0

        def __iter__(self) -> Iterator[str]:
            Names.listed += 1
            return super().__iter__()

        def __len__(self) -> int:
            Names.listed += 1
            return super().__len__()

    traits = PipelineTraits(("DDIMScheduler",), 8, ARGUMENTS, loras=Names(("ink",)))
    assert describe(traits)["loras"] == ["ink"]
    assert Names.listed <= 2  # sorting asks for a length, too
