"""`flashmoe simulate` as a user meets it.

Planted faults seen red: any trace taken, the factor of joules ignored, more boxes than the file
has, a mistyped key passed over, drawn routing not said to be, lists of boxes and of factors at
once.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from deploy.cli import run
from deploy.simulator.boxes_file import BoxesFile
from deploy.terminal import console
from proto import errors
from tests.scheduler.replays import PATH
from tests.stack import ROOT, flashmoe

EXAMPLE = ROOT / "deploy/simulator/boxes.toml"
QUICK = ("--model", "gpt-oss-20b", "--tokens", "5", "--warmup", "5")


@pytest.fixture
def simulated(capsys: pytest.CaptureFixture[str]) -> Callable[..., list[dict[str, Any]]]:
    def call(*arguments: str) -> list[dict[str, Any]]:
        code = run(["simulate", str(EXAMPLE), *QUICK, "--json", *arguments])
        said = capsys.readouterr()
        assert code == 0, said.err
        points: list[dict[str, Any]] = json.loads(said.out)
        return points

    return call


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """The one sentence."""

    def call(*arguments: str, code: int = console.BAD_INPUT) -> str:
        assert run(["simulate", *arguments]) == code
        said = capsys.readouterr().err
        assert said.startswith("flashmoe: ") and said.strip().count("\n") == 0, said
        return said

    return call


def test_more_boxes_hit_more_and_the_table_says_what_is_drawn(
    tmp_path: Path, simulated: Callable[..., list[dict[str, Any]]]
) -> None:
    picture = tmp_path / "out.png"
    done = flashmoe(
        "simulate", str(EXAMPLE), *QUICK, "--counts", "1,2", "--plot", str(picture)
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("Simulated, not measured")
    assert "drawn" in done.stdout and "16 experts a layer, 384 in all" in done.stdout
    assert "real routing may hit more or less" in done.stderr
    assert picture.read_bytes().startswith(b"\x89PNG")
    one, two = simulated("--counts", "1,2")
    assert (one["boxes"], two["boxes"]) == (1, 2)
    assert two["hit_ratio"] > one["hit_ratio"] and one["wire_bytes"] == 0


def test_joules_move_experts(
    tmp_path: Path, simulated: Callable[..., list[dict[str, Any]]]
) -> None:
    picture = tmp_path / "trade.png"
    few, many = simulated("--counts", "4", "--joules", "4,.25", "--plot", str(picture))
    assert few["map"][0]["experts"] > many["map"][0]["experts"]
    assert few["wire_bytes"] < many["wire_bytes"]
    assert picture.stat().st_size


def test_what_cannot_be_simulated_is_refused(tmp_path: Path, refused: Callable[..., str]) -> None:
    said = refused(str(EXAMPLE), *QUICK, "--trace", str(PATH))
    assert "8 layers, top 4 of 32, as none of gpt-oss-20b" in said
    assert "give one of gpt-oss-20b, " in refused(str(EXAMPLE), "--model", "gpt-5")
    assert "32 boxes, not 33" in refused(str(EXAMPLE), *QUICK, "--counts", "33")
    assert "write for example 1,2,4" in refused(str(EXAMPLE), *QUICK, "--counts", "1,1.5")
    several = ("--counts", "1,2", "--joules", "1,2")
    assert "one number of boxes" in refused(str(EXAMPLE), *QUICK, *several)
    small = tmp_path / "boxes.toml"
    small.write_text(EXAMPLE.read_text().replace('"4GiB"', '"40MiB"'))
    said = refused(str(small), *QUICK, "--counts", "1", code=console.NO_ROOM)
    assert "needs 4" in said


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("disk_mb_per_s = 1000", "main.disk_mb_per_s"),
        ("watts = 8", "main.wats"),
        ('memory = "4GiB"', "is not a size"),
    ],
)
def test_a_mistyped_file_is_refused_by_key(tmp_path: Path, line: str, said: str) -> None:
    wrong = {
        "disk_mb_per_s = 1000": "disk_mb_per_s = 0",
        "watts = 8": "wats = 8",
        'memory = "4GiB"': 'memory = "much"',
    }
    path = tmp_path / "boxes.toml"
    path.write_text(EXAMPLE.read_text().replace(line, wrong[line], 1))
    with pytest.raises(errors.ConfigInvalid, match=said):
        BoxesFile.load(path)
    path.write_text("[main")
    with pytest.raises(errors.ConfigInvalid, match="cannot read"):
        BoxesFile.load(path)


def test_the_first_boxes_of_the_file_are_taken() -> None:
    found = BoxesFile.load(EXAMPLE).boxes(3, joules=2.0)
    assert [one.name for one in found] == ["main", "worker-1", "worker-2"]
    assert [one.cost for one in found] == [1.0, 2.0, 2.0]


def test_boxes_of_a_kind_have_one_share_after_another(tmp_path: Path) -> None:
    """Seen red: each has the first."""
    path = tmp_path / "boxes.toml"
    path.write_text(EXAMPLE.read_text().replace("count = 31", 'count = 4\nshare = "2/3"'))
    found = BoxesFile.load(path).boxes(5)
    assert [one.share and one.share.owner for one in found] == [None, 2, 3, 1, 2]
    path.write_text(EXAMPLE.read_text().replace("count = 31", 'share = "4/3"'))
    with pytest.raises(errors.ConfigInvalid, match="share '4/3' names no share"):
        BoxesFile.load(path)


def test_the_bench_has_a_file_of_the_same_form() -> None:
    boxes = BoxesFile.load(ROOT / "tests/bench/boxes/trade_off.toml").boxes(4)
    assert [one.name for one in boxes] == ["main", "board-1", "board-2", "board-3"]
