"""Ranks by a forecaster trained ahead, over the features that River learns from too."""

from __future__ import annotations

from proto.access import DecodeAccess
from proto.correction import corrected
from scheduler.learn.features import Features
from scheduler.learn.forecaster import Forecast, Forecaster
from scheduler.simulate.ranking import Ranks, chosen


class Learned:
    """Ranks by the mean over horizons of P(used within it), [0, 1].

    features: may be shared with other policies of this node
    """

    def __init__(self, forecaster: Forecaster, features: Features) -> None:
        self._forecast = Forecast(forecaster)
        self._correction = forecaster.correction()
        self._features = features
        self._columns = [features.names.index(name) for name in forecaster.spec.feature_names]
        self._scores: Ranks | None = None  # [2, L, E], until the next step

    def observe(self, event: DecodeAccess) -> None:
        """One more decode step; learns nothing."""
        self._features.update(event)
        self._forecast.advance(event.sequence, chosen(event)[1])
        self._scores = None

    def ranks(self) -> Ranks:
        """The forecast after the last step."""
        ranks: Ranks = self._forecasts()[0]
        return ranks

    def unused_ranks(self) -> Ranks:
        """The forecast for after the next step, of what that does not use."""
        ranks: Ranks = self._forecasts()[1]
        return ranks

    def heard_ranks(self, event: DecodeAccess) -> Ranks:
        """What a node corrects that forecast to, layer after layer."""
        ranks: Ranks = corrected(self.unused_ranks(), self._correction.odds(chosen(event)[1]))
        return ranks

    def _forecasts(self) -> Ranks:
        if self._scores is None:
            features = self._features.table()[self._columns]
            self._scores = self._forecast.scores(features).astype(float)
        return self._scores
