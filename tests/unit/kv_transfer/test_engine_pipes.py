"""Records cross real pipes whole, from several writers, and a full pipe loses nothing."""

from __future__ import annotations

import os
import select
import threading
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvrelay.engine.base import KvReportKind
from kvrelay.engine.reports import RankQuorum
from kvrelay.kv_transfer import engine_pipes
from kvrelay.kv_transfer.engine_pipes import GrantReader, Pipe, RankReport, ReportReader, ReportWriter, write_grants


@pytest.fixture
def pipe() -> Iterator[Pipe]:
    pipe = Pipe()
    yield pipe
    pipe.close()


def test_reports_arrive_in_order(pipe: Pipe) -> None:
    writer, reader = ReportWriter(pipe.writer_path), ReportReader(pipe.read_fd)
    reports = [RankReport(i % 4, i % 256, 2**32 - 1 - i, i, 7 * i, i % 99, 2**16 - 1 - i) for i in range(5000)]
    assert list(reader.read()) == []
    writer.write(reports)
    assert list(reader.read()) == reports
    writer.close()
    writer.close()


def test_several_ranks_write_without_mixing_their_records(pipe: Pipe) -> None:
    """More than the pipe holds, so writers wait for the reader."""
    num_ranks, num_reports = 4, 40_000
    reader = ReportReader(pipe.read_fd)

    def write(rank: int) -> None:
        writer = ReportWriter(pipe.writer_path)
        writer.write(RankReport(2, rank, i, rank, i) for i in range(num_reports))
        writer.close()

    threads = [threading.Thread(target=write, args=(rank,)) for rank in range(num_ranks)]
    for thread in threads:
        thread.start()
    seen: dict[int, int] = dict.fromkeys(range(num_ranks), 0)
    while sum(seen.values()) < num_ranks * num_reports:
        for report in reader_chunk(reader, pipe.read_fd):
            assert report == RankReport(2, report.rank, seen[report.rank], report.rank, seen[report.rank])
            seen[report.rank] += 1
    for thread in threads:
        thread.join(10)
        assert not thread.is_alive()


def reader_chunk(reader: ReportReader, fd: int) -> list[RankReport]:
    """At least one record: waits for the pipe, then reads what is there."""
    assert select.select([fd], [], [], 10)[0], "nothing was written for 10 s"
    return list(reader.read())


def test_grants_arrive_in_order(pipe: Pipe) -> None:
    reader = GrantReader(pipe.reader_path)
    assert reader.read() == []
    assert write_grants(pipe.write_fd, range(3000)) == 3000
    assert write_grants(pipe.write_fd, [7]) == 1
    assert reader.read() == [*range(3000), 7]
    assert reader.read() == []
    reader.close()
    reader.close()


def test_what_does_not_fit_the_pipe_is_granted_later(pipe: Pipe) -> None:
    reader = GrantReader(pipe.reader_path)
    slots = list(range(500_000))
    received: list[int] = []
    rounds = 0
    while slots:
        written = write_grants(pipe.write_fd, slots)
        del slots[:written]
        received += reader.read()
        rounds += 1
    assert received == list(range(500_000))
    assert rounds > 1
    reader.close()


def test_a_rank_without_a_worker_is_told(pipe: Pipe) -> None:
    writer = ReportWriter(pipe.writer_path)
    pipe.close()
    with pytest.raises(BrokenPipeError):
        writer.write([RankReport(1, 0, 0, 0, 0)])
    writer.close()


def test_a_closed_pipe_leaves_no_descriptors() -> None:
    pipe = Pipe()
    paths = pipe.reader_path, pipe.writer_path
    pipe.close()
    pipe.close()
    assert not any(map(os.path.exists, paths))


def test_the_connector_and_the_worker_mean_the_same_kinds() -> None:
    assert engine_pipes.LOADED == KvReportKind.LOADED
    assert engine_pipes.SAVED == KvReportKind.SAVED
    assert engine_pipes.CLOSED == KvReportKind.CLOSED


def test_a_report_counts_once_all_ranks_have_sent_it() -> None:
    quorum = RankQuorum(2)
    saved = [RankReport(2, rank, 5, 0, 9) for rank in range(2)]
    other = RankReport(2, 0, 5, 1, 10)
    assert [quorum.complete(r) for r in (saved[0], other, saved[1])] == [False, False, True]
    assert [quorum.complete(r) for r in saved] == [False, True]
    assert RankQuorum(1).complete(saved[0])


def test_each_part_of_a_block_counts_for_itself() -> None:
    quorum = RankQuorum(2)
    first, second = ([RankReport(2, rank, 5, 0, 9, layer, 3) for rank in range(2)] for layer in (0, 3))
    reports = [first[0], second[0], second[1], first[1]]
    assert [quorum.complete(r) for r in reports] == [False, False, True, True]


@given(num_ranks=st.integers(1, 5), num_blocks=st.integers(0, 4), data=st.data())
def test_what_the_ranks_report_in_one_order_counts_in_that_order(
    num_ranks: int, num_blocks: int, data: st.DataObject
) -> None:
    """However the pipe mixes them: so CLOSED never counts before the last rank's last copy."""
    parts = [(block, layer) for layer in (0, 3) for block in range(num_blocks)]
    one_rank = [(2, 5, block, 9 + block, layer, 3) for block, layer in parts] + [(1, 5, 2, 0, 0, 0), (3, 5, 0, 0, 0, 0)]
    order = data.draw(st.permutations([rank for rank in range(num_ranks) for _ in one_rank]))
    quorum, left, counted = RankQuorum(num_ranks), [iter(one_rank) for _ in range(num_ranks)], []
    for rank in order:
        kind, *rest = next(left[rank])
        if quorum.complete(RankReport(kind, rank, *rest)):
            counted.append((kind, *rest))
    assert counted == one_rank
