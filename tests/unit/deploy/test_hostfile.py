"""What does deploy/launch/ssh.sh make of a hostfile? Nothing is started: `show` prints the commands."""

import re
from pathlib import Path

import pytest

from tests.support.ssh_launch import ROOT, SshLaunch, make_launch


def shown(directory: Path, hostfile: str, **environment: str) -> dict[str, str]:
    """The command of each process, without the random part of its id."""
    result = make_launch(directory, hostfile, **environment)("show")
    assert result.returncode == 0, result.stderr
    lines = [re.sub(r"-[0-9a-f]{4}\b", "", line) for line in result.stdout.splitlines()]
    return dict(line.rstrip().split(": ", 1) for line in lines)


def test_defaults_of_every_role(tmp_path: Path) -> None:
    commands = shown(
        tmp_path,
        "10.0.0.1 etcd\n\n10.0.0.1 coordinator - -\nme@node2:2222 prefill gpu:0,1 /m\n10.0.0.3 decode cpu:0-3 -\n",
    )
    etcd = "--etcd 10.0.0.1:2379 --cluster default"
    assert commands["etcd-0 on 10.0.0.1"].startswith(
        "@etcd --name throw-away --data-dir @dir/data --listen-client-urls http://10.0.0.1:2379"
    )
    assert commands["coordinator-0 on 10.0.0.1"] == (
        f"@kvrelay coordinator {etcd} --coordinator-id coordinator-0"
        " --http 10.0.0.1:8000 --grpc 10.0.0.1:50051 --advertise-host 10.0.0.1"
    )
    assert commands["prefill-0 on me@node2"] == (
        f"CUDA_VISIBLE_DEVICES=0\\,1 @kvrelay prefill-worker {etcd} --model /m --worker-id prefill-0"
        " --listen 0.0.0.0:7001 --kv-listen 0.0.0.0:7002 --advertise node2:7001"
    )
    assert commands["decode-0 on 10.0.0.3"] == (
        f"VLLM_CPU_OMP_THREADS_BIND=0-3 @kvrelay decode-worker {etcd} --worker-id decode-0"
        " --listen 10.0.0.3:7003 --kv-listen 10.0.0.3:7004 --advertise 10.0.0.3:7003"
    )


def test_options_replace_defaults_and_keep_their_words(tmp_path: Path) -> None:
    commands = shown(
        tmp_path,
        "n1 coordinator - - --http :9000 --grpc=n1:9001 --chat-template 'my chat.jinja' # a comment\n"
        'n2 decode - - A=1 B="x y" --listen 0.0.0.0:9 --worker-id w -- --listen 1 --hf-overrides "{\'a\': #}"\n',
        KVRELAY_ETCD="e1:2379,e2:2379",
        KVRELAY_CLUSTER="c",
    )
    etcd = "--etcd e1:2379\\,e2:2379 --cluster c"
    assert commands["coordinator-0 on n1"] == (
        f"@kvrelay coordinator {etcd} --coordinator-id coordinator-0 --advertise-host n1"
        " --http :9000 --grpc=n1:9001 --chat-template my\\ chat.jinja"
    )
    assert commands["decode-0 on n2"] == (
        f"A=1 B=x\\ y @kvrelay decode-worker {etcd} --kv-listen 0.0.0.0:10 --advertise n2:9 --listen 0.0.0.0:9"
        " --worker-id w -- --listen 1 --hf-overrides \\{\\'a\\':\\ #\\}"
    )


def test_the_example_is_right() -> None:
    result = SshLaunch(hostfile=ROOT / "deploy/launch/hosts.example", environment={})("show")
    assert result.returncode == 0, result.stderr
    assert len(result.stdout.splitlines()) == 6


@pytest.mark.parametrize(
    ("hostfile", "message"),
    [
        ("h worker - -", "line 1: 'worker' is no role"),
        ("\nh decode gpu: -", "line 2: devices 'gpu:' name none; write gpu:0,1 or cpu:0-3"),
        ("h decode 0,1 -", "line 1: devices '0,1' are not known"),
        ("h coordinator gpu:0 -", "line 1: devices are for workers"),
        ("h etcd - m", "line 1: etcd has no model"),
        ("h decode - - --x 'a", "line 1: a quote is opened and not closed"),
        ("h etcd\ng etcd", "more than one etcd line"),
        ("# nothing", "names no process"),
        ("h decode - -", "has no etcd line; add one, or set KVRELAY_ETCD=HOST:PORT"),
        ("h etcd - - --advertise-client-urls https://h:2379", "line 1: --advertise-client-urls https://h:2379 must"),
    ],
)
def test_a_wrong_hostfile_is_told_by_its_line(tmp_path: Path, hostfile: str, message: str) -> None:
    result = make_launch(tmp_path, hostfile)("show")
    assert result.returncode == 2
    assert message in result.stderr


def test_wrong_usage(tmp_path: Path) -> None:
    launch = make_launch(tmp_path, "h etcd")
    assert launch("begin").returncode == 2
    assert launch("status", "all").returncode == 2
    assert launch("logs", "decode-7").returncode == 2
    assert make_launch(tmp_path, "h etcd", KVRELAY_GRACE_S="1s")("status").returncode == 2
    assert "HOSTFILE start" in launch("--help").stdout
