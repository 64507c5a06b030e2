"""What a run reports: a summary, then a bar or log lines, metrics.jsonl, and records to a tracker.

Reading order: Log; summary, which is printed first; the trackers.
"""

import json
import math
import shutil
import signal
import sys
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple, TextIO

from tqdm import tqdm

from config.command import counted, one_line, printable, reader_left, shell_path, warn
from data.files import is_own_file, write_atomically
from data.loader import Dataset, val_starts
from data.prepare import XZ_LIMIT
from model import parameter_count
from run.evaluate import bytes_per_predicted_token
from run.folder import check_lock
from run.machine import flops_per_token, matmul_rate, memory_estimate, peak_memory
from run.metrics import METRICS_FILE, has_evaluation, read_metrics, training_seconds
from run.profile import Profiler
from run.setup import Run
from run.signals import Interrupts
from weights import checkpoint
from weights.lock import FolderLost
from weights.lora import adapter_count

# Short enough that a bar is left on a terminal of 80 columns.
BAR = "{percentage:3.0f}% |{bar}| {n_fmt}/{total_fmt} [{remaining} left{postfix}]"


class Tracker(NamedTuple):
    """Where main sends its records, beside metrics.jsonl."""

    send: Callable[[dict[str, Any]], object]
    finish: Callable[[], object]  # waits until all has arrived


def is_finished(run: Run) -> bool:
    """Whether nothing is left to do: the last step is done, saved and evaluated."""
    if run.step < run.config.max_iters or not run.config.max_iters:  # which is not fixed yet
        return False
    evaluated = run.ranks.is_main and has_evaluation(read_metrics(run.folder), run.step)
    return run.ranks.from_main(evaluated)


class Log:
    """The records of one run. All ranks keep them, and only main writes and prints them.

    Once training has begun, no failure here stops it: a file or a tracker that fails is a warning.
    There is one exception: another process has taken the folder, which raises FolderLost.
    If the reader of our output has gone (`| head`), the run is asked to save and end, as after a
    signal.
    """

    def __init__(self, run: Run, tracker: Tracker | None, interrupts: Interrupts):
        self.run, config, self.ranks = run, run.config, run.ranks
        self.folder, self.device = run.folder, config.device
        self.last_step, self.interval = config.max_iters, config.log_interval
        self.tracker, self.interrupts = tracker, interrupts
        self.tokens_per_step = config.batch_size * config.model.block_size
        self.flops_per_step = self.tokens_per_step * flops_per_token(config.model, config.lora_rank)
        # FLOP/s of large matrix products on all ranks: the training speed is compared with this.
        # Not on a CPU: what else it does while this is measured would decide the share.
        self.matmul_rate = None
        if config.device != "cpu":
            self.matmul_rate = self.ranks.size * matmul_rate(config.device, config.dtype)
        self.file_is_ours = False  # whether metrics.jsonl holds this run's records and no others
        self.recent: list[float] = []  # seconds of the steps since the last record
        self.records: list[dict[str, Any]] = []
        if self.ranks.is_main:
            # Later records are dropped, because a resumed run does their steps once more.
            before = read_metrics(run.past) if run.past else []
            self.records = [r for r in before if r["step"] <= run.step]
            self._tell_of_missing_records()
            try:
                self._write_all()
            except OSError as error:
                warn(f"metrics.jsonl failed, it is written again with the next record: {error}")
        measured = None, ""
        with self.ranks.all_or_exit():
            if self.ranks.is_main:
                measured = bytes_per_token_of(run)
        self.records = self.ranks.from_main(self.records)
        self.evaluated = max((r["step"] for r in self.records if "val_loss" in r), default=0)
        # The losses of the steps since the evaluation before, as far as they are known: of the
        # steps before a resume, only those that became records are.
        self.losses = {r["step"]: r["loss"] for r in self.records if "loss" in r}
        self.bytes_per_token, withheld = self.ranks.from_main(measured)
        self.bar = tqdm(
            total=self.last_step,
            initial=run.step,
            disable=not (self.ranks.is_main and sys.stderr.isatty()),
            bar_format=BAR,
            dynamic_ncols=True,
            file=sys.stderr,
        )
        if self.ranks.is_main:
            self.line(summary(run))
            if withheld:
                self.line(f"warning: bits per byte are withheld: {withheld}")
        self.profiler = Profiler(run, self.line)

    def _tell_of_missing_records(self) -> None:
        """A warning if a resumed run finds no record of its first step, or of the last one before
        the checkpoint that was due."""
        step, before = self.run.step, self.run.config_before or self.run.config
        if not step:
            return
        due = step // before.log_interval * before.log_interval
        due = step if step == before.max_iters else max(1, due)
        # A run of no more steps than it had already has only evaluated the last one.
        recorded = {r["step"] for r in self.records if "loss" in r or r["step"] == step}
        file, last = self.folder / METRICS_FILE, max(recorded, default=0)
        if last < due:
            warn(
                f"{file} ends at step {last}, and the run goes on from {step}: the records between "
                f"them are missing"
            )
        elif 1 not in recorded:
            warn(f"{file} has no record of step 1: its beginning is missing")

    def __enter__(self) -> "Log":
        return self

    def __exit__(self, kind: type | None, *_) -> None:
        if kind is None:  # else a second signal ends the process at once
            self.profiler.stop()
            if self.tracker is not None:
                self._try_tracker(self.tracker.finish)
        self.bar.close()

    def line(self, text: str, stream: TextIO | None = None) -> None:
        """Prints a line above the bar, to stdout unless `stream` is given. Only main prints."""
        if not self.ranks.is_main:
            return
        stream = stream or sys.stdout
        self.bar.write(printable(text), file=stream)
        stream.flush()
        if reader_left(stream):
            self.interrupts.ask_to_stop(signal.SIGPIPE)

    def fault(self, error: Exception) -> None:
        """Prints why the training ends, and the checkpoint from which it can go on."""
        text = f"error: {error}."
        if not isinstance(error, FolderLost):  # else the checkpoints there are another's
            good = checkpoint.all_in(self.folder)
            text += f" Last good checkpoint: {good[-1][1].name if good else 'none yet'}."
        if isinstance(error, FloatingPointError):
            text += " A lower learning_rate or more warmup_iters is the usual cure."
        self.line(text, sys.stderr)

    def end(self, step: int) -> None:
        """Prints the last lines: what a complete run has come to, a number in a line so that `grep`
        finds it; or where a run goes on that a signal has stopped, and that is saved."""
        if self.interrupts.came:
            name = signal.Signals(self.interrupts.came).name
            place = shell_path(self.folder)
            self.line(f"{name}: saved at step {step}; train.py {place} goes on from here")
            return
        last = [record for record in self.records if "val_loss" in record][-1]
        seconds, tokens = training_seconds(self.records), step * self.tokens_per_step
        outcome = {
            "val_bpb": f"{last['val_bpb']:.6f}" if "val_bpb" in last else "withheld",
            "val_loss": f"{last['val_loss']:.6f}",
            "steps": step,
            "tokens": tokens,
            "seconds": f"{seconds:.1f}",
            "tokens_per_second": f"{tokens / seconds:.0f}" if seconds else "unknown",
            "parameters": parameter_count(self.run.config.model),
            "peak_memory_mb": f"{peak_memory(self.device) / 2**20:.0f}",
        }
        self.line("\n".join(f"{name + ':':<18} {value}" for name, value in outcome.items()))

    def has_evaluation(self, step: int) -> bool:
        return has_evaluation(self.records, step)

    def is_due(self, step: int) -> bool:
        """Whether optimizer step `step`, counted from 1, becomes a record."""
        return step % self.interval == 0 or step in (1, self.last_step)

    def training(self, step: int, loss: float, lr: float, grad_norm: float, seconds: float) -> None:
        """Called after each optimizer step. If the step is due, it becomes a record, with the mean
        time of the steps since the last record."""
        self.recent.append(seconds)
        self.losses[step] = loss
        self.bar.update(1)
        self.profiler.step()
        if not self.is_due(step):
            return
        check_lock(self.run)
        steps_per_s = len(self.recent) / sum(self.recent)
        self.recent = []
        tokens_per_s, step_ms = self.tokens_per_step * steps_per_s, 1000 / steps_per_s
        speed = [f"{tokens_per_s:,.0f} tok/s"]
        if self.matmul_rate:
            share = self.flops_per_step * steps_per_s / self.matmul_rate
            speed.append(f"{share:.0%} of matmul rate")
        self.bar.set_postfix_str(f"loss {loss:.4f}, {speed[0]}")
        if self.bar.disable:
            self.line(
                f"step {step}/{self.last_step} | loss {loss:.4f} | lr {lr:.2e} | "
                f"grad norm {grad_norm:.2f} | {step_ms:.0f} ms | {' | '.join(speed)} | "
                f"{clock((self.last_step - step) / steps_per_s)} left"
            )
        self.write(
            {
                "step": step,
                "loss": loss,
                "lr": lr,
                "grad_norm": grad_norm,
                "step_ms": step_ms,
                "tok_per_s": tokens_per_s,
                "peak_memory_mb": peak_memory(self.device) / 2**20,
            }
        )

    def evaluation(self, step: int, losses: Sequence[float]) -> None:
        """`losses` are those of the data's sources, in nats per token. Beside their mean stands the
        mean training loss of the steps since the evaluation before; it is left out if one of them
        is not known. Bits per byte do not depend on the tokenizer; they are left out if the tokens
        do not spell their text."""
        check_lock(self.run)
        record, shown = {"step": step}, f"step {step}/{self.last_step}"
        if trained := self._take_losses(step):
            record["train_loss"] = sum(trained) / len(trained)
            shown += f" | train loss {record['train_loss']:.4f}"
        record["val_loss"] = val_loss = self.run.data.mean(losses)
        shown += f" | val loss {val_loss:.4f}"
        if self.bytes_per_token:
            record["val_bpb"] = val_loss / math.log(2) / self.bytes_per_token
            shown += f" | {record['val_bpb']:.4f} bits per byte"
        self.line(shown)
        if len(losses) > 1:
            names = [source.name for source in self.run.data.sources]
            each = dict(zip(names, losses, strict=True))
            self.line("  " + " | ".join(f"{name} {loss:.4f}" for name, loss in each.items()))
            record |= {f"val_loss {name}": loss for name, loss in each.items()}
        self.write(record)

    def _take_losses(self, step: int) -> list[float]:
        """The training losses of the steps since the evaluation before, up to `step`: of all of
        them, or none. They are forgotten then."""
        steps = range(self.evaluated + 1, step + 1)
        losses = [self.losses[s] for s in steps if s in self.losses]
        self.evaluated, self.losses = step, {}
        return losses if len(losses) == len(steps) else []

    def watch(self, step: int, scales: dict[str, list[float]]) -> None:
        """Records what run/watch.py measured just before optimizer step `step`; only main does."""
        finite_or_none = {  # JSON has no NaN and no Inf
            name: [value if math.isfinite(value) else None for value in values]
            for name, values in scales.items()
        }
        self.write({"step": step, "watch": finite_or_none})

    def write(self, record: dict[str, Any]) -> None:
        """Keeps the record; main also appends it to metrics.jsonl and sends it to the tracker."""
        self.records.append(record)
        if not self.ranks.is_main:
            return
        try:
            self._append(record)
        except OSError as error:  # a full disk is no reason to lose the training
            warn(f"metrics.jsonl failed, this record is not in it: {error}")
        if self.tracker is not None:
            self._try_tracker(lambda: self.tracker.send(flat_numbers(record)))

    def _try_tracker(self, act: Callable[[], object]) -> None:
        try:
            act()
        except Exception as error:  # each tracker has errors of its own
            warn(f"tracker failed and is left alone from here on: {error}")
            self.tracker = None

    def _append(self, record: dict[str, Any]) -> None:
        """Appends a whole line or nothing. If the file has vanished or is another one's, too, or
        could not be written when the run began, writes all records into a new file."""
        path = self.folder / METRICS_FILE
        if not (self.file_is_ours and is_own_file(path)):
            self._write_all()
            return
        line = (json.dumps(record) + "\n").encode()
        with open(path, "ab", buffering=0) as file:
            before, written = file.tell(), 0
            try:
                written = file.write(line)
            finally:
                if written < len(line):
                    file.truncate(before)
        if written < len(line):
            raise OSError(
                f"only {written} of {len(line)} bytes could be written, is the disk full?"
            )

    def _write_all(self) -> None:
        text = "".join(json.dumps(record) + "\n" for record in self.records)
        write_atomically(self.folder / METRICS_FILE, lambda file: file.write(text.encode()))
        self.file_is_ours = True


def flat_numbers(record: dict[str, Any]) -> dict[str, float]:
    """{"step": 3, "watch": {"rms": [1.0, None]}} -> {"step": 3, "watch/rms/0": 1.0}, because
    trackers take only numbers."""
    numbers = {name: value for name, value in record.items() if name != "watch"}
    for name, values in record.get("watch", {}).items():
        numbers |= {f"watch/{name}/{i}": v for i, v in enumerate(values) if v is not None}
    return numbers


def clock(seconds: float) -> str:
    """93 -> '1:33', 7265 -> '2:01:05'."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


def bytes_per_token_of(run: Run) -> tuple[float | None, str]:
    """bytes_per_predicted_token of the validation windows of a run. Of a mixture, the mean."""
    T, found = run.config.model.block_size, []
    for source in run.data.sources:
        starts = val_starts(len(source.val), T, run.config.eval_iters)
        measured, withheld = bytes_per_predicted_token(source, "val", starts, T)
        if measured is None:
            return None, withheld
        found.append(measured)
    return run.data.mean(found), ""


def about_data(run: Run) -> str:
    """Of each data set: its size, its share of a mixture, and how often the run will read it."""
    config, lines = run.config, []
    read = config.max_iters * config.batch_size * config.model.block_size
    for source, share in zip(run.data.sources, run.data.shares, strict=True):
        of_rows = f"{share:.1%} of the rows, " if len(run.data.sources) > 1 else ""
        learned = ""
        if source.answers and config.answers_only:
            edges = source.answers["train"]
            part = (edges[1::2] - edges[::2]).sum() / len(source.train)
            learned = f", of which {part:.1%}, those of answers, count"
        lines.append(
            f"{one_line(source.name)}: {of_rows}{len(source.train):,} training and "
            f"{len(source.val):,} validation tokens of {source.bytes_per_token('train'):.2f} "
            f"bytes, {share * read / len(source.train):.2g} epochs{learned}{about_xz(source)}"
        )
    return "\n         ".join(lines)


def about_xz(data: Dataset) -> str:
    """What a compressor needs: a model that needs more bits has learned little."""
    bits = data.meta.get("xz_bits_per_byte")
    if not bits or data.answers:
        return ""
    read = "the training text"
    if data.meta["bytes"]["train"] > XZ_LIMIT:
        read = f"{XZ_LIMIT / 1e6:.0f} MB of {read}"
    return f"; xz -9e, after {read}, needs {bits:.3f} bits per validation byte"


def summary(run: Run) -> str:
    """A few lines that say what the run will do, and which values each `auto` has become."""
    config, ranks = run.config, run.ranks
    model = config.model
    parameters, adapters = parameter_count(model), adapter_count(model, config.lora_rank)
    tokens = config.batch_size * model.block_size
    shards = ranks.size if config.parallel == "fsdp" else 1
    fixed, activations = memory_estimate(config, config.micro_batch_size, shards)

    frozen = begun = machine = on_each = rate = program = ""
    memory = fixed + activations
    if config.device == "cpu" and (held := peak_memory("cpu")):
        memory, program = memory + held, f", {held / 1e9:.2f} the program itself"
    if config.device == "cpu":
        rate = f", {counted(config.threads, 'thread*')}"
    else:
        measured = matmul_rate(config.device, config.dtype)
        rate = f" at {measured / 1e9:,.0f} GFLOP/s (measured)"
    if config.lora_rank:
        share = f"{adapters / parameters:.2%}"
        frozen = f", frozen; {adapters:,} parameters of adapters ({share}) are trained"
    if ranks.size > 1:
        machine, on_each = f"{ranks.size} ranks with {config.parallel}, rank 0 on ", "on each rank "
    if config.init_from:
        begun = f", begun with the weights of {one_line(config.init_from)}"

    lines = [
        f"model    {counted(model.n_layer, 'block*')}, {model.n_embd} wide, "
        f"{counted(model.n_head, 'head*')} "
        f"({model.kv_heads} kv), feed-forward {model.hidden_size}, {model.norm} "
        f"({model.norm_impl}), vocab {model.vocab_size:,}: {parameters:,} parameters{frozen}",
        f"data     {about_data(run)}",
        f"steps    {config.max_iters:,} of {config.batch_size} x {model.block_size} = {tokens:,} "
        f"tokens in micro-batches of {config.micro_batch_size}: "
        f"{config.max_iters * tokens / parameters:.2g} tokens per parameter; "
        f"{config.optimizer}, {config.lr_schedule}",
        f"memory   {on_each}about {memory / 1e9:.2f} GB: {fixed / 1e9:.2f} weights, gradient and "
        f"optimizer, {activations / 1e9:.2f} activations{program}",
        f"machine  {machine}{config.device}, {config.dtype}{rate}, "
        f"{'compiled' if config.compile else 'not compiled'}",
        f"out      {one_line(config.out_dir)} from step {run.step}{begun}",
    ]
    if warning := disk_warning(run, adapters or parameters):
        lines.append(warning)
    return "\n".join(lines)


def disk_warning(run: Run, parameters: int) -> str:
    """A warning if the disk has too little room for the run's checkpoints, else ''. Checkpoints
    that are already there count as room, because new ones take their place."""
    whole = 3 * 4 * parameters  # bytes: weights and two moments in fp32
    best = whole // 3  # weights alone
    # While a checkpoint is written, the one that it replaces is still on the disk.
    needed = (run.config.keep + 1) * whole + 2 * best
    existing = (*run.folder.glob("*.pt"), *run.folder.glob("*.shards/*"))
    room = sum(path.lstat().st_size for path in existing) + shutil.disk_usage(run.folder).free
    if room > needed:
        return ""
    return (
        f"warning: the checkpoints of this run need up to {needed / 1e9:.3f} GB, the disk of "
        f"{run.config.out_dir} has {room / 1e9:.3f} GB for them"
    )


def open_tracker(run: Run) -> Tracker | None:
    """The tracker that the knob names; None on other ranks than main and with tracker=none.

    Trackers are optional packages. ValueError says how to install one, or why it does not start.
    """
    kind = run.config.tracker
    with run.ranks.all_or_exit():
        if kind == "none" or not run.ranks.is_main:
            return None
        try:
            return TRACKERS[kind](run.folder, run.config.flat())
        except ImportError as error:
            raise ValueError(
                f"tracker={kind} needs a package that is not installed: pip install {kind}"
            ) from error
        except Exception as error:  # each tracker has errors of its own: no login, no network
            raise ValueError(f"tracker={kind} could not be started: {error}") from error


def tensorboard(folder: Path, knobs: dict[str, Any]) -> Tracker:
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(str(folder / "tensorboard"))

    def send(record: dict[str, Any]) -> None:
        for name, value in record.items():
            writer.add_scalar(name, value, record["step"])
        writer.flush()

    return Tracker(send, writer.close)


def wandb(folder: Path, knobs: dict[str, Any]) -> Tracker:
    import wandb as package

    with lasting_id(folder / "wandb.id") as known:
        package.init(
            project="rootllama",
            name=folder.name,
            dir=str(folder),
            config=knobs,
            id=known,
            resume="allow",
        )
    return tracker_of(package)


def trackio(folder: Path, knobs: dict[str, Any]) -> Tracker:
    import trackio as package

    with lasting_id(folder / "trackio.id") as known:  # a run is known by its name alone
        name = f"{folder.name}-{known[:8]}"
        package.init(project="rootllama", name=name, config=knobs, resume="allow")
    return tracker_of(package)


@contextmanager
def lasting_id(file: Path) -> Iterator[str]:
    """An id by which a resumed run is the same run for a tracker. It is in the file, or a new one
    comes there if nothing fails inside the `with`."""
    file.parent.mkdir(parents=True, exist_ok=True)
    known = file.read_text() if file.exists() else uuid.uuid4().hex
    yield known
    write_atomically(file, lambda new: new.write(known.encode()))


def tracker_of(package: ModuleType) -> Tracker:
    """A tracker with the functions of wandb, whose steps are no metric but an argument."""

    def send(record: dict[str, Any]) -> None:
        package.log({k: v for k, v in record.items() if k != "step"}, step=record["step"])

    return Tracker(send, package.finish)


TRACKERS = {"tensorboard": tensorboard, "wandb": wandb, "trackio": trackio}
