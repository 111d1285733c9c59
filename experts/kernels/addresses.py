"""Where a numpy array's values are, cheaply: a layer asks for a dozen addresses."""

from __future__ import annotations

import ctypes
from typing import cast

import numpy as np

_first_byte = ctypes.c_char.from_buffer
_address_of = ctypes.addressof


def address_of(array: np.ndarray) -> int:
    """The address of a C-contiguous array's first value. `array.ctypes.data` says the same in thrice the time."""
    if array.flags.writeable and array.size:
        return _address_of(_first_byte(cast(bytearray, array)))
    assert array.flags.c_contiguous
    return array.ctypes.data
