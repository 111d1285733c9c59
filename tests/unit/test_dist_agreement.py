"""What the ranks of a group agree on: what cannot be agreed on is refused by its value."""

from __future__ import annotations

import pytest

from barista.errors import ConfigError
from experts.transport.dist_agreement import Agreement


def agreement(**changes) -> Agreement:
    values = {
        "members": ("a", "b", "c"),
        "hidden_size": 8,
        "dtype": "bfloat16",
        "owners": {0: (1, 2, 2, 1), 2: (2, 1, 1, 1)},
        "numerics_id": "kernels-1",
        "digest": "ab12",
    }
    return Agreement(**values | changes)


def test_it_is_the_same_in_another_process():
    assert Agreement.from_json(agreement(way="all_gather", timeout=2.5).to_json()) == agreement(
        way="all_gather", timeout=2.5
    )


def test_the_shares_hold_every_expert_once_and_more_ranks_than_experts_will_do():
    value = agreement()
    assert value.share(1) == {0: (0, 3), 2: (1, 2, 3)}
    assert value.share(2) == {0: (1, 2), 2: (0,)}
    assert value.share(0) == value.share(3) == {}


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"members": ()}, "A group of 1 rank has no worker"),
        ({"members": ("a", "b", "a")}, "one name: a, b, a"),
        ({"owners": {0: (1, -1)}}, "Expert 1 of layer 0 has no rank"),
        ({"owners": {5: (4, 1)}}, "Expert 0 of layer 5 is on rank 4, and the workers are ranks 1 to 3"),
        ({"owners": {5: (1, 0)}}, "Expert 1 of layer 5 is on rank 0"),
        ({"way": "broadcast"}, r"'broadcast'.*all_to_all, all_gather"),
        ({"dtype": "float16"}, r"'float16'.*float32, bfloat16"),
        ({"hidden_size": 0}, "cannot hold 0 values"),
        ({"timeout": 0.0}, r"timeout of 0\.0 s"),
    ],
)
def test_what_no_group_could_work_with_is_refused(wrong, message):
    with pytest.raises(ConfigError, match=message) as refused:
        agreement(**wrong)
    assert refused.value.remedy


@pytest.mark.parametrize(
    ("here", "message"),
    [
        ({"hidden_size": 9}, "hidden_size is 9 here and 8 at the engine"),
        ({"dtype": "float32"}, "dtype is float32 here and bfloat16 at the engine"),
        ({"num_experts": {0: 4}}, r"experts by layer is \{0: 4\} here and \{0: 4, 2: 4\} at the engine"),
        ({"numerics_id": "kernels-2"}, "numerics_id is kernels-2 here and kernels-1 at the engine"),
        ({"digest": "cd34"}, "digest is cd34 here and ab12 at the engine"),
    ],
)
def test_a_worker_of_another_model_or_machine_is_told_what_differs(here, message):
    ours = {"hidden_size": 8, "dtype": "bfloat16", "num_experts": {0: 4, 2: 4}, "numerics_id": "kernels-1"}
    agreement().require(**ours, digest="ab12")
    with pytest.raises(ConfigError, match=message):
        agreement().require(**{**ours, "digest": "ab12"} | here)
