"""What ``speed: off | safe | max`` does to a loaded pipeline, on each kind of device.

=====  ==================================  =====================================================
speed  on the CPU                          on CUDA
=====  ==================================  =====================================================
off    the pipeline as diffusers loads it  the same
safe   convolutions in channels_last       the same but in decoders; the VAE decodes picture by
                                           picture
max    also bfloat16 where the CPU has     also fused projections, TF32 for what is float32,
       it, compiled for any rows           compiled for any rows, a CUDA graph a bucket
=====  ==================================  =====================================================

`safe` reorders sums and nothing else; on the CPU it copies no large weights that are mapped. `max`
may change pictures slightly, and takes minutes at the first start; what it compiled is kept in
torch's cache (``TORCHINDUCTOR_CACHE_DIR``).
"""

from __future__ import annotations

import functools
import inspect
import itertools
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch.utils import _pytree as pytree

from handler.acceleration.channels_last import put_channels_last
from handler.acceleration.compiled_forward import PreparedForward, record_cuda_graph
from handler.batching.arguments import SHARED_PARAMETERS, STEP_PARAMETERS
from handler.config import HandlerConfig
from handler.engine import BUCKETS, InFlightEngine
from handler.engine.device_faults import is_device_lost
from handler.engine.forward import is_out_of_memory
from handler.engine.parking import find_slots
from handler.engine.wrappers import CompiledForwards, ForwardWrapper
from handler.pipelines.placement import modules_of
from handler.pipelines.shared_state import SharedState

if TYPE_CHECKING:
    from handler.acceleration.compiled_forward import Forward

__all__ = ["Plan", "SpeedUp", "compile_forward", "make_plan"]

logger = logging.getLogger(__name__)

# Numbers that say where something is, not how much: half precision has too few digits for them.
_POSITIONS = STEP_PARAMETERS | SHARED_PARAMETERS | {"time_ids"}


@dataclass(frozen=True, slots=True)
class Plan:
    """What is done to the pipeline and to its denoisers' forwards."""

    channels_last: bool = False
    slice_decoding: bool = False
    fuse_projections: bool = False
    tf32: bool = False
    precision: torch.dtype | None = None
    """What denoisers compute in, where that is not what the pipeline was loaded in."""
    compile: bool = False
    capture: bool = False
    warm_up: bool = False

    @property
    def prepares(self) -> bool:
        """Whether forwards get other code than their own."""
        return self.compile or self.capture

    def __str__(self) -> str:
        words = (
            "channels_last",
            "slice_decoding",
            "fuse_projections",
            "tf32",
            "compile",
            "capture",
        )
        done = [word for word in words if getattr(self, word)]
        if self.precision is not None:
            done.append(str(self.precision).removeprefix("torch."))
        return ", ".join(done) or "nothing"


def make_plan(
    config: HandlerConfig,
    pipelines: Any,
    device: torch.device,
    dtype: torch.dtype,
    *,
    has_bfloat16: bool | None = None,
) -> Plan:
    """What `config.speed` means for `pipelines` on their device; with `exact`, nothing.

    One pipeline, or several that share modules, by the names of their tasks.
    """
    if config.speed == "off" or config.exact:
        return Plan()
    on_cpu, on_cuda = (device.type == kind for kind in ("cpu", "cuda"))
    if config.speed == "safe":
        # On a CPU nothing is made ready by drawing, and a large picture takes minutes.
        asked = config.warm_up_sizes is not None
        return Plan(channels_last=True, slice_decoding=on_cuda, warm_up=on_cuda or asked)
    if has_bfloat16 is None:
        has_bfloat16 = cpu_has_bfloat16()
    obstacle = next(filter(None, map(_obstacle, _several(pipelines))), None)
    if obstacle is not None:
        logger.warning("speed: max compiles nothing here: %s", obstacle)
    # A precision that the operator chose stays. Without a text encoder the denoiser's precision
    # becomes that of the latents, which the VAE would not take.
    first = _several(pipelines)[0]
    has_encoder = any(name.startswith("text_encoder") for name in modules_of(first))
    halves = on_cpu and has_bfloat16 and config.dtype is None and has_encoder
    return Plan(
        channels_last=True,
        slice_decoding=on_cuda,
        # Fused projections are not the layers that a LoRA adds to.
        fuse_projections=on_cuda and obstacle is None and config.lora_dir is None,
        tf32=on_cuda and dtype is torch.float32,
        precision=torch.bfloat16 if halves else None,
        compile=obstacle is None and (on_cpu or on_cuda),
        capture=obstacle is None and on_cuda,
        warm_up=True,
    )


def cpu_has_bfloat16() -> bool:
    """Whether the CPU multiplies matrices of bfloat16 faster than of float32."""
    capabilities = torch.cpu.get_capabilities()
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))


def _obstacle(pipeline: Any) -> str | None:
    """Why forwards that are compiled once would be wrong later; None where they would not."""
    if SharedState(pipeline).is_exclusive:
        return "calls of this pipeline replace parts of its modules"
    for name, module in modules_of(pipeline).items():
        if getattr(module, "peft_config", None):
            return f"{name} has LoRA adapters, which may be switched"
    return None


class SpeedUp:
    """Applies `plan` to `pipelines`, which cannot be undone; then tells an engine what it needs.

    Mutates their modules, what they share once: one pipeline, or several by the names of their
    tasks. `compiler` and `record` are for forwards that are prepared.
    """

    def __init__(
        self,
        pipelines: Any,
        plan: Plan,
        max_rows: int,
        *,
        compiler: Callable[[Forward], Forward] | None = None,
        record: Callable[..., Any] | None = None,
    ) -> None:
        self.plan = plan
        self.prepared: list[PreparedForward] = []
        self._max_rows = max_rows
        self._compiler = compiler or compile_forward
        self._record = record
        _apply(_several(pipelines), plan)

    @property
    def buckets(self) -> tuple[int, ...]:
        """Row counts to pad forwards to: few to capture; any above one where code fits any."""
        if not self.plan.prepares:
            return ()
        if not self.plan.capture:
            return tuple(range(2, max(2, self._max_rows) + 1))
        return tuple(sorted({*(b for b in BUCKETS if 1 < b < self._max_rows), self._max_rows}))

    @property
    def wrappers(self) -> tuple[ForwardWrapper, ...]:
        """For the engine: what runs the prepared forwards, if any are."""
        return (CompiledForwards(self._prepare),) if self.plan.prepares else ()

    def warm_up(
        self,
        engine: InFlightEngine,
        calls: Sequence[Mapping[str, Any]],
        tasks: Sequence[str] = (),
    ) -> None:
        """Draw `calls`; meanwhile forwards are prepared for all that look like theirs.

        `tasks` name the pipeline of each call; where there is no name, it is the engine's first.

        Raises:
            Exception: what a call failed with, where memory ran out or the device is lost: nothing
                of the kind could be drawn later either.
        """
        if not self.plan.warm_up:
            return
        started_s = time.monotonic()
        self._set_warming(True)
        try:
            for kwargs, task in itertools.zip_longest(calls, tasks):
                error = _drawn(engine, kwargs, task)
                if error is not None and is_out_of_memory(error) and self._forget_graphs():
                    error = _drawn(engine, kwargs, task)
                if error is None:
                    continue
                if is_out_of_memory(error) or is_device_lost(error):
                    raise error
                logger.warning("warming up failed: %s", error)
        finally:
            self._set_warming(False)
        seconds = time.monotonic() - started_s
        logger.info("warmed up in %.1f s (%s)%s", seconds, self.plan, _memory_held())

    def _forget_graphs(self) -> bool:
        """Whether there were any, which left too little memory for the rest of a picture."""
        if not any(prepared.has_graphs for prepared in self.prepared):
            return False
        logger.warning(
            "captured forwards of up to %d rows leave too little memory to draw: they are launched "
            "as usual; with a smaller max_rows they would fit",
            self._max_rows,
        )
        for prepared in self.prepared:
            prepared.forget_graphs()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        return True

    def _prepare(self, forward: Forward) -> Forward:
        record = self._record
        if self.plan.capture and record is None:
            record = record_cuda_graph()
        prepared = PreparedForward(
            forward,
            self.buckets,
            compiler=self._compiler if self.plan.compile else None,
            record=record if self.plan.capture else None,
            precision=self.plan.precision,
        )
        self.prepared.append(prepared)
        return prepared.function

    def _set_warming(self, is_warming: bool) -> None:
        for prepared in self.prepared:
            prepared.is_warming = is_warming
        if self.plan.capture:
            # cuDNN tries all its algorithms at every new shape: now, and never in traffic.
            torch.backends.cudnn.benchmark = is_warming


def _drawn(
    engine: InFlightEngine, kwargs: Mapping[str, Any], task: str | None
) -> BaseException | None:
    """Draw one picture; what it failed with, if it did."""
    ticket = engine.submit(kwargs, task=task)
    engine.run()
    return ticket.error


def _memory_held() -> str:
    """What the process holds of its device, for the log."""
    if not torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        return ""
    return f", {torch.cuda.memory_reserved() / 2**30:.1f} GiB of the device's memory are held"


def compile_forward(forward: Forward) -> Forward:
    """Compile `forward` for the shapes that it meets, its rows excepted."""
    # Each size is compiled for itself; the default of eight would leave the ninth as it is.
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 64)
    compiled: Forward = torch.compile(forward, dynamic=False)
    return compiled


def _apply(pipelines: Sequence[Any], plan: Plan) -> None:
    if plan.channels_last:
        done = set[int]()
        for pipeline in pipelines:
            modules = {name: m for name, m in modules_of(pipeline).items() if id(m) not in done}
            put_channels_last(modules)
            done |= {id(module) for module in modules.values()}
    first = pipelines[0]
    if plan.slice_decoding and hasattr(getattr(first, "vae", None), "enable_slicing"):
        first.vae.enable_slicing()
    if plan.fuse_projections and hasattr(first, "fuse_qkv_projections"):
        try:
            first.fuse_qkv_projections()
        except ValueError as error:
            logger.info("projections stay apart: %s", error)
    if plan.tf32:
        torch.set_float32_matmul_precision("high")
    if plan.precision is not None:
        for slot in find_slots(*pipelines):
            if slot.is_denoiser:
                _compute_in(slot.module, plan.precision)


def _several(pipelines: Any) -> list[Any]:
    return list(pipelines.values()) if isinstance(pipelines, Mapping) else [pipelines]


def _compute_in(module: torch.nn.Module, precision: torch.dtype) -> None:
    """Let `module` compute in `precision`, while the pipeline around it notices nothing of that.

    Latents and schedulers keep their precision: only what the module itself rounds is lost.
    """
    if getattr(module, "_keep_in_fp32_modules", None):
        logger.info("%s stays as it is: parts of it need float32", type(module).__name__)
        return
    forward = module.forward
    signature = inspect.signature(forward)

    @functools.wraps(forward)
    def converted(*args: Any, **kwargs: Any) -> Any:
        bound = signature.bind(*args, **kwargs)
        given = [t for t in pytree.tree_leaves(dict(bound.arguments)) if _is_float(t)]
        for name, value in bound.arguments.items():
            bound.arguments[name] = _converted(name, value, precision)
        output = forward(*bound.args, **bound.kwargs)
        wanted = given[0].dtype if given else precision
        return pytree.tree_map(lambda v: v.to(wanted) if _is_float(v) else v, output)

    # diffusers' own `to` warns of parts that need float32 even where there are none.
    torch.nn.Module.to(module, precision)
    module.forward = converted


def _converted(name: str, value: Any, precision: torch.dtype) -> Any:
    """`value` with its floating-point tensors in `precision`, but for positions."""
    if name in _POSITIONS:
        return value
    if isinstance(value, dict):
        return {key: _converted(str(key), member, precision) for key, member in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_converted(name, member, precision) for member in value)
    return value.to(precision) if _is_float(value) else value


def _is_float(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.is_floating_point()
