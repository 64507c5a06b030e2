"""Ranks meet, agree and give up together: what one of them cannot do, none does, and one line says so."""

import socket
from datetime import timedelta
from functools import partial

import pytest
import ranks
from faults.harness import Child, Ranks, command
from ranks import instead, only, trained

from data.prepare import prepare
from world import ALONE, join

WHOLE = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1",
         "MASTER_PORT": "1"}


def test_ranks_agree(tmp_path, data_folder):
    codes, texts = trained(3, tmp_path / "run", data_folder, partial(instead, ranks.agreeing))
    assert codes == [0, 0, 0], texts


def test_ranks_that_a_launcher_starts_again_do_not_ask_for_the_dead(tmp_path, data_folder):
    dead = Ranks(2, command(tmp_path / "run"), data_folder, partial(instead, ranks.dying))
    assert dead.wait() == [-9, -9]
    again = Ranks(2, command(tmp_path / "run"), data_folder, partial(instead, ranks.agreeing), dead.store)
    assert again.wait(30) == [0, 0], again.texts()


@pytest.mark.parametrize("rank", [0, 2])
@pytest.mark.parametrize("error", [ValueError("wrong"), OSError("wrong")], ids=["user", "machine"])
def test_a_fault_on_any_rank_is_one_line_by_main(tmp_path, data_folder, rank, error):
    codes, texts = trained(3, tmp_path / "run", data_folder, partial(instead, partial(ranks.failing, rank, error)))
    assert codes == [2, 1, 1] and texts == [f"error: {'rank 2: ' if rank else ''}wrong\n", "", ""]


@pytest.mark.parametrize("how", ["everywhere", "together"])
@pytest.mark.parametrize("rank", [0, 2])
def test_any_other_error_is_the_traceback_of_its_rank(tmp_path, data_folder, rank, how):
    codes, texts = trained(3, tmp_path / "run", data_folder,
                           partial(instead, partial(ranks.failing, rank, KeyError("bug"), how=how)))
    assert codes == [1, 1, 1] and texts.pop(rank).endswith("KeyError: 'bug'\n") and texts == ["", ""]


@pytest.mark.parametrize("variables, words", [
    ({"RANK": "0"}, "RANK are set but WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR, MASTER_PORT not: start"),
    ({"WORLD_SIZE": "2", "MASTER_ADDR": "x"}, "WORLD_SIZE, MASTER_ADDR are set but RANK, LOCAL_RANK"),
    (WHOLE | {"RANK": "-1", "MASTER_PORT": "ssh"}, "RANK=-1, MASTER_PORT=ssh: must be whole numbers"),
    (WHOLE | {"RANK": "2"}, "RANK=2 of WORLD_SIZE=2, LOCAL_RANK=0 of LOCAL_WORLD_SIZE=2 cannot be"),
    (WHOLE | {"LOCAL_RANK": "2"}, "cannot be"), (WHOLE | {"LOCAL_WORLD_SIZE": "3"}, "cannot be"),
    (WHOLE | {"WORLD_SIZE": "0"}, "cannot be")])
def test_variables_that_no_launcher_sets_are_one_line(start, tmp_path, monkeypatch, variables, words):
    monkeypatch.setattr("world.PATIENCE", timedelta(seconds=1))
    for name, text in variables.items():
        monkeypatch.setenv(name, text)
    code, _, err = start()
    assert code == 2 and err.startswith("error: ") and words in err and err.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_an_address_alone_does_not_make_a_rank(monkeypatch):
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", "1")
    assert join() is ALONE


def test_a_port_in_use_is_one_line(tmp_path, data_folder):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        child = Child(command(tmp_path / "run"), data_folder, variables=WHOLE | {"MASTER_PORT": str(port)})
        assert child.wait() == 2
    assert f"error: rank 0 on {socket.gethostname()} could not meet the others at 127.0.0.1:{port}: " in child.text()
    assert "Traceback" not in child.text() and not (tmp_path / "run").exists()


def test_a_rank_that_never_comes_is_one_line(tmp_path, data_folder):
    child = Child(command(tmp_path / "run"), data_folder, partial(ranks.impatient, 1),
                  variables=WHOLE | {"MASTER_PORT": "0"})
    assert child.wait() == 2 and child.text().count("error: rank 0 ") == 1 and "Traceback" not in child.text()


@pytest.mark.parametrize("knobs, words", [
    ({"batch_size": 7}, "batch_size=7 must be a multiple of the 2 ranks that share it: nearest are 6 and 8"),
    ({"batch_size": 1}, "batch_size=1 must be a multiple of the 2 ranks that share it: nearest is 2; or start fewer"),
    ({"micro_batch_size": 8}, "the 2 ranks that share it times micro_batch_size=8 (0 = automatic): nearest is 16"),
    ({"device": "cuda:0"}, "device=cuda:0 is one for 2 ranks: device=cuda gives each its own"),
    ({"watch": True, "parallel": "fsdp"}, "watch=true needs whole matrices on a device, but parallel=fsdp shares them"),
    ({"learing_rate": 1}, "did you mean learning_rate?"), ({"dataset": "missing"}, "no such data set")])
def test_what_the_user_got_wrong_is_one_line_and_leaves_nothing(tmp_path, data_folder, knobs, words):
    codes, (said, other) = trained(2, tmp_path / "run", data_folder, **knobs)
    assert codes == [2, 1] and not (tmp_path / "run").exists()
    assert said.startswith("error: ") and words in said and said.count("\n") == 1 and other == ""


def test_a_data_set_that_is_another_on_one_host_is_told(tmp_path, data_folder):
    text = (data_folder / "words.txt").read_text()
    (tmp_path / "other.txt").write_text(text[:-1] + "h")
    prepare([str(tmp_path / "other.txt")], tmp_path / "other", tokenizer="char")
    before = partial(only, 1, partial(ranks.other_data, tmp_path / "other"))
    codes, (said, other) = trained(2, tmp_path / "run", data_folder, before)
    assert codes == [2, 1] and not (tmp_path / "run").exists() and other == ""
    assert said == (f"error: rank 1: {tmp_path / 'other'} on {socket.gethostname()} is not the data set that rank 0 "
                    f"has there: copy it\n")
