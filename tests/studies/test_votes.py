"""The log of votes: nothing acknowledged is lost or doubled, and the index is only a view of it."""

from __future__ import annotations

import errno
import json
import os
import random
import signal
import threading
import time
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import pytest
from forked import Child

from loopos.config.diagnostics import DataError, UserError
from loopos.storage.durable import StorageError
from loopos.storage.shared_log import SharedLog
from loopos.studies.items import Item
from loopos.studies.study import Study
from tests.studies.study_makers import Clock, label_all, pair, prefers, study_in


def lines(folder: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (folder / "votes.jsonl").read_text(encoding="utf-8").splitlines()]


def test_a_second_append_with_the_same_key_returns_the_first(tmp_path: Path) -> None:
    with study_in(tmp_path / "s", 2) as study:
        assigned = study.next_item("ana")
        assert assigned is not None
        first = study.vote(assigned.key, {"choice": "left", "strength": 3}, annotator="ana", key="k")
        size = (tmp_path / "s" / "votes.jsonl").stat().st_size
        second = study.vote(assigned.key, {"choice": "right"}, annotator="ana", key="k")
        assert first.is_new
        assert not second.is_new
        assert second.event == first.event
        assert (tmp_path / "s" / "votes.jsonl").stat().st_size == size
        with pytest.raises(UserError, match=r'assignment: got ".*", which "k" answers; undo or edit that first'):
            study.vote(assigned.key, {"choice": "right"}, annotator="ana", key="other")


def test_undo_and_edit_change_what_is_in_force_and_never_the_log(tmp_path: Path) -> None:
    with study_in(tmp_path / "s", 2) as study:
        one, other = label_all(study, "ana", lambda study, assigned: {"choice": "left"})
        study.edit("ana-0", {"choice": "tie", "comment": "both are fine"}, annotator="ana", key="e1")
        study.edit("ana-0", {"choice": "both_bad", "comment": "after all"}, annotator="ana", key="e2")
        assert [vote.ballot.choice for vote in study.votes()] == ["both_bad", "left"]
        study.undo("e2", annotator="ana", key="u1")
        assert [vote.ballot.choice for vote in study.votes()] == ["tie", "left"]
        study.undo("ana-1", annotator="ana", key="u2")
        assert [vote.key for vote in study.votes()] == ["ana-0"]
        again = study.next_item("ana")
        assert again is not None
        assert (again.key, again.item, again.left) == (other.key, other.item, other.left)
        study.vote(again.key, {"choice": "right"}, annotator="ana", key="new")
        assert [vote.key for vote in study.votes()] == ["ana-0", "new"]
        assert [line["kind"] for line in lines(tmp_path / "s")].count("vote") == 3
        with pytest.raises(UserError, match="taken back already"):
            study.undo("ana-1", annotator="ana", key="u3")
        with pytest.raises(UserError, match=r'got "ana-0" \(vote by ana\); expected the key of a vote.* by bo'):
            study.undo("ana-0", annotator="bo", key="u4")
        assert one.item != other.item


def test_the_index_is_made_again_from_the_log_and_is_equal(tmp_path: Path) -> None:
    folder = tmp_path / "s"
    with study_in(folder, 30, repeat_fraction=0.3, overlap=2) as study:
        label_all(study, "ana", prefers("A"))
        label_all(study, "bo", prefers("B"), most=9)
        study.edit("bo-1", {"choice": "tie", "flag": "not English"}, annotator="bo", key="e")
        study.undo("ana-2", annotator="ana", key="u")
        study.flag(study.votes()[5].item, "a joke", annotator="bo", key="f")
        assigned = study.next_item("bo")
        assert assigned is not None
        study.skip(assigned.key, annotator="bo", key="s")
        live, votes = study.index_dump(), study.votes(repeats=True)
    assert len(votes) > 30
    index = folder / "index.sqlite"
    content = index.read_bytes()
    # Missing, of another log, cut off, and no database at all.
    for damage in (None, content[: len(content) // 2], b"no database", b""):
        index.unlink()
        if damage is not None:
            index.write_bytes(damage)
        with Study.open(folder, Clock()) as study:
            assert study.index_dump() == live
            assert study.votes(repeats=True) == votes
    log = folder / "votes.jsonl"
    whole = log.read_bytes()
    shorter = whole[: whole.rindex(b"\n", 0, len(whole) - 1) + 1]
    log.write_bytes(shorter)
    with Study.open(folder, Clock()) as study:
        assert study.index_dump() != live
    log.write_bytes(whole.replace(b'"choice":"tie"', b'"choice":"both_bad"'))
    with Study.open(folder, Clock()) as study:
        assert "both_bad" in str(study.index_dump()["votes"])


def test_a_torn_line_is_removed_and_a_whole_one_without_newline_stays(tmp_path: Path) -> None:
    folder = tmp_path / "s"
    with study_in(folder, 3) as study:
        label_all(study, "ana", prefers("A"), most=2)
    log = folder / "votes.jsonl"
    whole = log.read_bytes()
    for cut in (1, 20, len(whole.splitlines()[-1]) - 1):
        log.write_bytes(whole + whole.splitlines()[-1][:cut])
        with Study.open(folder, Clock()) as study:
            assert study.progress().torn_bytes == cut
            assert len(study.votes()) == 2
        assert log.read_bytes() == whole
    log.write_bytes(whole[:-1])
    with Study.open(folder, Clock()) as study:
        assert len(study.votes()) == 2
    assert log.read_bytes() == whole


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"kind": "ballot"}', 'votes.jsonl:2: kind: got "ballot"; expected "assignment", "vote"'),
        ("nonsense}", "votes.jsonl:2: kind: got text that is not an event"),
        (
            '{"kind": "undo", "key": "k", "time": "noon", "annotator": "ana", "target": "t"}',
            'votes.jsonl:2:38: time: got "noon" (text); expected a number',
        ),
        ('{"kind": "undo", "key": "k", "time": 1, "annotator": "ana"}', "votes.jsonl:2:1: target: got nothing"),
    ],
)
def test_a_line_that_is_no_event_is_named(tmp_path: Path, line: str, message: str) -> None:
    folder = tmp_path / "s"
    with study_in(folder, 1) as study:
        study.next_item("ana")
    with (folder / "votes.jsonl").open("a") as log:
        log.write(line + "\n")
    with pytest.raises(DataError) as caught:
        Study.open(folder)
    assert message in str(caught.value)


def test_threads_and_processes_append_whole_lines(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    logs = [SharedLog(path), SharedLog(path)]

    def append(log: SharedLog, who: int) -> None:
        for number in range(50):
            log.append(json.dumps([who, number, "x" * 300]).encode() + b"\n")

    threads = [threading.Thread(target=append, args=(logs[who % 2], who)) for who in range(4)]
    # The forked child has the parent's open files, and must not take its lock for its own.
    with Child(lambda: append(logs[0], 4)) as child:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert child.wait() == 0, child.errors
    for log in logs:
        log.close()
    found = [json.loads(line)[:2] for line in path.read_text().splitlines()]
    assert sorted(found) == [[who, number] for who in range(5) for number in range(50)]
    # Each writer's lines are in its own order.
    assert all([n for w, n in found if w == who] == list(range(50)) for who in range(5))


def client(folder: Path, annotator: str, begin: int) -> None:
    """Votes until nothing is left, and prints the key of each vote that was acknowledged."""
    with Study.open(folder) as study:
        print("open")
        while (assigned := study.next_item(annotator)) is not None:
            key = f"{annotator}-{begin}"
            study.vote(assigned.key, {"choice": "left", "seconds": 1.0}, annotator=annotator, key=key)
            print(key)
            begin += 1


def test_kill_9_at_any_moment_loses_no_acknowledged_vote_and_doubles_none(tmp_path: Path) -> None:
    folder = tmp_path / "s"
    study_in(folder, 600, overlap=2, repeat_fraction=0.1).close()
    draw, acknowledged = random.Random(7), list[str]()
    num_kills = int(os.environ.get("LOOPOS_TEST_KILLS", "20"))
    for kill in range(0, num_kills, 2):
        first, second = (partial(client, folder, f"annotator{who}", kill * 10_000) for who in range(2))
        with Child(first) as one, Child(second) as other:
            until = time.monotonic() + 60
            # Some are killed while they open the study, others after a vote or two.
            least = 1 + kill // 2 % 3
            while time.monotonic() < until and not all(
                each.poll() is not None or each.output.count("\n") >= least for each in (one, other)
            ):
                time.sleep(0.002)
            time.sleep(draw.random() * 0.05)
            for each in (one, other):
                each.kill()
            for each in (one, other):
                assert each.wait() in (-signal.SIGKILL, 0), each.errors
                acknowledged += each.output.splitlines()[1:]
    with Study.open(folder) as study:
        recorded = [vote.key for vote in study.votes(repeats=True)]
        assert len(acknowledged) >= num_kills // 2
        assert set(acknowledged) <= set(recorded)
        assert len(recorded) == len(set(recorded))
        own = [(vote.item, vote.annotator) for vote in study.votes()]
        assert len(own) == len(set(own))
        live = study.index_dump()
    (folder / "index.sqlite").unlink()
    with Study.open(folder) as study:
        assert study.index_dump() == live


def test_processes_share_the_queue(tmp_path: Path) -> None:
    folder = tmp_path / "s"
    study_in(folder, 60, repeat_fraction=0.2).close()
    with ExitStack() as stack:
        children = [stack.enter_context(Child(partial(client, folder, f"annotator{who}", 0))) for who in range(4)]
        for child in children:
            assert child.wait() == 0, child.errors
    with Study.open(folder) as study:
        # An item that one has is given to nobody else.
        assert sorted(vote.item for vote in study.votes()) == sorted(study.items)


def test_a_vote_that_cannot_be_flushed_is_not_recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with study_in(tmp_path / "s", 1) as study:
        assigned = study.next_item("ana")
        assert assigned is not None
        size = (tmp_path / "s" / "votes.jsonl").stat().st_size

        def refuse(descriptor: int) -> None:
            raise OSError(errno.EIO, "Input/output error")

        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", refuse)
            with pytest.raises(StorageError, match="nothing was recorded: check the disk, then try again"):
                study.vote(assigned.key, {"choice": "left"}, annotator="ana", key="k")
        assert (tmp_path / "s" / "votes.jsonl").stat().st_size == size
        assert study.votes() == []
        assert study.vote(assigned.key, {"choice": "left"}, annotator="ana", key="k").is_new


def test_a_log_that_is_replaced_while_it_is_open_is_read_anew(tmp_path: Path) -> None:
    folder = tmp_path / "s"
    with study_in(folder, 4) as study:
        label_all(study, "ana", prefers("A"), 2)
        log = folder / "votes.jsonl"
        early = log.read_bytes()
        assigned = study.next_item("ana")
        assert assigned is not None
        study.vote(assigned.key, {"choice": "tie"}, annotator="ana", key="third")
        # A copy of another history, which is longer.
        copy = folder / "copy"
        copy.write_bytes(
            early.replace(b'"ana', b'"someone else') + early.splitlines()[-1].replace(b"ana-1", b"x") + b"\n"
        )
        copy.replace(log)
        assert [vote.annotator for vote in study.votes()][:2] == ["someone else"] * 2
        assert study.index_dump()["state"][0][0] == log.stat().st_size


def test_votes_of_another_mode_are_refused(tmp_path: Path) -> None:
    folder = tmp_path / "s"
    with study_in(folder, 2) as study:
        label_all(study, "ana", prefers("A"))
    settings = (folder / "study.json").read_text()
    (folder / "study.json").write_text(settings.replace('"compare"', '"thumbs"'))
    with pytest.raises(UserError, match=r'study.json: mode: got "thumbs"; expected "compare", which the vote "ana-0"'):
        Study.open(folder)


def test_prompts_wait_until_an_item_answers_them(tmp_path: Path) -> None:
    with study_in(tmp_path / "s") as study:
        study.add([Item(prompt=f"question {number}") for number in range(3)])
        assert study.next_item("ana") is None
        study.add([pair(1)])
        assert [item.prompt for item in study.waiting()] == ["question 0", "question 2"]
        assert (study.progress().items, study.progress().waiting, study.progress().target) == (4, 2, 1)


def test_items_are_added_once_and_a_changed_line_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "s"
    with study_in(folder, 3) as study:
        other = Study.open(folder)
        assert study.add([pair(2), pair(3), pair(3)]).added == 1
        # Another process sees them.
        assert len(other.items) == 4
        other.close()
    text = (folder / "items.jsonl").read_text()
    (folder / "items.jsonl").write_text(text.replace("answer 1 of B", "another answer"))
    with pytest.raises(DataError, match=r'items.jsonl:2: id: got "\w{16}"; expected "\w{16}", the digest'):
        Study.open(folder)
    (folder / "items.jsonl").write_text('{"prompt": "p", "responses": [{"content": ""}]}\n')
    with pytest.raises(DataError, match=r"items.jsonl:1:\d+: responses.0.content: got "):
        Study.open(folder)
