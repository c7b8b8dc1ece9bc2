"""Modules of diffusers that take their batch in ways of their own: merged where that is right.

Each is called as its pipeline calls it, by several requests at once; every call must get what it
gets alone.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import diffusers
import pytest
import torch
import transformers
from diffusers.models.transformers import transformer_cosmos

from handler.batching.arguments import num_rows
from handler.batching.invariance import agree
from handler.engine.forward import BatchedForward, Failure
from handler.engine.parking import ModuleCall, Slot
from handler.engine.ticket import Ticket
from handler.pipelines.cost import Cost
from tests.support.forward_tools import batched
from tests.support.tiny_models import make_every_parameter_count

Call = dict[str, Any]


def made(build: Callable[[], torch.nn.Module]) -> torch.nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module = build().eval()
        make_every_parameter_count(module)
    return module


def drawn(index: int, *shapes: tuple[int, ...]) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(index)
    return [torch.randn(shape, generator=generator) for shape in shapes]


class Served:
    """A module whose calls are run together, as an engine's ticks do."""

    def __init__(self, module: torch.nn.Module, *, is_denoiser: bool = True) -> None:
        self.module = module
        self.forward: BatchedForward = batched(max_rows=64)
        self.slot = Slot(
            name="transformer.forward",
            module=module,
            method="forward",
            is_denoiser=is_denoiser,
            real=module.forward,
            signature=inspect.signature(module.forward),
            attribute=None,
        )

    @torch.no_grad()
    def alone(self, call: Call) -> Any:
        return self.module(**call)

    @torch.no_grad()
    def together(self, calls: Sequence[Call]) -> tuple[list[Any], int]:
        """The outputs of one tick, and how many forwards it took."""
        parked = []
        for call in calls:
            bound = self.slot.bind((), call)
            rows = num_rows(bound.arguments) or 0
            ticket = Ticket(kwargs={}, cost=Cost(rows, 0))
            parked.append(ModuleCall(self.slot, ticket, bound, rows))
        before = self.forward.counters.forwards
        results: dict[ModuleCall, Any] = {}
        for group in self.forward.group(parked):
            results.update(zip(group.calls, self.forward.run(group), strict=True))
        outputs = [results[each] for each in parked]
        assert not [output for output in outputs if isinstance(output, Failure)]
        return outputs, self.forward.counters.forwards - before


def check(
    module: torch.nn.Module, ticks: Sequence[Sequence[Call]], *, is_denoiser: bool = True
) -> list[int]:
    """Run each of `ticks` together; the forwards that each took. Every output is the call's own."""
    served, forwards = Served(module, is_denoiser=is_denoiser), []
    for calls in ticks:
        expected = [served.alone(call) for call in calls]
        outputs, num_forwards = served.together(calls)
        forwards.append(num_forwards)
        for place, (output, wanted) in enumerate(zip(outputs, expected, strict=True)):
            assert agree(output, wanted), "each gets its own"
            others = [other for i, other in enumerate(expected) if i != place]
            assert not any(agree(output, other) for other in others), "and not another's"
    return forwards


# Several rows a row


def motion_unet() -> torch.nn.Module:
    return diffusers.UNetMotionModel(
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        num_attention_heads=2,
        cross_attention_dim=16,
        down_block_types=("CrossAttnDownBlockMotion", "DownBlockMotion"),
        up_block_types=("UpBlockMotion", "CrossAttnUpBlockMotion"),
        motion_num_attention_heads=2,
        use_motion_mid_block=False,
    )


def animate(index: int, rows: int = 2, frames: int = 3) -> Call:
    """As AnimateDiff calls it: the text embeddings are repeated for every frame."""
    sample, text = drawn(index, (rows, 4, frames, 8, 8), (rows, 5, 16))
    return {
        "sample": sample,
        "timestep": torch.tensor(10 + index),
        "encoder_hidden_states": text.repeat_interleave(frames, dim=0),
    }


def test_text_embeddings_of_every_frame_are_merged() -> None:
    ticks = [
        [animate(0), animate(1)],
        [animate(2), animate(3), animate(4)],
        [animate(5), animate(6, rows=1)],
        [animate(7, rows=1), animate(8, rows=4), animate(9)],
    ]
    assert check(made(motion_unet), ticks) == [2, 1, 1, 1], "proven once, then one forward a tick"


def test_the_same_prompt_in_all_requests_is_still_each_ones_frames() -> None:
    """Equal text embeddings look like one table for all; the comparison tells."""
    calls = [animate(0), animate(1)]
    calls[1]["encoder_hidden_states"] = calls[0]["encoder_hidden_states"].clone()
    later = [animate(2), animate(3)]
    forwards = check(made(motion_unet), [calls, later])
    assert forwards[1] == 2, "what differs now was not proven, but nothing else is in the way"


@pytest.fixture
def cosmos(monkeypatch: pytest.MonkeyPatch) -> torch.nn.Module:
    if not hasattr(transformer_cosmos, "transforms"):  # torchvision's, for the nearest pixel
        functional = SimpleNamespace(
            resize=lambda mask, size, interpolation: torch.nn.functional.interpolate(mask, size)
        )
        stand_in = SimpleNamespace(
            functional=functional, InterpolationMode=SimpleNamespace(NEAREST=None)
        )
        monkeypatch.setattr(transformer_cosmos, "transforms", stand_in, raising=False)
    return made(tiny_cosmos)


def tiny_cosmos() -> torch.nn.Module:
    return diffusers.CosmosTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=1,
        mlp_ratio=2,
        text_embed_dim=16,
        adaln_lora_dim=4,
        max_size=(4, 16, 16),
        patch_size=(1, 2, 2),
    )


def cosmos_call(index: int, rows: int = 1) -> Call:
    """Its padding mask is one row for all, whatever the batch."""
    sample, text = drawn(index, (rows, 4, 1, 8, 8), (rows, 5, 16))
    return {
        "hidden_states": sample,
        "timestep": torch.full((rows,), 0.1 * (index + 1)),
        "encoder_hidden_states": text,
        "padding_mask": torch.zeros(1, 1, 16, 16),
        "return_dict": False,
    }


def test_a_padding_mask_of_one_row_is_passed_once(cosmos: torch.nn.Module) -> None:
    ticks = [
        [cosmos_call(0), cosmos_call(1)],
        [cosmos_call(2), cosmos_call(3), cosmos_call(4)],
        [cosmos_call(5), cosmos_call(6, rows=2)],
    ]
    first, *later = check(cosmos, ticks)
    assert later == [1, 1]
    assert first <= 6


def test_a_request_that_overflows_first_spoils_nothing(cosmos: torch.nn.Module) -> None:
    overflowing = cosmos_call(0)
    overflowing["hidden_states"].fill_(float("nan"))
    ticks = [
        [overflowing, cosmos_call(1)],
        [cosmos_call(2), cosmos_call(3)],
        [cosmos_call(4), cosmos_call(5)],
    ]
    assert check(cosmos, ticks)[-1] == 1


def wan() -> torch.nn.Module:
    return diffusers.WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        text_dim=16,
        freq_dim=16,
        ffn_dim=16,
        num_layers=1,
        image_dim=8,
        added_kv_proj_dim=24,
        rope_max_seq_len=32,
        pos_embed_seq_len=2 * 3,
    )


def wan_call(index: int) -> Call:
    """First and last frame: two image embeddings for the one row."""
    sample, text, images = drawn(index, (1, 4, 2, 8, 8), (1, 5, 16), (2, 3, 8))
    return {
        "hidden_states": sample,
        "timestep": torch.tensor([10 + index]),
        "encoder_hidden_states": text,
        "encoder_hidden_states_image": images,
        "return_dict": False,
    }


def test_two_image_embeddings_a_row_are_merged() -> None:
    ticks = [[wan_call(0), wan_call(1)], [wan_call(2), wan_call(3), wan_call(4)]]
    assert check(made(wan), ticks) == [2, 1]


def test_a_table_of_one_entry_is_passed_once() -> None:
    """Kandinsky 5 passes positions as lists: the one of a single frame has as many as rows."""

    class Positioned(torch.nn.Module):
        def forward(self, sample: torch.Tensor, places: Any, timestep: torch.Tensor) -> Any:
            frames, height, width = places
            assert len(frames) == 1
            grid = (height[:, None] * width[None, :]).float().reshape(1, 1, 4, 4)
            return sample * (1 + grid + frames) * timestep.reshape(-1, 1, 1, 1)

    def call(index: int) -> Call:
        (sample,) = drawn(index, (1, 2, 4, 4))
        places = [torch.arange(1), torch.arange(4), torch.arange(4)]
        return {"sample": sample, "places": places, "timestep": torch.tensor([index + 1])}

    first, second = check(Positioned(), [[call(0), call(1)], [call(2), call(3), call(4)]])
    assert second == 1
    assert first <= 5


# The batch elsewhere


def chatglm() -> torch.nn.Module:
    with warnings.catch_warnings(action="ignore"):  # of torch.jit.script, at its import
        from diffusers.pipelines.kolors.text_encoder import ChatGLMConfig, ChatGLMModel
    config = ChatGLMConfig(
        num_layers=2,
        padded_vocab_size=64,
        hidden_size=16,
        ffn_hidden_size=32,
        kv_channels=8,
        num_attention_heads=2,
        seq_length=16,
        multi_query_attention=True,
        multi_query_group_num=1,
        add_qkv_bias=True,
        original_rope=True,
        output_hidden_states=False,
    )
    module = ChatGLMModel(config)
    for weight in module.parameters():  # which it leaves as the memory was
        torch.nn.init.normal_(weight, std=0.3)
    return module


def chatglm_call(index: int, length: int = 6) -> Call:
    ids = torch.randint(1, 64, (1, length), generator=torch.Generator().manual_seed(index))
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "position_ids": torch.arange(length)[None],
        "output_hidden_states": True,
    }


@pytest.mark.parametrize("num_nans", [0, 1])
def test_an_encoder_whose_output_has_the_sequence_first_is_run_alone(num_nans: int) -> None:
    """Kolors: (sequence, batch, hidden), also where some of its numbers overflow."""
    module = made(chatglm)
    with torch.no_grad():
        module.encoder.final_layernorm.weight[:num_nans] = float("nan")
    ticks = [[chatglm_call(0), chatglm_call(1)], [chatglm_call(2), chatglm_call(3)]]
    # As many requests as there are tokens: the sequence could be taken for the batch.
    ticks.append([chatglm_call(i, length=3) for i in range(3)])
    forwards = check(module, ticks, is_denoiser=False)
    assert forwards[1] == 2


def test_an_encoder_that_gives_no_number_at_all_is_run_alone() -> None:
    module = made(chatglm)
    with torch.no_grad():
        module.encoder.final_layernorm.weight.fill_(float("nan"))
    served = Served(module, is_denoiser=False)
    for i in (0, 2):
        calls = [chatglm_call(i), chatglm_call(i + 1)]
        expected = [served.alone(call) for call in calls]
        outputs, _ = served.together(calls)
        assert all(agree(mine, wanted) for mine, wanted in zip(outputs, expected, strict=True))
        assert [output.last_hidden_state.shape for output in outputs] == [(6, 1, 16)] * 2


# Pins of what is right: nobody would notice losing it


def hidream() -> torch.nn.Module:
    return diffusers.HiDreamImageTransformer2DModel(
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        caption_channels=[16, 16],
        text_emb_dim=16,
        num_routed_experts=2,
        num_activated_experts=1,
        axes_dims_rope=(4, 2, 2),
        max_resolution=(16, 16),
        llama_layers=[0, 0],
    )


def hidream_call(index: int, rows: int = 1) -> Call:
    """Its layers of text embeddings stand before the batch: (layers, rows, tokens, width)."""
    sample, text, llama, pooled = drawn(
        index, (rows, 4, 8, 8), (rows, 5, 16), (1, rows, 5, 16), (rows, 16)
    )
    return {
        "hidden_states": sample,
        "timesteps": torch.full((rows,), 10 + index),
        "encoder_hidden_states_t5": text,
        "encoder_hidden_states_llama3": llama,
        "pooled_embeds": pooled,
        "return_dict": False,
    }


def test_a_group_that_is_refuted_is_drawn_row_by_row() -> None:
    """HiDream's text embeddings have their layers first."""
    ticks = [[hidream_call(0), hidream_call(1)], [hidream_call(2), hidream_call(3)]]
    assert check(made(hidream), ticks)[1] == 2


class Remembering(torch.nn.Module):
    """A denoiser that writes what it has seen into the cache it is given."""

    def __init__(self, returns: bool) -> None:
        super().__init__()
        self.returns = returns

    def forward(self, sample: torch.Tensor, kv_cache: dict[int, dict[str, torch.Tensor]]) -> Any:
        seen = kv_cache[0]["keys"].mean()
        output = sample * (1 + seen)
        kv_cache[0]["keys"][0] = output.mean()
        return (output, kv_cache) if self.returns else (output,)


@pytest.mark.parametrize("returns", [False, True])
def test_a_cache_that_a_forward_writes_into_stays_the_calls_own(returns: bool) -> None:
    """AnyFlow hands its transformer tensors to write to, all zeros at first."""
    served, alone = Served(Remembering(returns)), Remembering(returns)

    def caches() -> list[dict[int, Any]]:
        return [{0: {"keys": torch.zeros(2, 1, 3)}} for _ in range(2)]

    ours, theirs = caches(), caches()
    for step in range(3):
        samples = [drawn(10 * step + i, (1, 4))[0] for i in range(2)]
        calls = [{"sample": s, "kv_cache": cache} for s, cache in zip(samples, ours, strict=True)]
        expected = [alone(s.clone(), cache) for s, cache in zip(samples, theirs, strict=True)]
        outputs, _ = served.together(calls)
        for output, wanted in zip(outputs, expected, strict=True):
            assert agree(output[0], wanted[0])
        for cache, wanted in zip(ours, theirs, strict=True):
            assert torch.equal(cache[0]["keys"], wanted[0]["keys"])


def test_a_cache_object_is_not_merged() -> None:
    config = transformers.Qwen3Config(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
    )
    module = made(lambda: transformers.Qwen3Model(config))
    served = Served(module)
    caches = [[transformers.DynamicCache(config=config) for _ in range(2)] for _ in range(2)]
    for step in range(2):
        calls = [
            {"input_ids": torch.tensor([[1 + step, 5 + i]]), "past_key_values": caches[0][i]}
            for i in range(2)
        ]
        expected = [
            served.alone({**call, "past_key_values": caches[1][i]}) for i, call in enumerate(calls)
        ]
        outputs, num_forwards = served.together(calls)
        assert num_forwards == 2
        for output, wanted in zip(outputs, expected, strict=True):
            assert torch.equal(output.last_hidden_state, wanted.last_hidden_state)


def llava() -> torch.nn.Module:
    text = transformers.LlamaConfig(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
    )
    vision = transformers.CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=16,
        patch_size=8,
    )
    config = transformers.LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=63,
        image_seq_length=4,
        vision_feature_layer=-1,
    )
    return transformers.LlavaForConditionalGeneration(config)


def llava_call(index: int) -> Call:
    """As HunyuanVideo's image to video: tokens that stand for the picture, and the picture."""
    generator = torch.Generator().manual_seed(index)
    words = torch.randint(1, 60, (1, 5), generator=generator)
    ids = torch.cat([words[:, :2], torch.full((1, 4), 63), words[:, 2:]], dim=1)
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "pixel_values": torch.randn((1, 3, 16, 16), generator=generator),
        "output_hidden_states": True,
    }


def test_an_encoder_of_text_and_picture_gives_each_its_own() -> None:
    """HunyuanVideo's image-to-video text encoder."""
    ticks = [[llava_call(0), llava_call(1)], [llava_call(2), llava_call(3), llava_call(4)]]
    check(made(llava), ticks, is_denoiser=False)
