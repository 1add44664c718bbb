"""Tries settings round by round, as `knob_search` names them, for a quality card."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from deploy.lab.knob_search import Found, Goal, rounds
from deploy.lab.knobs import Knob, Point, route_of
from deploy.lab.route_trials import RouteTrials, Trial, setting_of
from deploy.terminal import console
from proto import errors
from proto.quality import Setting

_LEAST_TOKENS = 64


@dataclass
class Tuning:
    """Exact is tried first, and again before every round, so that each setting is compared with one
    close in time.

    most: settings to try besides exact
    say:  hears of every setting that was tried
    """

    trials: RouteTrials
    knobs: tuple[Knob, ...]
    goal: Goal
    most: int
    say: Callable[[str], None]
    _exact: list[Trial] = field(default_factory=list)
    _tried: list[tuple[Trial, Trial]] = field(default_factory=list)  # beside the nearest exact

    @property
    def num_tokens(self) -> int:
        """Scored for each setting."""
        return len(self._exact[0].score.scored)

    @property
    def num_checked(self) -> int:
        """Of these, those on which KL was measured."""
        return len(self._tried[0][0].checks) if self._tried else 0

    def run(self) -> tuple[Setting, ...]:
        """Exact first, then every setting that was tried.

        Raises InvalidRequest when there is too little text to say anything, and as
        `RouteTrials.run` does.
        """
        measured: dict[Point, Found] = {}
        for points in rounds(self.knobs, self.goal, measured, self.most):
            self._try_exact()
            exact = setting_of(self._exact[-1], self._exact[-1], self._exact)
            measured[(0.0,) * len(self.knobs)] = Found(0.0, exact.token_ms)
            for point in points:
                setting = self._try(route_of(self.knobs, point))
                measured[point] = Found(setting.least_budget.fraction, setting.token_ms)
        pairs = [(self._exact[0], self._exact[0]), *self._tried]
        return tuple(setting_of(trial, nearest, self._exact) for trial, nearest in pairs)

    def _try_exact(self) -> None:
        self._exact.append(self.trials.run(""))
        if self.num_tokens < _LEAST_TOKENS:
            raise errors.InvalidRequest(
                f"the text has {self.num_tokens} tokens to score, which says nothing: give --text "
                "more of what the model will be used for"
            )

    def _try(self, route: str) -> Setting:
        trial, nearest = self.trials.run(route), self._exact[-1]
        self._tried.append((trial, nearest))
        setting = setting_of(trial, nearest, self._exact)
        kl = "" if setting.kl is None else f", KL {setting.kl:.4f}"
        self.say(
            f"{len(self._tried)}/{self.most} {route}: perplexity x {setting.perplexity:.4f} "
            f"(at most {setting.perplexity_high:.4f}){kl}, "
            f"{console.size(setting.bytes_per_token)} and {setting.token_ms:.1f} ms a token"
        )
        return setting
