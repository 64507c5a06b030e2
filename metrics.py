"""What a run tells: a summary, then records for the bar or log lines, metrics.jsonl, a tracker and loss.png."""

import errno
import json
import math
import os
import shutil
import signal
import sys
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tqdm import tqdm

from checkpoint import write_atomically
from config.schema import Config, one_line, warn
from cost import memory_estimate, parameter_count
from data.loader import Dataset
from device import peak_memory
from lora import adapter_count
from world import ALONE, World

FILE = "metrics.jsonl"


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The records of a run, in order. A line that is damaged, or that a kill cut short, is named and left out."""
    path, records = folder / FILE, []
    lines = path.read_bytes().splitlines(keepends=True) if path.is_file() else []
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line) if line.endswith(b"\n") else None
        except (ValueError, RecursionError):
            record = None
        if isinstance(record, dict) and type(record.get("step")) is int:
            records.append(record)
        else:
            warn(f"{path}:{number} is damaged and left out")
    return records


def has_evaluation(records: list[dict[str, Any]], step: int) -> bool:
    return any(r["step"] == step and "val_loss" in r for r in records)


class Log:
    """Takes the records of one run, on all ranks alike; main writes and prints them.

    Printing and writing never stop the training: a failing file or tracker is named; when the reader of our output
    has gone (`| head`), the run is asked to save and end like after a signal.
    """

    def __init__(self, folder: Path, *, first_step: int, last_step: int, tokens_per_step: int, flops_per_step: float,
                 matmul_rate: float, bytes_per_token: float, device: str, interval: int,
                 tracker: Callable[[dict], None] | None, stop: Callable[[int], None], world: World = ALONE):
        self.folder, self.last_step, self.interval, self.device = folder, last_step, interval, device
        self.tokens_per_step, self.flops_per_step, self.matmul_rate = tokens_per_step, flops_per_step, matmul_rate
        self.bytes_per_token, self.tracker, self.stop = bytes_per_token, tracker, stop
        self.steps_timed, self.recent = 0, []  # seconds of the steps since the last record
        self.world, self.records = world, world.main(self._begin, first_step)
        self.records = world.share(self.records)
        self.bar = tqdm(total=last_step, initial=first_step, disable=not (world.is_main and sys.stderr.isatty()),
                        unit="step", dynamic_ncols=True, file=sys.stderr)

    def __enter__(self) -> "Log":
        return self

    def __exit__(self, *_) -> None:
        self.bar.close()

    def _begin(self, first_step: int) -> list[dict[str, Any]]:
        """The records up to the step that the run goes on from, and no others in the file any more."""
        self.records = [r for r in read_metrics(self.folder) if r["step"] <= first_step] if first_step else []
        self._write_all()
        return self.records

    def line(self, text: str, file=None) -> None:
        """Prints above the bar; what all ranks have to say is said by main."""
        if not self.world.is_main:
            return
        stream = file or sys.stdout
        try:
            self.bar.write(text, file=stream)
            stream.flush()
        except OSError as error:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())  # nor may the flush at exit fail
            if error.errno in (errno.EPIPE, errno.EIO):  # a closed pipe, or a terminal that has gone
                self.stop(signal.SIGPIPE)
            else:
                warn(f"nothing more is printed here: {error}")

    def is_due(self, step: int) -> bool:
        """Whether optimizer step `step`, counted from 1, becomes a record."""
        return step % self.interval == 0 or step in (1, self.last_step)

    def training(self, step: int, loss: float, lr: float, grad_norm: float, seconds: float) -> None:
        """After each optimizer step; every `interval` steps it becomes a record, with the mean time of those steps."""
        self.steps_timed += 1
        self.recent.append(seconds)
        rate = len(self.recent) / sum(self.recent)
        share = self.flops_per_step * rate / self.matmul_rate
        self.bar.update(1)
        if not self.is_due(step):
            return
        self.bar.set_postfix_str(f"loss {loss:.4f}, lr {lr:.2e}, {self.tokens_per_step * rate:,.0f} tok/s, "
                                 f"{share:.0%} of matmul rate")
        if self.bar.disable:
            self.line(f"step {step}/{self.last_step} | loss {loss:.4f} | lr {lr:.2e} | grad norm {grad_norm:.2f} | "
                      f"{1000 / rate:.0f} ms | {self.tokens_per_step * rate:,.0f} tok/s | {share:.0%} of matmul rate | "
                      f"{clock((self.last_step - step) / rate)} left")
        self.recent = []
        self.write({"step": step, "loss": loss, "lr": lr, "grad_norm": grad_norm, "step_ms": 1000 / rate,
                    "tok_per_s": self.tokens_per_step * rate, "peak_memory_mb": peak_memory(self.device) / 2**20})

    def evaluation(self, step: int, val_loss: float) -> None:
        """val_loss in nats per token; bits per byte compares runs across tokenizers."""
        bits = val_loss / math.log(2) / self.bytes_per_token
        self.line(f"step {step}/{self.last_step} | val loss {val_loss:.4f} | {bits:.4f} bits per byte | "
                  f"perplexity {math.exp(min(val_loss, 700)):.2f}")
        self.write({"step": step, "val_loss": val_loss, "val_bpb": bits})

    def watch(self, step: int, scales: dict[str, list[float]]) -> None:
        """What was seen inside the model just before optimizer step `step`. JSON has no NaN and no Inf: null."""
        self.write({"step": step, "watch": {name: [value if math.isfinite(value) else None for value in values]
                                            for name, values in scales.items()}})

    def write(self, record: dict[str, Any]) -> None:
        self.records.append(record)
        if not self.world.is_main:
            return
        for name, sink, form in (("metrics.jsonl", self._to_file, record), ("tracker", self.tracker, flat(record))):
            if sink is None:
                continue
            try:
                sink(form)
            except Exception as error:  # a full disk or a tracker's server is no reason to lose the training
                left = " and is left alone from here on" if name == "tracker" else ", this record is not in it"
                warn(f"{name} failed{left}: {error}")
                if name == "tracker":
                    self.tracker = None

    def _to_file(self, record: dict[str, Any]) -> None:
        """Appends a whole line or nothing. A file that has vanished is written again."""
        if not (self.folder / FILE).exists():
            self._write_all()
            return
        line = (json.dumps(record) + "\n").encode()
        with open(self.folder / FILE, "ab", buffering=0) as file:
            before, written = file.tell(), 0
            try:
                written = file.write(line)
            finally:
                if written < len(line):
                    file.truncate(before)
        if written < len(line):
            raise OSError(f"only {written} of {len(line)} bytes could be written, is the disk full?")

    def _write_all(self) -> None:
        text = "".join(json.dumps(record) + "\n" for record in self.records)
        write_atomically(self.folder / FILE, lambda file: file.write(text.encode()))


def flat(record: dict[str, Any]) -> dict[str, float]:
    """{"step": 3, "watch": {"rms": [1.0, None]}} -> {"step": 3, "watch/rms/0": 1.0}: trackers take numbers alone."""
    numbers = {name: value for name, value in record.items() if name != "watch"}
    return numbers | {f"watch/{name}/{i}": value for name, values in record.get("watch", {}).items()
                      for i, value in enumerate(values) if value is not None}


def summary(config: Config, data: Dataset, step: int, rate: float, ranks: int = 1) -> str:
    """What is about to happen, and what auto chose."""
    model = config.model
    tokens, parameters = config.batch_size * model.block_size, parameter_count(model)
    fixed, kept = memory_estimate(model, config.micro_batch_size, config.dtype, config.device,
                                  config.activation_checkpointing, config.lora_rank,
                                  ranks if config.parallel == "fsdp" else 1)
    many = f"{ranks} ranks with {config.parallel} and, each, " if ranks > 1 else ""
    begun = f", begun with the weights of {config.init_from}" if config.init_from else ""
    learn = adapter_count(model, config.lora_rank)
    share = f", beside which {learn:,} ({learn / parameters:.2%}) are trained" if config.lora_rank else ""
    xz = data.meta.get("val_xz_bits_per_byte")  # a model that needs more bits than xz has learned little
    yardstick = f"; xz -9e needs {xz:.3f} bits per byte of the latter" if xz else ""
    return "\n".join((
        f"model    {model.n_layer} blocks, {model.n_embd} wide, {model.n_head} heads ({model.kv_heads} kv), "
        f"feed-forward {model.hidden_size}, {model.norm} ({model.norm_impl}), vocab {model.vocab_size:,}: "
        f"{parameters:,} parameters{share}",
        f"data     {config.dataset}: {len(data.train):,} training and {len(data.val):,} validation tokens of "
        f"{data.bytes_per_token('train'):.2f} bytes{yardstick}",
        f"steps    {config.max_iters:,} of {config.batch_size} x {model.block_size} = {tokens:,} tokens in "
        f"micro-batches of {config.micro_batch_size}: {config.max_iters * tokens / parameters:.2g} tokens per "
        f"parameter, {config.max_iters * tokens / len(data.train):.2g} epochs; {config.optimizer}, "
        f"{config.lr_schedule}",
        f"memory   {'on each ' if ranks > 1 else ''}about {(fixed + kept) / 1e9:.2f} GB: {fixed / 1e9:.2f} weights, "
        f"gradient and optimizer, {kept / 1e9:.2f} activations",
        f"machine  {many}{config.device}, {config.dtype} at {rate / 1e9:,.0f} GFLOP/s (measured), "
        f"{'compiled' if config.compile else 'not compiled'}",
        f"out      {config.out_dir} from step {step}{begun}{disk_warning(config, learn or parameters)}"))


def disk_warning(config: Config, parameters: int) -> str:
    """A line if the checkpoints of a run will not fit on the disk of out_dir, those already there counted."""
    whole = 3 * 4 * parameters  # weights and two moments in fp32
    out = Path(config.out_dir)
    there = sum(path.stat().st_size for path in (*out.glob("*.pt"), *out.glob("*.shards/*")))
    needed = (config.keep + 1) * whole + 2 * whole // 3  # one more while it is written; best.pt twice, of weights alone
    room = there + shutil.disk_usage(config.out_dir).free
    if room > needed:
        return ""
    return (f"\nwarning: the checkpoints of this run need up to {needed / 1e9:.3f} GB, the disk of {config.out_dir} "
            f"has {room / 1e9:.3f} GB for them")


def clock(seconds: float) -> str:
    """93 -> '1:33', 7265 -> '2:01:05'."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


def open_tracker(kind: str, folder: Path, knobs: dict[str, Any]) -> Callable[[dict], None] | None:
    """A function that takes records, or None. Both are optional packages: ValueError says how to install them."""
    if kind == "none":
        return None
    try:
        return TRACKERS[kind](folder, knobs)
    except ImportError as error:
        raise ValueError(f"tracker={kind} needs a package that is not here: pip install {kind}") from error
    except Exception as error:  # each tracker has errors of its own: no login, no network
        raise ValueError(f"tracker={kind} could not be started: {error}") from error


def tensorboard(folder: Path, knobs: dict[str, Any]) -> Callable[[dict], None]:
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(str(folder / "tensorboard"))

    def send(record: dict[str, Any]) -> None:
        for name, value in record.items():
            writer.add_scalar(name, value, record["step"])
        writer.flush()

    return send


def wandb(folder: Path, knobs: dict[str, Any]) -> Callable[[dict], None]:
    import wandb as package

    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "wandb.id"  # so that a resumed run is one run there, too
    known = file.read_text() if file.exists() else uuid.uuid4().hex
    run = package.init(project="rootllama", name=folder.name, dir=str(folder), config=knobs, id=known, resume="allow")
    file.write_text(known)
    return lambda record: run.log(record, step=record["step"])


TRACKERS = {"tensorboard": tensorboard, "wandb": wandb}


def plain(name: str) -> str:
    """A name as matplotlib can write it: between two dollars it would see mathematics."""
    return one_line(name).replace("$", r"\$")


def plot_losses(folder: Path) -> Path | None:
    """loss.png from metrics.jsonl, by step; None without records, or where matplotlib is not installed."""
    try:
        from matplotlib.figure import Figure  # not pyplot: no global state, no display
    except ImportError:
        return None
    records = read_metrics(folder)
    if not records:
        return None
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot(xlabel="step", ylabel="loss (nats per token)", title=plain(folder.name))
    for key, style, label in (("loss", "-", "training"), ("val_loss", "o-", "validation")):
        points = [(r["step"], r[key]) for r in records if key in r]
        if points:
            axes.plot(*zip(*points, strict=True), style, linewidth=1, markersize=4,
                      label=f"{label}: {points[-1][1]:.3f}")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(folder / "loss.png", dpi=150)
    return folder / "loss.png"
