"""An access trace: which experts every decode step of some generations chose, as an npz file."""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import grpc
import numpy as np
from numpy.typing import NDArray

from proto import errors
from proto.access import DecodeAccess
from proto.redis_schema import LAYER

REQUIRED = ("topk_ids", "seq_offsets", "num_experts")
OPTIONAL = ("topk_weights", "seq_names", "router_scores", "sampling")
TRUTH = "truth"
_SUM_TOLERANCE = 0.01  # of shares in half precision
SAID = "said_"  # and the predictor's name


class TraceInvalid(errors.FlashMoEError):
    """A file is no access trace, or not one that fits the question."""

    status = grpc.StatusCode.INVALID_ARGUMENT


@dataclass(frozen=True)
class AccessTrace:
    """Decode steps of generations that follow one another. T steps, L layers, K experts a token.

    name:          for tables, usually the file's stem
    topk_ids:      [T, L, K] integers below num_experts, distinct within a row
    seq_offsets:   [S + 1] int64, where each generation starts and ends
    topk_weights:  [T, L, K] float16, gate weights; zeros when the file has none
    seq_names:     [S], what each generation is; empty when the file does not say
    router_scores: [T, L, E] float16, the router's scores of all experts; None when not recorded
    sampling:      how tokens were drawn, for a reader; empty when not recorded
    said:          [T, L, N, E] float16 by predictor, in the order in which a node asks them: what
                   it said of each layer 1 to N layers before; NaN: nothing; empty: not recorded
    truth:         [T, L, E] float16, what they foretell; None when not recorded
    """

    name: str
    topk_ids: NDArray[np.uint16]
    seq_offsets: NDArray[np.int64]
    num_experts: int
    topk_weights: NDArray[np.float16]
    seq_names: tuple[str, ...] = ()
    router_scores: NDArray[np.float16] | None = field(default=None, repr=False)
    sampling: str = ""
    said: Mapping[str, NDArray[np.float16]] = field(default_factory=dict, repr=False)
    truth: NDArray[np.float16] | None = field(default=None, repr=False)

    @property
    def num_steps(self) -> int:
        return len(self.topk_ids)

    @property
    def num_layers(self) -> int:
        return int(self.topk_ids.shape[1])

    @property
    def top_k(self) -> int:
        return int(self.topk_ids.shape[2])

    @property
    def num_generations(self) -> int:
        return len(self.seq_offsets) - 1

    @property
    def shape(self) -> tuple[int, int]:
        """Layers, experts a layer."""
        return self.num_layers, self.num_experts

    @cached_property
    def gates(self) -> NDArray[np.float16] | None:
        """[T, L, E], each expert's share of the token's gates: of scores that are probabilities as
        they are, else their softmax; None when scores were not recorded.
        """
        return None if self.router_scores is None else _shares(self.router_scores)

    def events(self) -> Iterator[DecodeAccess]:
        """Every step as the evidence a node would send. Slots, policy and hits are not known."""
        return self._events(self.gates)

    def _events(self, gates: NDArray[np.float16] | None) -> Iterator[DecodeAccess]:
        nowhere = np.zeros(self.topk_ids.shape[1:], np.bool_)
        for number, (start, end) in enumerate(
            zip(self.seq_offsets[:-1], self.seq_offsets[1:], strict=True)
        ):
            for at in range(int(start), int(end)):
                yield DecodeAccess(
                    node="replay",
                    sequence=str(number),
                    step=at - int(start),
                    num_experts=self.num_experts,
                    slots=0,
                    scope=LAYER,
                    policy="",
                    time_ns=0,
                    topk_ids=self.topk_ids[at],
                    topk_weights=self.topk_weights[at],
                    hits=nowhere,
                    gates=None if gates is None else gates[at],
                )

    def used(self) -> NDArray[np.bool_]:
        """[T, L, E], which experts each step chose."""
        used = np.zeros((self.num_steps, *self.shape), np.bool_)
        np.put_along_axis(used, self.topk_ids.astype(np.intp), True, axis=2)
        return used

    def take(self, generations: NDArray[np.intp], name: str) -> AccessTrace:
        """Some of its generations, in the order given."""
        spans = [range(*self.seq_offsets[g : g + 2]) for g in generations]
        at = np.concatenate([np.asarray(span, np.intp) for span in spans])
        return AccessTrace(
            name=name,
            topk_ids=self.topk_ids[at],
            seq_offsets=np.concatenate([[0], np.cumsum([len(s) for s in spans])]).astype(np.int64),
            num_experts=self.num_experts,
            topk_weights=self.topk_weights[at],
            seq_names=tuple(self.seq_names[g] for g in generations) if self.seq_names else (),
            router_scores=None if self.router_scores is None else self.router_scores[at],
            sampling=self.sampling,
            said={name: each[at] for name, each in self.said.items()},
            truth=None if self.truth is None else self.truth[at],
        )

    def save(self, path: Path) -> None:
        """Write it as an npz that needs no pickle to read. Raises OSError."""
        arrays: dict[str, Any] = {
            "topk_ids": self.topk_ids.astype(np.uint8 if self.num_experts <= 256 else np.uint16),
            "topk_weights": self.topk_weights,
            "seq_offsets": self.seq_offsets,
            "num_experts": np.int64(self.num_experts),
            "seq_names": np.array(self.seq_names or [""] * self.num_generations),
            "sampling": np.array(self.sampling),
        }
        if self.router_scores is not None:
            arrays["router_scores"] = self.router_scores
        if self.truth is not None:
            arrays[TRUTH] = self.truth
        arrays |= {SAID + name: each for name, each in self.said.items()}
        with path.open("wb") as file:
            np.savez_compressed(file, **arrays)

    @classmethod
    def load(cls, path: Path, *, predictions: bool = False) -> AccessTrace:
        """predictions: with `said` and `truth`, many times what the others take

        Raises TraceInvalid saying what is wrong with the file; FileNotFoundError.
        """
        arrays = _arrays(path, predictions)
        ids = arrays["topk_ids"]
        _check_ids(path, ids, arrays["num_experts"])
        _check_offsets(path, arrays["seq_offsets"], len(ids))
        num_experts = int(arrays["num_experts"])
        return cls(
            name=path.stem,
            topk_ids=ids.astype(np.uint16),
            seq_offsets=arrays["seq_offsets"].astype(np.int64),
            num_experts=num_experts,
            topk_weights=_weights(path, arrays.get("topk_weights"), ids.shape),
            seq_names=_names(path, arrays.get("seq_names"), len(arrays["seq_offsets"]) - 1),
            router_scores=_scores(
                path,
                arrays.get("router_scores"),
                (*ids.shape[:2], num_experts),
                "router_scores",
            ),
            sampling=str(arrays.get("sampling", "")),
            said={
                name.removeprefix(SAID): _said(path, name, array, (*ids.shape[:2], num_experts))
                for name, array in arrays.items()
                if name.startswith(SAID)
            },
            truth=_scores(path, arrays.get(TRUTH), (*ids.shape[:2], num_experts), TRUTH),
        )


def _shares(scores: NDArray[np.float16]) -> NDArray[np.float16]:
    """[T, L, E]; a step at a time, because what lies between takes twice the memory."""
    shares = np.empty_like(scores)
    for step, given in enumerate(scores):
        rows = given.astype(np.float32)
        is_share = (rows >= 0).all() and bool((abs(rows.sum(axis=-1) - 1) < _SUM_TOLERANCE).all())
        if not is_share:
            rows = np.exp(rows - rows.max(axis=-1, keepdims=True))
            rows /= rows.sum(axis=-1, keepdims=True)
        shares[step] = rows
    return shares


def check_same_model(trace: AccessTrace, other: AccessTrace) -> None:
    """Raises TraceInvalid when two traces cannot be of one model."""
    if (*trace.shape, trace.top_k) != (*other.shape, other.top_k):
        raise TraceInvalid(
            f"{other.name} has {_size(other)}, {trace.name} has {_size(trace)}: "
            "give two traces of one model"
        )


def _size(trace: AccessTrace) -> str:
    return f"{trace.num_layers} layers x {trace.num_experts} experts, top {trace.top_k}"


def _arrays(path: Path, predictions: bool) -> dict[str, Any]:
    try:
        with path.open("rb") as file:
            archive = np.load(file, allow_pickle=False)
            if isinstance(archive, np.ndarray):
                raise TraceInvalid(f"{path} is one array, not an npz: see flashmoe record")
            missing = [name for name in REQUIRED if name not in archive.files]
            if missing:
                raise TraceInvalid(f"{path} has no {', '.join(missing)}: it is no access trace")
            return {name: archive[name] for name in archive.files if _is_wanted(name, predictions)}
    except (zipfile.BadZipFile, zlib.error, ValueError, EOFError) as error:
        raise TraceInvalid(
            f"{path} is no access trace (no pickle is ever loaded): record one with `flashmoe "
            "record`"
        ) from error


def _is_wanted(name: str, predictions: bool) -> bool:
    if name == TRUTH or name.startswith(SAID):
        return predictions
    return name in REQUIRED + OPTIONAL


def _check_ids(path: Path, ids: Any, num_experts: Any) -> None:
    if num_experts.ndim or num_experts.dtype.kind not in "iu" or not 0 < num_experts <= 65_536:
        raise TraceInvalid(f"{path}: num_experts must be one number from 1 to 65536")
    if ids.ndim != 3 or ids.dtype.kind not in "iu" or not ids.size:
        raise TraceInvalid(
            f"{path}: topk_ids must be integers [steps, layers, top_k], not {ids.shape}"
        )
    if ids.min() < 0 or ids.max() >= num_experts:
        raise TraceInvalid(f"{path}: topk_ids names expert {ids.max()} of {num_experts}")
    in_order = np.sort(ids, axis=2)
    if (in_order[..., 1:] == in_order[..., :-1]).any():
        raise TraceInvalid(f"{path}: topk_ids names an expert twice in one step of a layer")


def _check_offsets(path: Path, offsets: Any, num_steps: int) -> None:
    if (
        offsets.ndim != 1
        or offsets.dtype.kind not in "iu"
        or len(offsets) < 2
        or offsets[0] != 0
        or offsets[-1] != num_steps
        or (np.diff(offsets.astype(np.int64)) <= 0).any()
    ):
        raise TraceInvalid(f"{path}: seq_offsets must rise from 0 to the {num_steps} steps")


def _weights(path: Path, weights: Any, shape: tuple[int, ...]) -> NDArray[np.float16]:
    if weights is None:
        return np.zeros(shape, np.float16)
    if weights.shape != shape or weights.dtype.kind != "f" or not np.isfinite(weights).all():
        raise TraceInvalid(f"{path}: topk_weights must be finite floats of the shape of topk_ids")
    packed: NDArray[np.float16] = weights.astype(np.float16)
    return packed


def _said(path: Path, name: str, scores: Any, shape: tuple[int, ...]) -> NDArray[np.float16]:
    steps, layers, experts = shape
    is_one = scores.ndim == 4 and scores.shape[:2] + scores.shape[3:] == (steps, layers, experts)
    if not is_one or scores.dtype.kind != "f":
        raise TraceInvalid(f"{path}: {name} must be floats [steps, layers, layers ahead, experts]")
    packed: NDArray[np.float16] = scores.astype(np.float16)
    return packed


def _scores(
    path: Path, scores: Any, shape: tuple[int, ...], name: str
) -> NDArray[np.float16] | None:
    if scores is None:
        return None
    if scores.shape != shape or scores.dtype.kind != "f":
        raise TraceInvalid(f"{path}: {name} must be floats [steps, layers, experts]")
    if name != TRUTH and not np.isfinite(scores).all():
        raise TraceInvalid(f"{path}: {name} must be finite")
    packed: NDArray[np.float16] = scores.astype(np.float16)
    return packed


def _names(path: Path, names: Any, num_generations: int) -> tuple[str, ...]:
    if names is None:
        return ()
    if names.shape != (num_generations,):
        raise TraceInvalid(f"{path}: seq_names must name each of the {num_generations} generations")
    return tuple(str(name) for name in names)
