"""A counter is defined once, beside where it is counted: as the start of an attribute, or on a
property.

    demand_reads: int = counter("flashmoe_store_reads", "Records read", reason="demand")

    @property
    @gauge("flashmoe_node_prefetch_depth", "Layers ahead that pay now", key="prefetch_depth")
    def depth(self) -> int: ...

The Stats call, the metrics page and `flashmoe status` derive from it. Counting stays arithmetic on
a plain attribute.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache, partial
from typing import Any, TypeVar

from proto import errors
from proto import stats_pb2 as pb
from proto.histogram import Histogram

VERSION = 1

Getter = TypeVar("Getter", bound=Callable[[Any], object])
Value = bool | int | float | str | list[str] | Histogram | None


_NO_START: Any = object()
_TABLE, _MARK = "__shown__", "__shown_as__"  # of a class; of the function behind a property


@dataclass(frozen=True)
class Shown(Any):  # type: ignore[misc]  # so that `hits: int = counter(...)` has a type
    """How an attribute is shown, also a field of a dataclass.

    key:   its name in a snapshot; empty: the attribute's own
    start: its value in the class
    """

    kind: pb.Metric.Kind.ValueType
    page_name: str
    text: str
    key: str
    start: Any
    labels: Mapping[str, str]

    def __new__(cls, *_: object) -> Shown:
        return object.__new__(cls)

    def __set_name__(self, owner: type, name: str) -> None:
        """Leave the start in the class: counting costs what it does without a definition."""
        if _TABLE not in vars(owner):
            setattr(owner, _TABLE, {})
        getattr(owner, _TABLE)[name] = self
        if self.start is _NO_START:
            delattr(owner, name)
        else:
            setattr(owner, name, self.start)

    def __call__(self, getter: Getter) -> Getter:
        """Under `@property`: what it returns is shown."""
        setattr(getter, _MARK, self)
        return getter


def counter(page_name: str, text: str, *, key: str = "", start: Any = 0, **labels: str) -> Shown:
    """A number that only grows. page_name: its Prometheus family, without `_total`"""
    return Shown(pb.Metric.COUNTER, page_name, text, key, start, labels)


def gauge(
    page_name: str, text: str, *, key: str = "", start: Any = _NO_START, **labels: str
) -> Shown:
    """A number as it is now; None is left out of the metrics page."""
    return Shown(pb.Metric.GAUGE, page_name, text, key, start, labels)


def histogram(
    page_name: str, text: str, bounds: tuple[float, ...], *, key: str = "", **labels: str
) -> Shown:
    """A field of a dataclass that observes values. bounds: see `Histogram`"""
    start = field(default_factory=partial(Histogram.empty, bounds))
    return Shown(pb.Metric.HISTOGRAM, page_name, text, key, start, labels)


def fact(text: str, *, key: str = "", start: Any = _NO_START, **labels: str) -> Shown:
    """Text, texts or a number that the metrics page does not have."""
    return Shown(pb.Metric.FACT, "", text, key, start, labels)


@dataclass(frozen=True)
class Labelled:
    """One of several alike, such as the counters of a layer."""

    source: object
    labels: Mapping[str, str]


def labelled(source: object, **labels: object) -> Labelled:
    return Labelled(source, {name: str(value) for name, value in labels.items()})


@dataclass(frozen=True)
class Absent:
    """Stands for an object of `kind` where there is none: readers find what it starts from, the
    metrics page has nothing of it.
    """

    kind: type


def snapshot(*sources: object) -> pb.Snapshot:
    """What the sources show now, in their order. None shows nothing."""
    return pb.Snapshot(
        version=VERSION, metrics=[metric for given in sources for metric in _metrics(given)]
    )


def _metrics(given: object) -> Iterator[pb.Metric]:
    match given:
        case Absent():
            return _metrics_of_none(given.kind)
        case Labelled():
            return _metrics_of(given)
        case _:
            return _metrics_of(labelled(given))


def _metrics_of_none(kind: type) -> Iterator[pb.Metric]:
    for name, shown in declared(kind):
        metric = pb.Metric(key=shown.key or name, help=shown.text, labels=shown.labels)
        has_start = shown.start is not _NO_START and shown.kind != pb.Metric.HISTOGRAM
        _set_value(metric, shown.start if has_start else None)
        yield metric


def _metrics_of(given: Labelled) -> Iterator[pb.Metric]:
    source: Any = given.source
    for name, shown in declared(type(source)):  # type: ignore[arg-type]  # a class is hashable
        metric = pb.Metric(
            key=shown.key or name,
            page_name=shown.page_name,
            help=shown.text,
            kind=shown.kind,
            labels={**given.labels, **shown.labels},
        )
        _set_value(metric, getattr(source, name))
        yield metric


@cache
def declared(kind: type) -> tuple[tuple[str, Shown], ...]:
    """Attributes and properties of a class that are shown, by name."""
    found: dict[str, Shown] = {}
    for base in reversed(kind.__mro__):
        found |= vars(base).get(_TABLE, {})
        for name, member in vars(base).items():
            if isinstance(member, property) and hasattr(member.fget, _MARK):
                found[name] = getattr(member.fget, _MARK)
    return tuple(found.items())


def _set_value(metric: pb.Metric, value: object) -> None:
    match value:
        case None:
            pass
        case bool():
            metric.flag = value
        case int():
            metric.count = value
        case float():
            metric.measure = value
        case str():
            metric.text = value
        case list():
            metric.texts.items.extend(value)
        case Histogram():
            metric.histogram.CopyFrom(value.to_pb())
        case _:
            raise TypeError(f"{metric.key} is of type {type(value).__name__}")


def value_of(metric: pb.Metric) -> Value:
    kind = metric.WhichOneof("value")
    if kind == "texts":
        return list(metric.texts.items)
    if kind == "histogram":
        return Histogram.from_pb(metric.histogram)
    value: Value = getattr(metric, kind) if kind else None
    return value


class NotShown(errors.VersionMismatch, AttributeError):
    """A daemon of another version has no such counter."""


class Stats:
    """What a daemon shows, by key: `stats.hits`. Of several alike, that is the sum.

    Raises NotShown for any other key.
    """

    def __init__(self, found: list[tuple[str, dict[str, str], Value]]) -> None:
        """found: key, labels and value of each metric"""
        self._found = found

    @classmethod
    def from_pb(cls, message: pb.Snapshot) -> Stats:
        """Raises VersionMismatch for the answer of a daemon that has another form of it."""
        if message.version != VERSION:
            raise errors.VersionMismatch(
                f"the daemon shows its counters in form {message.version}, this program reads form "
                f"{VERSION}: update the older one"
            )
        return cls([(m.key, dict(m.labels), value_of(m)) for m in message.metrics])

    def __getattr__(self, key: str) -> Any:
        values = [] if key.startswith("_") else [value for name, _, value in self if name == key]
        if not values:
            raise NotShown(f"the daemon shows no {key!r}: update the older one of the two programs")
        return sum(values) if len(values) > 1 else values[0]

    def __iter__(self) -> Iterator[tuple[str, dict[str, str], Value]]:
        return iter(self._found)

    def get(self, key: str, default: Any = None) -> Any:
        return getattr(self, key, default)

    def of(self, **labels: str) -> Stats:
        """Those with all these labels, which are taken off."""
        wanted = labels.items()
        return Stats(
            [
                (key, dict(found.items() - wanted), value)
                for key, found, value in self
                if found.items() >= wanted
            ]
        )

    def by(self, label: str) -> dict[str, Stats]:
        """Those with this label, by its value, in the order of their first."""
        names = dict.fromkeys(found[label] for _, found, _ in self if label in found)
        return {name: self.of(**{label: name}) for name in names}

    def document(self) -> dict[str, object]:
        """Every value by key and labels, as in `hits{layer=3}`, as JSON has it."""
        return {
            f"{key}{_suffix(labels)}": value.document() if isinstance(value, Histogram) else value
            for key, labels, value in self
        }


def _suffix(labels: Mapping[str, str]) -> str:
    pairs = ",".join(f"{name}={labels[name]}" for name in sorted(labels))
    return f"{{{pairs}}}" if pairs else ""
