"""The verb that copies a checkpoint into aligned records."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from deploy.report.written_store import print_written
from deploy.terminal import console, options
from deploy.terminal.imports import importing_torch
from deploy.terminal.progress import progress

PackFormat = Literal["exact", "lossless", "bf16", "int8", "int4"]  # proto.weight_format.NAMES
FORMAT = typer.Option("--format", help="How experts are kept; exact: as the checkpoint has them.")


def pack(
    checkpoint: Annotated[Path, options.CHECKPOINT],
    out: Annotated[Path, options.OUT],
    weight_format: Annotated[PackFormat, FORMAT] = "exact",
    overwrite: Annotated[bool, typer.Option(help="Replace STORE if it exists.")] = False,
) -> None:
    """Copy a checkpoint into aligned records that read fastest; STORE is then self-contained.

    Memory use is bounded; killed, it resumes; a full disk leaves STORE as it was. lossless keeps
    every bit of bf16 experts in three quarters of the bytes. int8 and int4 are lossy: `flashmoe
    eval` measures the loss. gpt-oss as its vendor ships it (mxfp4) becomes bf16,
    the same values, or int4.

    Example: flashmoe pack ~/models/OLMoE-1B-7B --out /nvme/olmoe-int4 --format int4
    """
    with importing_torch():
        from expert_store.offline.pack import pack as make_pack

    with progress("packing") as report:
        manifest = make_pack(
            checkpoint, out, report, console.warn, weight_format=weight_format, overwrite=overwrite
        )
    print_written(manifest, out)
