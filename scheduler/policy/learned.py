"""Ranks by a forecaster trained ahead, over the features that River learns from too."""

from __future__ import annotations

from proto.access import DecodeAccess
from scheduler.learn.features import Features
from scheduler.learn.forecaster import Forecast, Forecaster
from scheduler.simulate.ranking import Ranks, chosen


class Learned:
    """Ranks by the mean over horizons of P(used within it), [0, 1].

    features: may be shared with other policies of this node
    """

    def __init__(self, forecaster: Forecaster, features: Features) -> None:
        self._forecast = Forecast(forecaster)
        self._features = features
        self._columns = [features.names.index(name) for name in forecaster.spec.feature_names]

    def observe(self, event: DecodeAccess) -> None:
        """One more decode step; learns nothing."""
        self._features.update(event)
        self._forecast.advance(event.sequence, chosen(event)[1])

    def ranks(self) -> Ranks:
        """The forecast after the last step."""
        ranks: Ranks = self._forecast.scores(self._features.table()[self._columns]).astype(float)
        return ranks
