"""The verb that tells how fast several boxes would decode a model that is not here."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby, product
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from deploy.lab import plot as pictures
from deploy.plan.owners_map import Owned, placement_of
from deploy.simulator import plot
from deploy.simulator.boxes_file import BoxesFile
from deploy.simulator.decoding import Outcome
from deploy.simulator.geometry import GEOMETRIES, Geometry
from deploy.simulator.point import DRAWN, Point, Routing
from deploy.simulator.routing import matches
from deploy.simulator.setting import SHARES, Foresight, Setting
from deploy.terminal import console
from proto import errors
from scheduler.simulate.trace import AccessTrace, TraceInvalid

BOXES = typer.Argument(metavar="BOXES.toml", help="As deploy/simulator/boxes.toml.")
MODELS = typer.Option(
    "--model", metavar="NAME", help=f"One of {', '.join(GEOMETRIES)}; repeat for more."
)
TRACE = typer.Option(
    metavar="TRACE.npz", help="Recorded routing of one of the models. (default: routing is drawn)"
)
COUNTS = typer.Option(metavar="N,...", help="Numbers of boxes, the first ones of the file.")
TOKENS = typer.Option(min=1, help="Tokens that are counted.")
WARMUP = typer.Option(min=0, help="Tokens before them, which fill the memories.")
PLACEMENT = typer.Option(metavar="shares|cheapest|rotation", help="Who owns which experts.")
GROUPS = typer.Option(min=1, help="Of a rotation. (default: each worker is one)")
AHEAD = typer.Option(min=0, help="Layers ahead of which experts are named; 0: never.")
RECALL = typer.Option(min=0, max=1, help="Share of misses, that is named.")
PRECISION = typer.Option(min=0.01, max=1, help="Share of what is named and read, that is used.")
NEXT = typer.Option(min=0, max=1, help="Share of tokens that are foreseen, layers and all.")
WAITING = typer.Option(
    "--while-waiting", help="Names come only while the main box waits for its disk, as run-ahead's."
)
JOULES = typer.Option(
    metavar="F,...", help="Multiply each worker's joules: what that trades of speed for energy."
)
SEED = typer.Option(min=0, help="Of what is drawn.")
AS_JSON = typer.Option("--json", help="One JSON object.")
PICTURE = typer.Option("--plot", metavar="OUT.png", help="Draw it.")

_COLUMNS = ("boxes", "joules x", "tokens/s", "hits", "MiB read", "KiB sent", "J")


def simulate(
    boxes: Annotated[Path, BOXES],
    model: Annotated[list[str], MODELS],
    trace: Annotated[Path | None, TRACE] = None,
    counts: Annotated[str, COUNTS] = "1,2,4,8,16,32",
    tokens: Annotated[int, TOKENS] = 100,
    warmup: Annotated[int, WARMUP] = 300,
    placement: Annotated[str, PLACEMENT] = SHARES,
    groups: Annotated[int | None, GROUPS] = None,
    layers_ahead: Annotated[int, AHEAD] = 0,
    recall: Annotated[float, RECALL] = 1.0,
    precision: Annotated[float, PRECISION] = 1.0,
    next_token: Annotated[float, NEXT] = 0.0,
    while_waiting: Annotated[bool, WAITING] = False,
    joules: Annotated[str, JOULES] = "1",
    seed: Annotated[int, SEED] = 0,
    as_json: Annotated[bool, AS_JSON] = False,
    picture: Annotated[Path | None, PICTURE] = None,
) -> None:
    """Tell how fast several boxes would decode a model, by the rules that real boxes follow.

    One answer at a time. Where no recording of the model is given, routing is drawn from a model
    that was fitted to gpt-oss-20b's: the figures are as good as that guess.

    Example: flashmoe simulate boxes.toml --model DeepSeek-V3 --counts 8,16,32
    """
    file = BoxesFile.load(boxes)
    recorded = AccessTrace.load(trace) if trace else None
    geometries = [_geometry(name) for name in model]
    if recorded is not None and not any(matches(recorded, one) for one in geometries):
        raise TraceInvalid(
            f"{recorded.name} has {recorded.num_layers} layers, top {recorded.top_k} of "
            f"{recorded.num_experts}, as none of {', '.join(model)}: give another --model"
        )
    numbers, factors = _numbers(counts, "--counts"), _numbers(joules, "--joules")
    if len(factors) > 1 and len(numbers) > 1:
        raise errors.InvalidRequest("several --joules compare one number of boxes: give one")
    if picture is not None:
        pictures.check_writable(picture)
    foresight = Foresight(layers_ahead, recall, precision, next_token, while_waiting)
    points = []
    for geometry in geometries:
        routing = Routing.of(recorded, geometry, warmup, tokens, seed)
        for count, factor in product(numbers, factors):
            setting = Setting(
                geometry,
                file.boxes(int(count), factor),
                file.link.link(),
                file.main.layer_ms / 1e3,
                foresight,
                placement_of(placement),
                groups,
            )
            points.append(Point.of(setting, routing, factor, seed))
    if picture is not None:
        _draw(picture, points, trades=len(factors) > 1)
    if as_json:
        console.print_json([point.as_document() for point in points])
    else:
        _print(points)


def _geometry(name: str) -> Geometry:
    if name not in GEOMETRIES:
        raise errors.InvalidRequest(
            f"no model {name!r} is known: give one of {', '.join(GEOMETRIES)}"
        )
    return GEOMETRIES[name]


def _numbers(text: str, what: str) -> list[float]:
    """Above 0, in their order."""
    try:
        found = [float(word) for word in text.split(",")]
    except ValueError:
        found = []
    if not found or min(found) <= 0 or (what == "--counts" and any(n % 1 for n in found)):
        raise errors.InvalidRequest(f"{what} {text!r} is no list: write for example 1,2,4")
    return found


def _draw(picture: Path, points: Sequence[Point], *, trades: bool) -> None:
    curves: dict[str, list[tuple[float, Outcome]]] = {}
    for point in points:
        x = point.factor if trades else point.num_boxes
        name = f"{point.model}, routing {point.routing}"
        curves.setdefault(name, []).append((x, point.outcome))
    title = "Simulated, not measured: one answer at a time"
    if trades:
        title += f", {points[0].num_boxes} boxes; x: of the joules that workers are said to cost"
    plot.draw(picture, title, curves, trades=trades)


def _print(points: Sequence[Point]) -> None:
    grid = Table(
        title="Simulated, not measured; reads, sent bytes and joules are of a token",
        title_justify="left",
        box=None,
        pad_edge=False,
    )
    for heading in ("model", "routing"):
        grid.add_column(heading, no_wrap=True)
    for heading in _COLUMNS:
        grid.add_column(heading, justify="right")
    for point in points:
        outcome = point.outcome
        grid.add_row(
            point.model,
            point.routing,
            str(point.num_boxes),
            f"{point.factor:g}",
            f"{outcome.tokens_per_s:.2f}",
            f"{outcome.hit_ratio:.1%}",
            f"{outcome.read_bytes / 2**20:,.0f}",
            f"{outcome.wire_bytes / 2**10:,.0f}",
            f"{outcome.joules:.1f}",
        )
    console.out.print(grid)
    for point in _largest(points):
        shares = groupby(point.map, _share)
        rows = {_boxes([one.box for one in alike]): share for share, alike in shares}
        title = f"Who owns what of {point.model}, {point.num_boxes} boxes"
        console.out.print(console.table(title, rows))
    if any(point.routing == DRAWN for point in points):
        console.warn(
            "drawn routing is of a model that was fitted to a recording of gpt-oss-20b; real "
            "routing may hit more or less"
        )


def _largest(points: Sequence[Point]) -> list[Point]:
    """One of each model."""
    return list({point.model: point for point in points}.values())


def _boxes(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} to {names[-1]}, each"


def _share(one: Owned) -> str:
    return (
        f"{one.a_layer} experts a layer, {one.experts:,} in all, "
        f"{console.size(one.experts * one.expert_bytes)}; memory for {one.slots:,}"
    )
