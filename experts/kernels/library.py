"""Chooses, loads and types the compiled kernels (src/barista_kernels.h)."""

from __future__ import annotations

import ctypes
import functools
import logging
from typing import Any

from barista.errors import BaristaError
from barista.machine import usable_cores
from experts.kernels import compiler
from experts.spec import GateSpec

logger = logging.getLogger(__name__)

_P, _L, _I, _F, _D = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32, ctypes.c_float, ctypes.c_double

# Name -> (argument types, result type), in the order of src/barista_kernels.h.
_SIGNATURES: dict[str, tuple[list[type], type | None]] = {
    "bk_set_threads": ([_I], None),
    "bk_num_threads": ([], _I),
    "bk_linear": ([_P, _L, _P, _L, _P, _P, _L, _L, _L, _L, _I, _I, _I], None),
    "bk_encode": ([_I, _P, _I, _L, _L, _P], _I),
    "bk_decode": ([_I, _P, _L, _P, _L, _P], _I),
    "bk_rms_norm": ([_P, _L, _P, _L, _P, _F, _P, _L, _L, _I], None),
    "bk_silu_mul": ([_P, _L, _P, _L, _P, _L, _L, _I], None),
    "bk_rope": ([_P, _L, _L, _P, _P, _L, _L, _L, _I, _I], None),
    "bk_store_kv": ([_P, _L, _L, _L, _P, _L, _P, _L, _L], None),
    "bk_ties_as_torch": ([], _I),
    "bk_gate": ([_P, _P, _P, _P, _P, _L], None),
    "bk_moe": ([_P, _L, _P, _P, _P, _P, _P, _P, _P, _L, _L, _L, _L, _L, _I, _I], _I),
    "bk_expert_rows": ([_P, _L, _P, _P, _P, _P, _P, _L, _L, _L, _L, _L, _I, _I], _L),
    "bk_combine_rows": ([_P, _P, _P, _P, _L, _L, _L, _I], None),
    "bk_find_nonfinite": ([_P, _P, _L, _L, _I], None),
    "bk_route": ([_P, _L, _P, _L, _L, _P, _L, _D, _P], _I),
    "bk_split": ([_P, _L, _L, _P, _L, _I, _P, _P, _P], _L),
    "bk_place_rows": ([_P, _L, _L, _P, _P, _L, _L, _L], _L),
    "bk_attention": (
        [_P, _P, _L, _L, _L, _P, _L, _L, _L, _P, _L, _P, _P, _F, _P, _L, _L, _L, _L, _L, _L, _I],
        None,
    ),
    "bk_gqa_layer": ([_P, _P, _P, _P], _I),
    "bk_mla_layer": ([_P, _P, _P, _P], _I),
    "bk_choose": ([_P, _P, _P, _P, _L], _I),
    "bk_forward": ([_P, _P, _P, _P], _I),
}


class GateSpecStruct(ctypes.Structure):
    """bk_gate_spec of src/barista_kernels.h."""

    _fields_ = (
        ("num_experts", _L),
        ("top_k", _L),
        ("num_groups", _L),
        ("topk_groups", _L),
        ("sigmoid", _I),
        ("top2sum", _I),
        ("normalise", _I),
        ("masked_value", _F),
        ("norm_eps", _F),
        ("scale", _F),
    )


@functools.cache
def gate_parameters(spec: GateSpec) -> Any:
    """The spec as bk_gate takes it."""
    return ctypes.pointer(
        GateSpecStruct(
            num_experts=spec.num_experts,
            top_k=spec.top_k,
            num_groups=spec.num_groups,
            topk_groups=spec.topk_groups,
            sigmoid=spec.score == "sigmoid",
            top2sum=spec.group_score == "top2sum",
            normalise=spec.normalise,
            masked_value=spec.masked_value,
            norm_eps=spec.norm_eps,
            scale=spec.scale,
        )
    )


class Library:
    """The compiled kernels of one instruction set. Functions are those of src/barista_kernels.h."""

    def __init__(self, variant: compiler.Variant) -> None:
        self.variant = variant.name
        self.functions = ctypes.CDLL(str(compiler.build(variant)))
        for name, (arguments, result) in _SIGNATURES.items():
            function = getattr(self.functions, name)
            function.argtypes, function.restype = arguments, result
        self.functions.bk_set_threads(usable_cores())


_loaded = False
_library: Library | None = None


def current() -> ctypes.CDLL | None:
    """The functions in use, loaded at the first call; None when the torch reference stands in for them."""
    if not _loaded:
        use(_best())
    return _library.functions if _library else None


def use(library: Library | None) -> None:
    """Make this library (None: the torch reference) serve all calls from now on."""
    global _library, _loaded
    _library, _loaded = library, True


def _best() -> Library | None:
    try:
        return Library(compiler.runnable_variants()[0])
    except (BaristaError, OSError) as error:
        logger.warning("the CPU kernels are not used, and torch does their work more slowly: %s", error)
        return None


def load() -> str:
    """Build and load the kernels for this machine if that has not happened yet; what numerics_id() says."""
    current()
    return numerics_id()


def numerics_id() -> str:
    """Names what the bytes of the results depend on: sources, instruction set and how a gate takes ties; or
    "torch-reference"."""
    current()
    if _library is None:
        return "torch-reference"
    ties = "" if _library.functions.bk_ties_as_torch() else "-libcxx"
    return f"kernels-{compiler.source_digest()[:8]}-{_library.variant}{ties}"


def set_num_threads(threads: int) -> None:
    """Threads that the kernels use, the caller's included; 0: as many as this process may keep busy, which is where
    they start. No result changes.
    """
    if functions := current():
        functions.bk_set_threads(threads or usable_cores())
