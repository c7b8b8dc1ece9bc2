"""LoRAs on the modules that all requests share: each row of a merged forward under its own set.

A set names LoRAs and their scales. What it adds to a layer is computed beside the layer, row by
row, so that requests of different sets share forwards and nothing is switched. Calls that scale
their LoRAs for themselves change the layers, and what PEFT has put into the modules that is no
plain LoRA (DoRA, LoKr …) is left to it: theirs are forwards of one set, for which PEFT's layers are
switched.
"""

from __future__ import annotations

import itertools
from collections.abc import Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from handler.batching.low_rank import Adapter, Part, Scaled
from handler.pipelines.adapted_layers import (
    AdaptedLayer,
    LoraLayers,
    adapter_at,
    low_rank_of,
    patched,
    peft_layers,
)
from handler.pipelines.placement import modules_of

__all__ = ["AdapterRows", "AdapterSet", "AdapterSets", "PreparedLora", "scales_adapters"]

# Reads as no set at all: whatever is asked for next has to be applied.
_UNKNOWN: tuple[Any, Mapping[str, float]] = (None, {"": 0.0})
_MAX_PLANS = 256
_NO_MARKS: frozenset[Hashable] = frozenset()
_serial_numbers = itertools.count()


def scales_adapters(kwargs: Mapping[str, Any]) -> bool:
    """Whether a call with `kwargs` scales the active adapters for its own duration."""
    return any(
        "scale" in (kwargs.get(name) or ())
        for name in ("cross_attention_kwargs", "joint_attention_kwargs", "attention_kwargs")
    )


@dataclass(frozen=True, eq=False, slots=True)
class AdapterSet:
    """LoRAs with their scales, and what they add to which layers."""

    weights: Mapping[str, float] | None
    """The scale of each LoRA by its name; None is what was active at first."""
    components: Mapping[int, Mapping[AdaptedLayer, tuple[Scaled, ...]]]
    """What is added to each layer, by the identity of the component that it is in."""
    is_mixable: bool
    """Whether its rows may share a forward with those of other sets."""
    serial: int = field(default_factory=lambda: next(_serial_numbers))

    @property
    def key(self) -> Hashable:
        """Equal for sets that may share a forward even if they are not mixable."""
        return None if self.weights is None else tuple(sorted(self.weights.items()))


@dataclass(frozen=True, eq=False, slots=True, weakref_slot=True)
class PreparedLora:
    """A LoRA that was read, where the layers are that it adds to."""

    components: Mapping[int, Mapping[AdaptedLayer, Adapter]]
    """What it adds to each layer, by the identity of the component that it is in."""

    @property
    def size_bytes(self) -> int:
        """What its weights occupy."""
        return sum(each.size_bytes for of in self.components.values() for each in of.values())


_NOTHING = PreparedLora({})


@dataclass(frozen=True, slots=True)
class AdapterRows:
    """Some rows of a forward: how many, whose pipeline's, under which set."""

    pipeline: Any
    kwargs: Mapping[str, Any]
    adapters: AdapterSet | None
    num_rows: int


class AdapterSets:
    """The LoRAs of pipelines that share modules, and forwards under the sets that requests name.

    Nothing is touched until the first request that names a set or scales one.
    """

    def __init__(self, pipelines: Sequence[Any]) -> None:
        self._pipelines = pipelines
        self._before: list[_Layer] | None = None
        self._peft: dict[int, list[AdaptedLayer]] = {}
        """PEFT's layers by the identity of their component; known as soon as `_before` is."""
        self._loaded: dict[str, PreparedLora] = {}
        self._known: set[str] = set()
        self._layers: dict[int, AdaptedLayer] = {}
        self._sets: dict[Hashable, AdapterSet] = {}
        self._marks: dict[Hashable, frozenset[Hashable]] = {}
        self._found: AdapterSet | None = None
        self._plans: dict[Hashable, list[tuple[AdaptedLayer, list[Part]]]] = {}
        self._active: tuple[Any, Mapping[str, float]] | None = None
        """The pipeline whose modules were switched last, and to what; None: all are as at first."""

    def checked(
        self, pipeline: Any, adapters: Mapping[str, float] | None, kwargs: Mapping[str, Any]
    ) -> AdapterSet | None:
        """The set of `adapters`, if `pipeline` has loaded them all; None is what it had at first.

        Raises:
            ValueError: it has not, or they cannot be applied together.
        """
        is_scaled = scales_adapters(kwargs)
        if adapters is None and not is_scaled:
            return None
        known = _names_in(pipeline)
        names = (adapters or {}).keys()
        missing = sorted(names - known - self._loaded.keys())
        if missing:
            loaded = sorted(known | self._loaded.keys())
            raise ValueError(f"adapters {missing} are not loaded; loaded are {loaded}")
        if self._before is None and known:
            self._remember()
        if known != self._known:
            self._forget()
            self._known = known
        if adapters is None:
            return None
        chosen = self._set(dict(adapters))
        beside = sorted(names & self._loaded.keys())
        if beside and is_scaled:
            raise ValueError(f"{beside} take their scale with their name, not for the call")
        if beside and not chosen.is_mixable:
            raise ValueError(f"{beside} do not go together with {sorted(names - set(beside))}")
        return chosen

    def prepare(self, layers: LoraLayers) -> PreparedLora:
        """Find these layers, by component and path, and put the weights where they are.

        Nothing of the modules is changed. In any thread, also while forwards run.

        Raises:
            ValueError: a layer is not there, or takes no LoRA.
        """
        found: dict[int, dict[AdaptedLayer, Adapter]] = {}
        for component, paths in layers.items():
            for model in self._models(component):
                modules = dict(getattr(model, "_orig_mod", model).named_modules())
                # A search through all its weights.
                dtype: Any = getattr(model, "dtype", torch.float32)
                for path, weights in paths.items():
                    if path not in modules:
                        raise ValueError(f"{component} has no layer {path}")
                    layer = self._layer(modules[path])
                    found.setdefault(id(model), {})[layer] = adapter_at(layer, weights, dtype)
        return PreparedLora(found)

    def attach(self, name: str, lora: PreparedLora) -> None:
        """Let requests name a LoRA.

        Raises:
            ValueError: the name is taken.
        """
        known = set[str]().union(*map(_names_in, self._pipelines))
        if name in known | self._loaded.keys():
            raise ValueError(f"there is an adapter {name!r} already")
        if known and self._before is None:
            self._remember()
        self._loaded[name] = lora

    def detach(self, name: str) -> None:
        """Forget a LoRA that `attach` added; requests that have named it keep it."""
        del self._loaded[name]
        self._forget()

    def key_of(self, adapters: AdapterSet | None, *, apart: bool) -> Hashable:
        """What the calls of one forward have in common; `apart`, also the set itself."""
        found = self._found if adapters is None else adapters
        if found is None or (found.is_mixable and not apart):
            return None
        return ("set", found.key)

    @contextmanager
    def applied(self, rows: Sequence[AdapterRows], padded: int, module: Any) -> Iterator[bool]:
        """Whatever `module` runs meanwhile is under the sets of `rows`, the last one's padded.

        None for `module` is all modules. Yields whether its layers are patched, so that faster code
        in place of its own would be wrong.
        """
        sets = [each.adapters for each in rows]
        is_scaled = any(scales_adapters(each.kwargs) for each in rows)
        is_plain = all(each is None for each in sets)
        if is_scaled or is_plain or any(self.key_of(each, apart=False) for each in sets):
            weights = None if sets[0] is None else sets[0].weights
            self.activate(rows[0].pipeline, weights, scaled=is_scaled)
            yield False
        else:
            plan = self._plan(rows, padded, None if module is None else id(module))
            with patched(plan, max(padded, 1)):
                yield bool(plan)

    def check_present(self, adapters: AdapterSet | None) -> None:
        """Raise ValueError if a LoRA of PEFT's that the set names was deleted meanwhile."""
        for name in {} if adapters is None else adapters.weights or {}:
            layers = itertools.chain.from_iterable(self._peft.values())
            if name not in self._loaded and not any(name in x.module.scaling for x in layers):
                raise ValueError(f"the adapter {name!r} was deleted")

    def activate(
        self, pipeline: Any, adapters: Mapping[str, float] | None, *, scaled: bool = False
    ) -> None:
        """Switch PEFT's layers of `pipeline` to `adapters`; None is what was active at first.

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

    def marks_of(self, adapters: AdapterSet | None, module: Any) -> frozenset[Hashable]:
        """The layers of `module` that the set adds to; the same object for the same set."""
        chosen = self._found if adapters is None else adapters
        if chosen is None:
            return _NO_MARKS
        key = (chosen.serial, id(module))
        if key not in self._marks:
            layers = chosen.components.get(id(module), {})
            self._marks[key] = frozenset(id(layer) for layer in layers)
        return self._marks[key]

    def _remember(self) -> None:
        """Look at PEFT's layers, as they are before any of them is switched."""
        components = [each for p in self._pipelines for each in modules_of(p).values()]
        for component in dict.fromkeys(components):
            if layers := peft_layers(component):
                self._peft[id(component)] = [self._layer(layer) for layer in layers]
        layers = [each for found in self._peft.values() for each in found]
        self._before = [_Layer.of(each.module) for each in layers]
        self._found = self._make_set(None)

    def _models(self, component: str) -> list[torch.nn.Module]:
        """The modules that the pipelines have under this name."""
        found = (modules_of(pipeline) for pipeline in self._pipelines)
        return list(dict.fromkeys(each[component] for each in found if component in each))

    def _layer(self, module: Any) -> AdaptedLayer:
        """The one layer of `module`, whichever thread asks first."""
        found = self._layers.get(id(module))
        return found or self._layers.setdefault(id(module), AdaptedLayer(module))

    def _forget(self) -> None:
        """Resolve sets anew: which LoRAs there are has changed."""
        self._sets.clear()
        self._plans.clear()
        self._marks.clear()

    def _set(self, weights: dict[str, float]) -> AdapterSet:
        key = tuple(weights.items())
        if key not in self._sets:
            if len(self._sets) >= _MAX_PLANS:
                self._forget()
            self._sets[key] = self._make_set(weights)
        return self._sets[key]

    def _make_set(self, weights: Mapping[str, float] | None) -> AdapterSet:
        """Resolve a set; None is what PEFT's layers add as they are."""
        components: dict[int, dict[AdaptedLayer, tuple[Scaled, ...]]] = {}
        is_mixable = True

        def add(component: int, layer: AdaptedLayer, *found: Scaled) -> None:
            into = components.setdefault(component, {})
            into[layer] = (*into.get(layer, ()), *found)

        for component, layers in self._peft.items():
            for layer in layers:
                is_mixable &= not layer.module.merged
                if weights is None:
                    found = layer.as_found()
                    is_mixable &= found is not None
                    if found:
                        add(component, layer, *found)
        for name, scale in (weights or {}).items():
            for component, layers in self._peft.items():
                for layer in layers:
                    if name in layer.module.scaling:
                        plain = low_rank_of(layer.module, name)
                        is_mixable &= plain is not None
                        if plain is not None:
                            add(component, layer, (plain, plain.factor(scale)))
            for component, adapted in self._loaded.get(name, _NOTHING).components.items():
                for layer, adapter in adapted.items():
                    add(component, layer, (adapter, adapter.factor(scale)))
        return AdapterSet(weights, components, is_mixable)

    def _plan(
        self, rows: Sequence[AdapterRows], padded: int, component: int | None
    ) -> list[tuple[AdaptedLayer, list[Part]]]:
        """What each layer adds to which rows; those of PEFT's are all there, to add no more."""
        runs: list[tuple[AdapterSet | None, int, int]] = []
        at = 0
        for each in rows:
            chosen = self._found if each.adapters is None else each.adapters
            if runs and runs[-1][0] is chosen:
                runs[-1] = (chosen, runs[-1][1], at + each.num_rows)
            else:
                runs.append((chosen, at, at + each.num_rows))
            at += each.num_rows
        chosen, start, _ = runs[-1]
        runs[-1] = (chosen, start, max(padded, 1))
        key = (component, *((None if s is None else s.serial, *span) for s, *span in runs))
        if key not in self._plans:
            if len(self._plans) >= _MAX_PLANS:
                self._plans.clear()
            self._plans[key] = self._make_plan(runs, component)
        return self._plans[key]

    def _make_plan(
        self, runs: Sequence[tuple[AdapterSet | None, int, int]], component: int | None
    ) -> list[tuple[AdaptedLayer, list[Part]]]:
        peft = self._peft if component is None else {component: self._peft.get(component, [])}
        parts: dict[AdaptedLayer, list[Part]] = {
            layer: [] for layers in peft.values() for layer in layers
        }
        for chosen, start, stop in runs:
            within = {} if chosen is None else chosen.components
            for one in within if component is None else (component,):
                for layer, adapters in within.get(one, {}).items():
                    parts.setdefault(layer, []).append(Part(start, stop, adapters))
        return list(parts.items())


def _names_in(pipeline: Any) -> set[str]:
    """The adapters that PEFT has put into the modules of `pipeline`."""
    listed: dict[str, list[str]] = getattr(pipeline, "get_list_adapters", dict)()
    return {name for names in listed.values() for name in names}


def _switch(pipeline: Any, adapters: Mapping[str, float]) -> None:
    if adapters:
        pipeline.enable_lora()
        pipeline.set_adapters(list(adapters), list(adapters.values()))
    else:
        pipeline.disable_lora()


@dataclass(frozen=True, slots=True)
class _Layer:
    """One of PEFT's layers, as it was found."""

    module: Any
    active: list[str]
    is_disabled: bool
    scaling: dict[str, float]
    trained: list[torch.nn.Parameter]

    @classmethod
    def of(cls, module: Any) -> _Layer:
        return cls(
            module=module,
            active=list(module.active_adapters),
            is_disabled=module.disable_adapters,
            scaling=dict(module.scaling),
            trained=[p for p in module.parameters() if p.requires_grad],
        )

    def restore(self) -> None:
        self.module.enable_adapters(True)
        self.module.set_adapter(self.active)
        self.module.scaling.update(self.scaling)
        if self.is_disabled:
            self.module.enable_adapters(False)
        for parameter in self.module.parameters():
            parameter.requires_grad_(any(parameter is trained for trained in self.trained))
