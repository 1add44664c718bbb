"""What `flashmoe calibrate` learned about the routers of one store, as a file beside its manifest:
how the scores of layers to come differ from what their routers say when asked early.

A ridge regression of low rank (Hoerl & Kennard 1970; Izenman 1975), shrunk towards the next router
as it is asked today, so that few tokens make it no worse.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import xxhash
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from proto.errors import RouterMapInvalid

FORMAT = "flashmoe-router-map-1"
MAX_BYTES = 64 * 1024 * 1024
_ROOM_BYTES = 1024 * 1024  # of those, for the file's header


@dataclass(frozen=True)
class Part:
    """From one layer, to those it foretells. R the rank, N layers.

    layers: model layer numbers, [N]
    down:   [R, D], of what was seen over its root mean square
    up:     [N * E, R]
    bias:   [N * E]
    """

    layers: tuple[int, ...]
    down: NDArray[np.float16]
    up: NDArray[np.float16]
    bias: NDArray[np.float32]

    def tensors(self) -> dict[str, NDArray[Any]]:
        return {"down": self.down, "up": self.up, "bias": self.bias}


@dataclass(frozen=True)
class RouterMap:
    """Of one store.

    fingerprint: of the store it was calibrated for
    num_experts: E
    hidden_size: D
    parts:       by the layer that is seen, `EMBEDDING` too
    """

    fingerprint: str
    num_experts: int
    hidden_size: int
    trained_steps: int
    parts: Mapping[int, Part]

    def save(self, path: Path) -> None:
        """Raises OSError."""
        tensors = {
            f"{layer}.{name}": np.ascontiguousarray(tensor)
            for layer, part in self.parts.items()
            for name, tensor in part.tensors().items()
        }
        spec = {
            "fingerprint": self.fingerprint,
            "num_experts": self.num_experts,
            "hidden_size": self.hidden_size,
            "trained_steps": self.trained_steps,
            "parts": [[layer, *part.layers] for layer, part in self.parts.items()],
        }
        text = json.dumps(spec)
        metadata = {"format": FORMAT, "spec": text, "checksum": _checksum(text, tensors)}
        save_file(tensors, path, metadata)

    @classmethod
    def load(cls, path: Path, fingerprint: str, num_experts: int) -> Self:
        """For a store and its number of experts a layer.

        Raises RouterMapInvalid saying what is wrong and the remedy; FileNotFoundError.
        """
        if (size := path.stat().st_size) > MAX_BYTES:
            raise RouterMapInvalid.of(path, f"has {size:,} bytes, more than {MAX_BYTES:,}")
        try:
            metadata, tensors = _read(path)
            if metadata.get("format") != FORMAT:
                found = metadata.get("format")
                raise RouterMapInvalid.of(path, f"has the format {found}, not {FORMAT}")
            if metadata["checksum"] != _checksum(metadata["spec"], tensors):
                raise RouterMapInvalid.of(path, "is damaged (its checksum is another)")
            spec = json.loads(metadata["spec"])
            parts = {
                layer: Part(tuple(layers), *(tensors[f"{layer}.{name}"] for name in _NAMES))
                for layer, *layers in spec.pop("parts")
            }
            read = cls(**spec, parts=parts)
        except (SafetensorError, KeyError, TypeError, ValueError) as error:
            raise RouterMapInvalid.of(path, f"is damaged ({error})") from error
        if (read.fingerprint, read.num_experts) != (fingerprint, num_experts):
            raise RouterMapInvalid.of(path, "was calibrated for another model or an earlier index")
        read._check_parts(path)
        return read

    def check_reads(self, path: Path, hidden_size: int) -> None:
        """Raises RouterMapInvalid unless it reads vectors of the model's size."""
        if self.hidden_size != hidden_size:
            raise RouterMapInvalid.of(
                path,
                f"reads vectors of {self.hidden_size} numbers, not of the model's {hidden_size}",
            )

    def _check_parts(self, path: Path) -> None:
        """Raises RouterMapInvalid unless they have the shapes they are said to have, and are
        finite.
        """
        for part in self.parts.values():
            rank, outputs = len(part.down), len(part.layers) * self.num_experts
            shapes = {"down": (rank, self.hidden_size), "up": (outputs, rank), "bias": (outputs,)}
            for name, tensor in part.tensors().items():
                if tensor.shape != shapes[name] or not np.isfinite(tensor).all():
                    raise RouterMapInvalid.of(
                        path, f"has a {name} that is not {shapes[name]} finite numbers"
                    )


_NAMES = ("down", "up", "bias")


def most_rank(num_parts: int, hidden_size: int, num_outputs: int) -> int:
    """Of each part, so that the file stays within `MAX_BYTES`."""
    part_bytes = (MAX_BYTES - _ROOM_BYTES) // num_parts - 4 * num_outputs
    return max(1, part_bytes // (2 * (hidden_size + num_outputs)))


def _read(path: Path) -> tuple[dict[str, str], dict[str, NDArray[Any]]]:
    with safe_open(path, framework="numpy") as file:
        names = list(file.keys())
        return file.metadata() or {}, {name: file.get_tensor(name) for name in names}


def _checksum(spec: str, tensors: Mapping[str, NDArray[Any]]) -> str:
    digest = xxhash.xxh3_64(spec.encode())
    for name in sorted(tensors):
        digest.update(name.encode())
        digest.update(np.ascontiguousarray(tensors[name]).tobytes())
    return digest.hexdigest()
