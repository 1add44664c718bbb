"""Every promised architecture with low-bit experts, through a real store, beside transformers'
eager experts on the same weights dequantised.

Planted faults seen red: a transposed matrix read the wrong way round, or unpacked so, biases left
out, codes of another CPU taken, int8 scaled by one row's scale, bf16 of fp32 called exact or not
widened, room for the outliers of the first expert alone, lossless where it does not pay or of fp32.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from compute_node.engine.engine import Engine
from compute_node.engine.sequence import SequenceState
from compute_node.kernels.formats.int4 import Int4Matrix
from compute_node.kernels.formats.int8 import Int8Matrix
from compute_node.store.memory import TORCH_DTYPES
from expert_store.manifest.manifest import Manifest
from expert_store.offline.formats import int4
from expert_store.offline.formats.lossless import LosslessEncoder
from expert_store.offline.pack import pack
from expert_store.offline.record_file import RECORDS_NAME
from proto import errors
from proto.expert import ExpertKey
from tests.checkpoints import ARCHITECTURES, make
from tests.contract.test_exactness import decode_eagerly, eager_model, engine, prompt
from tests.matrices import dequantised

STEPS = 12


@pytest.fixture
def dequantising(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """As if every pass had many tokens, until undone."""
    with monkeypatch.context() as patched:
        for kernel in (Int8Matrix, Int4Matrix):
            patched.setattr(kernel, "few_tokens", 0)
        yield patched


def stored(store_dir: Path) -> dict[ExpertKey, dict[str, torch.Tensor]]:
    """The tensors of every record, as the node gets them."""
    manifest = Manifest.load(store_dir)
    data = bytearray((store_dir / RECORDS_NAME).read_bytes())
    found: dict[ExpertKey, dict[str, torch.Tensor]] = {}
    for record_key, record in manifest.records.items():
        key = record_key.expert
        start = record.extents[0].offset_bytes - record.extents[0].place_bytes
        found[key] = {}
        for tensor, offset in zip(
            manifest.spec.layouts[key.layer], record.tensor_offsets, strict=True
        ):
            dtype = TORCH_DTYPES[tensor.dtype]
            count = tensor.length_bytes // dtype.itemsize
            flat = torch.frombuffer(data, dtype=dtype, count=count, offset=start + offset)
            found[key][tensor.name] = flat.view(tensor.shape)
    return found


def dequantised_model(root: Path, store_dir: Path, dtype: torch.dtype) -> Any:
    """transformers' eager experts on what the store's codes mean."""
    model = eager_model(root, dtype)
    modules = [m for m in model.modules() if hasattr(m, "is_transposed")]
    layers = dict(zip(Manifest.load(store_dir).spec.moe_layers, modules, strict=True))
    with torch.no_grad():
        for key, tensors in stored(store_dir).items():
            module = layers[key.layer]
            for name, parameter in module.named_parameters(recurse=False):
                if parameter.dim() == 3:
                    slot = parameter[key.expert]
                    slot = slot.T if module.is_transposed else slot  # [N, K]
                    weight = dequantised(tensors, name, tuple(slot.shape))
                    assert 0 < (weight - slot).norm() / slot.norm() < 0.1, "no quantised copy"
                    slot.copy_(weight)
    return model


def run(engine: Engine) -> tuple[list[torch.Tensor], list[int]]:
    sequence = SequenceState("s", prompt())
    logits = [engine.prefill(sequence)]
    sequence.token_ids.append(int(logits[-1].argmax()))
    while len(logits) < STEPS:
        logits += engine.decode([sequence])
        sequence.token_ids.append(int(logits[-1].argmax()))
    return logits, sequence.token_ids


def check_same(ours: Any, theirs: Any) -> None:
    assert ours[1] == theirs[1]
    assert all(torch.equal(a, b) for a, b in zip(ours[0], theirs[0], strict=True))


def check_meant(ours: Any, theirs: Any) -> None:
    """Bit for bit where torch adds alike for a matrix and for its transpose. Without avx512_bf16
    bits depend on how they lie: the last may differ, while both choose the same tokens.
    """
    if "avx512_bf16" in Path("/proc/cpuinfo").read_text():
        check_same(ours, theirs)
        return
    same = next((n for n, (a, b) in enumerate(zip(ours[1], theirs[1], strict=True)) if a != b), -1)
    num_steps = STEPS if same < 0 else same - len(prompt()) + 1
    assert num_steps > STEPS // 2
    for a, b in list(zip(ours[0], theirs[0], strict=True))[:num_steps]:
        torch.testing.assert_close(a, b, rtol=0, atol=0.05)


@pytest.mark.parametrize("weight_format", ["int8", "int4"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_experts_compute_what_their_codes_mean(
    name: str, weight_format: str, tmp_path: Path, dequantising: pytest.MonkeyPatch
) -> None:
    """Dequantised, bit for bit; by the low-bit kernel, the same whatever the cache holds."""
    root = make(name, tmp_path / "checkpoint", torch.bfloat16)
    manifest = pack(root, tmp_path / "store", weight_format=weight_format)
    assert manifest.spec.weight_format.lossy
    expected = decode_eagerly(dequantised_model(root, tmp_path / "store", torch.bfloat16), STEPS)
    with engine(tmp_path / "store", tmp_path) as node:
        check_meant(run(node), expected)
        dequantising.undo()
        first = run(node)
    with engine(tmp_path / "store", tmp_path, spare=9) as node:
        check_same(run(node), first)


@pytest.mark.parametrize("weight_format", ["int8", "int4"])
@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
def test_low_bit_kernels_are_near(name: str, weight_format: str, tmp_path: Path) -> None:
    """In fp32, where no rounding tips a router over. Padded groups; transposed, with biases."""
    root = make(name, tmp_path / "checkpoint", torch.float32)
    pack(root, tmp_path / "store", weight_format=weight_format)
    logits, tokens = decode_eagerly(
        dequantised_model(root, tmp_path / "store", torch.float32), STEPS
    )
    with engine(tmp_path / "store", tmp_path) as node:
        ours, our_tokens = run(node)
    assert our_tokens == tokens
    for step, (a, b) in enumerate(zip(ours, logits, strict=True)):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-4, msg=f"step {step}")


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_lossless_is_exact(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bit for bit transformers' eager experts on the checkpoint itself."""
    monkeypatch.setattr(LosslessEncoder, "_check_gain", lambda *_: None)  # tiny ones are padded
    root = make(name, tmp_path / "checkpoint", torch.bfloat16)
    manifest = pack(root, tmp_path / "store", weight_format="lossless")
    assert not manifest.spec.weight_format.lossy
    model = eager_model(root, torch.bfloat16)
    with engine(tmp_path / "store", tmp_path) as node:
        check_same(run(node), decode_eagerly(model, STEPS))


def test_lossless_needs_bf16_and_must_pay(tmp_path: Path) -> None:
    wide = make("mixtral", tmp_path / "fp32", torch.float32)
    with pytest.raises(errors.CheckpointUnsupported, match="lossless is for bf16 experts"):
        pack(wide, tmp_path / "store", weight_format="lossless")
    padded = make("mixtral", tmp_path / "bf16", torch.bfloat16, intermediate_size=8)
    with pytest.raises(errors.CheckpointUnsupported, match="pack them with --format exact"):
        pack(padded, tmp_path / "store", weight_format="lossless")
    assert not (tmp_path / "store").exists()


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
def test_bf16_of_a_bf16_checkpoint_is_exact(name: str, tmp_path: Path) -> None:
    """The same bits as an exact store's, yet another model by its fingerprint."""
    root = make(name, tmp_path / "checkpoint", torch.bfloat16)
    exact = pack(root, tmp_path / "exact")
    manifest = pack(root, tmp_path / "bf16", weight_format="bf16")
    assert not manifest.spec.weight_format.lossy
    assert manifest.spec.fingerprint != exact.spec.fingerprint
    records = [(tmp_path / kind / RECORDS_NAME).read_bytes() for kind in ("exact", "bf16")]
    assert records[0] == records[1]


def test_bf16_of_an_fp32_checkpoint_is_rounded(tmp_path: Path) -> None:
    """Its dense part stays fp32, and its experts are widened where they are multiplied with."""
    root = make("gpt_oss", tmp_path / "checkpoint", torch.float32)
    manifest = pack(root, tmp_path / "store", weight_format="bf16")
    assert manifest.spec.weight_format.lossy
    model = eager_model(root, torch.float32)
    for module in model.modules():
        if hasattr(module, "is_transposed"):
            for parameter in module.parameters(recurse=False):
                if parameter.dim() == 3:
                    parameter.data = parameter.data.to(torch.bfloat16).float()
    with engine(tmp_path / "store", tmp_path) as node:
        check_same(run(node), decode_eagerly(model, STEPS))


def test_codes_laid_for_another_cpu_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = make("mixtral", tmp_path / "checkpoint", torch.bfloat16)
    here = int4.layout_here()
    other = "blocks32" if here == "blocks64" else "blocks64"
    monkeypatch.setattr(int4, "layout_here", lambda: other)
    pack(root, tmp_path / "store", weight_format="int4")
    with (
        pytest.raises(errors.CheckpointUnsupported, match=r"pack the checkpoint on this machine"),
        engine(tmp_path / "store", tmp_path),
    ):
        raise AssertionError("it was loaded")
