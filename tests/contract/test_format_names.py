"""What one service packs another multiplies with: formats and dtypes have the same names in both.

Planted faults seen red: a format that a node lacks, one that cannot be packed, a dtype of another
size.
"""

from __future__ import annotations

from compute_node.kernels.expert_kernels import MATRICES
from compute_node.store.memory import TORCH_DTYPES
from expert_store.offline.checkpoint.parameters import EXPERT_DTYPES
from expert_store.offline.formats.table import FORMATS
from proto.expert import DTYPE_BYTES
from proto.weight_format import NAMES


def test_every_format_is_packed_and_multiplied_with() -> None:
    assert set(FORMATS) == set(MATRICES) == set(NAMES)


def test_dtypes_have_the_size_that_the_contract_says() -> None:
    assert {name: dtype.itemsize for name, dtype in TORCH_DTYPES.items()} == {
        name: DTYPE_BYTES[name] for name in TORCH_DTYPES
    }
    assert EXPERT_DTYPES.items() <= TORCH_DTYPES.items()
