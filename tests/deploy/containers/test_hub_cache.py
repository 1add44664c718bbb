"""A checkpoint in a model hub's cache, in containers: they see the blobs that its links lead to.

Planted fault seen red: only the revision's folder mounted, whose links then lead nowhere.
"""

from __future__ import annotations

import shutil
import tomllib
from pathlib import Path

from deploy.containers.tables import SOURCE_DIR
from deploy.verbs.container_config import container_config
from expert_store.manifest.manifest import check_sources
from expert_store.offline.index import index
from tests.checkpoints import make


def test_the_links_lead_somewhere_in_the_container_too(tmp_path: Path) -> None:
    model = tmp_path / "models--org--name"
    root = model / "snapshots" / "0123abcd"
    root.mkdir(parents=True)
    make("qwen3_moe", model / "blobs")
    for path in (model / "blobs").iterdir():
        (root / path.name).symlink_to(f"../../blobs/{path.name}")
    manifest = index(root, tmp_path / "store")
    for weights in (model / "blobs").iterdir():
        weights.chmod(0o644)  # the containers' user reads them; safetensors saves them for us alone
    container_config(tmp_path / "store", out=tmp_path / "out", memory="1GiB")
    variables = (tmp_path / "out" / "compose.env").read_text().splitlines()
    said = next(v for v in variables if v.startswith("FLASHMOE_SOURCE="))
    mounted = Path(said.split("=")[1].strip("'"))
    tables = tomllib.loads((tmp_path / "out" / "flashmoe.toml").read_text())
    inside = Path(tables["expert_store"]["source_root"]).relative_to(SOURCE_DIR)
    seen = shutil.copytree(mounted, tmp_path / "container", symlinks=True)
    check_sources(manifest, Path(seen) / inside, times=False)
