"""The same text by a real stack under each policy, beside the replay of its own recording.

    flashmoe calibrate STORE --trace TRAIN.npz
    python -m tests.bench.live_policies STORE

Every policy generates the same tokens (output is exact), so one recording serves all replays. Live,
prompts pass through the cache too, and advice is as late as it is.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import cast

from compute_node.client.result import Result
from deploy.lab.recorder import Recorder, Sampling, to_trace
from deploy.terminal.prompts import Prompt
from proto.redis_schema import POOL
from scheduler.config import FORECASTER_NAME
from scheduler.lab.policies import POLICIES, Background
from scheduler.learn.followers import Followers
from scheduler.learn.forecaster import Forecaster
from scheduler.policy.hedged import Hedged
from scheduler.policy.learned import Learned
from scheduler.policy.river import RiverSettings
from scheduler.simulate.replay import Outcome, RankedCache, Setting, ranked, replay, slots_of
from scheduler.simulate.trace import AccessTrace
from tests.bench.record_tiny import split
from tests.bench.table import show
from tests.stack import MODEL, served

NAMES = ("lru", "lfru", "decayed", "river", "learned", "auto")
SAMPLING = Sampling(
    max_tokens=160, temperature=0.9, top_p=1.0, seed=2000, ignore_eos=True, prompt_tokens=64
)
SETTINGS = "[compute_node]\nthreads = 1\n"
SLOTS = 12


def live(store: Path, folder: Path, policy: str, prompts: list[Prompt]) -> list[Result]:
    config = folder / "flashmoe.toml"
    config.write_text(SETTINGS)
    flags = ["--experts-memory", "37.5%", "--policy", policy, "--config", str(config)]
    flags += ["--source", str(MODEL)]
    with served(store, folder / "run", *flags) as stack, stack.client() as node:
        return Recorder(node, SAMPLING, router_scores=False).run(prompts, lambda *_: None)


def replayed(trace: AccessTrace, forecaster: Forecaster, name: str) -> Outcome:
    """With the live stack's own forecaster, and every prompt's first steps counted, as live."""
    setting = Setting(trace, SLOTS, POOL, warmup_steps=0, lag_steps=1)
    members = {"lru", "lfru", "decayed", "river"}
    caches = {one: cast(RankedCache, POLICIES[one](setting, Background())) for one in members}
    settings = RiverSettings()
    followers, memory = Followers(*trace.shape), forecaster.memory()
    features = settings.new_features(trace.shape, followers, memory)
    caches["learned"] = ranked(setting, Learned(forecaster, features), advised=True)
    order = ("decayed", "lru", "lfru", "river", "learned")
    hedged = Hedged({one: caches[one] for one in order}, slots_of(setting))
    return replay(setting, hedged if name == "auto" else caches[name])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("store", type=Path, help="of the shipped model, calibrated")
    parser.add_argument("--prompts", type=int, default=11)
    given = parser.parse_args()
    lines = split()[1]
    prompts = lines[:: max(1, len(lines) // given.prompts)]
    forecaster = Forecaster.load(given.store / FORECASTER_NAME)
    rows = []
    with tempfile.TemporaryDirectory(prefix="fm-live-") as scratch:
        for name in NAMES:
            results = live(given.store, Path(scratch), name, prompts)
            trace = to_trace("live", prompts, results, "")
            hits = sum(result.decode.hits for result in results)
            total = hits + sum(result.decode.misses for result in results)
            speed = sum(r.decode.tokens for r in results) / sum(r.decode.wall_s for r in results)
            again = 100 * replayed(trace, forecaster, name).hit_ratio
            rows.append([name, f"{100 * hits / total:.1f}", f"{again:.1f}", f"{speed:.1f}"])
    steps = f"{trace.num_generations} generations, {trace.num_steps} steps"
    show(
        f"The shipped model, {steps}, {SLOTS} x {trace.num_layers} slots in a pool: decode hits %",
        ["policy", "live", "replay, lag 1", "tokens/s live"],
        rows,
    )


if __name__ == "__main__":
    main()
