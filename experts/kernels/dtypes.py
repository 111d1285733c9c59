"""The dtypes of the kernels."""

from __future__ import annotations

import torch

# enum bk_dtype of src/barista_kernels.h
DTYPES = {torch.float32: 0, torch.bfloat16: 1}
# Plain weights in enum bk_weights; other formats carry their own code.
PLAIN_WEIGHTS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
# The rows that plain weights of a dtype are multiplied with; other formats take rows of either.
ROWS_OF = {torch.float32: torch.float32, torch.bfloat16: torch.bfloat16, torch.float16: torch.float32}
