"""Ranks meet, agree and give up together: what one of them cannot do, none does, and one line says
so."""

import socket
from datetime import timedelta
from functools import partial

import pytest
import ranks
from conftest import slow
from faults.harness import Child, RankProcesses, train_ranks
from faults.launched import own_data
from ranks import instead

from data.prepare import prepare
from run.ranks import ALONE, LOST_RANK, Ranks, join

LAUNCHED = {
    "RANK": "0",
    "WORLD_SIZE": "2",
    "LOCAL_RANK": "0",
    "LOCAL_WORLD_SIZE": "2",
    "MASTER_ADDR": "127.0.0.1",
    "MASTER_PORT": "1",
}


def test_ranks_agree_and_those_started_again_do_not_ask_for_the_dead(tmp_path):
    dead = RankProcesses(2, tmp_path / "run", partial(instead, ranks.die))
    assert dead.end()[0] == [-9, -9]
    again = RankProcesses(2, tmp_path / "run", partial(instead, ranks.agree), dead.store)
    codes, texts = again.end(60)
    assert codes == [0, 0], texts
    codes, texts = train_ranks(3, tmp_path / "run", partial(instead, ranks.agree))
    assert codes == [0, 0, 0], texts


@pytest.mark.parametrize(
    "rank, error",
    [
        (0, OSError("wrong")),
        (2, ValueError("wrong")),
        slow(0, ValueError("wrong")),
        slow(2, OSError("wrong")),
    ],
)
def test_a_fault_on_any_rank_is_one_line_by_main(tmp_path, rank, error):
    act = partial(instead, partial(ranks.fail, rank, error, "all_or_exit"))
    codes, texts = train_ranks(3, tmp_path / "run", act)
    assert codes == [2, 1, 1]
    assert texts == [f"error: {'rank 2: ' if rank else ''}wrong\n", "", ""]


@pytest.mark.parametrize(
    "rank, how",
    [
        (0, "all_or_none"),
        (2, "all_or_exit"),
        slow(0, "all_or_exit"),
        slow(2, "all_or_none"),
    ],
)
def test_any_other_error_is_the_traceback_of_its_rank(tmp_path, rank, how):
    act = partial(instead, partial(ranks.fail, rank, KeyError("bug"), how))
    codes, texts = train_ranks(3, tmp_path / "run", act)
    assert codes == [1, 1, 1]
    assert texts.pop(rank).endswith("KeyError: 'bug'\n") and texts == ["", ""]


@pytest.mark.parametrize(
    "words, lost",
    [
        ("Application timeout caused pair closure", True),  # as a backward has shown it
        ("[../third_party/gloo/gloo/pair.cc:537] Connection closed by peer [127.0.0.1]:1", True),
        ("[/pytorch/gloo/buffer.cc:73] Timed out waiting 5000ms for recv", True),
        (
            "NCCL error in: ../ProcessGroupNCCL.cpp:3763, remote process exited or there was a "
            "network error, NCCL version 2.28.8\nncclRemoteError: A call failed",
            True,
        ),
        (
            "NCCL error in: ../ProcessGroupNCCL.cpp:1275, internal error, NCCL version 2.14.3\n"
            "ncclInternalError: Internal check failed.\nLast error:\n"
            "Net : Connection closed by remote peer user<50260>",
            True,
        ),
        ("[Rank 0] Watchdog caught collective operation timeout: WorkNCCL(SeqNum=15", True),
        ("NCCL error in: ../NCCLUtils.cpp:93, invalid usage, NCCL version 2.27.5", False),
        ("I/O operation on closed file", False),
        ("a test says: Connection closed", False),
    ],
)
def test_the_words_of_gloo_and_nccl_for_a_rank_that_has_gone_are_known(words, lost):
    assert bool(LOST_RANK.search(words)) is lost


def test_a_rank_whose_peer_hangs_leaves_with_one_line_when_its_patience_is_over(tmp_path):
    hang = partial(instead, partial(ranks.hang, 1))
    codes, texts = train_ranks(2, tmp_path / "run", hang)
    assert codes == [1, 0]
    assert texts[0].startswith("error: another rank has gone or does not answer (Timed out")
    assert texts[0].count("\n") == 1


@pytest.mark.parametrize(
    "device, size, limited", [("cuda:1", 2, 1), ("cuda:0", 1, 0), ("cpu", 2, 0)]
)
def test_patience_is_short_between_gpus_alone(monkeypatch, device, size, limited):
    limits = []
    monkeypatch.setattr("run.ranks.limit_waits", lambda *limit: limits.append(limit))
    Ranks(size=size).expect_answers(device)
    assert limits == [(device, timedelta(minutes=5))] * limited


MISSING = "LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR, MASTER_PORT not: start"


@pytest.mark.parametrize(
    "variables, words",
    [
        ({"RANK": "0"}, f"RANK are set but WORLD_SIZE, {MISSING}"),
        (
            {"WORLD_SIZE": "2", "MASTER_ADDR": "x"},
            "WORLD_SIZE, MASTER_ADDR are set but RANK, LOCAL_RANK",
        ),
        (
            LAUNCHED | {"RANK": "-1", "MASTER_PORT": "ssh"},
            "RANK=-1, MASTER_PORT=ssh: must be whole numbers",
        ),
        (
            LAUNCHED | {"RANK": "2"},
            "RANK=2 of WORLD_SIZE=2, LOCAL_RANK=0 of LOCAL_WORLD_SIZE=2 cannot be",
        ),
        (LAUNCHED | {"LOCAL_RANK": "2"}, "cannot be"),
        (LAUNCHED | {"LOCAL_WORLD_SIZE": "3"}, "cannot be"),
        (LAUNCHED | {"WORLD_SIZE": "0"}, "cannot be"),
    ],
)
def test_variables_that_no_launcher_sets_are_one_line(
    start, tmp_path, monkeypatch, variables, words
):
    for name, text in variables.items():
        monkeypatch.setenv(name, text)
    code, _, err = start()
    assert code == 2 and err.startswith("error: ") and words in err and err.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_an_address_alone_does_not_make_a_rank(monkeypatch):
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", "1")
    assert join() is ALONE


def test_a_port_in_use_and_a_rank_that_never_comes_are_one_line(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        for where, before in ((port, None), ("0", partial(ranks.be_impatient, 1))):
            variables = LAUNCHED | {"MASTER_PORT": where}
            code, text = Child(tmp_path / "run", before, variables=variables).end()
            line = f"error: rank 0 on {socket.gethostname()} could not meet the others at 127.0.0.1"
            assert code == 2 and text.count(f"{line}:{where}: ") == 1
            assert "Traceback" not in text and not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "knobs, words",
    [
        (
            {"batch_size": 7},
            "batch_size=7 must be a multiple of the 2 ranks that share it: nearest are 6 and 8",
        ),
        (
            {"batch_size": 1},
            "must be a multiple of the 2 ranks that share it: nearest is 2; or start fewer",
        ),
        (
            {"micro_batch_size": 8},
            "the 2 ranks that share it times micro_batch_size=8 (0 = automatic): nearest is 16",
        ),
        ({"device": "cuda:0"}, "device=cuda:0 is one for 2 ranks: device=cuda gives each its own"),
        (
            {"watch": True, "parallel": "fsdp"},
            "watch=true needs whole matrices on a device, but parallel=fsdp shares them",
        ),
        ({"learing_rate": 1}, "did you mean learning_rate?"),
        ({"dataset": "missing"}, "no such data set"),
    ],
)
def test_what_the_user_got_wrong_is_one_line_and_leaves_nothing(tmp_path, knobs, words):
    codes, (said, other) = train_ranks(2, tmp_path / "run", **knobs)
    assert codes == [2, 1] and not (tmp_path / "run").exists()
    assert said.startswith("error: ") and words in said and said.count("\n") == 1 and other == ""


def test_a_data_set_that_is_another_on_one_host_is_told(tmp_path):
    (tmp_path / "other.txt").write_text("the cat sat on a mat\n" * 999)
    prepare([str(tmp_path / "other.txt")], tmp_path / "other", tokenizer="char")
    before = partial(own_data, tmp_path / "other", None)
    codes, (said, other) = train_ranks(2, tmp_path / "run", before)
    assert codes == [2, 1] and not (tmp_path / "run").exists() and other == ""
    assert said == (
        f"error: rank 1: {tmp_path / 'other'} on {socket.gethostname()} is not the data set that "
        f"rank 0 has there: copy it\n"
    )
