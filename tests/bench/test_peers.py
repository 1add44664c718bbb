"""The parts of `make bench-peers` that need neither root nor the peers.

Planted faults seen red: bytes of the prompt counted to decode, an engine that stops early taken as
whole, an arithmetic mean of speeds, the first token counted in a token's bytes, the cold prompt in
the table, failed runs as figures, limits from small to large, a file of results begun anew, a
cgroup found by part of a controller's name or in version 2's hierarchy, requests read as sectors;
in the plan: everybody without a limit, own read-ahead at every share, limits within a page, rounds
innermost, all prompts or rounds for the slow; a core's share for the machine's, stolen time left
out, a name with brackets, other fields of a process read as its time; texts of two lengths compared
as far as the shorter goes, the first place left out, first tokens alone or everybody's compared.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NoReturn

import pytest

from tests.bench.peers import cgroup, cpu, disk, plan, report, results
from tests.bench.peers.agreement import agreement
from tests.bench.peers.contenders import Contender
from tests.bench.peers.engine import Setup, Token
from tests.bench.peers.run import Answer, Case, Prompt, RunResult, ask
from tests.bench.widen import MIB

PROMPT = Prompt("bible", (5, 6, 7))


class Counted:
    """A disk and a cgroup that count what the test says."""

    def __init__(self) -> None:
        self.bytes_read, self.faults = 1000, 10

    def read(self) -> tuple[int, int]:
        return self.bytes_read, self.faults


class Scripted:
    """An engine that reads 300 bytes for the prompt and 20 for a token, with a fault each time."""

    def __init__(self, counted: Counted, num_tokens: int) -> None:
        self._counted, self._num_tokens = counted, num_tokens

    def generate(self, prompt: Sequence[int], max_tokens: int, seed: int) -> Iterator[Token]:
        for number in range(self._num_tokens):
            self._counted.bytes_read += 20 if number else 300
            self._counted.faults += 1
            yield Token(number + seed, 0.5 * number)


def answer(latencies_s: list[float], decode_bytes: int = 0) -> Answer:
    return Answer("bible", 3, [1] * (len(latencies_s) + 1), 1.5, latencies_s, 7, decode_bytes, 2, 3)


def result(engine: str, share: float | None, answers: list[Answer], **more: str) -> RunResult:
    case = Case(engine, share, 1 << 30, 131072, 2, 32, 0)
    return RunResult(case, "c0", 2.0, 5 << 20, answers, **more)


def test_what_a_prompt_cost_is_split_at_its_first_token() -> None:
    counted = Counted()
    got = ask(Scripted(counted, 4), PROMPT, 4, 100, counted)
    assert got.token_ids == [100, 101, 102, 103]
    assert got.latencies_s == [0.5, 0.5, 0.5]
    assert (got.prefill_bytes, got.decode_bytes) == (300, 60)
    assert (got.prefill_faults, got.decode_faults) == (1, 3)
    assert got.tokens_per_s == 2.0


def test_an_engine_that_stops_early_has_failed() -> None:
    counted = Counted()
    with pytest.raises(OSError, match="3 tokens came of 4"):
        ask(Scripted(counted, 3), PROMPT, 4, 0, counted)
    with pytest.raises(OSError, match="0 tokens came of 4"):
        ask(Scripted(counted, 0), PROMPT, 4, 0, counted)


def test_speed_is_the_harmonic_mean_over_prompts() -> None:
    assert report.speed([answer([0.1]), answer([0.4, 0.4])]) == pytest.approx(4.0)


def test_figures_of_a_token_are_of_decode() -> None:
    answers = [answer([0.1], 90), answer([0.4, 0.4], 30)]
    assert report.per_token(answers, lambda a: a.decode_bytes) == 40
    assert report.latency_ms(answers, 0.5) == 400


def test_a_table_leaves_out_the_cold_prompt_and_says_why_a_run_failed(
    capsys: pytest.CaptureFixture[str],
) -> None:
    cold, warm = answer([9.0]), answer([0.1, 0.1], 2 << 20)
    report.print_table(
        [
            result("ours", None, [cold, warm]),
            result("ours", 25.0, [cold, warm]),
            result("theirs", 25.0, [cold], failure="killed for memory"),
        ]
    )
    title, header, *rows = capsys.readouterr().out.splitlines()
    assert rows.pop(-2) == "  theirs at 25 %: killed for memory"
    assert title.startswith("Read-ahead 128 KiB")
    assert "tokens/s" in header
    assert [row.split()[0] for row in rows if row] == ["none", "25", "25"]
    assert "10.00 (10.00-10.00)" in rows[0]
    assert rows[2].split() == ["25", "%", "theirs", "1", "failed"]


def test_time_of_others_is_what_is_left_of_the_busy_time() -> None:
    tick_s = 1 / os.sysconf("SC_CLK_TCK")
    stat = "cpu  100 20 30 5000 7 1 2 40 9 9\ncpu0 1 1 1 1 1 1 1 1 1 1\n"
    assert cpu.busy_s(stat) == pytest.approx(193 * tick_s)
    process = "77 (a) b (c)) S " + " ".join(str(n) for n in range(4, 30))
    assert cpu.process_s(process) == pytest.approx((14 + 15 + 16 + 17) * tick_s)
    before, after = cpu.CpuMoment(10.0, 100.0, 3.0), cpu.CpuMoment(20.0, 115.0, 13.0)
    assert after.others_ratio(before, num_cores=2) == pytest.approx(0.25)


def test_runs_are_kept_on_file(tmp_path: Path) -> None:
    runs = [result("ours", 37.5, [answer([0.1])]), result("theirs", None, [], failure="no")]
    file = tmp_path / "results.jsonl"
    assert results.load(file) == []
    for run in runs:
        results.append(file, run)
    assert results.load(file) == runs


def test_own_memory_cgroup_is_found_among_controllers() -> None:
    listed = "9:name=memory-less:/x\n4:memory:/a/b\n3:cpuset:/\n0::/\n"
    assert cgroup.own_group(listed) == Path("/sys/fs/cgroup/memory/a/b")
    assert cgroup.own_group("4:memory,hugetlb:/\n") == Path("/sys/fs/cgroup/memory")
    with pytest.raises(LookupError, match="version 1"):
        cgroup.own_group("0::/user.slice\n")


def test_kernel_counters_are_read() -> None:
    stat = "    8150   12  652000  900 0 0 0 0 0 880 900\n"
    assert disk.sectors_read(stat) == 652000
    assert cgroup.parse_stat("cache 4096\npgmajfault 17\n")["pgmajfault"] == 17


def test_a_plan_takes_turns_and_leaves_out_what_says_nothing() -> None:
    contenders = {
        "ours": Contender(never),
        "mapped": Contender(never, maps_files=True),
        "slow": Contender(never, needs_limit=True, num_prompts=3, num_rounds=1, max_tokens=8),
    }
    planned = list(plan.cases(contenders, (None, 37.5), 1000 * MIB + 5, 8 * MIB, 11, 2))
    assert [case.round_number for case in planned] == [0] * 6 + [1] * 4
    of_round = [(case.engine, case.share, case.read_ahead_bytes) for case in planned[:6]]
    assert of_round == [
        ("ours", None, 128 * 1024),
        ("mapped", None, 128 * 1024),
        ("ours", 37.5, 128 * 1024),
        ("mapped", 37.5, 128 * 1024),
        ("mapped", 37.5, 8 * MIB),
        ("slow", 37.5, 128 * 1024),
    ]
    assert {case.limit_bytes for case in planned} == {None, 375 * MIB}
    assert [(case.num_prompts, case.max_tokens) for case in planned[3:6]] == [
        (11, 32),
        (4, 32),
        (3, 8),
    ]
    again = {(case.engine, case.read_ahead_bytes) for case in planned[6:]}
    assert again == {("ours", 128 * 1024), ("mapped", 128 * 1024)}, "the slow, once"


def never(setup: Setup) -> NoReturn:
    raise AssertionError("a plan starts nothing")


def test_agreement_is_counted_place_by_place() -> None:
    assert agreement([[1, 2, 3], [4]], [[1, 9, 3], [4]]) == (3, 4)
    with pytest.raises(ValueError, match="shorter"):
        agreement([[1, 2]], [[1]])


def test_variants_of_ours_are_compared_token_for_token(capsys: pytest.CaptureFixture[str]) -> None:
    same, other = answer([0.1]), replace(answer([0.1]), token_ids=[1, 2])
    report.print_sameness([result("a", None, [same]), result("b", 25.0, [same])], ["a", "b"])
    assert "2 answers to 1 prompts and seeds, 0 of them not" in capsys.readouterr().out
    report.print_sameness([result("a", None, [same]), result("b", 25.0, [other])], ["a", "b"])
    assert "2 answers to 1 prompts and seeds, 1 of them not" in capsys.readouterr().out
    report.print_sameness([result("a", None, [same]), result("c", 25.0, [other])], ["a", "b"])
    assert capsys.readouterr().out == "", "one answer is not compared with anything"
