"""`kvrelay chat` and `kvrelay generate` as a person or a script meets them."""

import json
import os
import pty
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import grpc
import pytest
from typer.testing import CliRunner, Result

from kvrelay.cli import app
from tests.support.scripted_inference import ScriptedInference, scripted_inference


@pytest.fixture
def service() -> Iterator[ScriptedInference]:
    with scripted_inference() as service:
        yield service


def run(*arguments: str, stdin: str | None = None) -> Result:
    return CliRunner().invoke(app, arguments, input=stdin)


def test_generate_prints_the_text(service: ScriptedInference) -> None:
    service.say("Par", "is")
    result = run("generate", "The capital", "--address", service.address, "--temperature", "0", "--stop", ".")
    assert (result.exit_code, result.stdout) == (0, "Paris\n")
    (request,) = service.requests
    assert (request.text, request.sampling.temperature, list(request.sampling.stop)) == ("The capital", 0, ["."])
    assert request.sampling.max_tokens == 128
    assert not request.sampling.HasField("top_p")


def test_generate_prints_json_for_scripts(service: ScriptedInference) -> None:
    service.say("Par", "is")
    result = json.loads(run("generate", "x", "--json", "--chat", "--address", service.address).stdout)
    assert result["completions"][0]["text"] == "Paris"
    assert result["usage"] == {"prompt_tokens": 5, "completion_tokens": 3}
    assert result["e2e_s"] > 0
    assert service.requests[0].chat.messages[0].content == "x"


def test_generate_reads_the_prompt_from_standard_input(service: ScriptedInference) -> None:
    service.say("ok")
    run("generate", "-", "--address", service.address, stdin="from a pipe")
    assert service.requests[0].text == "from a pipe"


def test_a_model_that_says_nothing_is_told_on_standard_error(service: ScriptedInference) -> None:
    service.say("")
    result = run("generate", "x", "--address", service.address)
    assert (result.exit_code, result.stdout) == (0, "\n")
    assert "ended the text at once" in result.stderr
    assert "--chat" in result.stderr


def test_several_completions_are_numbered(service: ScriptedInference) -> None:
    service.say("one")
    assert run("generate", "x", "-n", "2", "--address", service.address).stdout == "[0] one\n"


@pytest.mark.parametrize(
    ("code", "exit_code"),
    [
        (grpc.StatusCode.INVALID_ARGUMENT, 2),
        (grpc.StatusCode.NOT_FOUND, 2),
        (grpc.StatusCode.UNAVAILABLE, 4),
        (grpc.StatusCode.INTERNAL, 1),
    ],
)
def test_errors_are_one_line_and_a_code(service: ScriptedInference, code: grpc.StatusCode, exit_code: int) -> None:
    service.error = (code, "the message\nof the server")
    result = run("generate", "x", "--address", service.address)
    assert (result.exit_code, result.stdout) == (exit_code, "")
    assert re.fullmatch(r"kvrelay: the message of the server.*\n", result.stderr)


def test_nobody_answering_says_what_to_do() -> None:
    result = run("generate", "x", "--address", "127.0.0.1:1")
    assert result.exit_code == 4
    assert result.stderr.startswith("kvrelay: no coordinator answers at 127.0.0.1:1")
    assert "kvrelay up" in result.stderr
    assert result.stderr.count("\n") == 1


def test_a_bad_address_says_how_one_looks() -> None:
    result = run("generate", "x", "--address", "nonsense")
    assert result.exit_code == 2
    assert "HOST:PORT" in result.stderr


def test_chat_keeps_the_conversation_until_reset(service: ScriptedInference) -> None:
    service.say("hello")
    lines = "hi\nagain\n/reset\nnew\n/what\n/exit\nnever\n"
    result = run("chat", "--address", service.address, "--system", "be brief", stdin=lines)
    assert result.exit_code == 0
    turns = [[message.content for message in request.chat.messages] for request in service.requests[1:]]
    assert turns == [["be brief", "hi"], ["be brief", "hi", "hello", "again"], ["be brief", "new"]]
    assert "/what is not a command" in result.stdout


def test_chat_goes_on_after_a_refused_question(service: ScriptedInference) -> None:
    service.error = (grpc.StatusCode.INVALID_ARGUMENT, "the prompt is too long")
    service.num_calls_before_error = 1
    result = run("chat", "--address", service.address, stdin="hi\nhello\n")
    assert result.exit_code == 0
    assert result.stdout.count("No answer: the prompt is too long") == 2
    assert [len(request.chat.messages) for request in service.requests[1:]] == [1, 1]


def test_an_answer_without_a_token_is_no_accident(service: ScriptedInference) -> None:
    assert "no tokens" in run("chat", "--address", service.address, stdin="hi\n").stdout


class Terminal:
    """A program on a pseudo terminal."""

    def __init__(self, process: subprocess.Popen[bytes], fd: int) -> None:
        self.process = process
        self._fd = fd
        self.output = ""

    def send(self, text: str) -> None:
        os.write(self._fd, text.encode())

    def read_until(self, text: str) -> None:
        """Read on until `text` appears; what came before it is dropped."""
        while text not in self.output:
            try:
                part = os.read(self._fd, 4096)
            except OSError:  # the other side is closed
                part = b""
            assert part, f"{text!r} did not come; last was {self.output!r}"
            self.output += part.decode()
        self.output = self.output.partition(text)[2]


@contextmanager
def terminal(*arguments: str) -> Iterator[Terminal]:
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "kvrelay.cli", *arguments]
    environment = {**os.environ, "TERM": "dumb"}
    process = subprocess.Popen(
        command, stdin=theirs, stdout=theirs, stderr=theirs, env=environment, start_new_session=True
    )
    os.close(theirs)
    try:
        yield Terminal(process, ours)
        assert process.wait(10) is not None
    finally:
        process.kill()
        process.wait()
        os.close(ours)


def test_control_c_stops_an_answer_and_control_d_leaves(service: ScriptedInference) -> None:
    service.say("once ", "upon")
    service.hang = True
    with terminal("chat", "--address", service.address) as person:
        person.read_until("> ")
        person.send("tell a story\n")
        person.read_until("once upon")
        os.kill(person.process.pid, signal.SIGINT)
        person.read_until("stopped")
        assert service.cancelled.wait(5)
        service.hang = False
        person.read_until("> ")
        person.send("and then?\n")
        person.read_until("once upon")
        person.read_until("> ")
        person.send("\x04")
        assert person.process.wait(10) == 0
    assert [message.content for message in service.requests[-1].chat.messages] == [
        "tell a story",
        "once upon",
        "and then?",
    ]
