"""LoRA adapters on the modules that all requests share: one set is active at a time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

__all__ = ["AdapterSets", "scales_adapters"]

# Reads as no set at all: whatever is asked for next has to be applied.
_UNKNOWN: tuple[Any, Mapping[str, float]] = (None, {"": 0.0})


def scales_adapters(kwargs: Mapping[str, Any]) -> bool:
    """Whether a call with `kwargs` scales the active adapters for its own duration."""
    return any(
        "scale" in (kwargs.get(name) or ())
        for name in ("cross_attention_kwargs", "joint_attention_kwargs", "attention_kwargs")
    )


class AdapterSets:
    """Switches the adapters of pipelines that share modules between the sets that requests name.

    Nothing is touched until the first request that names a set or scales one.
    """

    def __init__(self, pipelines: Sequence[Any]) -> None:
        self._pipelines = pipelines
        self._before: list[_Layer] | None = None
        self._active: tuple[Any, Mapping[str, float]] | None = None
        """The pipeline whose modules were switched last, and to what; None: all are as at first."""

    def checked(
        self, pipeline: Any, adapters: Mapping[str, float] | None, kwargs: Mapping[str, Any]
    ) -> Mapping[str, float] | None:
        """`adapters`, if `pipeline` has loaded them all.

        Raises:
            ValueError: it has not.
        """
        if adapters is None and not scales_adapters(kwargs):
            return None
        listed: dict[str, list[str]] = getattr(pipeline, "get_list_adapters", dict)()
        loaded = {name for names in listed.values() for name in names}
        missing = sorted((adapters or {}).keys() - loaded)
        if missing:
            raise ValueError(f"adapters {missing} are not loaded; loaded are {sorted(loaded)}")
        if self._before is None and loaded:
            self._before = _layers(self._pipelines)
        return None if adapters is None else dict(adapters)

    def activate(
        self, pipeline: Any, adapters: Mapping[str, float] | None, *, scaled: bool = False
    ) -> None:
        """Make `adapters` the active set of `pipeline`; None is the set that was active at first.

        `scaled` says that what runs next scales them: diffusers divides again afterwards, which
        rounds, and after a scale of zero forgets the weights.
        """
        if self._before is None:
            return
        wanted = None if adapters is None else (pipeline, adapters)
        if wanted != self._active:
            self._active = _UNKNOWN
            if adapters is None:
                for layer in self._before:
                    layer.restore()
            else:
                _switch(pipeline, adapters)
        self._active = _UNKNOWN if scaled else wanted

    def restore(self) -> None:
        """Give every layer back the adapters and weights that it had at first."""
        self.activate(None, None)


def _switch(pipeline: Any, adapters: Mapping[str, float]) -> None:
    if adapters:
        pipeline.enable_lora()
        pipeline.set_adapters(list(adapters), list(adapters.values()))
    else:
        pipeline.disable_lora()


@dataclass(frozen=True, slots=True)
class _Layer:
    """One layer with adapters, as it was found."""

    module: Any
    active: list[str]
    is_disabled: bool
    scaling: dict[str, float]
    trained: list[torch.nn.Parameter]

    def restore(self) -> None:
        self.module.enable_adapters(True)
        self.module.set_adapter(self.active)
        self.module.scaling.update(self.scaling)
        if self.is_disabled:
            self.module.enable_adapters(False)
        for parameter in self.module.parameters():
            parameter.requires_grad_(any(parameter is trained for trained in self.trained))


def _layers(pipelines: Sequence[Any]) -> list[_Layer]:
    from peft.tuners.tuners_utils import BaseTunerLayer

    components = {id(c): c for pipeline in pipelines for c in pipeline.components.values()}
    return [
        _Layer(
            module=module,
            active=list(module.active_adapters),
            is_disabled=module.disable_adapters,
            scaling=dict(module.scaling),
            trained=[p for p in module.parameters() if p.requires_grad],
        )
        for component in components.values()
        if isinstance(component, torch.nn.Module)
        for module in component.modules()
        if isinstance(module, BaseTunerLayer)
    ]
