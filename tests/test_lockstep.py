"""Two real ranks that share sharded models, each with work of its own, beside what whole models give."""

import threading
import time

import pytest
import torch.distributed as dist
from conftest import records_of, run_project

from srd_lightning.distributed import process_group
from srd_lightning.distributed.process_group import Signs
from srd_lightning.errors import RankError


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("together")
    run_project("together", folder, ranks=2, timeout=120)
    return records_of(folder, 2)


@pytest.mark.parametrize("model", ["plain", "tied", "lora"])
def test_answers_are_those_of_a_whole_model_and_it_is_left_as_it_was(model, ranks):
    for record in ranks:
        assert record[model]["found"] == record[model]["expected"]
        assert record[model]["left"] == [True, True, True]  # in training mode, random state, spread
    assert [len(answers) for answers in ranks[0][model]["found"]] == [4, 3, 0]
    assert [len(answers) for answers in ranks[1][model]["found"]] == [0, 0, 4]
    assert len(set(ranks[0][model]["found"][0])) > 1


def test_each_rank_calls_a_model_as_often_as_it_needs(ranks):
    assert [record["scoring"] for record in ranks] == [
        {"equal": [True] * 3, "answered": True},
        {"equal": [True] * 7, "answered": True},
    ]


def test_loaders_may_give_ranks_unlike_numbers_of_batches_to_answer(ranks):
    assert [record["answering"] for record in ranks] == [
        {"equal": [True] * 3, "left": [True] * 3},
        {"equal": [True], "left": [True] * 3},
    ]


def test_a_model_that_has_answered_trains_as_one_that_has_not(ranks):
    assert [record["training"] for record in ranks] == [{"equal": True}] * 2


def test_digests_say_in_which_type_a_model_runs(ranks):
    for record in ranks:
        assert record["rounded"]["same"] == record["rounded"]["half"] == [True, True]
    assert [len(record["rounded"]["answers"]) for record in ranks] == [4, 0]


def test_a_copy_is_made_on_the_first_rank_alone(ranks):
    assert ranks[0]["copying"]["equal"]
    assert ranks[0]["copying"]["tied"]
    assert ranks[1]["copying"]["names"] == ranks[0]["copying"]["names"]


def test_a_rank_that_fails_tells_the_others_why(ranks):
    assert ranks[1]["failing"]["error"] == "OSError: no space left on the disk"
    assert ranks[0]["failing"]["error"] == "RankError: process 1 failed: OSError: no space left on the disk"


def test_a_rank_waits_for_one_with_more_to_do(ranks):
    assert [record["waiting"]["done"] for record in ranks] == [0, 3]


def look_on(signs):
    for _ in range(1000):
        time.sleep(0.02)
        signs.check()


class TestSigns:
    @pytest.fixture
    def two(self, monkeypatch):
        monkeypatch.setattr(process_group, "BEAT", 0.01)
        store = dist.HashStore()
        return [Signs(store, "work", rank, 2) for rank in (0, 1)]

    def test_a_rank_without_a_heartbeat_is_missed(self, two, monkeypatch):
        first, second = two
        with first.heartbeat():
            with second.heartbeat():
                first.check()
            monkeypatch.setattr(process_group, "PATIENCE", 0.05)
            with pytest.raises(RankError, match="process 1 is gone: it was killed"):
                look_on(first)

    def test_one_that_waits_long_is_not(self, two, monkeypatch):
        monkeypatch.setattr(process_group, "PATIENCE", 0.0)
        first, second = two
        for _ in range(3):  # between two looks its heart has beaten
            second._store.add(second._beat(1), 1)
            time.sleep(0.02)
            first.check()

    def test_a_failure_is_heard_amid_work(self, two):
        """The rank that fails may have the store, and waits until the others know why."""
        first, second = two
        with first.heartbeat():
            failing = threading.Thread(target=second.fail, args=["process 1 failed: OSError: full"])
            failing.start()
            failing.join()
            assert first._reason is not None
        with pytest.raises(RankError, match="process 1 failed: OSError: full"):
            first.check()
