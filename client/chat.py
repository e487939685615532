"""How does a person talk with the model in a terminal?"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from kvrelay.client.blocking_client import Client
from kvrelay.client.connection import UnreachableError
from kvrelay.client.options import GenerateOptions, Message
from kvrelay.client.results import FinishReason
from kvrelay.errors import KvrelayError

HELP = "/exit or Ctrl-D leaves, /reset forgets the conversation, /help shows this; Ctrl-C stops an answer."


@dataclass(frozen=True, slots=True, kw_only=True)
class Terminal:
    """Where a chat happens."""

    read_line: Callable[[], str]
    """The next line, without its end. Raises `EOFError` when there are no more, `KeyboardInterrupt` on Ctrl-C."""
    write: Callable[[str], None]
    """Shows text of the answer at once."""
    note: Callable[[str], None]
    """Shows a line that is not part of the conversation."""


class ChatSession:
    """A conversation. Every question is sent with all turns before it, whose KV blocks the cluster still knows."""

    def __init__(self, client: Client, terminal: Terminal, options: GenerateOptions, system: str | None = None) -> None:
        self._client = client
        self._terminal = terminal
        self._options = options
        self._first = [Message("system", system)] if system else []
        self.messages = list(self._first)

    def run(self) -> None:
        """Talk until the person leaves. Raises `UnreachableError` once nobody answers any more."""
        while True:
            try:
                line = self._terminal.read_line().strip()
            except EOFError:
                return
            except KeyboardInterrupt:
                self._terminal.note(HELP)
                continue
            if line == "/exit":
                return
            if line.startswith("/"):
                self._command(line)
            elif line:
                self._ask(line)

    def _command(self, line: str) -> None:
        if line == "/reset":
            self.messages = list(self._first)
            self._terminal.note("The conversation starts anew.")
        elif line == "/help":
            self._terminal.note(HELP)
        else:
            self._terminal.note(f"{line.split()[0]} is not a command. {HELP}")

    def _ask(self, question: str) -> None:
        self.messages.append(Message("user", question))
        try:
            answer = self._answer()
        except UnreachableError:
            raise
        except KvrelayError as error:
            self.messages.pop()
            advice = " /reset makes room." if len(self.messages) > len(self._first) else ""
            self._terminal.note(f"No answer: {error}{advice}")
        else:
            self.messages.append(Message("assistant", answer))

    def _answer(self) -> str:
        """Show the answer as it comes. What was shown until Ctrl-C counts as the answer."""
        texts: list[str] = []
        speed = _Speed()
        finish_reason: FinishReason | None = None
        with self._client.stream(self.messages, **self._options) as chunks:
            try:
                for chunk in chunks:
                    speed.add(len(chunk.token_ids))
                    texts.append(chunk.text)
                    self._terminal.write(chunk.text)
                    finish_reason = chunk.finish_reason
                note = str(speed)
                if finish_reason == "length":
                    note += "; cut off at the limit of tokens"
            except KeyboardInterrupt:
                note = "stopped"
            except KvrelayError:
                if texts:
                    self._terminal.write("\n")
                raise
        self._terminal.write("\n")
        self._terminal.note(note)
        return "".join(texts)


class _Speed:
    """First token and pace of one answer, measured where the person sits."""

    def __init__(self) -> None:
        self._started_s = time.monotonic()
        self._first_s: float | None = None
        self._num_first = 0
        self._num_tokens = 0

    def add(self, num_tokens: int) -> None:
        if self._first_s is None and num_tokens:
            self._first_s = time.monotonic() - self._started_s
            self._num_first = num_tokens
        self._num_tokens += num_tokens

    def __str__(self) -> str:
        if self._first_s is None:
            return "no tokens"
        text = f"{self._num_tokens} tokens, the first after {self._first_s:.2f} s"
        rest_s = time.monotonic() - self._started_s - self._first_s
        num_rest = self._num_tokens - self._num_first
        return f"{text}, then {num_rest / rest_s:.0f} a second" if num_rest and rest_s else text
