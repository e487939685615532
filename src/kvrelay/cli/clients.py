"""The commands that use a running cluster: chat, generate, workers."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated, cast

import typer

from kvrelay.cli.failure import client_errors, fail
from kvrelay.cli.parsing import Address, parse_address
from kvrelay.cli.running import RunningClusterOption, RunningEtcdOption, coordinator_address, etcd_and_cluster

if TYPE_CHECKING:
    from kvrelay.client import GenerateOptions
    from kvrelay.client.chat import Terminal

AddressOption = Annotated[
    Address | None,
    typer.Option(
        parser=parse_address,
        metavar="HOST:PORT",
        envvar="KVRELAY_ADDRESS",
        help="gRPC address of a coordinator. Default: that of the `kvrelay up` running here.",
    ),
]
ModelOption = Annotated[str, typer.Option(metavar="NAME", help="Needed only when several models are served.")]
MaxTokens = Annotated[
    int | None, typer.Option(min=1, help="Most tokens of the answer. Without it: what the context holds.")
]
Temperature = Annotated[
    float | None, typer.Option(min=0.0, help="0 always takes the most likely token. Default: the model's own.")
]
TopP = Annotated[float | None, typer.Option(help="Keep the most likely tokens that together have this probability.")]
Seed = Annotated[int | None, typer.Option(help="The same seed gives the same answer.")]


def chat(
    address: AddressOption = None,
    model: ModelOption = "",
    system: Annotated[str | None, typer.Option(help="What the model is told before the conversation.")] = None,
    max_tokens: MaxTokens = None,
    temperature: Temperature = None,
    top_p: TopP = None,
    seed: Seed = None,
) -> None:
    """Talk with the model. The answer appears as it is generated.

    /reset forgets the conversation, /exit or Ctrl-D leaves, Ctrl-C stops an answer.

    Example: kvrelay chat --system "You answer in one sentence." --temperature 0
    """
    from kvrelay.client import Client
    from kvrelay.client.chat import ChatSession

    options = _options(model=model, max_tokens=max_tokens, temperature=temperature, top_p=top_p, seed=seed)
    with client_errors(), Client(str(address or coordinator_address())) as client:
        names = [served.name for served in client.models()]
        terminal = _terminal(f"{model or ', '.join(names)} at {client.address}")
        ChatSession(client, terminal, options, system).run()


def generate(
    prompt: Annotated[str, typer.Argument(help="The text to continue; - reads standard input.")],
    address: AddressOption = None,
    model: ModelOption = "",
    max_tokens: MaxTokens = 128,
    temperature: Temperature = None,
    top_p: TopP = None,
    seed: Seed = None,
    stop: Annotated[list[str] | None, typer.Option(help="Text that ends the answer; may be repeated.")] = None,
    n: Annotated[int, typer.Option("-n", min=1, help="Number of completions.")] = 1,
    as_chat: Annotated[
        bool, typer.Option("--chat", help="Ask the prompt as a question, in the chat template.")
    ] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object with tokens, usage and times instead of the text.")
    ] = False,
    timeout_s: Annotated[
        float | None, typer.Option("--timeout", min=0.0, help="Give up after so many seconds.")
    ] = None,
) -> None:
    """Continue a text, and print it as it is generated.

    Example: kvrelay generate "The capital of France is" --max-tokens 16 --temperature 0

    Example: kvrelay generate --chat --json "Name three rivers." | jq .usage
    """
    from kvrelay.client import Client, Message
    from kvrelay.client.generate import print_json, print_stream

    text = sys.stdin.read() if prompt == "-" else prompt
    options = _options(
        model=model,
        max_tokens=max_tokens,
        temperature=temperature,
        top_p=top_p,
        seed=seed,
        stop=stop,
        n=n if n > 1 else None,
        timeout_s=timeout_s,
    )
    content = [Message("user", text)] if as_chat else text
    with client_errors(), Client(str(address or coordinator_address())) as client:
        if as_json:
            print_json(client, content, options, _write)
        elif not print_stream(client, content, options, _write):
            hint = "" if as_chat else "; a model that is tuned for chat answers a question with --chat"
            typer.echo(f"kvrelay: the model ended the text at once{hint}", err=True)


def workers(
    etcd: RunningEtcdOption = None,
    cluster: RunningClusterOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON array instead of the table.")] = False,
    timeout_s: Annotated[float, typer.Option("--timeout", min=0.1, help="Longest wait for a worker, seconds.")] = 2.0,
) -> None:
    """List the workers: id, role, model, address, state, load and KV use.

    The list comes from etcd, the figures from each worker itself.
    """
    from kvrelay.cli.worker_table import show_workers

    show_workers(*etcd_and_cluster(etcd, cluster), as_json=as_json, timeout_s=timeout_s)


def _options(**values: object) -> GenerateOptions:
    """Only what was given: everything else is the model's own default."""
    return cast("GenerateOptions", {name: value for name, value in values.items() if value not in (None, "")})


def _write(text: str) -> None:
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except BrokenPipeError:
        fail("nobody reads the output any more")


def _terminal(title: str) -> Terminal:
    from rich.console import Console

    from kvrelay.client.chat import HELP, Terminal

    interactive = sys.stdin.isatty()
    console = Console(highlight=False)

    def note(text: str) -> None:
        console.print(text, style="dim", markup=False, soft_wrap=True)

    if interactive:
        import readline  # noqa: F401 - editing and history for input()

        note(f"{title}. {HELP}")
    return Terminal(read_line=lambda: input("> " if interactive else ""), write=_write, note=note)
