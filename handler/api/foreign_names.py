"""The table of other APIs' names for request fields: each is translated exactly, or refused.

A refusal says what to send in its place. A new name is one entry in `_entries`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

from handler.api.images import NO_FETCHING
from handler.messages import show

__all__ = [
    "FOREIGN_NAMES",
    "HOW_PICTURES_ARE_SENT",
    "SEVERAL_PROMPTS",
    "ForeignName",
    "is_picture_input",
]

HOW_PICTURES_ARE_SENT = (
    "is no field; a picture to begin with is sent as image, a mask as mask_image, a ControlNet's as"
    " control_image"
)
SEVERAL_PROMPTS = (
    'several prompts are sent as {"instances": [{"prompt": "a"}, {"prompt": "b"}]},'
    " several pictures of one prompt as num_images"
)
_SIZE = re.compile(r"\s*([0-9]{1,5})\s*[xX]\s*([0-9]{1,5})\s*", re.ASCII)

# Names that are in no list; those of counts and sizes are not.
_PICTURE_LIKE = re.compile(r"image|img|mask|photo|video")
_NOT_PICTURE_LIKE = re.compile(
    r"num|count|size|width|height|per_|(^|_)n_|format|quality|seed|steps"
)

Translation = Callable[[object], Mapping[str, object]]
"""From the value sent to our fields; raises ValueError with what is wrong with it."""


@dataclass(frozen=True, slots=True)
class ForeignName:
    """One name of another API's."""

    name: str
    apis: str
    meaning: str
    """What it is here, for documentation."""
    translate: Translation
    targets: tuple[str, ...] = ()
    """The fields that it may become."""
    counts_with: str | None = None
    """The field without which it says nothing, whatever its value."""


def is_picture_input(name: str) -> bool:
    """Whether a field that is not ours holds a picture to begin with, or belongs to one."""
    lower = name[:100].lower()
    return bool(_PICTURE_LIKE.search(lower) and not _NOT_PICTURE_LIKE.search(lower))


def _renamed(apis: str, **targets: str) -> Iterable[ForeignName]:
    """Names whose values mean the same here."""
    for name, target in targets.items():
        convert = _to(target)
        yield ForeignName(name, apis, f"`{target}`", convert, (target,))


def _to(target: str) -> Translation:
    return lambda value: {target: value}


def _idle(
    apis: str, names: Iterable[str], allowed: Iterable[object], instead: str
) -> Iterable[ForeignName]:
    """Names that change nothing with one of the `allowed` values, and are refused with others."""
    values = tuple(allowed)
    shown = ", ".join(json.dumps(value) for value in values)

    def convert(value: object) -> Mapping[str, object]:
        if _plain(value) not in values:
            raise ValueError(f"{instead}; only {shown} may be sent, or nothing")
        return {}

    for name in names:
        yield ForeignName(name, apis, f"accepted as {shown}, without effect", convert)


def _ignored(apis: str, names: Iterable[str], why: str) -> Iterable[ForeignName]:
    """Names that change nothing whatever their value."""
    for name in names:
        yield ForeignName(name, apis, f"accepted without effect: {why}", lambda value: {})


def _refused(apis: str, **problems: str) -> Iterable[ForeignName]:
    for name, problem in problems.items():
        yield ForeignName(name, apis, f"refused: {problem}", _refusal(problem))


def _refusal(problem: str) -> Translation:
    def convert(value: object) -> Mapping[str, object]:
        raise ValueError(problem)

    return convert


def _one_picture(target: str) -> Translation:
    """A list of one picture is that picture."""

    def convert(value: object) -> Mapping[str, object]:
        if isinstance(value, list | tuple):
            if len(value) != 1:
                raise ValueError(f"is {show(value)}; a request begins with one picture")
            value = value[0]
        return {target: value}

    return convert


def _strengths(apis: str, names: Iterable[str]) -> Iterable[ForeignName]:
    """Names of our strength that clients send without a picture, too."""
    for name in names:
        meaning = "`strength` with a picture; without one it is accepted without effect"
        yield ForeignName(name, apis, meaning, _to("strength"), ("strength",), "image")


def _plain(value: object) -> object:
    """A value of a form as JSON would have it: ``false`` is a boolean, ``[]`` a list."""
    if isinstance(value, str) and len(value) <= 20:
        try:
            return json.loads(value.strip().lower())
        except ValueError:
            return value
    return value


def _size(value: object) -> Mapping[str, object]:
    """OpenAI's ``WIDTHxHEIGHT``."""
    if value == "auto":
        return {}
    match = _SIZE.fullmatch(value) if isinstance(value, str) else None
    if match is None:
        raise ValueError(
            f'{show(value)} is not a size such as "512x768" (width x height); or send width and'
            " height"
        )
    return {"width": int(match[1]), "height": int(match[2])}


def _target_size(value: object) -> Mapping[str, object]:
    if not isinstance(value, Mapping) or value.keys() != {"width", "height"}:
        raise ValueError(
            f'{show(value)} is not an object such as {{"width": 512, "height": 768}}; or send width'
            " and height"
        )
    return {"width": value["width"], "height": value["height"]}


def _options(value: object) -> Mapping[str, object]:
    known = {"wait_for_model", "use_cache", "use_gpu"}
    value = _plain(value)
    if not isinstance(value, Mapping):
        raise ValueError(f"must be an object, not {show(value)}")
    for name, each in value.items():
        if name not in known or not isinstance(each, bool):
            raise ValueError(
                f"{show(name)} with {show(each)} means nothing here; accepted without effect are"
                f" {', '.join(sorted(known))}, true or false"
            )
    return {}


def _override_settings(value: object) -> Mapping[str, object]:
    value = _plain(value)
    if not isinstance(value, Mapping):
        raise ValueError(f"must be an object, not {show(value)}")
    meant: dict[str, object] = {}
    for name, each in value.items():
        # The only one that is in most requests; A1111 counts the last layer as 1.
        is_layer = isinstance(each, int) and not isinstance(each, bool) and each >= 1
        if name == "CLIP_stop_at_last_layers" and is_layer:
            if each > 1:
                meant["clip_skip"] = each - 1
            continue
        reason = _OVERRIDES.get(name, "a request cannot change settings")
        raise ValueError(f"{show(name)} with {show(each)}: {reason}; leave it out")
    return meant


def _flag_of(sigmas: str) -> Translation:
    def convert(value: object) -> Mapping[str, object]:
        value = _plain(value)
        if not isinstance(value, bool):
            raise ValueError(f"{show(value)} is neither true nor false")
        return {"sigmas": sigmas} if value else {}

    return convert


def _n_iter(value: object) -> Mapping[str, object]:
    if _plain(value) != 1:
        raise ValueError(
            "only 1; send batch_size times n_iter as num_images: picture k has the seed + k"
        )
    return {}


_A1111, _OPENAI, _HF = "AUTOMATIC1111", "OpenAI", "Hugging Face"
_DIFFUSERS, _STABILITY, _REPLICATE = "diffusers", "Stability AI", "Replicate"
_NO_LORA = (
    'LoRAs are named with their scales, "loras": {"style": 0.8}; a server has those packed with'
    " --lora FILE and those in its lora_dir"
)
_NO_SIGMAS = (
    "a request cannot list its steps; sigmas names a schedule, such as karras, normal (evenly"
    " spaced) or sgm_uniform (trailing)"
)
_OVERRIDES = {
    "sd_model_checkpoint": "the URL names the model, /predictions/NAME",
}
_NO_HIRES = "there is no second pass; send the final width and height"


def _entries() -> Iterable[ForeignName]:
    yield from _renamed(f"{_A1111}, {_STABILITY}", cfg_scale="guidance_scale")
    yield from _renamed(
        _A1111, sampler_name="scheduler", sampler_index="scheduler", batch_size="num_images"
    )
    yield ForeignName("n_iter", _A1111, "accepted as 1; more pictures are `num_images`", _n_iter)
    yield from _idle(
        _A1111,
        ["restore_faces", "tiling", "save_images"],
        [False],
        "this server does nothing of the kind",
    )
    yield from _idle(_A1111, ["enable_hr"], [False], _NO_HIRES)
    yield from _idle(_A1111, ["send_images"], [True], "the reply always holds the pictures")
    yield from _idle(
        _A1111,
        ["styles", "script_args", "alwayson_scripts", "script_name"],
        [[], {}, ""],
        "this server has no styles and no scripts",
    )
    yield ForeignName(
        "override_settings",
        _A1111,
        "`CLIP_stop_at_last_layers` is `clip_skip` and one more; a request cannot change other"
        " settings",
        _override_settings,
        ("clip_skip",),
    )
    yield from _idle(_A1111, ["refiner_checkpoint"], [""], "this server draws with one pipeline")
    yield from _idle(_A1111, ["subseed_strength"], [0], "seeds are not blended")
    yield from _idle(
        _A1111,
        ["seed_resize_from_h", "seed_resize_from_w"],
        [-1, 0],
        "noise is drawn at the size of the picture",
    )
    yield from _idle(
        _A1111,
        ["s_churn", "s_tmin", "s_min_uncond"],
        [0],
        "the scheduler runs as it is configured",
    )
    yield from _idle(_A1111, ["s_noise"], [1], "the scheduler runs as it is configured")
    yield from _ignored(
        _A1111,
        [
            *("subseed", "firstphase_width", "firstphase_height", "inpaint_full_res_padding"),
            *("hr_scale", "hr_upscaler", "hr_second_pass_steps", "hr_resize_x", "hr_resize_y"),
            *("hr_checkpoint_name", "hr_sampler_name", "hr_scheduler", "hr_prompt"),
            *("hr_negative_prompt", "refiner_switch_at", "override_settings_restore_afterwards"),
            "s_tmax",
        ],
        "it counts only with what is refused",
    )
    yield from _ignored(
        _A1111,
        ["do_not_save_samples", "do_not_save_grid"],
        "the server keeps no pictures",
    )
    yield from _strengths(_A1111, ["denoising_strength"])
    yield ForeignName("init_images", _A1111, "`image`, one", _one_picture("image"), ("image",))
    yield from _renamed(_A1111, image_cfg_scale="image_guidance_scale")
    yield from _idle(
        _A1111,
        ["mask_blur", "mask_blur_x", "mask_blur_y"],
        [0],
        "blur the mask that you send",
    )
    yield from _idle(
        _A1111, ["inpainting_fill"], [1], "what is masked begins as it is in the picture"
    )
    yield from _idle(_A1111, ["inpainting_mask_invert"], [0], "white is drawn anew")
    yield from _idle(
        _A1111, ["inpaint_full_res"], [False, 0], "padding_mask_crop draws only what is masked"
    )
    yield from _idle(
        _A1111,
        ["resize_mode"],
        [0],
        "pictures are stretched to height and width; crop or fill the one that you send",
    )
    yield from _idle(
        _A1111, ["initial_noise_multiplier"], [1], "noise is as strong as the scheduler makes it"
    )
    yield from _ignored(
        _A1111, ["include_init_images"], "the reply holds the pictures that were drawn"
    )
    yield ForeignName(
        "size", _OPENAI, "`width` and `height`, as `512x768`", _size, ("width", "height")
    )
    yield from _idle(
        _OPENAI,
        ["quality"],
        ["auto", "standard"],
        "more num_inference_steps are what costs time here",
    )
    yield ForeignName("image[]", _OPENAI, "`image`, one", _one_picture("image"), ("image",))
    yield from _idle(_OPENAI, ["background"], ["auto", "opaque"], "pictures have no transparency")
    yield from _refused(
        _OPENAI,
        model="the URL names the model, /predictions/NAME; leave it out",
        response_format='"output_format": "json" replies with pictures in base64, under "images";'
        " pictures are not kept under a URL",
        style="say it in the prompt",
        user="request_id is a name for a request",
        output_compression="jpeg_quality is the quality of JPEG and WebP",
        partial_images='"stream": true with previews, a picture every so many steps',
        moderation="nothing here moderates prompts",
    )
    yield from _renamed(f"{_HF}, {_DIFFUSERS}", num_images_per_prompt="num_images")
    yield from _renamed(_HF, generator="seed")
    yield ForeignName(
        "target_size",
        _HF,
        '`width` and `height`, as `{"width": 512, "height": 768}`',
        _target_size,
        ("width", "height"),
    )
    yield ForeignName(
        "options",
        _HF,
        "`wait_for_model`, `use_cache` and `use_gpu` are accepted without effect: a request always"
        " waits, and is always drawn",
        _options,
    )
    yield from _refused(
        _HF, parameters="is read in JSON; in a form its fields stand beside the prompt"
    )
    yield from _idle(_DIFFUSERS, ["output_type"], ["pil"], "output_format says what the reply is")
    yield from _ignored(_DIFFUSERS, ["return_dict"], "output_format says what the reply is")
    yield from _refused(
        _DIFFUSERS,
        cross_attention_kwargs=_NO_LORA,
        attention_kwargs=_NO_LORA,
        joint_attention_kwargs=_NO_LORA,
        timestep_spacing=_NO_SIGMAS,
        timesteps=_NO_SIGMAS,
    )
    yield from _refused(
        "several",
        **dict.fromkeys(["lora_scale", "lora_scales", "lora_weights", "lora_path"], _NO_LORA),
        prompts=SEVERAL_PROMPTS,
        instances='KServe\'s; it is read in JSON: {"instances": [{"prompt": "a"}]}',
        **dict.fromkeys(
            ["image_url", "image_urls", "init_image_url", "mask_url", "control_image_url"],
            NO_FETCHING,
        ),
        image_strength="strength is 1 less that: 1 draws all of the picture anew",
        **dict.fromkeys(
            ["reference_image", "ip_adapter_image", "controlnet_units"], HOW_PICTURES_ARE_SENT
        ),
        video="this archive draws pictures",
    )
    for name in ("images", "image_base64", "init_img", "source_image"):
        yield ForeignName(name, "several", "`image`, one", _one_picture("image"), ("image",))
    yield from _renamed("several", mask_img="mask_image", mask_image_base64="mask_image")
    yield from _renamed(
        "several", conditioning_image="control_image", controlnet_image="control_image"
    )
    yield from _renamed(f"{_A1111}, several", schedule_type="sigmas")
    for name, sigmas in (
        ("use_karras_sigmas", "karras"),
        ("use_exponential_sigmas", "exponential"),
        ("use_beta_sigmas", "beta"),
        ("karras", "karras"),
    ):
        meaning = f'true is `sigmas: "{sigmas}"`'
        yield ForeignName(name, f"{_DIFFUSERS}, several", meaning, _flag_of(sigmas), ("sigmas",))
    yield from _renamed(_STABILITY, samples="num_images", sampler="scheduler")
    yield from _refused(
        _STABILITY,
        text_prompts="the text is sent as prompt, one of negative weight as negative_prompt:"
        ' {"prompt": "a"}',
    )
    yield from _renamed(_REPLICATE, num_outputs="num_images")
    yield from _strengths(_REPLICATE, ["prompt_strength"])
    yield from _refused(
        _REPLICATE, input='its fields stand at the top of the body: {"prompt": "a"}'
    )


FOREIGN_NAMES: Mapping[str, ForeignName] = MappingProxyType(
    {each.name: each for each in _entries()}
)
