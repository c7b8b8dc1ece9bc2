"""The forms of a JSON body: plain, Hugging Face, KServe v1 and v2; all become one `Message`.

plain          {"prompt": "a", "seed": 1}          also with "parameters": {…}
Hugging Face   {"inputs": "a", "parameters": {…}}
KServe v1      {"instances": [{"prompt": "a"}, "b"], "parameters": {…}}
KServe v2      {"id": "7", "inputs": [{"name": "prompt", "shape": [2], "datatype": "BYTES",
               "data": ["a", "b"]}], "parameters": {…}}
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum

from handler.api.body import Payload, check_number_of_fields
from handler.api.fields import FieldReader
from handler.api.foreign_names import FOREIGN_NAMES
from handler.api.schema import PICTURE_FIELDS, PICTURE_NAMES
from handler.messages import show, shown_name

__all__ = ["Envelope", "Message", "open_message"]

MAX_ENVELOPE_ID_CHARS = 256
_V2_DATATYPES = frozenset(
    ["BOOL", "BYTES", "FP16", "FP32", "FP64"]
    + [f"{sign}INT{bits}" for sign in ("", "U") for bits in (8, 16, 32, 64)]
)
_V2_TENSOR_KEYS = frozenset(["name", "shape", "datatype", "data", "parameters"])


# The names that an instance or a tensor may have.
_INSTANCE_NAMES = PICTURE_NAMES | FOREIGN_NAMES.keys()


class Envelope(Enum):
    """How the body was wrapped, and so how its reply is."""

    PLAIN = "plain"
    KSERVE_V1 = "kserve_v1"
    KSERVE_V2 = "kserve_v2"


@dataclass(frozen=True, slots=True)
class Instance:
    """The fields of one prompt; `path` says where they stood, for messages."""

    path: str
    fields: Mapping[str, object]


@dataclass(frozen=True, slots=True)
class Message:
    """A body without its wrapping. What is in `shared` counts for every instance."""

    envelope: Envelope
    shared: Mapping[str, object]
    instances: tuple[Instance, ...]
    problems: Mapping[str, str]
    envelope_id: str | None = None


def open_message(payload: Payload, *, max_instances: int) -> Message:
    """Unwrap a payload. What is wrong with the wrapping is in the message's `problems`."""
    fields, problems = payload.fields, dict(payload.problems)
    if payload.is_form:
        return Message(Envelope.PLAIN, fields, (Instance("", {}),), problems)
    if "instances" in fields:
        return _open_v1(fields, problems, max_instances)
    tensors = fields.get("inputs")
    if isinstance(tensors, (list, tuple)) and not _are_prompts(tensors):
        return _open_v2(fields, tensors, problems, max_instances)
    if tensors is not None and not isinstance(tensors, (str, list, tuple, bytes, bytearray)):
        problems["inputs"] = (
            f"must be a prompt, or a list of tensors as KServe v2 has it, not {show(tensors)}"
        )
        return Message(Envelope.PLAIN, fields, (), problems)
    shared = _with_parameters(fields, "", problems)
    return Message(Envelope.PLAIN, shared, (Instance("", {}),), problems)


def _are_prompts(items: Sequence[object]) -> bool:
    """Whether a list is one of prompts, as other clients of Hugging Face's form send."""
    return bool(items) and all(isinstance(each, str) for each in items)


def _with_parameters(
    fields: Mapping[str, object], path: str, problems: dict[str, str]
) -> dict[str, object]:
    """`fields`, with those inside its ``parameters`` beside the others."""
    check_number_of_fields(fields, path.removesuffix(".") or "body")
    flat = {name: value for name, value in fields.items() if name != "parameters"}
    parameters = fields.get("parameters")
    if parameters is None:
        return flat
    if not isinstance(parameters, Mapping):
        problems[f"{path}parameters"] = f"must be an object, not {show(parameters)}"
        return flat
    check_number_of_fields(parameters, f"{path}parameters")
    for name, value in parameters.items():
        if value is None:
            continue
        if fields.get(name) is not None:
            problems[f"{path}{shown_name(name)}"] = (
                "given more than once: beside and inside parameters"
            )
            continue
        flat[name] = value
    return flat


def _open_v1(body: Mapping[str, object], problems: dict[str, str], max_instances: int) -> Message:
    sent = body["instances"]
    shared = _with_parameters(body, "", problems)
    shared.pop("instances", None)
    instances = []
    if not isinstance(sent, (list, tuple)) or not 1 <= len(sent) <= max_instances:
        problems["instances"] = f"must be a list of 1 to {max_instances}, not {show(sent)}"
        sent = []
    for index, item in enumerate(sent):
        path = f"instances[{index}]."
        if isinstance(item, str):
            item = {"prompt": item}
        if isinstance(item, Mapping):
            fields = _with_parameters(item, path, problems)
            for name in _given(fields) & _given(shared) & _INSTANCE_NAMES:
                problems[f"{path}{name}"] = "given more than once: inside and beside instances"
            instances.append(Instance(path, fields))
        else:
            problems[path[:-1]] = f"must be an object or a prompt, not {show(item)}"
    return Message(Envelope.KSERVE_V1, shared, tuple(instances), problems)


def _given(fields: Mapping[str, object]) -> set[str]:
    """The names of fields that have a value: null is none."""
    return {name for name, value in fields.items() if value is not None}


def _open_v2(
    body: Mapping[str, object],
    tensors: Sequence[object],
    problems: dict[str, str],
    max_instances: int,
) -> Message:
    shared = _with_parameters(body, "", problems)
    shared.pop("inputs", None)
    # Names of wanted outputs: every reply holds all there are.
    shared.pop("outputs", None)
    reader = FieldReader({"id": shared.pop("id", None)}, allow_text=False)
    envelope_id = reader.text("id", max_chars=MAX_ENVELOPE_ID_CHARS)
    problems.update(reader.problems)
    columns = _read_columns(tensors, problems)
    prompts = next((columns[n] for n in PICTURE_FIELDS["prompt"].names if n in columns), [])
    if not problems and not 1 <= len(prompts) <= max_instances:
        problems["inputs"] = f"hold {len(prompts)} prompts; allowed are 1 to {max_instances}"
    for name, column in columns.items():
        if not problems and len(column) not in (1, len(prompts)):
            problems[f"inputs.{name}"] = f"holds {len(column)} values for {len(prompts)} prompts"
        if shared.get(name) is not None:
            problems[f"inputs.{name}"] = "given more than once: in inputs and in parameters"
    instances = []
    for index in range(0 if problems else len(prompts)):
        fields = {name: c[0] if len(c) == 1 else c[index] for name, c in columns.items()}
        instances.append(Instance("" if len(prompts) == 1 else f"prompts[{index}].", fields))
    return Message(Envelope.KSERVE_V2, shared, tuple(instances), problems, envelope_id)


def _read_columns(tensors: Sequence[object], problems: dict[str, str]) -> dict[str, list[object]]:
    """The values of every input tensor, by the name of the field that they are for."""
    columns: dict[str, list[object]] = {}
    if len(tensors) > len(PICTURE_NAMES):
        problems["inputs"] = f"has {len(tensors)} tensors; there are {len(PICTURE_NAMES)} fields"
        return columns
    for index, tensor in enumerate(tensors):
        path = f"inputs[{index}]"
        if not isinstance(tensor, Mapping):
            problems[path] = (
                f"must be a tensor with name, shape, datatype and data, not {show(tensor)};"
                ' several prompts can also be sent as {"instances": [...]}'
            )
            continue
        name = tensor.get("name")
        # A lone tensor can only be the prompt, and the protocol leaves its name to the model.
        if isinstance(name, str) and len(tensors) == 1 and name not in _INSTANCE_NAMES:
            name = "prompt"
        if not isinstance(name, str) or name not in _INSTANCE_NAMES:
            known = ", ".join(sorted(PICTURE_NAMES))
            problems[f"{path}.name"] = f"{show(name)} is not one of {known}"
        elif name in columns:
            problems[f"{path}.name"] = f"{name} is given more than once"
        else:
            columns[name] = _read_tensor(tensor, path, problems)
    return columns


def _read_tensor(tensor: Mapping[str, object], path: str, problems: dict[str, str]) -> list[object]:
    unknown = sorted(tensor.keys() - _V2_TENSOR_KEYS)
    if unknown:
        problems[path] = f"unknown key {show(unknown[0])}"
    datatype = tensor.get("datatype")
    if datatype not in tuple(_V2_DATATYPES):
        known = ", ".join(sorted(_V2_DATATYPES))
        problems[f"{path}.datatype"] = f"{show(datatype)} is not one of {known}"
    data = tensor.get("data")
    if not isinstance(data, (list, tuple)):
        problems[f"{path}.data"] = f"must be a list, not {show(data)}"
        return []
    values = _flatten(data)
    count = _num_elements(tensor.get("shape"))
    if count != len(values):
        problems[f"{path}.shape"] = f"does not agree with {len(values)} values in data"
    return values


def _flatten(data: list[object] | tuple[object, ...]) -> list[object]:
    """The leaves of nested lists, in order; without recursion, for they may be deep."""
    leaves: list[object] = []
    pending: list[object] = [data]
    while pending:
        item = pending.pop()
        if isinstance(item, (list, tuple)):
            pending.extend(reversed(item))
        else:
            leaves.append(item)
    return leaves


def _num_elements(shape: object) -> int | None:
    """How many values a tensor of `shape` holds; None if that is no shape."""
    if not isinstance(shape, (list, tuple)) or len(shape) > 8:
        return None
    count = 1
    for length in shape:
        if isinstance(length, bool) or not isinstance(length, int) or not 0 <= length < 2**31:
            return None
        count *= length
    return count
