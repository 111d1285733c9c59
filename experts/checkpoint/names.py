"""Do the tensors that a checkpoint holds and those that its model needs agree? Torch-free: headers are enough."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

from barista.errors import CheckpointError
from experts.checkpoint.types import Checkpoint

SCALE_SUFFIX = "_scale_inv"


def check_names(expected: Mapping[str, tuple[int, ...]], checkpoint: Checkpoint, ignore: Callable[[str], bool]) -> None:
    """Compare a checkpoint's tensors with those that its model needs, before any is read.

    expected: name -> shape. ignore: true for stored names that the model does not need. The scales of an FP8 weight
    come with it. Raises CheckpointError naming missing, unexpected and misshapen tensors.
    """
    stored = checkpoint.tensors
    missing = [name for name in expected if name not in stored]
    misshapen = [
        f"{name} {list(stored[name].shape)} instead of {list(shape)}"
        for name, shape in expected.items()
        if name in stored and stored[name].shape != shape
    ]
    unexpected = [
        name
        for name in stored
        if name not in expected and name.removesuffix(SCALE_SUFFIX) not in expected and not ignore(name)
    ]
    problems = [
        f"{len(names)} {kind} ({_first(names)})"
        for kind, names in (("missing", missing), ("unexpected", unexpected), ("misshapen", misshapen))
        if names
    ]
    if problems:
        raise CheckpointError(
            f"{checkpoint.path}: tensors do not match config.json: {'; '.join(problems)}.",
            "Is the download complete and of one model? Try: barista pull NAME",
        )


def _first(names: Iterable[str], count: int = 3) -> str:
    names = list(names)
    return ", ".join(names[:count]) + (", ..." if len(names) > count else "")
