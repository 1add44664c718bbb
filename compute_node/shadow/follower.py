"""Computes the tokens of main nodes' sequences with a small copy of the model."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer

from compute_node.boxes.work import tensor_of
from compute_node.engine.sampling import Sampler
from compute_node.model.loaded import LoadedModel
from compute_node.moe.step import Batch, Part, Phase, Step
from compute_node.predict.drawing import Drawing
from compute_node.shadow.naming import Named
from proto import errors
from proto import shadow_pb2 as pb
from proto.stats import counter


class Token(NamedTuple):
    """position: in its sequence, from 0"""

    position: int
    token_id: int


Tell = Callable[[Token, int, list[int]], None]
"""Called with a token, a layer, and the experts that its router chose for it."""

_MOST_SEQUENCES = 8
_CHUNK_TOKENS = 512
_TOKENS, _TOKENS_HELP = "flashmoe_shadow_tokens", "Tokens computed"


class OutOfStep(Exception):
    """The tokens before are not there. num_tokens: that are"""

    def __init__(self, num_tokens: int) -> None:
        super().__init__(f"{num_tokens} tokens are there")
        self.num_tokens = num_tokens


@dataclass
class Followed:
    """One sequence. token_ids: that its state holds, the latest may be a guess

    guess:  the token that likely comes next; -1: nothing is known
    num_true: of the tokens, that the main node has said
    sampler: draws what the main node will draw; None: it is not known how that draws
    """

    token_ids: list[int] = field(default_factory=list)
    state: Any = None
    guess: int = -1
    num_true: int = 0
    sampler: Sampler | None = None

    def think(self, logits: Tensor) -> None:
        """Of the token after the latest. logits: [1, V]"""
        if self.sampler is None:
            self.guess = int(logits[0].argmax())
        else:
            self.guess = self.sampler.draw(self.token_ids, logits)


class Follower:
    """One thread.

    num_followed: tokens that main nodes named
    num_guessed:  tokens computed before they were named; num_guesses_right: that were named then
    num_states:   tokens whose keys and values came from a main node
    """

    num_followed: int = counter(_TOKENS, _TOKENS_HELP, key="followed", why="followed")
    num_guessed: int = counter(_TOKENS, _TOKENS_HELP, key="guessed", why="guessed")
    num_guesses_right: int = counter(
        "flashmoe_shadow_right_tokens", "Guessed tokens that came", key="guessed_right"
    )
    num_states: int = counter(
        "flashmoe_shadow_states", "Tokens whose keys and values were replaced", key="states"
    )

    def __init__(self, loaded: LoadedModel, named: Named) -> None:
        """named: what the model's layers tell"""
        self._loaded, self._named = loaded, named
        self._sequences: OrderedDict[str, Followed] = OrderedDict()

    @torch.inference_mode()
    def follow(
        self,
        name: str,
        num_before: int,
        token_ids: Sequence[int],
        tell: Tell,
        states: Sequence[pb.LayerState] = (),
        drawing: Drawing | None = None,
    ) -> None:
        """Compute these tokens; tell what the latest of them chooses. What was guessed rightly is
        there. states: the main node's keys and values of tokens before the latest: they take the
        place of the own, where a layer's state grows by its tokens; drawing: of the token after the
        latest

        Raises OutOfStep when fewer tokens than `num_before` are there, InvalidRequest for states
        that do not fit, and what computing raises; the sequence is given up then.
        """
        followed = self._sequences.setdefault(name, Followed())
        self._sequences.move_to_end(name)
        while len(self._sequences) > _MOST_SEQUENCES:
            self._sequences.popitem(last=False)
        num_right = _alike(followed.token_ids[num_before:], token_ids)
        if num_before + num_right < len(followed.token_ids):
            _crop(followed, num_before + num_right)
        num_right = len(followed.token_ids) - num_before
        if num_right < 0:
            raise OutOfStep(len(followed.token_ids))
        self.num_guesses_right += num_right
        self.num_followed += len(token_ids)
        followed.num_true = num_before + len(token_ids)
        left = token_ids[num_right:]
        for start in range(0, len(left) - 1, _CHUNK_TOKENS):
            end = min(start + _CHUNK_TOKENS, len(left) - 1)
            self._compute(name, left[start:end], nothing)
        self._align(followed, states)
        if left:
            followed.sampler = Sampler.resumed(drawing) if drawing is not None else None
            self._compute(name, left[-1:], tell)

    def go_on(self, name: str, tell: Tell, check: Callable[[Token], None]) -> None:
        """Compute the token that likely comes next. check: called with it; raises to give it up"""
        followed = self._sequences.get(name)
        if followed is None or followed.guess < 0 or not _can_crop(followed.state):
            return
        if followed.num_true < len(followed.token_ids):
            return
        self.num_guessed += 1
        guess = Token(len(followed.token_ids), followed.guess)
        self._compute(name, [guess.token_id], tell, partial(check, guess))

    def forget(self, name: str) -> None:
        """The sequences whose names begin so have ended."""
        for one in [one for one in self._sequences if one.startswith(name)]:
            del self._sequences[one]

    def _align(self, followed: Followed, states: Sequence[pb.LayerState]) -> None:
        """Raises InvalidRequest."""
        if not states or followed.state is None:
            return
        for state in states:
            if not 0 <= state.number < len(followed.state.layers):
                raise errors.InvalidRequest(f"the model has no layer number {state.number}")
            layer = followed.state.layers[state.number]
            if type(layer) is DynamicLayer:
                _put(layer.keys, state.keys, state.start, state.num_tokens)
                _put(layer.values, state.values, state.start, state.num_tokens)
        self.num_states += states[0].num_tokens

    @torch.inference_mode()
    def _compute(
        self,
        name: str,
        token_ids: Sequence[int],
        tell: Tell,
        check: Callable[[], None] = lambda: None,
    ) -> None:
        followed = self._sequences[name]
        num_before, num_computed = len(followed.token_ids), len(followed.token_ids) + len(token_ids)
        phase = Phase.DECODE if len(token_ids) == 1 else Phase.PREFILL
        part = Part(name, phase, len(token_ids), num_computed)
        latest = Token(num_computed - 1, token_ids[-1])
        self._named.tell = partial(tell, latest)
        try:
            with Step(Batch(part), check).running():
                output = self._loaded.forward(torch.tensor([list(token_ids)]), followed.state)
        except errors.Cancelled:
            _crop(followed, num_before)
            raise
        except BaseException:
            self.forget(name)
            raise
        finally:
            self._named.tell = None
        followed.state = output.past_key_values
        followed.token_ids += token_ids
        followed.think(output.logits[:, -1])


def nothing(token: Token, layer: int, experts: list[int]) -> None:
    """Nobody needs to hear it."""


def _crop(followed: Followed, num_tokens: int) -> None:
    """Take back what came after. A state that cannot be cropped is begun anew."""
    if not _can_crop(followed.state):
        num_tokens = 0
    if num_tokens == 0:
        followed.state = None
    else:
        for layer in followed.state.layers:
            layer.keys = layer.keys[..., :num_tokens, :]
            layer.values = layer.values[..., :num_tokens, :]
    del followed.token_ids[num_tokens:]
    followed.guess = -1
    followed.num_true = min(followed.num_true, num_tokens)


def _can_crop(state: Any) -> bool:
    return state is not None and all(type(layer) is DynamicLayer for layer in state.layers)


def _alike(left: Sequence[int], right: Sequence[int]) -> int:
    """How many tokens both begin with."""
    for number, (one, other) in enumerate(zip(left, right, strict=False)):
        if one != other:
            return number
    return min(len(left), len(right))


def _put(tensor: Tensor, data: bytes, start: int, num_tokens: int) -> None:
    """tensor: [1, heads, tokens, size]. Raises InvalidRequest."""
    _, heads, tokens, size = tensor.shape
    if start + num_tokens > tokens:
        raise errors.InvalidRequest(f"{start + num_tokens} tokens of state are too many: {tokens}")
    rows = tensor_of(data, tensor.dtype, heads * num_tokens)
    if rows.shape[1] != size:
        raise errors.InvalidRequest(f"keys and values have {rows.shape[1]} numbers, not {size}")
    tensor[0, :, start : start + num_tokens] = rows.view(heads, num_tokens, size)
