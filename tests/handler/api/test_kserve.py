"""KServe's and Hugging Face's shapes of a body."""

from __future__ import annotations

import pytest

from handler.api.body import Payload
from handler.api.kserve import Envelope, Message, open_message
from handler.errors import InvalidRequest
from tests.support.calls import problems


def unwrap(body: dict[str, object]) -> Message:
    return open_message(Payload(body, is_form=False), max_instances=3)


def tensor(name: str, data: object, datatype: str = "BYTES", **more: object) -> dict[str, object]:
    shape = [len(data)] if isinstance(data, list) else [1]
    return {"name": name, "shape": shape, "datatype": datatype, "data": data, **more}


def fields_of(message: Message) -> list[dict[str, object]]:
    assert not message.problems
    return [dict(instance.fields) for instance in message.instances]


def test_plain() -> None:
    message = unwrap({"prompt": "a", "seed": 5})
    assert message.envelope is Envelope.PLAIN
    assert message.shared == {"prompt": "a", "seed": 5}
    assert fields_of(message) == [{}]


def test_hugging_face() -> None:
    message = unwrap({"inputs": "a", "parameters": {"seed": 5, "width": None}})
    assert message.envelope is Envelope.PLAIN
    assert message.shared == {"inputs": "a", "seed": 5}


def test_a_field_beside_and_inside_parameters() -> None:
    message = unwrap({"inputs": "a", "seed": 5, "parameters": {"seed": 6}})
    assert message.problems == {"seed": "given more than once: beside and inside parameters"}


@pytest.mark.parametrize(
    ("body", "name"),
    [
        ({"inputs": "a"}, "inputs"),
        ({"instances": ["a"]}, "instances"),
        (
            {"inputs": [{"name": "prompt", "shape": [1], "datatype": "BYTES", "data": ["a"]}]},
            "inputs",
        ),
        ({"prompt": "a", "unheard of": 1}, "unheard of"),
    ],
)
def test_what_is_beside_parameters_is_never_replaced(body: dict[str, object], name: str) -> None:
    message = unwrap({**body, "parameters": {name: "x"}})
    assert message.problems == {name: "given more than once: beside and inside parameters"}
    assert message.shared.get(name) != "x"


def test_null_is_not_given() -> None:
    message = unwrap({"instances": [{"prompt": "a", "seed": None}], "parameters": {"seed": 5}})
    assert not message.problems
    tensors = [tensor("prompt", ["a"]), tensor("seed", [1])]
    assert not unwrap({"inputs": tensors, "seed": None}).problems


def test_parameters_that_are_no_object() -> None:
    assert unwrap({"inputs": "a", "parameters": [1]}).problems == {
        "parameters": "must be an object, not a list of 1"
    }


@pytest.mark.parametrize(("sent", "shown"), [(5, "5"), ({"a": 1}, "an object"), (True, "true")])
def test_inputs_that_are_neither_prompts_nor_tensors(sent: object, shown: str) -> None:
    message = unwrap({"inputs": sent})
    assert message.problems == {
        "inputs": f"must be a prompt, or a list of tensors as KServe v2 has it, not {shown}"
    }
    assert problems({"body": {"inputs": sent}}) == dict(message.problems)


def test_forms_have_no_envelope() -> None:
    payload = Payload({"instances": "a", "parameters": "b"}, is_form=True)
    message = open_message(payload, max_instances=3)
    assert message.envelope is Envelope.PLAIN
    assert message.shared == payload.fields


def test_v1() -> None:
    message = unwrap(
        {
            "instances": [
                {"data": "a", "seed": 1},
                "b",
                {"inputs": "c", "parameters": {"seed": 3}},
            ],
            "parameters": {"steps": 5},
        }
    )
    assert message.envelope is Envelope.KSERVE_V1
    assert message.shared == {"steps": 5}
    assert fields_of(message) == [
        {"data": "a", "seed": 1},
        {"prompt": "b"},
        {"inputs": "c", "seed": 3},
    ]
    assert [each.path for each in message.instances] == [
        "instances[0].",
        "instances[1].",
        "instances[2].",
    ]


@pytest.mark.parametrize("instances", [[], ["a"] * 4, "a", {"a": 1}, None])
def test_v1_wants_one_to_max_instances(instances: object) -> None:
    assert "must be a list of 1 to 3" in unwrap({"instances": instances}).problems["instances"]


def test_v1_names_every_wrong_instance() -> None:
    message = unwrap({"instances": [5, {"seed": 1}, {"parameters": 7}], "seed": 2})
    assert message.problems == {
        "instances[0]": "must be an object or a prompt, not 5",
        "instances[1].seed": "given more than once: inside and beside instances",
        "instances[2].parameters": "must be an object, not 7",
    }


def test_v2() -> None:
    message = unwrap(
        {
            "id": "7",
            "inputs": [
                tensor("prompt", ["a", "b"]),
                tensor("seed", [1, 2], "INT64"),
                tensor("guidance_scale", [5.5], "FP32"),
            ],
            "parameters": {"steps": 5},
            "outputs": [{"name": "images"}],
        }
    )
    assert (message.envelope, message.envelope_id) == (Envelope.KSERVE_V2, "7")
    assert message.shared == {"steps": 5}
    assert fields_of(message) == [
        {"prompt": "a", "seed": 1, "guidance_scale": 5.5},
        {"prompt": "b", "seed": 2, "guidance_scale": 5.5},
    ]
    assert [each.path for each in message.instances] == ["prompts[0].", "prompts[1]."]


@pytest.mark.parametrize("name", ["text_input", "input-0", "prompt", "data"])
def test_v2s_only_tensor_is_the_prompt_whatever_its_name(name: str) -> None:
    (fields,) = fields_of(unwrap({"inputs": [tensor(name, ["a"])]}))
    assert list(fields.values()) == ["a"]


def test_v2_data_may_be_nested() -> None:
    nested = {"name": "x", "shape": [2, 1], "datatype": "BYTES", "data": [["a"], ["b"]]}
    assert fields_of(unwrap({"inputs": [nested]})) == [{"prompt": "a"}, {"prompt": "b"}]


@pytest.mark.parametrize(
    ("inputs", "where", "complaint"),
    [
        ([], "inputs", "hold 0 prompts; allowed are 1 to 3"),
        ([tensor("prompt", ["a"] * 4)], "inputs", "hold 4 prompts"),
        ([tensor("seed", [1])], "inputs", "hold 0 prompts"),
        (["a", 5], "inputs[1]", '"instances"'),
        ([tensor("prompt", ["a"]), tensor("sed", [1])], "inputs[1].name", "'sed' is not one of"),
        ([tensor("prompt", ["a"]), tensor("prompt", ["b"])], "inputs[1].name", "more than once"),
        ([tensor("prompt", ["a"], "STRING")], "inputs[0].datatype", "'STRING' is not one of"),
        ([tensor("prompt", "a")], "inputs[0].data", "must be a list, not 'a'"),
        ([tensor("prompt", ["a"], foo=1)], "inputs[0]", "unknown key 'foo'"),
        ([tensor("prompt", ["a"], shape=[2])], "inputs[0].shape", "1 values"),
        ([tensor("prompt", ["a"], shape=None)], "inputs[0].shape", "1 values"),
        ([tensor("prompt", ["a"], shape=[True])], "inputs[0].shape", "1 values"),
        ([tensor("prompt", ["a"], shape=[10**5000])], "inputs[0].shape", "1 values"),
        (
            [tensor("prompt", ["a", "b", "c"]), tensor("seed", [1, 2])],
            "inputs.seed",
            "holds 2 values for 3 prompts",
        ),
        ([tensor("prompt", ["a"])] * 99, "inputs", "has 99 tensors"),
    ],
)
def test_v2_problems(inputs: list[object], where: str, complaint: str) -> None:
    message = unwrap({"inputs": inputs})
    assert message.envelope is Envelope.KSERVE_V2
    assert complaint in message.problems[where]
    assert not message.instances


def test_v2_field_in_inputs_and_in_parameters() -> None:
    inputs = [tensor("prompt", ["a"]), tensor("seed", [1])]
    message = unwrap({"inputs": inputs, "parameters": {"seed": 2}})
    assert "in inputs and in parameters" in message.problems["inputs.seed"]


@pytest.mark.parametrize("envelope_id", [5, "x" * 257, "a\0"])
def test_v2_ids_are_checked(envelope_id: object) -> None:
    assert "id" in unwrap({"id": envelope_id, "inputs": [tensor("x", ["a"])]}).problems


def test_v2_deep_data_is_flattened_without_recursion() -> None:
    deep: object = "a"
    for _ in range(100_000):
        deep = [deep]
    (fields,) = fields_of(unwrap({"inputs": [tensor("x", deep)]}))
    assert fields == {"prompt": "a"}


@pytest.mark.parametrize(
    ("body", "name"),
    [
        ({"instances": [{"prompt": "a"}, {f"x{i}": i for i in range(300)}]}, "instances[1]"),
        ({"prompt": "a", "parameters": {f"x{i}": i for i in range(300)}}, "parameters"),
    ],
)
def test_too_many_fields_are_refused_wherever_they_stand(
    body: dict[str, object], name: str
) -> None:
    with pytest.raises(InvalidRequest) as caught:
        open_message(Payload(body, is_form=False), max_instances=8)
    assert caught.value.fields == {name: "has 300 fields; allowed are 256"}
