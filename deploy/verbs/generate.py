"""The verb that streams text from a running stack."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from deploy.report.summary import print_summary, result_document
from deploy.settings import ServeSettings
from deploy.stack.connection import connected
from deploy.stack.run_dir import RunDir
from deploy.terminal import console, options
from deploy.terminal.prompts import as_text, choose_prompt
from deploy.terminal.schema_file import read_schema
from proto import errors
from proto.memory_report import MemoryReport


def generate(
    prompt: Annotated[str | None, options.PROMPT] = None,
    prompt_file: Annotated[Path | None, options.PROMPT_FILE] = None,
    run_dir: Annotated[Path | None, options.RUN_DIR] = None,
    max_tokens: Annotated[int, options.MAX_TOKENS] = 128,
    temperature: Annotated[float, options.TEMPERATURE] = 0.0,
    top_p: Annotated[float, options.TOP_P] = 1.0,
    seed: Annotated[int | None, options.SEED] = None,
    stop: Annotated[list[str] | None, options.STOP] = None,
    ignore_eos: Annotated[bool, options.IGNORE_EOS] = False,
    special_tokens: Annotated[bool, options.SPECIAL_TOKENS] = False,
    route: Annotated[str, options.ROUTE] = "",
    route_prompts: Annotated[bool, options.ROUTE_PROMPTS] = False,
    quality: Annotated[str, options.QUALITY] = "",
    json_schema: Annotated[Path | None, options.JSON_SCHEMA] = None,
    timeout: Annotated[float | None, options.TIMEOUT] = None,
    as_json: Annotated[bool, options.JSON] = False,
    config: Annotated[Path | None, options.CONFIG] = None,
) -> None:
    """Stream text from a running stack.

    Example: flashmoe generate "Once upon a time" --max-tokens 64 --temperature 0.8 --seed 1
    """
    text = choose_prompt(prompt, prompt_file)
    stops = [as_text(string, "--stop") for string in stop or ()]
    settings = ServeSettings.load(config).with_flags(run_dir=run_dir)
    with connected(RunDir(settings.run_dir.resolve())) as node:
        generation = node.generate(
            text,
            max_tokens=max_tokens,
            temperature=temperature,
            top_p=top_p,
            seed=seed,
            stop=stops,
            ignore_eos=ignore_eos,
            skip_special_tokens=not special_tokens,
            route=route,
            route_prompts=route_prompts,
            quality=quality,
            grammar=None if json_schema is None else read_schema(json_schema),
            timeout_s=timeout,
        )
        try:
            if not as_json:
                console.write_all(piece.text for piece in generation)
            result = generation.run()
        except errors.DeadlineExceeded as error:
            raise errors.DeadlineExceeded(
                f"the answer was not complete within --timeout {timeout} s"
            ) from error
    report = MemoryReport.read(settings.run_dir)
    if as_json:
        console.print_json(result_document(result, report))
    else:
        print_summary(result, report)
