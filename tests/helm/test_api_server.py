"""The API server of the tests keeps the real one's rules where the other tests stand on them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.helm.api_patch import (
    ApplyConflict,
    PatchError,
    apply_patch,
    json_patch,
    merge_patch,
    strategic_patch,
    take_ownership,
)
from tests.helm.api_protobuf import MAGIC, decode
from tests.helm.api_store import field_matcher, label_matcher

json_values = st.recursive(
    st.one_of(st.booleans(), st.integers(), st.text(max_size=3)),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.dictionaries(st.text("abc", max_size=2), inner, max_size=3)
    ),
    max_leaves=8,
)


@pytest.mark.parametrize(
    ("value", "patch", "merged"),  # from appendix A of RFC 7386
    [
        ({"a": "b"}, {"a": "c"}, {"a": "c"}),
        ({"a": "b"}, {"b": "c"}, {"a": "b", "b": "c"}),
        ({"a": "b"}, {"a": None}, {}),
        ({"a": ["b"]}, {"a": "c"}, {"a": "c"}),
        ({"a": [{"b": "c"}]}, {"a": [1]}, {"a": [1]}),
        ({"a": {"b": "c"}}, {"a": {"b": "d", "c": None}}, {"a": {"b": "d"}}),
        ({"a": "foo"}, "bar", "bar"),
    ],
)
def test_merge_patches_of_the_rfc(value, patch, merged):
    assert merge_patch(value, patch) == merged


def test_a_json_patch_changes_all_or_nothing():
    value = {"a": [1, 2], "b/c": {"d": 3}}
    patch = [
        {"op": "test", "path": "/a/1", "value": 2},
        {"op": "add", "path": "/a/-", "value": 9},
        {"op": "remove", "path": "/a/0"},
        {"op": "replace", "path": "/b~1c/d", "value": 4},
    ]
    assert json_patch(value, patch) == {"a": [2, 9], "b/c": {"d": 4}}
    for wrong in ({"op": "test", "path": "/a/1", "value": 7}, {"op": "replace", "path": "/x", "value": 1}):
        with pytest.raises(PatchError):
            json_patch(value, [*patch, wrong])
    assert value == {"a": [1, 2], "b/c": {"d": 3}}


def test_a_strategic_patch_merges_the_lists_that_have_a_key():
    pod = {"containers": [{"name": "a", "image": "1", "args": ["x"]}, {"name": "b"}], "tolerations": [{"key": "k"}]}
    patch = {"containers": [{"name": "a", "args": ["y"]}, {"name": "b", "$patch": "delete"}], "tolerations": []}
    assert strategic_patch(pod, patch) == {
        "containers": [{"name": "a", "image": "1", "args": ["y"]}],
        "tolerations": [],
    }


def spec(**fields):
    return {"spec": fields}


def test_apply_takes_back_only_what_its_manager_has_applied():
    owners = {}
    value = apply_patch({}, spec(a=1, b=2), owners, "helm", force=False, built_in=True)
    value = apply_patch(value, spec(b=2), owners, "other", force=False, built_in=True)
    assert apply_patch(value, spec(a=1), owners, "helm", force=False, built_in=True) == spec(a=1, b=2)
    assert apply_patch(value, spec(), owners, "helm", force=False, built_in=True) == spec(b=2)


def test_apply_conflicts_with_whoever_has_changed_a_field_unless_forced():
    owners = {}
    value = apply_patch({}, spec(replicas=2), owners, "helm", force=False, built_in=True)
    take_ownership(value, spec(replicas=5), owners, "scaler", built_in=True)
    with pytest.raises(ApplyConflict, match=r"scaler.*replicas"):
        apply_patch(spec(replicas=5), spec(replicas=2), owners, "helm", force=False, built_in=True)
    same = apply_patch(spec(replicas=5), spec(replicas=5), owners, "helm", force=False, built_in=True)
    assert same == spec(replicas=5)
    assert apply_patch(same, spec(replicas=2), owners, "helm", force=True, built_in=True) == spec(replicas=2)


def test_a_list_of_a_custom_resource_is_one_field():
    owners = {}
    wanted = spec(ports=[{"port": 1, "name": "a"}])
    value = apply_patch({}, wanted, owners, "helm", force=False, built_in=False)
    take_ownership(value, spec(ports=[{"port": 1, "name": "b"}]), owners, "other", built_in=False)
    with pytest.raises(ApplyConflict):
        apply_patch(spec(ports=[{"port": 1, "name": "b"}]), wanted, owners, "helm", force=False, built_in=False)


@given(st.dictionaries(st.text("abc", max_size=2), json_values, max_size=3))
def test_applying_the_same_twice_changes_nothing(wanted):
    owners = {}
    once = apply_patch({}, wanted, owners, "helm", force=False, built_in=True)
    assert apply_patch(once, wanted, owners, "helm", force=False, built_in=True) == once == wanted


@pytest.mark.parametrize(
    ("selector", "matches"),
    [
        ("", True),
        ("a=1", True),
        ("a==1,b=2", True),
        ("a!=1", False),
        ("a in (1, 5),b notin (3)", True),
        ("c", False),
        ("!c,a", True),
        ("c!=1", True),
    ],
)
def test_label_selectors(selector, matches):
    assert label_matcher(selector)({"a": "1", "b": "2"}) is matches


@pytest.mark.parametrize(
    ("selector", "matches"), [("metadata.name=x", True), ("status.phase!=Failed", True), ("metadata.name=y", False)]
)
def test_field_selectors(selector, matches):
    assert field_matcher(selector)({"metadata": {"name": "x"}, "status": {"phase": "Running"}}) is matches


def test_a_secret_as_protobuf():
    def part(number, value):
        return bytes([number << 3 | 2, len(value)]) + value

    entry = part(1, b"release") + part(2, b"\x00\xff")
    labels = part(11, part(1, b"owner") + part(2, b"helm"))
    secret = part(1, part(1, b"name") + labels) + part(2, entry) + part(3, b"helm.sh/release.v1")
    body = MAGIC + part(1, part(1, b"v1") + part(2, b"Secret")) + part(2, secret)
    assert decode(body) == {
        "apiVersion": "v1",
        "kind": "Secret",
        "metadata": {"name": "name", "labels": {"owner": "helm"}},
        "data": {"release": "AP8="},
        "type": "helm.sh/release.v1",
    }
