"""What a run writes into its folder, out_dir: config.json and the tokenizer, then checkpoints.

run/log.py writes metrics.jsonl there. weights.lock.Lock keeps other processes from writing there.
"""

import json
import os
from contextlib import suppress
from pathlib import Path

from config.command import warn
from config.preset import load_json
from data.files import open_regular, write_atomically
from model import parameter_count
from run import sharded
from run.machine import versions
from run.metrics import METRICS_FILE
from run.parallel import gather_on_main
from run.profile import TRACE_FILE
from run.setup import Run
from text.tokenizer import tokenizer_file
from weights import checkpoint
from weights.lock import Lock


def refuse_foreign(folder: Path) -> None:
    """ValueError if a run in this folder would replace a file that is not of a run."""
    begun = [*folder.glob("ckpt_*"), *folder.glob("best*")]  # run/setup.py says what is done then
    written = ("tokenizer.json", "tokenizer.model", "loss.png", TRACE_FILE)
    names = ("config.json", METRICS_FILE, *written)
    there = [name for name in names if os.path.lexists(folder / name)]
    if begun or not there:
        return
    with suppress(ValueError, OSError):  # then it is not of a run
        said = load_json(folder / "config.json")
        if "model_type" in said or {"out_dir", "data", "versions"} <= said.keys():
            return  # a Hugging Face folder is refused by run/setup.py
    raise ValueError(
        f"out_dir={folder} has a {there[0]}, which is not of a run and would be replaced: name "
        f"another folder"
    )


def claim_folder(run: Run, lock: Lock) -> None:
    """Main removes what a killed process has left in out_dir and writes config.json and the
    tokenizer, which also proves that it can. If it cannot, all ranks exit. `lock` is that of
    out_dir, which main has."""
    with run.ranks.all_or_exit():
        if run.ranks.is_main:
            run.lock = lock
            lock.clean_up()
            _write_config_and_tokenizer(run)


def _write_config_and_tokenizer(run: Run) -> None:
    about = {
        "versions": versions(),
        "parameters": parameter_count(run.config.model),
        "data": run.data.fingerprint,
    }
    text = json.dumps(run.config.flat() | about, indent=1) + "\n"
    tokenizer = tokenizer_file(run.data.folder)
    run.written = {"config.json": text.encode(), tokenizer.name: tokenizer.read_bytes()}
    for name in run.written:
        _write(run, name)


def _write(run: Run, name: str) -> None:
    if not run.folder.is_dir():  # the lock has made the folder, but it may have vanished since
        run.folder.mkdir(exist_ok=True)
        if run.lock is not None:
            run.lock.take_again()
    write_atomically(run.folder / name, lambda file: file.write(run.written[name]))


def _restore_what_was_lost(run: Run) -> None:
    """Writes config.json and the tokenizer again if somebody has deleted, changed or replaced one
    of them, or deleted the whole folder: without them, neither train.py nor sample.py could use the
    checkpoints. A failure is a warning, because it must not keep the weights from being saved."""
    lost = [name for name in run.written if not _is_as_written(run, name)]
    if lost and not run.folder.is_dir():
        warn(f"{run.folder} has vanished and is made again")
    for name in lost:
        path = run.folder / name
        if run.folder.is_dir():
            what = "is not as this run wrote it" if os.path.lexists(path) else "has vanished"
            warn(f"{path} {what} and is made again")
        try:
            if path.is_dir() and not path.is_symlink():
                path.rmdir()  # OSError if there is anything in it
            _write(run, name)
        except (OSError, ValueError) as error:
            warn(f"{path} could not be written again: {error}")


def _is_as_written(run: Run, name: str) -> bool:
    wanted = run.written[name]
    try:
        with open_regular(run.folder / name) as file:
            return file.read(len(wanted) + 1) == wanted
    except (OSError, ValueError):
        return False


def save_checkpoint(run: Run, required: bool) -> bool:
    """Saves a checkpoint that the run can go on from, and removes old ones. Returns whether the
    checkpoint was saved.

    If the disk fails, this warns and training goes on. But if the checkpoint is `required`, that
    raises OSError. FloatingPointError if a tensor holds NaN or Inf.
    """
    path = checkpoint.path_of(run.folder, run.step)
    saved = _save(run, path, run.optimizers.state_dict(), required)
    prune_checkpoints(run)
    return saved


def save_if_best(run: Run, val_loss: float) -> None:
    """Saves best.pt (a folder if the run is sharded) if val_loss is the lowest so far. It has no
    optimizer state, because it is for sampling and exporting, not for going on."""
    if val_loss < run.best_val_loss:
        before, run.best_val_loss = run.best_val_loss, val_loss
        if not _save(run, run.folder / "best.pt", optimizer={}, required=False):
            run.best_val_loss = before


def _save(run: Run, path: Path, optimizer: dict, required: bool) -> bool:
    config, ranks = run.config, run.ranks
    trained = {n: p.detach() for n, p in run.model.named_parameters() if p.requires_grad}
    state = {
        "step": run.step,
        "model": trained,
        "optimizer": optimizer,
        "scaler": run.scaler.state_dict(),
        "config": config.flat(),
        "data": run.data.fingerprint,
        "base": run.base,
        "best_val_loss": run.best_val_loss,
        "grad_norms": run.grad_norms,
    }
    if config.sharded:
        path = sharded.folder_of(path, run.step)
    check_lock(run)
    try:
        if ranks.is_main:
            _restore_what_was_lost(run)
        if config.sharded:
            sharded.save_parts(path, state, ranks)
        else:
            whole = gather_on_main(state, ranks)
            with ranks.all_or_none():
                if ranks.is_main:
                    checkpoint.save(path, whole)
    except OSError as error:
        first_line = str(error).partition("\n")[0]
        reason = f"{path} could not be saved ({first_line:.200})"
        if required:
            raise OSError(reason) from error
        if ranks.is_main:
            warn(f"{reason}; training goes on")
        return False
    run.damaged.discard(path)
    return True


def check_lock(run: Run) -> None:
    """To be called by all ranks before a run writes. If another process may have written to the
    folder, main raises FolderLost, and the other ranks exit."""
    with run.ranks.all_or_exit():
        if run.lock is not None:
            run.lock.check()


def prune_checkpoints(run: Run) -> None:
    """Removes the numbered checkpoints up to this step, except the newest `keep` of them and those
    of each `keep_every` steps."""
    config = run.config
    with run.ranks.all_or_none():
        if run.ranks.is_main:
            checkpoint.prune(run.folder, config.keep, run.step, run.damaged, config.keep_every)
