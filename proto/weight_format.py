"""How a store keeps its experts' weights: what packs them and what multiplies with them must agree.

Matrices are kept as [N, K], N outputs and K inputs, whatever way round the module has them; biases
stay as they are.

    int8  the matrix I8 [N, K], K padded to 16s; `<name>_scale` [N]
          weight = code * scale
    int4  the matrix U8 [N, K / 2], N padded to 64s and K to whole groups; `<name>_scale_zero`
          [K / group, N, 2]: weight = (code - 8) * scale + zero
          Rows lie in blocks of B (layout `blocks64`, `blocks32`), each of them [K, B / 2]: the low
          four bits are the block's first half, the high ones its second.
          Scales and zeros, here and in int8, have the model's own dtype.
    lossless  bf16 in twelve bits, N padded to 16s and K to 32s: the matrix U8 [N, K], sign and
          mantissa; `<name>_codes` U8 [N, K / 2], two a byte, the first in the low half;
          `<name>_bases` U8 [N]; exponent = code + the row's base, or 0 where the code is 0.
          Exponents farther off: `<name>_outliers` I32, place in its block | exponent << 24,
          ascending; `<name>_outlier_ends` I32 [N / 16], where each block's end among them.
          A block is 16 rows, of tiles of 32 columns one after another; of the 512 numbers of a
          tile, number 64 q + 16 i + 8 h + 2 r + p is row 4 i + r, column 4 q + 2 h + p.
"""

from __future__ import annotations

from dataclasses import dataclass

from proto import expert_pb2 as pb
from proto.shm import align_up

NAMES = ("exact", "lossless", "bf16", "int8", "int4")
SCALE = "_scale"
SCALE_ZERO = "_scale_zero"
CODES, BASES, OUTLIERS, OUTLIER_ENDS = "_codes", "_bases", "_outliers", "_outlier_ends"
TILE_ROWS, TILE_COLUMNS = 16, 32
INT8_INPUTS = 16  # torch's kernel reads this many at once
INT4_OUTPUTS = 64  # a whole block of either layout
INT4_GROUPS = (64, 32)
BLOCK_ROWS = {"blocks64": 64, "blocks32": 32}


@dataclass(frozen=True, slots=True)
class WeightFormat:
    """name: one of NAMES, `exact` being the checkpoint's own bytes

    group:  inputs that share a scale; 0: none do, or all of a row
    layout: how the codes lie, where more than one way is possible
    lossy:  whether weights differ from the checkpoint's
    """

    name: str = "exact"
    group: int = 0
    layout: str = ""
    lossy: bool = False

    def __str__(self) -> str:
        facts = [f"group {self.group}"] if self.group else []
        if self.name != "exact":
            facts.append("lossy" if self.lossy else "same values as the checkpoint")
        return f"{self.name} ({', '.join(facts)})" if facts else self.name

    @property
    def codes_per_byte(self) -> int:
        """Of the matrix itself, where it is kept in bytes."""
        return 2 if self.name == "int4" else 1

    @classmethod
    def from_pb(cls, message: pb.WeightFormat) -> WeightFormat:
        return cls(message.name, message.group, message.layout, message.lossy)

    def to_pb(self) -> pb.WeightFormat:
        return pb.WeightFormat(
            name=self.name, group=self.group, layout=self.layout, lossy=self.lossy
        )


EXACT = WeightFormat()


def low_bit_tensors(
    weight_format: WeightFormat, num_outputs: int, num_inputs: int, dtype: str
) -> tuple[tuple[str, str, tuple[int, ...]], ...]:
    """What a record holds of a matrix [N, K]: (what follows its name, dtype, shape) of each tensor.

    weight_format: int8 or int4
    dtype: the model's own, in safetensors' spelling
    """
    if weight_format.name == "int8":
        columns = align_up(num_inputs, INT8_INPUTS)
        return ("", "I8", (num_outputs, columns)), (SCALE, dtype, (num_outputs,))
    group = weight_format.group
    rows, columns = align_up(num_outputs, INT4_OUTPUTS), align_up(num_inputs, group)
    scale_zero = (SCALE_ZERO, dtype, (columns // group, rows, 2))
    return ("", "U8", (rows, columns // 2)), scale_zero


def lossless_tensors(
    num_outputs: int, num_inputs: int, num_outliers: int
) -> tuple[tuple[str, str, tuple[int, ...]], ...]:
    """The same for `lossless`. num_outliers: of the matrix that has most of them, at least one."""
    rows, columns = align_up(num_outputs, TILE_ROWS), align_up(num_inputs, TILE_COLUMNS)
    return (
        ("", "U8", (rows, columns)),
        (CODES, "U8", (rows, columns // 2)),
        (BASES, "U8", (rows,)),
        (OUTLIER_ENDS, "I32", (rows // TILE_ROWS,)),
        (OUTLIERS, "I32", (num_outliers,)),
    )
