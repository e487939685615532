"""`kvrelay replay`: apply a recorded load to a server, and see how it is served."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Annotated

import typer

from kvrelay import default_addresses
from kvrelay.cli.failure import FAILED, INTERRUPTED, WRONG_USAGE, fail
from kvrelay.cli.load_options import (
    DEFAULT_TARGETS,
    LOAD,
    SERVER,
    Header,
    JsonOption,
    LengthScaleOption,
    LimitOption,
    NameOption,
    PlotsOption,
    SeedOption,
    SpeedOption,
    TargetsOption,
    TraceArgument,
    parse_header,
)
from kvrelay.cli.running import running
from kvrelay.workload.request_form import Api, PromptKind, TooLong

if TYPE_CHECKING:
    from kvrelay.client.http_pool import Origin

API_KEY = "KVRELAY_API_KEY"

UrlOption = Annotated[
    str | None,
    typer.Option(
        "--url",
        metavar="URL",
        envvar="KVRELAY_URL",
        rich_help_panel=SERVER,
        help="Any server with OpenAI's API, as http://HOST:PORT. Default: the `kvrelay up` running here. An API key is"
        f" taken from the environment, {API_KEY}.",
    ),
]
ModelOption = Annotated[
    str | None,
    typer.Option("--model", metavar="NAME", rich_help_panel=SERVER, help="Default: the first that the server lists."),
]
EndpointOption = Annotated[
    Api, typer.Option("--endpoint", rich_help_panel=SERVER, help="Which of OpenAI's two APIs is asked.")
]
PromptOption = Annotated[
    PromptKind | None,
    typer.Option(
        "--prompt",
        rich_help_panel=SERVER,
        help="tokens: ids, exactly as many as recorded; completions only. text: a common word per token, the same words"
        " for the same recorded block, so about as long. Default: tokens with completions, text with chat.",
    ),
]
IgnoreEosOption = Annotated[
    bool,
    typer.Option(
        "--ignore-eos/--no-ignore-eos",
        rich_help_panel=SERVER,
        help="Answers as long as recorded; needs a server that knows vLLM's parameter ignore_eos.",
    ),
]
HeaderOption = Annotated[
    list[Header] | None,
    typer.Option(
        "--header",
        parser=parse_header,
        metavar="'NAME: VALUE'",
        rich_help_panel=SERVER,
        help="Sent with every request, for example 'x-kvrelay-tenant: a'; may be repeated.",
    ),
]
MaxModelLenOption = Annotated[
    int | None,
    typer.Option(
        "--max-model-len",
        min=2,
        rich_help_panel=LOAD,
        help="Most tokens of prompt and answer together. Default: what the server tells.",
    ),
]
TooLongOption = Annotated[
    TooLong, typer.Option("--too-long", rich_help_panel=LOAD, help="What becomes of requests over that.")
]
VocabSizeOption = Annotated[
    int, typer.Option("--vocab-size", min=2, rich_help_panel=LOAD, help="Prompts of token ids have ids below this.")
]
MaxConnectionsOption = Annotated[
    int,
    typer.Option(
        "--max-connections",
        min=1,
        rich_help_panel=SERVER,
        help="Most requests at a time. With more to send the loop is not open any more, which is told.",
    ),
]
TimeoutOption = Annotated[
    float | None,
    typer.Option("--timeout", min=0.001, rich_help_panel=SERVER, help="Seconds after which a request has failed."),
]


def replay(
    trace: TraceArgument,
    url: UrlOption = None,
    model: ModelOption = None,
    endpoint: EndpointOption = Api.COMPLETIONS,
    prompt: PromptOption = None,
    ignore_eos: IgnoreEosOption = True,
    header: HeaderOption = None,
    speed: SpeedOption = 1.0,
    limit: LimitOption = None,
    length_scale: LengthScaleOption = 1.0,
    max_model_len: MaxModelLenOption = None,
    too_long: TooLongOption = TooLong.CLIP,
    vocab_size: VocabSizeOption = 32_000,
    seed: SeedOption = 0,
    max_connections: MaxConnectionsOption = 1000,
    timeout_s: TimeoutOption = 600.0,
    targets: TargetsOption = DEFAULT_TARGETS,
    json_path: JsonOption = None,
    plots_dir: PlotsOption = None,
    name: NameOption = None,
) -> None:
    """Apply a recorded load to a server, and tell how it was served.

    Requests are sent when they are due, whatever became of those before (an open loop), and their latency counts from
    then. Ctrl-C ends the load and reports what was done so far; a second one ends at once.

    Example: kvrelay replay mooncake_conversation.jsonl --speed 2 --length-scale 16 --plots results

    Example: kvrelay replay azure_conv_2023.csv --limit 500 --url http://10.0.0.5:8000 --targets ttft=1,itl=0.2
    """
    from kvrelay.cli.load_results import check_writable, show, write
    from kvrelay.cli.load_trace import read_requests
    from kvrelay.cli.replay_run import Finished, run
    from kvrelay.client.replay.planning import Fit
    from kvrelay.client.replay.session import ReplayConfig
    from kvrelay.workload.trace import TraceOptions

    requests = read_requests(trace, TraceOptions(limit=limit, speed=speed, length_scale=length_scale))
    check_writable(json_path, plots_dir)
    config = ReplayConfig(
        origin=_origin(url),
        model=model,
        api=endpoint,
        prompt_kind=_prompt_kind(endpoint, prompt),
        ignore_eos=ignore_eos,
        headers=_headers(header or []),
        fit=Fit(max_model_len_tokens=max_model_len, too_long=too_long, vocab_size=vocab_size, seed=seed),
        max_connections=max_connections,
        timeout_s=timeout_s,
    )
    finished: Finished = run(requests, config)
    load = {"trace": trace.name, "speed": speed, "limit": limit, "length_scale": length_scale}
    record, notes = finished.report(name or f"{trace.stem} x{speed:g}", targets, load)
    show(record, notes)
    write(record, finished.replayed.outcomes, json_path, plots_dir)
    if finished.replayed.interrupted:
        raise typer.Exit(INTERRUPTED)
    if not record.summary.num_completed:
        fail("no request was completed", FAILED)


def _origin(url: str | None) -> Origin:
    from kvrelay.client.http_pool import Origin

    if url is None:
        cluster = running()
        url = cluster.http_url if cluster else f"http://{default_addresses.HTTP}"
    try:
        return Origin.parse(url)
    except ValueError as error:
        fail(f"--url: {error}", WRONG_USAGE)


def _prompt_kind(api: Api, wanted: PromptKind | None) -> PromptKind:
    if api is Api.COMPLETIONS:
        return wanted or PromptKind.TOKENS
    if wanted is PromptKind.TOKENS:
        fail("--prompt tokens goes with --endpoint completions only: messages of a chat are text", WRONG_USAGE)
    return PromptKind.TEXT


def _headers(given: list[Header]) -> dict[str, str]:
    headers = dict(given)
    if key := os.environ.get(API_KEY):
        if not key.isascii() or not key.isprintable():
            fail(f"{API_KEY} has characters that no header can have", WRONG_USAGE)
        headers["Authorization"] = f"Bearer {key}"
    return headers
