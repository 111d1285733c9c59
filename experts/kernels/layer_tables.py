"""The tables of all layers that a worker holds, where compiled code can find them without Python."""

from __future__ import annotations

import ctypes

from experts.kernels.expert_table import ExpertTable
from experts.kernels.library import current

_P, _L, _U64 = ctypes.c_void_p, ctypes.c_int64, ctypes.c_uint64

_SIGNATURES: dict[str, tuple[list[type], type | None]] = {
    "bk_layer_tables_new": ([_L], _P),
    "bk_layer_tables_free": ([_P], None),
    "bk_layer_tables_set": ([_P, _L, _P], None),
    "bk_layer_tables_set_epoch": ([_P, _U64], None),
    "bk_layer_tables_served": ([_P], _U64),
}


class LayerTables:
    """Room for num_layers tables. Needs compiled kernels: see `layer_tables`."""

    def __init__(self, functions: ctypes.CDLL, num_layers: int) -> None:
        for name, (arguments, result) in _SIGNATURES.items():
            function = getattr(functions, name)
            function.argtypes, function.restype = arguments, result
        self._functions = functions
        self._kept: dict[int, ExpertTable] = {}
        self.address: int = functions.bk_layer_tables_new(num_layers)

    def set(self, layer: int, table: ExpertTable) -> None:
        """Compute this layer with this table from now on. Returns once nobody computes with the one before."""
        self._functions.bk_layer_tables_set(self.address, layer, ctypes.addressof(table.struct))
        self._kept[layer] = table  # and the one before may go

    def set_epoch(self, epoch: int) -> None:
        """The newest placement that the worker knows, for its answers."""
        self._functions.bk_layer_tables_set_epoch(self.address, epoch)

    @property
    def served(self) -> int:
        """Requests that compiled code has answered by itself."""
        count: int = self._functions.bk_layer_tables_served(self.address)
        return count

    def __del__(self) -> None:
        self._functions.bk_layer_tables_free(self.address)


def layer_tables(num_layers: int) -> LayerTables | None:
    """Tables for so many layers; None where there are no compiled kernels."""
    functions = current()
    return None if functions is None else LayerTables(functions, num_layers)
