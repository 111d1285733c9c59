"""PromQL as far as our alerts and panels use it: what a query names, and what it says about given samples.

A counter's samples are its growth per second, so `rate` is what it is given, and `increase` that times its range.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import promql_parser as promql
from promql_parser import MatchOp

Labels = Mapping[str, str]
Vector = list[tuple[Labels, float]]
Samples = Mapping[str, Sequence[tuple[Labels, float]]]

COMPARISONS: dict[str, Callable[[float, float], bool]] = {">": operator.gt, "<": operator.lt, "==": operator.eq}
ARITHMETIC: dict[str, Callable[[float, float], float]] = {"+": operator.add, "*": operator.mul}
AGGREGATES: dict[str, Callable[[list[float]], float]] = {
    "sum": sum,
    "max": max,
    "count": len,
    "avg": lambda values: sum(values) / len(values),
}


def parse(query: str) -> Any:
    """The syntax tree. Grafana's variables stand for a time or a name."""
    return promql.parse(query.replace("$__rate_interval", "5m"))


def walk(node: Any, above: tuple[Any, ...] = ()) -> Iterator[tuple[Any, tuple[Any, ...]]]:
    """Every node with those around it, the outermost first."""
    yield node, above
    children = [getattr(node, name, None) for name in ("lhs", "rhs", "expr", "vector_selector")]
    for child in (*children, *getattr(node, "args", ())):
        if isinstance(child, promql.Expr):
            yield from walk(child, (*above, node))


def selectors(query: str) -> Iterator[tuple[promql.VectorSelector, tuple[Any, ...]]]:
    """The metrics that a query reads, each with the nodes around it."""
    return ((node, above) for node, above in walk(parse(query)) if isinstance(node, promql.VectorSelector))


def function(node: Any) -> str:
    """The name of a call or an aggregation, else ""."""
    if isinstance(node, promql.Call):
        return str(node.func.name)
    return str(node.op) if isinstance(node, promql.AggregateExpr) else ""


def grouping(node: Any) -> list[str]:
    """The labels in `by` or `on`."""
    modifier = getattr(node, "modifier", None)
    labels = getattr(modifier, "labels", None) or getattr(getattr(modifier, "matching", None), "labels", None)
    return list(labels or ())


def evaluate(query: str, samples: Samples) -> Vector:
    """What the query answers; an empty vector does not alert."""
    result = _evaluate(parse(query), samples)
    assert isinstance(result, list), query
    return result


def _evaluate(node: Any, samples: Samples) -> Vector | float:
    match node:
        case promql.NumberLiteral():
            return float(node.val)
        case promql.ParenExpr():
            return _evaluate(node.expr, samples)
        case promql.VectorSelector():
            chosen = ((labels, value) for labels, value in samples.get(node.name or "", ()))
            return [(labels, value) for labels, value in chosen if _matches(node, labels)]
        case promql.Call():
            return _call(node, samples)
        case promql.AggregateExpr():
            inner = _evaluate(node.expr, samples)
            assert isinstance(inner, list)
            groups: dict[tuple[tuple[str, str], ...], list[float]] = {}
            for labels, value in inner:
                key = tuple((name, labels[name]) for name in grouping(node) if name in labels)
                groups.setdefault(key, []).append(value)
            return [(dict(key), AGGREGATES[function(node)](values)) for key, values in groups.items()]
        case promql.BinaryExpr():
            return _binary(str(node.op), _evaluate(node.lhs, samples), _evaluate(node.rhs, samples))
    raise NotImplementedError(type(node))


def _matches(node: promql.VectorSelector, labels: Labels) -> bool:
    for matcher in node.matchers.matchers:
        value = labels.get(matcher.name, "")
        equal = (
            re.fullmatch(matcher.value, value) if matcher.op in (MatchOp.Re, MatchOp.NotRe) else value == matcher.value
        )
        if bool(equal) == (matcher.op in (MatchOp.NotEqual, MatchOp.NotRe)):
            return False
    return True


def _call(node: promql.Call, samples: Samples) -> Vector:
    (argument,) = node.args
    name = function(node)
    if name in ("rate", "increase"):
        growth = _evaluate(argument.vector_selector, samples)
        assert isinstance(growth, list)
        seconds = argument.range.total_seconds() if name == "increase" else 1.0
        return [(labels, value * seconds) for labels, value in growth]
    inner = _evaluate(argument, samples)
    if name == "absent":
        return [] if inner else [({}, 1.0)]
    assert name == "vector", name
    assert isinstance(inner, float)
    return [({}, inner)]


def _binary(name: str, left: Vector | float, right: Vector | float) -> Vector:
    """One to one, by equal labels."""
    assert isinstance(left, list)
    if name == "or":
        assert isinstance(right, list)
        return [*left, *(sample for sample in right if all(sample[0] != labels for labels, _ in left))]
    pairs = [
        (labels, value, other)
        for labels, value in left
        for other in ([right] if isinstance(right, float) else [value for other, value in right if other == labels])
    ]
    if name in COMPARISONS:
        return [(labels, value) for labels, value, other in pairs if COMPARISONS[name](value, other)]
    if name == "/":
        return [(labels, value / other if other else float("nan")) for labels, value, other in pairs]
    return [(labels, ARITHMETIC[name](value, other)) for labels, value, other in pairs]
