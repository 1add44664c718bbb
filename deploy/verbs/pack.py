"""The verb that copies a checkpoint into aligned records."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal, get_args

import typer

from deploy.report.written_store import print_written
from deploy.terminal import console, options
from deploy.terminal.imports import importing_torch
from deploy.terminal.progress import progress
from proto import errors

PackFormat = Literal["exact", "lossless", "bf16", "int8", "int4"]  # proto.weight_format.NAMES
FORMAT = typer.Option(
    "--format",
    help="How experts are kept; exact: as the checkpoint has them.",
    show_default="exact",
)
VARIANTS = typer.Option(
    metavar="FORMATS",
    help="Keep each expert more than once: exact,int4 keeps small records beside those of --format "
    "exact, for requests that allow them.",
    show_default=False,
)


def pack(
    checkpoint: Annotated[Path, options.CHECKPOINT],
    out: Annotated[Path, options.OUT],
    weight_format: Annotated[PackFormat | None, FORMAT] = None,
    variants: Annotated[str, VARIANTS] = "",
    overwrite: Annotated[bool, typer.Option(help="Replace STORE if it exists.")] = False,
) -> None:
    """Copy a checkpoint into aligned records that read fastest; STORE is then self-contained.

    Memory use is bounded; killed, it resumes; a full disk leaves STORE as it was. lossless keeps
    every bit of bf16 experts in three quarters of the bytes. int8 and int4 are lossy: `flashmoe
    eval` measures the loss. gpt-oss as its vendor ships it (mxfp4) becomes bf16,
    the same values, or int4.

    Example: flashmoe pack ~/models/OLMoE-1B-7B --out /nvme/olmoe --variants lossless,int4
    """
    formats = _formats(weight_format, variants)
    with importing_torch():
        from expert_store.offline.pack import pack as make_pack

    with progress("packing") as report:
        manifest = make_pack(
            checkpoint,
            out,
            report,
            console.warn,
            weight_format=formats[0],
            variants=formats[1:],
            overwrite=overwrite,
        )
    print_written(manifest, out)


def _formats(weight_format: str | None, variants: str) -> list[str]:
    """Of an expert's records, the one that counts first. Raises ConfigInvalid."""
    if not variants:
        return [weight_format or "exact"]
    names = [name.strip() for name in variants.split(",")]
    unknown = [name for name in names if name not in get_args(PackFormat)]
    if unknown or len(set(names)) < max(2, len(names)):
        raise errors.ConfigInvalid(
            f"--variants {variants!r} does not name two formats or more, each once: say for "
            f"example exact,int4, of {', '.join(get_args(PackFormat))}"
        )
    if weight_format not in (None, names[0]):
        raise errors.ConfigInvalid(
            f"--format {weight_format} and --variants {variants} disagree: the first variant is "
            "the format that a model computes with"
        )
    return names
