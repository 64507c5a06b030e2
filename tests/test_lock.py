"""A folder has one writer, and nobody has to clean up after it."""

import multiprocessing
import os
import signal
import stat

import pytest

from weights.lock import FolderLost, Lock


def hold(folder, held):
    with Lock(folder):
        held.set()
        signal.pause()


@pytest.fixture
def holder(tmp_path):
    """Another process that has tmp_path/run."""
    spawn = multiprocessing.get_context("spawn")
    held = spawn.Event()
    process = spawn.Process(target=hold, args=(tmp_path / "run", held))
    process.start()
    assert held.wait(60)
    yield process
    process.kill()
    process.join()


def test_a_second_writer_is_told_who_the_first_is(tmp_path, holder):
    with pytest.raises(
        ValueError,
        match=f"run is in use by process {holder.pid} on .*: wait until it has ended, or",
    ):
        Lock(tmp_path / "run")


def test_kill_9_leaves_no_lock(tmp_path, holder):
    holder.kill()
    holder.join()
    assert (tmp_path / "run" / ".lock").exists()
    with Lock(tmp_path / "run"):
        pass


def test_nothing_stays_of_a_lock(tmp_path):
    with Lock(tmp_path / "new"):
        assert (tmp_path / "new" / ".lock").exists()
    assert not (tmp_path / "new").exists()
    with Lock(tmp_path / "used"):
        (tmp_path / "used" / "file").touch()
    assert os.listdir(tmp_path / "used") == ["file"]
    (tmp_path / "empty").mkdir()
    with Lock(tmp_path / "empty"):
        pass
    assert (tmp_path / "empty").exists()


def test_a_lock_whose_file_was_removed_by_the_one_before_is_taken_again(tmp_path, monkeypatch):
    """Between our opening the file and locking it, the process that had it ends and removes it."""
    taken, calls = Lock._locked_file, []

    def late(self):
        file = taken(self)
        calls.append(file)
        if len(calls) == 1:
            self.path.unlink()
        return file

    monkeypatch.setattr(Lock, "_locked_file", late)
    with Lock(tmp_path / "run"):
        assert len(calls) == 2
        with pytest.raises(ValueError, match="in use"):
            Lock(tmp_path / "run")


def test_only_our_own_unfinished_files_are_removed(tmp_path):
    ours = [
        ".ckpt_00000004.pt.tmp",
        ".best.pt.tmp",
        ".metrics.jsonl.tmp",
        ".config.json.tmp",
        ".tokenizer.model.tmp",
        ".loss.png.tmp",
        ".ckpt_00000004.shards.old",
    ]
    others = [".notes.tmp", "ckpt_00000004.pt", "x.json.tmp", ".mine.json.tmp", ".my.shards.old"]
    others += [".ckpt_mine.pt.tmp", ".tokenizer.txt.tmp", "ckpt_00000004.shards"]
    for name in ours + others:
        (tmp_path / name).touch()
    with Lock(tmp_path) as lock:
        assert set(ours) < set(os.listdir(tmp_path))  # the command may still be refused
        lock.clean_up()
        assert sorted(os.listdir(tmp_path)) == sorted([*others, ".lock"])


@pytest.mark.parametrize(
    "make",
    [
        lambda lock: lock.symlink_to("../precious"),
        lambda lock: os.link(lock.parents[1] / "precious", lock),
        lambda lock: os.mkfifo(lock),
        lambda lock: lock.mkdir(),
        lambda lock: os.mknod(lock, stat.S_IFSOCK | 0o600),
    ],
    ids=["a link", "another name", "a FIFO", "a folder", "a socket"],
)
def test_a_lock_that_is_not_a_file_of_its_own_is_told_and_not_written_to(tmp_path, make):
    (tmp_path / "precious").write_text("text")
    (tmp_path / "run").mkdir()
    make(tmp_path / "run" / ".lock")
    with pytest.raises(ValueError, match="lock is not a file of its own, as a lock is: remove it"):
        Lock(tmp_path / "run")
    assert (tmp_path / "precious").read_text() == "text"


@pytest.mark.parametrize("name", ["cells", "tensorboard", "wandb"])
def test_a_folder_inside_that_is_a_link_is_refused(tmp_path, name):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / name).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match=f"{name} is a link, and nothing is written through one"):
        Lock(tmp_path / "run")


def test_an_owner_notices_that_the_folder_is_not_its_own_any_more(tmp_path):
    run, file = tmp_path / "run", tmp_path / "run" / "file"
    with Lock(run) as lock:
        file.touch()
        lock.check()
        lock.path.unlink()
        with pytest.raises(FolderLost, match="nothing more is written there"):
            lock.check()
        with Lock(run):  # another process
            with pytest.raises(FolderLost):
                lock.check()
            with pytest.raises(ValueError, match="in use"):
                lock.take_again()
        run.rename(tmp_path / "moved")
        lock.check()  # nobody has the folder: it may be made and locked again
        run.mkdir()
        lock.take_again()
        lock.check()
        with pytest.raises(ValueError, match="in use"):
            Lock(run)


def test_an_emptied_folder_is_locked_again_before_anything_is_written(tmp_path, monkeypatch):
    run = tmp_path / "run"
    with Lock(run) as lock:
        run.rename(tmp_path / "moved")
        run.mkdir()
        lock.check()
        with pytest.raises(ValueError, match="in use"):
            Lock(run)
        lock.check()
        run.rename(tmp_path / "moved again")
        run.mkdir()
        another = []  # is faster
        monkeypatch.setattr(lock, "take_again", lambda: another.append(Lock(run)) or Lock(run))
        with pytest.raises(FolderLost, match="nothing more is written there"):
            lock.check()
        another[0].file.close()


def test_a_file_is_no_folder(tmp_path):
    (tmp_path / "run").touch()
    with pytest.raises(ValueError, match="is a file: name a folder"):
        Lock(tmp_path / "run")


def test_a_file_system_without_locks_is_told(tmp_path, monkeypatch, capsys):
    def refuse(*_):
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr("fcntl.flock", refuse)
    with Lock(tmp_path / "run"):
        pass
    assert (
        "cannot be locked here ([Errno 38] Function not implemented): let no other"
        in capsys.readouterr().err
    )
