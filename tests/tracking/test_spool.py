"""The journal survives kills, torn lines and long outages."""

from __future__ import annotations

from pathlib import Path

import pytest

from fewstep.tracking import spool
from fewstep.tracking.delivery import Item, LogBatch, next_batch
from fewstep.tracking.spool import Journal, Session, left_behind


def values(journal: Journal) -> list[int]:
    return [record["n"] for record, _ in journal.read()]


def test_a_journal_opened_again_continues_after_what_was_confirmed(tmp_path):
    journal = Journal(tmp_path / "records.jsonl")
    for n in range(5):
        journal.append({"n": n})
    journal.confirm(journal.read()[2][1])
    journal.close()
    assert values(Journal(tmp_path / "records.jsonl")) == [3, 4]


def test_a_torn_last_line_is_dropped_and_later_records_are_whole(tmp_path):
    journal = Journal(tmp_path / "records.jsonl")
    journal.append({"n": 1})
    journal.close()
    with open(tmp_path / "records.jsonl", "a") as file:
        file.write('{"n": 2')
    journal = Journal(tmp_path / "records.jsonl")
    journal.append({"n": 3})
    assert values(journal) == [1, 3]


def test_a_delivered_journal_gives_its_disk_space_back(tmp_path, monkeypatch):
    monkeypatch.setattr(spool, "_TRUNCATE_BYTES", 100)
    journal = Journal(tmp_path / "records.jsonl")
    for n in range(50):
        journal.append({"n": n})
    journal.confirm(journal.end)
    assert (tmp_path / "records.jsonl").stat().st_size == 0
    journal.append({"n": 50})
    assert values(journal) == [50]
    assert values(Journal(tmp_path / "records.jsonl")) == [50]


def test_a_kill_between_emptying_and_marking_loses_nothing(tmp_path):
    journal = Journal(tmp_path / "records.jsonl")
    journal.append({"n": 1})
    journal.confirm(journal.end)
    journal.close()
    (tmp_path / "records.jsonl").write_bytes(b"")
    journal = Journal(tmp_path / "records.jsonl")
    journal.append({"n": 2})
    assert values(journal) == [2]


def test_reading_is_bounded_however_long_the_outage(tmp_path, monkeypatch):
    monkeypatch.setattr(spool, "_READ_BYTES", 64)
    journal = Journal(tmp_path / "records.jsonl")
    for n in range(1000):
        journal.append({"n": n})
    seen: list[int] = []
    while waiting := journal.read():
        assert len(waiting) < 20
        seen += [record["n"] for record, _ in waiting]
        journal.confirm(waiting[-1][1])
    assert seen == list(range(1000))


def test_a_living_session_is_left_alone_and_a_dead_one_adopted(tmp_path):
    session = Session.create(tmp_path, "sqlite:///x.db", "run")
    session.records.append({"n": 1})
    assert list(left_behind(tmp_path)) == []
    session.close()
    assert list(left_behind(tmp_path, run_id="another")) == []
    (adopted,) = left_behind(tmp_path, run_id="run")
    assert values(adopted.records) == [1]
    adopted.close()


def test_a_half_made_session_is_no_session(tmp_path: Path):
    (tmp_path / "0001-1").mkdir()
    assert list(left_behind(tmp_path)) == []


def metric(n: int, **values: float) -> tuple[dict, int]:
    return {"kind": "metric", "values": values or {"loss": 0.5}, "time_ms": n, "step": n}, n


def test_neighbouring_metrics_travel_in_one_batch_of_at_most_1000():
    batch = next_batch([metric(n, a=0.1, b=0.2) for n in range(1, 700)])
    assert (len(batch.items), batch.end) == (1000, 500)


def test_a_status_does_not_overtake_metrics():
    waiting = [metric(1), ({"kind": "status", "status": "FINISHED", "time_ms": 2}, 2), metric(3)]
    first = next_batch(waiting)
    assert (first.end, first.status) == (1, None)
    second = next_batch(waiting[1:])
    assert (second.end, second.status["status"], second.items) == (2, "FINISHED", [])


@pytest.mark.parametrize(("kind", "limit"), [("param", 100), ("tag", 100)])
def test_a_batch_respects_mlflows_limits(kind, limit):
    batch = LogBatch([Item(kind, f"k{n}", "v") for n in range(limit)])
    assert not batch.takes([Item(kind, "one more", "v")])
    assert batch.takes([Item("metric", "loss", 0.5)])


def test_a_param_key_appears_once_in_a_batch():
    assert not LogBatch([Item("param", "lr", "1")]).takes([Item("param", "lr", "2")])
    assert next_batch([]) is None
