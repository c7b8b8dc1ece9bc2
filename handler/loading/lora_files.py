"""Reads LoRAs: which layers of a pipeline a file changes, and whether all of it fits.

diffusers itself converts a file, in whatever names its trainer wrote; its models only receive what
they would be given, so that nothing is injected anywhere. Every tensor of the file has to arrive.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from handler.errors import ArchiveError
from handler.library_logs import quiet_libraries
from handler.loading.documents import parse_json
from handler.loading.lora_layers import (
    METADATA,
    WEIGHT,
    Delivery,
    KroneckerLayer,
    Layers,
    LoraLayer,
    layers_in,
)
from handler.loading.lora_refusals import not_a_lora, not_finite, shown
from handler.loading.safetensors_map import read_header, read_tensors
from handler.messages import first_lines

if TYPE_CHECKING:
    from pathlib import Path

    import torch

    from handler.loading.safetensors_map import Header

__all__ = ["LoraReader", "in_present_names"]

# Kinds that diffusers converts for some pipelines.
_SOME_KINDS = {".lokr_": "a LoKr of LyCORIS"}
# Where the name of a tensor in a file stops being that of its layer, whoever wrote it.
_LAYER_END = re.compile(
    r"[._]lora(_linear_layer)?[._](down|up|A|B|embedding_A|embedding_B|magnitude_vector)\b.*"
    r"|\.(alpha|dora_scale|lora_alpha|diff|diff_b|lokr_w[12](_[ab])?)$"
)
_ALPHA = re.compile(r"(.+?)[._]?(?:lora_)?alpha")
# What diffusers leaves of kohya's names for the attention of a text encoder, where the file has
# other layers of it too; PEFT would drop these.
_OLD_ATTENTION = re.compile(r"(.*\.)to_(q|k|v|out)_lora\.(down|up)\.weight")


class LoraReader:
    """Reads LoRAs for `pipeline`, which is only looked at: what is kept of it has no weights."""

    def __init__(self, pipeline: Any) -> None:
        self._kind = type(pipeline).__name__
        self._skeleton: Any = None
        encoders = (getattr(pipeline, name, None) for name in ("text_encoder", "text_encoder_2"))
        configs = (getattr(encoder, "config", None) for encoder in encoders)
        self._widths = {getattr(config, "hidden_size", 0) for config in configs} - {0}
        if hasattr(pipeline, "load_lora_weights"):
            self._skeleton = _without_weights(pipeline)
            self._modules = {
                name: dict(component.named_modules())
                for name, component in self._skeleton.components.items()
                if hasattr(component, "named_modules")
            }

    def check(self, header: Header) -> None:
        """Raise ArchiveError unless a file of this `header` fits whole; its data is not read."""
        import torch

        one = torch.ones(())
        shapes = {name: one.expand(info.shape) for name, info in header.tensors.items()}
        self.read(shapes, header.metadata)

    def read(self, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> Layers:
        """The layers that a file of these tensors changes, and by what.

        Raises:
            ArchiveError: it is no LoRA, or not all of it fits; the message names keys.
        """
        if problem := not_a_lora(tensors, self._widths):
            raise ArchiveError(problem)
        if self._skeleton is None:
            raise ArchiveError(f"{self._kind} takes no LoRAs")
        configured = _adapter_metadata(metadata)
        self._check_keys(tensors, configured)
        layers: dict[str, dict[str, LoraLayer | KroneckerLayer]] = {}
        for each in self._delivered(tensors, configured):
            found = layers[each.component] = dict(layers_in(each))
            for path, layer in found.items():
                wanted = tuple(self._modules[each.component][path].weight.shape)
                if isinstance(layer, KroneckerLayer) and layer.shape != wanted:
                    raise ArchiveError(
                        f"it does not fit the pipeline: {path} is changed by a product of the shape"
                        f" {layer.shape}, its layer wants {wanted}"
                    )
        return layers

    def read_file(self, path: Path) -> Layers:
        """The same of the file at `path`; nothing of it stays mapped.

        Raises:
            ArchiveError: as `read` does, or a weight is not a finite number.
        """
        size_bytes = path.stat().st_size
        with path.open("rb") as file:
            header = read_header(file, size_bytes, path.name)
        if not any(_LAYER_END.search(name) for name in header.tensors):
            self.check(header)  # a whole model, perhaps: it is refused without being read
        # Not mapped: the operator may replace or cut off the file at any time.
        tensors = read_tensors(path, path.name)
        if problem := not_finite(tensors):
            raise ArchiveError(problem)
        return self.read(tensors, header.metadata)

    def _check_keys(
        self, tensors: Mapping[str, torch.Tensor], configured: Mapping[str, Any]
    ) -> None:
        """Let each tensor carry a number of its own, and see which of them arrive at a layer."""
        marked = _marked(tensors)
        arrived: dict[int, str] = {}
        problems: list[str] = []
        for each in self._delivered(marked, configured):
            modules = self._modules[each.component]
            for name, tensor in each.tensors.items():
                found = WEIGHT.fullmatch(name)
                layer = None if found is None else modules.get(found["layer"])
                marks = _marks_in(tensor)
                if layer is not None and found is not None:
                    arrived.update(dict.fromkeys(marks, f"{each.component}.{found['layer']}"))
                    problems += _misfit(layer, found, tensor)
        names = list(tensors)
        used = {names[mark - 1] for mark in arrived if 0 < mark <= len(names)}
        accounted = {_layer_of(name) for name in used}
        lost = [
            name
            for name in names
            if name not in used and not (_ALPHA.fullmatch(name) and _layer_of(name) in accounted)
        ]
        if lost:
            raise ArchiveError(_what_is_lost(names, lost, used))
        if problems:
            keys = shown(sorted(names))
            raise ArchiveError(f"it does not fit the pipeline: {problems[0]}; its keys are {keys}")

    def _delivered(
        self, tensors: Mapping[str, torch.Tensor], configured: Mapping[str, Any]
    ) -> list[Delivery]:
        """What diffusers would load into each component."""
        stand_in = copy.copy(self._skeleton)
        delivered: list[Delivery] = []
        for name, modules in self._modules.items():
            vars(stand_in)[name] = _Recipient(name, modules[""], configured, delivered)
        try:
            with quiet_libraries(are_errors_logged=False):
                stand_in.load_lora_weights(dict(tensors), adapter_name="read")
        except ArchiveError:
            raise
        except Exception as error:
            # What the libraries raise about a wrong LoRA is of any kind.
            reason = first_lines(error, num_chars=200)
            for part, kind in _SOME_KINDS.items():
                if found := [name for name in tensors if part in name]:
                    raise ArchiveError(
                        f"it is {kind}, which is not applied to a {self._kind} ({reason}); "
                        f"its keys are {shown(found)}"
                    ) from error
            # What is named like nothing of a LoRA comes first.
            keys = shown(sorted(tensors, key=lambda name: (_layer_of(name) != name, name)))
            raise ArchiveError(
                f"it does not fit the pipeline: {reason}; its keys are {keys}"
            ) from error
        finally:
            self._restore()
        return delivered

    def _restore(self) -> None:
        """Put back the layers that diffusers replaced by larger ones, for a control LoRA."""
        for modules in self._modules.values():
            for path, module in modules.items():
                parent, _, name = path.rpartition(".")
                if path and modules[parent]._modules.get(name) is not module:
                    modules[parent]._modules[name] = module


class _Recipient:
    """Stands for a model where diffusers loads LoRAs into it, and keeps what it is given."""

    def __init__(
        self, name: str, model: Any, configured: Mapping[str, Any], delivered: list[Delivery]
    ) -> None:
        self._name = name
        self._model = model
        self._configured = {
            key.removeprefix(f"{name}."): value
            for key, value in configured.items()
            if key.startswith(f"{name}.")
        }
        self._delivered = delivered

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def modules(self) -> Iterator[Any]:
        """None, for nothing is to be scaled."""
        return iter(())

    def to(self, *args: Any, **kwargs: Any) -> _Recipient:
        """Stay as it is."""
        return self

    def load_lora_adapter(
        self,
        state_dict: Mapping[str, torch.Tensor],
        prefix: str | None = "transformer",
        network_alphas: Mapping[str, float] | None = None,
        **_: Any,
    ) -> None:
        """What diffusers calls of its own models; follows diffusers 0.42, loaders/peft.py."""
        from diffusers.utils import convert_unet_state_dict_to_peft, get_peft_kwargs

        own = _below(prefix, state_dict)
        if not own:
            return
        if any(".lokr_" in name for name in own):
            self._delivered.append(Delivery(self._name, own, self._kronecker_config(own)))
            return
        if "lora_A" not in next(iter(own)):
            own = convert_unet_state_dict_to_peft(own)
        ranks = {
            f"^{key}": weight.shape[1]
            for key, weight in own.items()
            if "lora_B" in key and weight.ndim > 1
        }
        alphas = None if network_alphas is None else _below(prefix, network_alphas)
        config = self._configured or get_peft_kwargs(ranks, alphas, own)
        self._delivered.append(Delivery(self._name, own, config))

    def _kronecker_config(self, own: Mapping[str, torch.Tensor]) -> Mapping[str, Any]:
        """What diffusers makes of a LoKr, which raises where it is none that it can load."""
        from diffusers.utils.peft_utils import _create_lokr_config

        config = vars(_create_lokr_config(own, dict(self._configured) or None))
        return {**config, "lora_alpha": config["alpha"]}

    def load_adapter(
        self, *, adapter_state_dict: Mapping[str, torch.Tensor], peft_config: Any, **_: Any
    ) -> None:
        """What diffusers calls of transformers' models."""
        own = {_present_name(name): tensor for name, tensor in adapter_state_dict.items()}
        config = dict(self._configured or vars(peft_config))
        if own.keys() != adapter_state_dict.keys():
            config["r"] = config["rank_pattern"] = None  # found without the layers under old names
        self._delivered.append(Delivery(self._name, own, config))


def _present_name(name: str) -> str:
    found = _OLD_ATTENTION.fullmatch(name)
    if found is None:
        return name
    return f"{found[1]}{found[2]}_proj.lora_{'A' if found[3] == 'down' else 'B'}.weight"


def _below(prefix: str | None, named: Mapping[str, Any]) -> dict[str, Any]:
    if prefix is None:
        return dict(named)
    start = f"{prefix}."
    return {k.removeprefix(start): v for k, v in named.items() if k.startswith(start)}


def _without_weights(pipeline: Any) -> Any:
    """A copy of `pipeline` whose models have shapes and no memory."""
    import torch

    bare = copy.copy(pipeline)
    for name, component in pipeline.components.items():
        if isinstance(component, torch.nn.Module):
            weights = [*component.parameters(), *component.buffers()]
            memo: dict[int, Any] = {
                id(w): torch.nn.Parameter(w.detach().to("meta"), requires_grad=False)
                if isinstance(w, torch.nn.Parameter)
                else w.to("meta")
                for w in weights
            }
            vars(bare)[name] = copy.deepcopy(component, memo)
    return bare


def _adapter_metadata(metadata: Mapping[str, str]) -> Mapping[str, Any]:
    """PEFT's configuration of each component, which diffusers writes into the header."""
    text = metadata.get(METADATA)
    if text is None:
        return {}
    read = parse_json(text.encode(), METADATA)
    if not isinstance(read, dict):
        raise ArchiveError(f"its {METADATA} is no object")
    return read


def _marked(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Tensors of the same names and shapes, each full of its own number, counted from 1.

    An alpha is its layer's rank, so that nothing is multiplied on the way.
    """
    import torch

    ranks: dict[str, int] = {}
    for name, tensor in tensors.items():
        if name.endswith((".lokr_w1_b", ".lokr_w2_b")):
            # Of two ranks, diffusers takes the second one's.
            ranks[_layer_of(name)] = tensor.shape[0]
        elif re.search(r"lora(_linear_layer)?[._](down|A)\b", name) and tensor.ndim > 1:
            ranks[_layer_of(name)] = tensor.shape[0]
    marked = {}
    for place, (name, tensor) in enumerate(tensors.items()):
        is_alpha = _ALPHA.fullmatch(name) is not None
        value = ranks.get(_layer_of(name), 1) if is_alpha else place + 1
        marked[name] = torch.full((), float(value)).expand(tensor.shape)
    return marked


def _marks_in(tensor: torch.Tensor) -> set[int]:
    """The numbers that a converted tensor carries; parts may have been joined or put apart."""
    if not tensor.numel():
        return set()
    if not any(tensor.stride()):  # as it was marked: one number everywhere
        return {round(tensor.flatten()[0].item())}
    flat = tensor.reshape(len(tensor), -1).float()
    edges = (flat.amax(0).unique(), flat.amax(1).unique())  # type: ignore[no-untyped-call]
    return {round(value) for edge in edges for value in edge.tolist()}


def _misfit(layer: Any, found: re.Match[str], tensor: torch.Tensor) -> list[str]:
    """What is wrong with the shape of a weight for its layer."""
    import torch

    is_down = found["side"] == "A"
    sides: tuple[int, int]
    kernel: tuple[int, ...] = ()
    # Those that `handler.pipelines.adapted_layers` can add to.
    if isinstance(layer, torch.nn.Linear):
        sides = layer.in_features, layer.out_features
    elif isinstance(layer, torch.nn.Embedding) and layer.max_norm is None:
        sides = layer.num_embeddings, layer.embedding_dim
    elif isinstance(layer, (torch.nn.Conv1d, torch.nn.Conv2d, torch.nn.Conv3d)):
        sides = layer.in_channels, layer.out_channels
        kernel = layer.kernel_size if is_down else (1,) * len(layer.kernel_size)
    else:
        return [f"{found['layer']} is a {type(layer).__name__}, which takes no LoRA"]
    if found["factor"]:
        # Their product is looked at when all are there.
        takes_it = isinstance(layer, torch.nn.Linear) and tensor.ndim == 2
        return [] if takes_it else [f"{found[0]} is not a matrix for a linear layer"]
    if found["magnitude"] and isinstance(layer, torch.nn.Embedding):
        return [f"{found['layer']} is an {type(layer).__name__}, which takes no DoRA"]
    rank = tensor.shape[0 if is_down else 1] if tensor.ndim > 1 else 1
    wanted: tuple[int, ...] = (rank, sides[0]) if is_down else (sides[1], rank)
    wanted = (sides[1],) if found["part"] == "bias" else (*wanted, *kernel)
    if found["magnitude"]:
        wanted = (1, sides[1], *kernel) if kernel else (sides[1],)
    if tuple(tensor.shape) != wanted:
        return [f"{found[0]} has the shape {tuple(tensor.shape)}, its layer wants {wanted}"]
    return []


def _layer_of(name: str) -> str:
    return _LAYER_END.sub("", name)


def _what_is_lost(names: list[str], lost: list[str], used: set[str]) -> str:
    layers = list(dict.fromkeys(_layer_of(name) for name in names))
    if not used:
        return f"it is of another model: the pipeline has none of its layers {shown(layers)}"
    lost_layers = list(dict.fromkeys(_layer_of(name) for name in lost))
    known = {_layer_of(name) for name in used}
    if unknown := [layer for layer in lost_layers if layer not in known]:
        return (
            f"it is of another model: {len(unknown)} of its {len(layers)} layers are "
            f"not in the pipeline, such as {shown(unknown)}"
        )
    return (
        f"{len(lost)} of its {len(names)} tensors would not be applied, such as "
        f"{shown(sorted(lost))}"
    )


def in_present_names(layers: Layers) -> dict[str, torch.Tensor]:
    """The same in the names that diffusers and PEFT use now, with the scale in the weights."""
    found: dict[str, torch.Tensor] = {}
    for component, of in layers.items():
        for name, layer in of.items():
            assert isinstance(layer, LoraLayer), "only these are dropped"
            scale = layer.alpha / layer.divisor
            found[f"{component}.{name}.lora_A.weight"] = layer.down
            found[f"{component}.{name}.lora_B.weight"] = layer.up * scale
            if layer.bias is not None:
                found[f"{component}.{name}.lora_B.bias"] = layer.bias * scale
            if layer.magnitude is not None:
                found[f"{component}.{name}.lora_magnitude_vector"] = layer.magnitude
    return found
