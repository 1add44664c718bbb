"""Dense weights come back under their names, checked, from several files at once.

Planted faults seen red: names paired with other tensors, a checksum not compared, a descriptor left
open, the rest read after the block was left.
"""

from __future__ import annotations

import os
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
import xxhash

from compute_node.model import dense_weights
from compute_node.model.dense_weights import reading_dense
from proto import errors
from proto.expert import DenseTensor
from tests.expert_store.stores import flip

NUM_TENSORS = 9


@pytest.fixture
def stored(tmp_path: Path) -> dict[str, tuple[DenseTensor, torch.Tensor]]:
    """Tensors of different sizes, by turns in two files that begin with something else."""
    found = {}
    written = dict.fromkeys(("a.bin", "b.bin"), b"header")
    for number in range(NUM_TENSORS):
        file, name = ("a.bin", "b.bin")[number % 2], f"t{number}"
        weight = torch.randn(number + 1, 3)
        data = weight.numpy().tobytes()
        found[name] = (
            DenseTensor(
                name=name,
                dtype="F32",
                shape=tuple(weight.shape),
                file=file,
                offset_bytes=len(written[file]),
                length_bytes=len(data),
                checksum=xxhash.xxh3_64_intdigest(data),
            ),
            weight,
        )
        written[file] += data
    for file, data in written.items():
        (tmp_path / file).write_bytes(data)
    return found


def test_every_tensor_comes_under_its_name(
    stored: dict[str, tuple[DenseTensor, torch.Tensor]], tmp_path: Path
) -> None:
    before = set(os.listdir("/proc/self/fd"))
    with reading_dense(tmp_path, [tensor for tensor, _ in stored.values()]) as dense:
        found = dense()
    assert found.keys() == stored.keys()
    assert all(torch.equal(found[name], weight) for name, (_, weight) in stored.items())
    assert len(os.listdir("/proc/self/fd")) == len(before)


def test_a_damaged_tensor_is_named(
    stored: dict[str, tuple[DenseTensor, torch.Tensor]], tmp_path: Path
) -> None:
    damaged, _ = stored[f"t{NUM_TENSORS - 1}"]
    flip(tmp_path / damaged.file, damaged.offset_bytes + 5)
    with (
        reading_dense(tmp_path, [tensor for tensor, _ in stored.values()]) as dense,
        pytest.raises(errors.WeightsDamaged, match=rf"{damaged.name} in .*{damaged.file} .*verify"),
    ):
        dense()


def test_a_file_that_is_not_there(
    stored: dict[str, tuple[DenseTensor, torch.Tensor]], tmp_path: Path
) -> None:
    (tmp_path / "b.bin").unlink()
    with (
        pytest.raises(errors.ConfigInvalid, match=r"b\.bin .*set model_dir"),
        reading_dense(tmp_path, [tensor for tensor, _ in stored.values()]),
    ):
        pass


def test_who_leaves_does_not_wait_for_the_rest(
    stored: dict[str, tuple[DenseTensor, torch.Tensor]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A checkpoint that is refused is not read to its end first."""
    read, released = list[str](), threading.Event()

    def slow(descriptor: int, path: Path, tensor: DenseTensor) -> torch.Tensor:
        read.append(tensor.name)
        released.wait(10)
        return torch.empty(0)

    def shutdown(pool: ThreadPoolExecutor, **options: bool) -> None:
        honest(pool, wait=False, **options)
        released.set()
        honest(pool)

    honest = ThreadPoolExecutor.shutdown
    monkeypatch.setattr(dense_weights, "_read", slow)
    monkeypatch.setattr(ThreadPoolExecutor, "shutdown", shutdown)
    with (
        pytest.raises(errors.CheckpointUnsupported),
        reading_dense(tmp_path, [tensor for tensor, _ in stored.values()]),
    ):
        raise errors.CheckpointUnsupported("not this one")
    assert len(read) <= dense_weights._READS_AT_ONCE
