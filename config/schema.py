"""Every knob, and the parser of presets and command lines.

A preset is a file of `name = literal` lines, read with ast and never executed. Preset and command line go through the
same types and the same checks; all of it is gathered first and checked once, so the order of overrides never matters.
"""

import ast
import dataclasses
import json
import math
import operator
import os
import shlex
import signal
import sys
import textwrap
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

from model import ModelConfig, knob

DEFAULT_PRESET = Path(__file__).with_name("small.py")
LARGEST_PRESET = 100_000  # bytes
LARGEST_JSON = 2**24  # bytes of a config.json or an index, some ten times those of the largest models
UNDECIDED = ("block_size", "dropout", "norm_impl")  # of a model; the rest of it belongs to its weights


@dataclass(frozen=True, kw_only=True)
class Config:
    """One training run: the model, and every knob of how it is trained."""

    model: ModelConfig = field(default_factory=ModelConfig)

    out_dir: str = knob("out/run", "folder of the run: checkpoints, config.json, metrics.jsonl, tokenizer")
    resume: Literal["no", "yes", "auto"] = knob("no", "continue the run in out_dir; auto = if there is one")
    init_from: str = knob("", "start from the weights of a run, of a checkpoint's file or of a Hugging Face folder, "
                              "which decide the architecture; '' = from scratch")
    lora_rank: int = knob(0, "train adapters of this rank beside the weights of init_from, which stay; 0 = all weights")
    lora_alpha: float = knob(16.0, "scale of the adapters, in units of 1 / lora_rank")
    seed: int = knob(1337, "of the weights, the data order and dropout")

    dataset: str = knob("python", "folder under data/, made by data/prepare.py; or a text file, or a folder of them "
                                  "with a / in its name, which is prepared first")
    batch_size: int = knob(32, "sequences per optimizer step, over all devices")
    micro_batch_size: int = knob(0, "sequences one device works on at once; 0 = the largest that fits")
    max_iters: int = knob(2000, "optimizer steps")

    optimizer: Literal["adamw", "muon"] = knob("adamw", "muon = Muon for the Blocks' matrices, AdamW for the rest")
    learning_rate: float = knob(1e-3, "peak; the same scale for both optimizers (Muon's update is matched to AdamW's)")
    embed_lr: float = knob(1.0, "learning rate of embedding and head, in units of learning_rate")
    min_lr: float = knob(0.0, "where the schedule ends")
    lr_schedule: Literal["cosine", "linear", "wsd", "constant"] = knob(
        "cosine", "from learning_rate to min_lr after warm-up; wsd = stay, then fall linearly over decay_fraction")
    warmup_iters: int = knob(100, "steps of linear warm-up")
    decay_fraction: float = knob(0.2, "wsd: share of max_iters spent falling")
    weight_decay: float = knob(0.1, "of matrices; never of gains, biases and the embedding")
    beta1: float = knob(0.9, "AdamW's first moment")
    beta2: float = knob(0.95, "AdamW's second moment")
    muon_momentum: float = knob(0.95, "Muon's momentum")
    grad_clip: float = knob(1.0, "largest norm of the whole gradient; 0 = no clipping")
    skip_spikes: float = knob(0.0, "leave out an update whose gradient norm is so many standard deviations above the "
                                   "mean of the last 128; 6 is usual, 0 = never")

    eval_interval: int = knob(250, "steps between evaluations; 0 = only at the end")
    eval_iters: int = knob(0, "validation windows per evaluation, evenly spread, always the same; 0 = the whole split")
    log_interval: int = knob(10, "steps between log lines")
    watch: bool = knob(False, "with each log line, record the scales of every layer: costs one eager micro-batch")
    save_interval: int = knob(250, "steps between checkpoints; 0 = only at the end")
    keep: int = knob(2, "newest checkpoints to keep, beside the best one")
    sample_prompt: str = knob("", "what the sample printed at the end starts with")
    sample_tokens: int = knob(200, "tokens of the sample printed at the end; 0 = none")
    tracker: Literal["none", "tensorboard", "wandb"] = knob("none", "where else to send the metrics")

    device: str = knob("auto", "auto (CUDA, then MPS, then CPU), cpu, mps, cuda or cuda:N")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = knob(
        "auto", "of the matrix products; weights stay float32. auto = bfloat16 where the hardware has it, else float32")
    compile: Literal["auto", True, False] = knob("auto", "torch.compile; auto = where it works and pays for itself")
    parallel: Literal["auto", "ddp", "fsdp"] = knob(
        "auto", "several ranks (torchrun): ddp = each has all weights, fsdp = each has a part of every matrix; auto = "
                "ddp where the whole fits a device")
    sharded: Literal["auto", True, False] = knob(
        "auto", "fsdp: each rank writes its part of a checkpoint, and sharded.py makes one file of them; auto = where "
                "one of these machines could not hold it all")
    activation_checkpointing: bool = knob(False, "compute each Block twice to keep less: slower, less memory")

    def __post_init__(self):
        bounds = {"1 or more": (lambda v: v >= 1, "batch_size", "max_iters", "log_interval", "keep"),
                  "0 or more": (lambda v: v >= 0, "micro_batch_size", "min_lr", "warmup_iters", "weight_decay",
                                "grad_clip", "skip_spikes", "eval_interval", "eval_iters", "save_interval",
                                "sample_tokens", "seed", "lora_rank"),
                  "above 0": (lambda v: v > 0, "learning_rate", "embed_lr", "lora_alpha"),
                  "in [0, 1)": (lambda v: 0 <= v < 1, "beta1", "beta2", "muon_momentum"),
                  "in (0, 1]": (lambda v: 0 < v <= 1, "decay_fraction"), "below 2**43": (lambda v: v < 2**43, "seed"),
                  "at most 1,000,000": (lambda v: v <= 1_000_000, "batch_size", "micro_batch_size")}
        problems = [f"{name} must be {bound}, got {getattr(self, name)}" for bound, (holds, *names) in bounds.items()
                    for name in names if not holds(getattr(self, name))]
        if self.min_lr > self.learning_rate > 0:
            problems.append(f"min_lr={self.min_lr} must not be above learning_rate={self.learning_rate}")
        if self.warmup_iters > self.max_iters > 0:
            problems.append(f"warmup_iters={self.warmup_iters} must not be above max_iters={self.max_iters}")
        if 0 < self.micro_batch_size <= 1_000_000 and self.batch_size % self.micro_batch_size:
            near = max(m for m in range(1, self.micro_batch_size) if self.batch_size % m == 0)
            problems.append(f"batch_size={self.batch_size} must be a multiple of micro_batch_size="
                            f"{self.micro_batch_size}: the nearest is {near}")
        if self.dataset in ("", ".", ".."):
            problems.append(f"dataset must be the name of a folder under data/, or of a text, got {self.dataset!r}")
        if self.lora_rank > 0 and not self.init_from:
            problems.append(f"lora_rank={self.lora_rank} needs weights to stand beside: name them with init_from")
        if self.lora_rank > self.model.n_embd:
            problems.append(f"lora_rank={self.lora_rank} must be at most n_embd={self.model.n_embd}")
        if problems:
            raise ValueError("; ".join(problems))

    def flat(self) -> dict[str, Any]:
        """All knobs in one dict, the model's too: what config.json and checkpoints hold."""
        own = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "model"}
        return own | dataclasses.asdict(self.model)


OTHERS_NAMES = {  # what the field calls it elsewhere -> what it is called here
    "lr": "learning_rate", "dim": "n_embd", "d_model": "n_embd", "hidden_size": "n_embd", "n_layers": "n_layer",
    "n_heads": "n_head", "n_kv_heads": "n_kv_head", "max_seq_len": "block_size", "context": "block_size",
    "gradient_accumulation_steps": "micro_batch_size", "max_steps": "max_iters", "lr_decay_iters": "max_iters",
    "decay_lr": "lr_schedule", "lora_r": "lora_rank", "wandb_log": "tracker", "eps": "norm_eps",
    "always_save_checkpoint": "save_interval", "weight_tying": "tie_embeddings", "intermediate_size": "n_hidden"}


def knobs_of(*classes: type) -> dict[str, tuple[Any, dataclasses.Field]]:
    """name -> (type, field) of every knob of the dataclasses."""
    return {f.name: (get_type_hints(cls)[f.name], f) for cls in classes
            for f in dataclasses.fields(cls) if "help" in f.metadata}


def split_arguments(argv: list[str]) -> tuple[list[str], dict[str, str]]:
    """['config/x.py', 'a=1', '--b=2'] -> (['config/x.py'], {'a': '1', 'b': '2'}); a value may contain '=', and so may a
    place that has a / before it, as out/lr=1."""
    places, pairs = [], {}
    for argument in argv:
        key, equals, text = argument.removeprefix("--").partition("=")
        if not equals and argument.startswith("-"):
            raise ValueError(f"{argument} has no value: write {key.lstrip('-')}=VALUE")
        if not equals or "/" in key:
            places.append(argument)
        elif key in pairs:
            raise ValueError(f"{key} is given twice on the command line, as {pairs[key]!r} and {text!r}: keep one")
        else:
            pairs[key] = text
    return places, pairs


def convert(key: str, value: Any, kind: Any) -> Any:
    """`value`, a literal of a preset or text of the command line, as the knob's type; ValueError if it is not one."""
    if get_origin(kind) is Literal:
        return choose(key, value, get_args(kind))
    if kind is str:
        if not isinstance(value, str) or (key, value) == ("out_dir", ""):
            raise ValueError(f"{key} must be {'a folder' if value == '' else 'text in quotes'}, got {value!r:.80}")
        return value
    if kind is bool:
        return choose(key, value, (True, False))
    parsed = None if isinstance(value, str) else value
    if isinstance(value, str) and len(value) <= 100:  # int() of a long text takes its time
        with suppress(ValueError):
            parsed = kind(value)
    wanted = {int: "a whole number", float: "a number"}[kind]
    too_large = isinstance(parsed, int) and abs(parsed) >= 2**63  # for any knob, and for float()
    if isinstance(parsed, bool) or not isinstance(parsed, (int, kind)) or too_large:
        raise ValueError(f"{key} must be {wanted}, got {value!r:.80}")
    if isinstance(parsed, float) and not math.isfinite(parsed):
        raise ValueError(f"{key} must be finite, got {value!r:.80}")
    return kind(parsed)


def choose(key: str, value: Any, choices: tuple) -> Any:
    """The one of `choices` that value names; booleans may be true/false, yes/no or 1/0 in any case."""
    words = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
    for choice in choices:
        if words.get(str(value).lower()) is choice if isinstance(choice, bool) else value == choice:
            return choice
    *others, last = (str(choice).lower() for choice in choices)
    raise ValueError(f"{key} must be {', '.join(others)} or {last}, got {value!r:.80}")


def typed(values: dict[str, Any], knobs: dict, where: str) -> dict[str, Any]:
    """Every value as its knob's type; an unknown key is refused with the nearest known one."""
    result = {}
    for key, value in values.items():
        if key not in knobs:
            near = [OTHERS_NAMES[key]] if OTHERS_NAMES.get(key) in knobs else get_close_matches(key, knobs, 1, 0.5)
            hint = f"did you mean {near[0]}?" if near else "--help lists all"
            raise ValueError(f"{where}: unknown knob {key!r}; {hint}")
        if not isinstance(value, (str, int, float)):  # only a foreign checkpoint can hold such; it may be deep
            raise ValueError(f"{where}: {key} must be a number or a text, got {type(value).__name__}")
        result[key] = convert(key, value, knobs[key][0])
    return result


def read_preset(path: str | Path) -> dict[str, Any]:
    """The `name = literal` lines of a preset, in order. Numbers, strings, booleans and arithmetic of numbers.

    A run's folder is one too; tiny, tiny.py and config/tiny.py are ours where there is no such file and no such run.
    """
    path, ours = Path(path), DEFAULT_PRESET.with_name(Path(path).name.removesuffix(".py") + ".py")
    if (path / "config.json").is_file():
        return read_run(path)
    path = ours if not path.is_file() and str(path.parent) in (".", "config") and ours.is_file() else path
    if not path.is_file():
        known = sorted(p.stem for p in DEFAULT_PRESET.parent.glob("*.py") if p.stem not in ("schema", "__init__"))
        raise ValueError(f"{path} is neither a file nor a run's folder; presets are "
                         f"{', '.join(f'config/{name}.py' for name in known)}")
    if path.stat().st_size > LARGEST_PRESET:
        raise ValueError(f"{path} is larger than {LARGEST_PRESET:,} bytes: no preset")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about odd but valid spelling
            tree = ast.parse(path.read_text(encoding="utf-8"), filename=str(path))
    except SyntaxError as error:
        raise ValueError(f"{path}:{error.lineno}:{error.offset}: {error.msg}") from error
    except (UnicodeDecodeError, ValueError) as error:
        raise ValueError(f"{path} is not a UTF-8 text file: {error}") from error
    except (RecursionError, MemoryError) as error:  # the parser's own ways to say so
        raise ValueError(f"{path} is nested too deeply") from error
    values = {}
    for line in tree.body:
        where = f"{path}:{line.lineno}:{line.col_offset + 1}"
        if isinstance(line, ast.Expr) and isinstance(line.value, ast.Constant) and isinstance(line.value.value, str):
            continue  # a docstring
        if not (isinstance(line, ast.Assign) and len(line.targets) == 1 and isinstance(line.targets[0], ast.Name)):
            raise ValueError(f"{where}: a preset holds only lines of the form name = literal; nothing of it was run")
        key = line.targets[0].id
        if key in values:
            raise ValueError(f"{where}: {key} is given twice")
        try:
            values[key] = literal(line.value, path)
        except RecursionError as error:
            raise ValueError(f"{where}: {key} is nested too deeply") from error
    return values


def read_run(folder: Path) -> dict[str, Any]:
    """All knobs of a run, as a preset that goes on with it, or begins one like it in another out_dir. A vocab_size that
    is its data's is left open, so that it will be that of other data."""
    saved = read_json(folder / "config.json")
    if not ({"out_dir", "device"} <= saved.keys() and isinstance(saved.get("data"), dict)):
        raise ValueError(f"{folder} is not a run's folder, going by its config.json; for weights there is init_from=")
    knobs = {name: value for name, value in saved.items() if name not in ("versions", "parameters", "data")
             and (name, value) != ("vocab_size", saved["data"].get("vocab_size"))}
    return knobs | {"out_dir": str(folder), "resume": "auto", "device": str(saved["device"]).partition(":")[0]}


def as_place(folder: Path) -> str:
    """For a shell; with a / in it, so that nothing takes it for a knob, an option or a preset of ours."""
    return shlex.quote(str(folder) if "/" in str(folder) else f"./{folder}")


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file. ValueError or OSError, in one line, where there is none."""
    if not path.is_file():  # opening a FIFO would wait for ever
        raise FileNotFoundError(f"{path} is missing, or not a regular file")
    if path.stat().st_size > LARGEST_JSON:
        raise ValueError(f"{path} is larger than {LARGEST_JSON:,} bytes: no such file is")
    try:
        content = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON ({error!s:.200})") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold a JSON object, got {type(content).__name__}")
    return content


ARITHMETIC: dict[type, Callable] = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul,
                                    ast.Div: operator.truediv, ast.FloorDiv: operator.floordiv, ast.Pow: operator.pow}


def literal(node: ast.expr, path: Path) -> int | float | str | bool:
    """The value of a literal, or of + - * / // ** on numbers."""
    where = f"{path}:{node.lineno}:{node.col_offset + 1}"
    match node:
        case ast.Constant(value=int() | float() | str() as value) if not isinstance(value, int) or value < 2**63:
            return value
        case ast.UnaryOp(op=ast.USub(), operand=inner):
            value = literal(inner, path)
            if isinstance(value, (int, float)):
                return -value
        case ast.BinOp(left=left, op=op, right=right) if type(op) in ARITHMETIC:
            a, b = literal(left, path), literal(right, path)
            small = not isinstance(op, ast.Pow) or (isinstance(b, (int, float)) and abs(b) <= 64)
            if isinstance(a, (int, float)) and isinstance(b, (int, float)) and small and max(abs(a), abs(b)) < 1e18:
                try:
                    return ARITHMETIC[type(op)](a, b)
                except ArithmeticError as error:
                    raise ValueError(f"{where}: {error}") from error
    raise ValueError(f"{where}: only numbers, strings, booleans and arithmetic of numbers (below 2**63) are allowed; "
                     "nothing was run")


def load_config(argv: list[str], inherit: Callable[[dict[str, Any]], dict[str, Any]] = lambda knobs: {}) -> Config:
    """A preset (config/small.py when none is named), then key=value overrides, into one checked Config.

    inherit(all knobs given) has the model knobs that the weights to begin with decide; what was given must not differ,
    but for those in UNDECIDED.
    """
    places, pairs = split_arguments(argv)
    if len(places) > 1:
        raise ValueError(f"one preset at most, got {' '.join(places)}; knobs are written key=value")
    path, own, model = places[0] if places else DEFAULT_PRESET, knobs_of(Config), knobs_of(ModelConfig)
    preset = read_preset(path)
    if Path(path).is_dir() and "out_dir" in pairs:
        preset.pop("resume", None)  # a run like that one: it must not go on with what is there
    values = typed(preset, own | model, str(path)) | typed(pairs, own | model, "command line")
    inherited = inherit(values)
    other = [f"{name}={values[name]} ({decided} there)" for name, decided in inherited.items()
             if name not in UNDECIDED and values.get(name, decided) != decided]
    if other:
        raise ValueError(f"init_from={values['init_from']} decides the architecture: leave out {', '.join(other)}; "
                         f"config/finetune.py is a preset without it")
    return Config(model=ModelConfig(**inherited | {k: v for k, v in values.items() if k in model}),
                  **{k: v for k, v in values.items() if k in own})


def help_text(usage: str, *classes: type) -> str:
    """Every knob with its choices or type, default and meaning."""
    lines = [usage, ""]
    for name, (kind, knob_field) in knobs_of(*classes).items():
        choices = get_args(kind) if get_origin(kind) is Literal else ()
        shape = "|".join(str(c).lower() for c in choices) or kind.__name__
        default = knob_field.default if knob_field.default != "" else "''"
        text = f"  {name}={default}".ljust(31) + f" {knob_field.metadata['help']} ({shape})"
        lines.append(textwrap.fill(text, 120, subsequent_indent=32 * " ", break_on_hyphens=False))
    return "\n".join(lines)


def print_help(*texts: str) -> None:
    """Prints them; that a reader leaves in between (`| head`) is no error."""
    try:
        print(*texts, sep="\n\n", flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # where Python puts the rest when it ends


def one_line(error: object, most: int = 1500) -> str:
    """What an error or a text says, on one line of bounded length, without control characters, which a file may have
    put in."""
    text = " ".join("".join(c if c.isprintable() else " " for c in str(error)).split())
    return text if len(text) <= most else f"{text[:most - 300]} ... {text[-295:]}"


def warn(text: str) -> None:
    """One line on stderr; where that cannot be written to either, there is nobody to tell."""
    with suppress(OSError):
        print(f"warning: {one_line(text)}", file=sys.stderr)


@contextmanager
def user_errors() -> Iterator[None]:
    """Around all that a user can get wrong: a ValueError or OSError becomes one line on stderr and exit code 2.

    `python -X dev` shows where it rose instead. A signal ends the program at once, since nothing has begun yet, but as
    an exception, so that what is half made is cleaned up.
    """
    before = catch_signals(end_at_once)
    try:
        yield
    except (ValueError, OSError) as error:
        if sys.flags.dev_mode:
            raise
        print(f"error: {one_line(error)}", file=sys.stderr)
        raise SystemExit(2) from error
    finally:
        restore_signals(before)


def catch_signals(handler: Callable) -> dict[int, Any]:
    """handler(number, frame) for Ctrl-C, SIGTERM and a closed terminal. One that is ignored, as under nohup, stays so.
    Returns the handlers before."""
    numbers = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
    return {n: signal.signal(n, handler) for n in numbers if signal.getsignal(n) is not signal.SIG_IGN}


def restore_signals(before: dict[int, Any]) -> None:
    for number, handler in before.items():
        signal.signal(number, handler)


def end_at_once(number: int, frame: Any) -> None:
    raise SystemExit(128 + number)
