"""Every promised architecture, through a real store: bit-identical to transformers' eager experts.

Planted faults seen red: summing experts in descending order, dropping the wave of resident experts,
swapping gate and up at index; verdicts on norms left out of the file.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from compute_node.cache.capacity import Capacity
from compute_node.cache.expert_cache import ExpertCache
from compute_node.cache.policy_chooser import PolicyChooser
from compute_node.config import RunAheadSetting
from compute_node.engine.ahead import new_run_ahead
from compute_node.engine.engine import Engine
from compute_node.engine.sequence import SequenceState
from compute_node.evidence.step import Evidence
from compute_node.kernels.prober import Prober
from compute_node.model.loaded import load_model
from compute_node.moe.step import Keeps, Phase
from compute_node.native import binding
from compute_node.store.borrow import StoreClient
from expert_store.manifest.manifest import Manifest
from expert_store.offline.index import index
from expert_store.offline.pack import pack
from tests.checkpoints import ARCHITECTURES, make
from tests.local_store import local_store

PROMPT_TOKENS, STEPS = 32, 64
_SEEDS = {"qwen3_moe": 3}  # seed 0 makes it repeat one token, which proves nothing
MAKERS = {"index": index, "pack": pack}


@dataclass(frozen=True)
class Reference:
    root: Path
    logits: list[torch.Tensor]
    tokens: list[int]
    generated: list[int]


@pytest.fixture(scope="module")
def references(tmp_path_factory: pytest.TempPathFactory) -> dict[Any, Reference]:
    return {}


def reference(
    references: dict[Any, Reference],
    name: str,
    dtype: torch.dtype,
    folder: Path,
    **overrides: Any,
) -> Reference:
    """transformers' eager experts on the same checkpoint, step by step and through generate()."""
    variant = (name, dtype, *overrides.items())
    if variant not in references:
        root = make(name, folder / "checkpoint", dtype, seed=_SEEDS.get(name, 0), **overrides)
        model = eager_model(root, dtype)
        logits, tokens = decode_eagerly(model, STEPS)
        with torch.inference_mode():
            generated = model.generate(
                torch.tensor([prompt()]),
                attention_mask=torch.ones(1, PROMPT_TOKENS, dtype=torch.long),
                max_new_tokens=STEPS,
                do_sample=False,
                eos_token_id=None,
                pad_token_id=0,
            )[0].tolist()
        references[variant] = Reference(root, logits, tokens, generated)
    return references[variant]


def eager_model(root: Path, dtype: torch.dtype) -> Any:
    """transformers' own, with its eager experts."""
    model = AutoModelForCausalLM.from_pretrained(root, dtype=dtype).eval()
    model.set_experts_implementation("eager")
    align(model)
    return model


@torch.inference_mode()
def decode_eagerly(model: Any, num_steps: int) -> tuple[list[torch.Tensor], list[int]]:
    """Logits of each step, and the prompt with what was chosen, greedily, after it."""
    tokens, logits, cache = prompt(), [], None
    chunk = tokens
    for _ in range(num_steps):
        output = model(
            torch.tensor([chunk]), past_key_values=cache, use_cache=True, logits_to_keep=1
        )
        cache = output.past_key_values
        logits.append(output.logits[:, -1])
        chunk = [int(logits[-1].argmax())]
        tokens = tokens + chunk
    return logits, tokens


def align(model: torch.nn.Module) -> None:
    """Move weights to allocations of their own.

    MKL's fp32 kernels round by the alignment of their operands, and weights that transformers maps
    from a file lie wherever the file's header ends: one checkpoint saved twice can differ in the
    last bit.
    """
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()


def prompt() -> list[int]:
    return [(7 * n + n * n) % 125 + 3 for n in range(PROMPT_TOKENS)]


@contextmanager
def engine(
    store_dir: Path,
    run_dir: Path,
    spare: int = 4,
    pooled: bool = False,
    prober: Prober | None = None,
    run_ahead: RunAheadSetting = "auto",
    policy: str = "decayed",
    evidence: Evidence | None = None,
) -> Iterator[Engine]:
    """A node's engine with `spare` slots above top_k a layer, on a store of its own. Its kernels
    are used wherever they give torch's bits, however fast they are.
    """
    spec = Manifest.load(store_dir).spec
    slots = (spec.top_k + spare) * (1 if pooled else len(spec.moe_layers))
    with local_store(store_dir, run_dir, slots + 2, read_depth=2) as address:
        client = StoreClient(address, "node", slots, run_dir / "sessions", deadline_s=10)
        try:
            description = client.describe()
            expert_bytes = description.lease_bytes["exact"]
            chooser = PolicyChooser(
                policy,
                16,
                spec.moe_layers,
                spec.num_experts,
                lambda: None,
                weighs=policy == "importance",
            )
            small_bytes = description.lease_bytes[spec.small_variant] if pooled else expert_bytes
            capacity = Capacity(
                slots * expert_bytes,
                expert_bytes,
                spec.moe_layers,
                spec.top_k,
                pooled,
                expert_bytes // small_bytes,
            )
            cache = ExpertCache(client, capacity, chooser)
            model_dir = description.model_dir
            loaded = load_model(model_dir, spec, cache, prober or Prober())
            cache.room.num_spare = 2
            cache.open()
            ahead = new_run_ahead(loaded, cache, run_ahead)
            yield Engine(loaded, cache, model_dir, 256, 256, evidence, run_ahead=ahead)
        finally:
            client.close()


def run(engine: Engine) -> tuple[list[torch.Tensor], list[int]]:
    sequence = SequenceState("s", prompt())
    before = {layer: c.misses + c.hits for layer, c in engine.cache.counters.items()}
    logits = [engine.prefill(sequence)]
    for layer, counters in engine.cache.counters.items():
        needed = counters.misses + counters.hits - before[layer]
        capacity = engine.cache.capacity
        assert needed > capacity.layer_slots(layer), "several waves are needed"
    sequence.token_ids.append(int(logits[-1].argmax()))
    for _ in range(STEPS - 1):
        logits += engine.decode([sequence])
        sequence.token_ids.append(int(logits[-1].argmax()))
    return logits, sequence.token_ids


@pytest.mark.parametrize("kind", MAKERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_bits_and_tokens_equal_eager(
    name: str, dtype: torch.dtype, kind: str, references: dict[Any, Reference], tmp_path: Path
) -> None:
    expected = reference(references, name, dtype, tmp_path)
    MAKERS[kind](expected.root, tmp_path / "store")
    with engine(tmp_path / "store", tmp_path) as node:
        logits, tokens = run(node)
        again, _ = run(node)  # with experts resident: they come in a wave of their own
        spec = node.loaded.spec
        sequence = SequenceState("s", tokens[:1])
        scores = node.forward(sequence, tokens[:1], Phase.DECODE, keeps=Keeps(scores=True))[
            1
        ].scores
        counters = node.cache.counters.values()
    for step, (ours, theirs) in enumerate(zip(logits + again, expected.logits * 2, strict=True)):
        assert torch.equal(ours, theirs), f"step {step} differs"
    assert tokens == expected.tokens == expected.generated
    assert scores is not None and set(scores) == set(spec.moe_layers)
    assert all(s.shape == (1, spec.num_experts) for s in scores.values())
    assert len(set(tokens[PROMPT_TOKENS:])) > 8, "degenerate text proves nothing"
    assert all(c.misses > spec.num_experts for c in counters), "the cache must have had to evict"


def test_pool_of_all_layers_is_exact(references: dict[Any, Reference], tmp_path: Path) -> None:
    expected = reference(references, "qwen3_moe", torch.bfloat16, tmp_path)
    index(expected.root, tmp_path / "store")
    with engine(tmp_path / "store", tmp_path, pooled=True) as node:
        logits, tokens = run(node)
    assert all(torch.equal(a, b) for a, b in zip(logits, expected.logits, strict=True))
    assert tokens == expected.tokens


@pytest.fixture
def use_native() -> Iterator[Callable[[binding.Setting], None]]:
    """Until the test's end."""
    before = binding.setting()
    yield binding.use
    binding.use(before)


@pytest.mark.skipif(binding.obstacle() != "", reason=binding.obstacle())
@pytest.mark.parametrize(
    ("setting", "num_threads"),
    [("auto", 1), ("auto", 2), ("portable", 1), ("portable", 2), ("off", 2)],
)
@pytest.mark.parametrize("weight_format", ["exact", "lossless"])
def test_native_kernels_are_exact(
    setting: binding.Setting,
    weight_format: str,
    num_threads: int,
    use_native: Callable[[binding.Setting], None],
    tmp_path: Path,
) -> None:
    """The tiny checkpoints' matrices are too small for them: torch has another kernel for those."""
    use_native(setting)
    before = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    try:
        wide = {"hidden_size": 256, "moe_intermediate_size": 96, "head_dim": 64}
        expected = reference({}, "qwen3_moe", torch.bfloat16, tmp_path, **wide)
        pack(expected.root, tmp_path / "store", weight_format=weight_format)
        with engine(tmp_path / "store", tmp_path) as node:
            logits, tokens = run(node)
            prober = node.loaded.prober
            tried = {*prober.gemm.known, *prober.lossless_gemm.known}
            prober.prove_put_off(lambda: False)
            again, _ = run(node)
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(logits + again, expected.logits * 2, strict=True))
    assert tokens == expected.tokens
    if setting == "off":
        assert prober.gemv.count(native=True) == prober.gemm.count(native=True) == 0
        return
    # Portable code adds up as torch does on CPUs without bf16 instructions, so not on others.
    cpu = Path("/proc/cpuinfo").read_text()
    by_amx = "amx_bf16" in cpu or ("avx512_bf16" in cpu and binding.isa() == binding.PORTABLE)
    assert prober.gemv.count(native=True) >= 4 or by_amx, "experts, attention, output"
    if weight_format == "lossless":
        ways = [verdict.way for verdict in prober.lossless_gemv.known.values()]
        assert (len(ways) >= 2 and set(ways) == {1}) or by_amx, "whatever number of threads asks"
    if setting == "auto" and binding.isa() == binding.PORTABLE:
        assert not tried, "the first prompt waits for no comparison"
    assert prober.gemm.count(native=True) >= 4 or by_amx, "experts of the prompt"
    if weight_format == "lossless":
        some = any if binding.isa() == binding.PORTABLE else all  # not for every number of tokens
        known = [verdict.way for verdict in prober.lossless_gemm.known.values()]
        assert (known and some(known)) or by_amx


@pytest.mark.skipif(binding.obstacle() != "", reason=binding.obstacle())
@pytest.mark.parametrize("weight_format", ["exact", "lossless"])
def test_a_second_start_proves_nothing(
    weight_format: str, use_native: Callable[[binding.Setting], None], tmp_path: Path
) -> None:
    """Red when an entry's verdicts are not in the file, or keys differ between two processes."""
    use_native("portable")
    wide = {"hidden_size": 256, "moe_intermediate_size": 96, "head_dim": 64}
    root = make("qwen3_moe", tmp_path / "checkpoint", torch.bfloat16, **wide)
    pack(root, tmp_path / "store", weight_format=weight_format)
    found = []
    for run_dir in (tmp_path / "first", tmp_path / "second"):
        run_dir.mkdir()
        prober = Prober()
        prober.load(tmp_path / "kernels.json")
        with engine(tmp_path / "store", run_dir, prober=prober) as node:
            logits, _ = run(node)
        prober.save(tmp_path / "kernels.json")
        found.append((prober.num_proofs, logits))
    (first, before), (second, after) = found
    assert first > 10 and second == 0
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
