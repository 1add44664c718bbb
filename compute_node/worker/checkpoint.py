"""What a worker needs of the checkpoint whose experts it computes: its config, from this box or
from the store.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from compute_node.store.session import StoreDescription
from compute_node.worker.config import WorkerConfig
from proto import errors


@contextmanager
def checkpoint_folder(config: WorkerConfig, description: StoreDescription) -> Iterator[Path]:
    """The folder of config.json, for the block. Of a store on another host it is made of what the
    store sent, unless the configuration names one.

    Raises ManifestInvalid when the store sent none.
    """
    if config.model_dir is not None or config.transport == "shared_memory":
        yield config.model_dir or description.model_dir
        return
    if not description.config:
        raise errors.ManifestInvalid(
            f"the store at {config.store_address} has no config.json of its model: set model_dir "
            "in [worker] to a folder that has it"
        )
    with tempfile.TemporaryDirectory(prefix="flashmoe-config-") as folder:
        (Path(folder) / "config.json").write_bytes(description.config)
        yield Path(folder)


def check_model(config: WorkerConfig, description: StoreDescription) -> None:
    """Raises VersionMismatch for another model than the memory was planned for."""
    found = description.spec.fingerprint
    if config.fingerprint not in (None, found):
        raise errors.VersionMismatch(
            f"the store at {config.store_address} serves model {found}, this worker was planned "
            f"for {config.fingerprint}: start the worker again"
        )
