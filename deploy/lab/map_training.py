"""Trains a router map: for each layer, how the routers to come will differ from what they say when
asked early. Judged on generations that were held out, layer by layer and distance by distance;
only what names more of the chosen experts than the next router is kept.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray

from compute_node.predict.drift import corrected
from compute_node.predict.predictor import EMBEDDING
from compute_node.predict.router_map import Part, RouterMap, most_rank
from deploy.lab.map_lessons import MapLessons
from proto.expert import ModelSpec

MIN_STEPS = 64
RANK, EMBEDDING_RANK = 32, 128
RIDGE = 0.1  # of the mean square of what is read, which is 1
HELD_OUT = 10  # every tenth generation
LEAST_SHARE = 0.5  # of the chosen experts that the map must name where nothing else can be asked

Floats = NDArray[np.float32]


@dataclass
class Verdict:
    """Of one distance: the share of chosen experts that are among the best by score, held out.

    plain, mapped: the sums over layers
    """

    layers: int = 0
    kept: int = 0
    plain: float = 0.0
    mapped: float = 0.0

    def text(self, ahead: int) -> str:
        return (
            f"{ahead} ahead: next router {self.plain / self.layers:.3f}, map "
            f"{self.mapped / self.layers:.3f}, used at {self.kept} of {self.layers}"
        )


@dataclass
class MapTraining:
    """One store's.

    verdicts:  by layers ahead
    embedding: the map's share of what it may foretell from the embedding, likewise
    """

    spec: ModelSpec
    lessons: MapLessons
    verdicts: dict[int, Verdict] = field(default_factory=dict)
    embedding: dict[int, float] = field(default_factory=dict)

    def run(self) -> RouterMap | None:
        """None: it is nowhere better, or there are too few steps."""
        if self.lessons.num_steps < MIN_STEPS or self.lessons.num_generations < 2:
            return None
        hidden_size = self.lessons.inputs().shape[2]
        parts = {}
        for place in range(-1, len(self.spec.moe_layers) - 1):
            if (part := self._part(place, hidden_size)) is not None:
                parts[EMBEDDING if place < 0 else self.spec.moe_layers[place]] = part
        if not parts:
            return None
        learned = len(self._learned_from())
        return RouterMap(self.spec.fingerprint, self.spec.num_experts, hidden_size, learned, parts)

    def report(self) -> Iterator[str]:
        """What was judged, a line each."""
        for ahead, verdict in sorted(self.verdicts.items()):
            yield verdict.text(ahead)
        if self.embedding:
            shares = ", ".join(
                f"{ahead} ahead {each:.3f}" for ahead, each in self.embedding.items()
            )
            yield f"from a token's embedding: map {shares}"

    def _held_out(self) -> NDArray[np.intp]:
        """Steps."""
        offsets, last = self.lessons.seq_offsets, self.lessons.num_generations - 1
        held = [g for g in range(last + 1) if g % HELD_OUT == min(HELD_OUT - 1, last)]
        return np.concatenate([np.arange(offsets[g], offsets[g + 1]) for g in held])

    def _learned_from(self) -> NDArray[np.intp]:
        """Steps."""
        return np.setdiff1d(np.arange(self.lessons.num_steps), self._held_out())

    def _part(self, place: int, hidden_size: int) -> Part | None:
        """From what is seen at a layer, counted from 0; -1: the embedding."""
        lesson = self._lesson(place)
        if lesson is None:
            return None
        outputs = lesson.truth.shape[1] * lesson.truth.shape[2]
        rank = EMBEDDING_RANK if place < 0 else RANK
        rank = min(rank, most_rank(len(self.spec.moe_layers) + 1, hidden_size, outputs))
        fitted = fit(lesson.inputs, lesson.truth - lesson.said, rank)
        kept = self._judged(place, fitted, lesson.ahead)
        if not kept:
            return None
        layers = [self.spec.moe_layers[place + lesson.ahead[number]] for number in kept]
        return fitted.part(kept, layers)

    def _lesson(self, place: int) -> _Lesson | None:
        """Of the layers after it whose routers are recognised. None: nothing can be learned."""
        lesson = self._read(place, self._learned_from())
        known = lesson.known().sum(axis=0) >= MIN_STEPS // 2
        usable = lesson.of(known).usable()
        return usable if known.any() and len(usable.inputs) >= MIN_STEPS // 2 else None

    def _read(self, place: int, steps: NDArray[np.intp]) -> _Lesson:
        """What was seen at a layer, and what came of the N layers after it."""
        number = min(self.lessons.said().shape[2], len(self.spec.moe_layers) - 1 - place)
        targets = [place + ahead for ahead in range(1, number + 1)]
        truth = self.lessons.truth()[steps][:, targets].astype(np.float32)
        said = np.zeros_like(truth)
        if place >= 0:
            every = self.lessons.said()
            for ahead, target in enumerate(targets):
                said[:, ahead] = every[steps, target, ahead]
        inputs = self.lessons.inputs()[steps, place + 1].astype(np.float32)
        return _Lesson(inputs, truth, said, np.arange(1, number + 1))

    def _judged(self, place: int, fitted: _Fitted, learned: NDArray[np.intp]) -> list[int]:
        """Which of the layers `learned` the map foretells better, by their place there; none where
        no step that was held out shows it.
        """
        every = self._read(place, self._held_out())
        held = every.of(np.isin(every.ahead, learned)).usable()
        if not len(held.inputs):
            return []
        mapped = held.said + fitted.corrections(held.inputs)
        kept = []
        for number, ahead in enumerate(learned.tolist()):
            truth = held.truth[:, number]
            share = self._share(corrected(mapped[:, number], truth), truth)
            plain = self._share(corrected(held.said[:, number], truth), truth)
            if place < 0:
                self.embedding[ahead] = share
                is_better = share > LEAST_SHARE
            else:
                is_better = share > plain
                verdict = self.verdicts.setdefault(ahead, Verdict())
                verdict.layers, verdict.kept = verdict.layers + 1, verdict.kept + is_better
                verdict.plain, verdict.mapped = verdict.plain + plain, verdict.mapped + share
            if is_better:
                kept.append(number)
        return kept

    def _share(self, scores: Floats, truth: Floats) -> float:
        """Of the experts that are chosen by `truth`, those that these scores choose, too."""
        top_k = self.spec.top_k
        named, chosen = (np.argpartition(-each, top_k - 1)[:, :top_k] for each in (scores, truth))
        return float((named[:, :, None] == chosen[:, None, :]).any(axis=1).mean())


@dataclass(frozen=True)
class _Lesson:
    """inputs: [T, D]; truth, said: [T, N, E]; ahead: [N], layers"""

    inputs: Floats
    truth: Floats
    said: Floats
    ahead: NDArray[np.intp]

    def known(self) -> NDArray[np.bool_]:
        """[T, N], where the stream and the router are recognised."""
        known: NDArray[np.bool_] = np.isfinite((self.truth - self.said)[:, :, 0])
        known &= np.isfinite(self.inputs[:, :1])
        return known

    def of(self, targets: NDArray[np.bool_]) -> _Lesson:
        """targets: [N], which to keep"""
        truth, said = self.truth[:, targets], self.said[:, targets]
        return _Lesson(self.inputs, truth, said, self.ahead[targets])

    def usable(self) -> _Lesson:
        """Its steps where everything is known."""
        steps = self.known().all(axis=1)
        return _Lesson(self.inputs[steps], self.truth[steps], self.said[steps], self.ahead)


@dataclass(frozen=True)
class _Fitted:
    """down: [R, D]; up: [N, E, R]; bias: [N, E]"""

    down: Floats
    up: Floats
    bias: Floats

    def corrections(self, inputs: Floats) -> Floats:
        """[T, D] to [T, N, E]"""
        found: Floats = np.einsum("tr,ner->tne", inputs @ self.down.T, self.up) + self.bias
        return found

    def part(self, kept: list[int], layers: list[int]) -> Part:
        up = self.up[kept]
        return Part(
            tuple(layers),
            self.down.astype(np.float16),
            up.reshape(-1, up.shape[-1]).astype(np.float16),
            self.bias[kept].reshape(-1),
        )


def fit(inputs: Floats, wanted: Floats, rank: int) -> _Fitted:
    """Ridge regression of `wanted`, [T, N, E], on `inputs`, [T, D], and of it the part of this rank
    that explains most.
    """
    read, asked = torch.from_numpy(inputs), torch.from_numpy(wanted).flatten(1)
    means, wanted_means = read.mean(0), asked.mean(0)
    read, asked = read - means, asked - wanted_means
    square = read.T @ read / len(read) + RIDGE * torch.eye(read.shape[1])
    root = torch.linalg.cholesky(square)  # of the regularised second moment
    full = torch.cholesky_solve(read.T @ asked / len(read), root)  # [D, N * E]
    left, sizes, right = torch.linalg.svd(root.T @ full, full_matrices=False)
    scale = sizes[:rank].sqrt()
    down = torch.linalg.solve_triangular(root.T, left[:, :rank] * scale, upper=True).T
    up = (right[:rank].T * scale).contiguous()
    bias = wanted_means - up @ (down @ means)
    shape = wanted.shape[1:]
    return _Fitted(down.numpy(), up.reshape(*shape, -1).numpy(), bias.reshape(shape).numpy())
