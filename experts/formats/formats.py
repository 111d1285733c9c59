"""The formats that a weight matrix [out, in] can be held in, beside the plain dtypes. Torch-free.

int8, int4 and mxfp4 are tiles of 16 output rows by 64 inputs, laid out as the kernels read them
(experts/kernels/src/tiles.h): a header of 64 bytes, then strips of 16 rows, each a tile for every 64 inputs. q8_0 and
q4_0 are ggml's blocks of these names, rearranged into tiles without loss. fp8 is e4m3 with a float32 scale for each
block of 128x128, as DeepSeek publishes it.
"""

from __future__ import annotations

from dataclasses import dataclass

from barista.errors import CheckpointError

TILE_ROWS, TILE_INPUTS, HEADER_BYTES = 16, 64, 64
FP8_BLOCK = 128


@dataclass(frozen=True, slots=True)
class Format:
    """name: as in `--format`. code: enum bk_weights.

    tile_bytes: of 16 x 64 weights, their scales included; 0 for fp8, which has no tiles.
    """

    name: str
    code: int
    tile_bytes: int

    @property
    def dtype(self) -> str:
        """Of a tensor that is held so (TensorInfo.dtype); no name of safetensors or ggml, whose Q8_0 lies otherwise."""
        return f"{self.name.upper()}_{'TILES' if self.tile_bytes else 'BLOCKS'}"

    def nbytes(self, shape: tuple[int, ...]) -> int:
        """Bytes of a matrix of this shape. Raises CheckpointError if the format cannot take it."""
        self.check(shape)
        out, in_features = shape
        if not self.tile_bytes:
            return out * in_features + 4 * -(-out // FP8_BLOCK) * -(-in_features // FP8_BLOCK)
        return HEADER_BYTES + -(-out // TILE_ROWS) * (in_features // TILE_INPUTS) * self.tile_bytes

    def takes(self, shape: tuple[int, ...]) -> bool:
        """Whether a tensor of this shape can be held so."""
        return len(shape) == 2 and (not self.tile_bytes or (shape[1] > 0 and shape[1] % TILE_INPUTS == 0))

    def check(self, shape: tuple[int, ...], name: str = "a tensor") -> None:
        """Raises CheckpointError unless it `takes` the shape."""
        if not self.takes(shape):
            raise CheckpointError(
                f"{name} of shape {list(shape)} cannot be held as {self.name}: "
                f"its {shape[-1] if shape else 0} inputs do not divide into groups of {TILE_INPUTS}.",
                "Serve it with --format bf16, float32 or fp8.",
            )


FP8 = Format("fp8", 3, 0)
INT8 = Format("int8", 4, 1024 + 32)
INT4 = Format("int4", 5, 512 + 32)
MXFP4 = Format("mxfp4", 6, 512 + 32)
Q8_0 = Format("q8_0", 7, 1024 + 64)
Q4_0 = Format("q4_0", 8, 512 + 64)

# By name: what a model can be converted to, and what a GGUF file's tensors become as they are.
QUANTISED = {form.name: form for form in (FP8, INT8, INT4, MXFP4)}
KEPT_FROM_GGUF = {"Q8_0": Q8_0, "Q4_0": Q4_0}
TILED = {form.dtype: form for form in (INT8, INT4, MXFP4, Q8_0, Q4_0)}
