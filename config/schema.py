"""Every knob of a training run: its type, its default, what --help says of it, what it may hold.

Reading order: the knobs, one class for each group of --help; Config, which joins and checks them;
then how a word of a command line or a preset becomes the value of a knob.
"""

import dataclasses
import math
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from difflib import get_close_matches
from functools import cache
from typing import Any, Literal, get_args, get_origin, get_type_hints

from config.command import expand_home, split_arguments
from model import ModelConfig, knob
from norm import NORMS


@dataclass(frozen=True, kw_only=True)
class OptimizerKnobs:
    """How the weights are updated, and how often."""

    max_iters: int = knob(2000, "optimizer steps; 0 = as many as `minutes` allow")
    minutes: float = knob(
        0.0, "time for the optimizer steps; how many that are is measured and fixed at the start"
    )
    optimizer: Literal["adamw", "muon"] = knob(
        "adamw", "muon = Muon for the matrices of the Blocks, AdamW for the other weights"
    )
    learning_rate: float = knob(
        1e-3, "peak of the schedule; means the same for Muon, whose updates are scaled to AdamW's"
    )
    min_lr: float = knob(0.0, "learning rate at which the schedule ends")
    lr_schedule: Literal["cosine", "linear", "wsd", "constant"] = knob(
        "cosine", "the way from the peak to min_lr; wsd = stay, then fall linearly at the end"
    )
    warmup_iters: int = knob(100, "first steps, in which the learning rate grows linearly")
    decay_fraction: float = knob(0.2, "lr_schedule=wsd: share of max_iters spent falling")
    taper_start: int = knob(0, "tapernorm: steps before the norms of the Blocks begin to fade")
    taper_end: int = knob(
        0, "tapernorm: steps after which fixed factors are left of them; at most max_iters"
    )
    embed_lr: float = knob(
        1.0, "learning rate of embedding and output head, as a multiple of learning_rate"
    )
    weight_decay: float = knob(0.1, "decay of matrices; biases and the embedding have none")
    gain_decay: float = knob(
        0.0,
        "decay of the norms' gains to 0; those of rmsnorm1p, which multiplies by 1 + gain, to 1",
    )
    centred_writers: bool = knob(
        False,
        "keep the mean over the channels of the residual stream out of all weights that write into "
        "it, at the start and after each step, and out of their gradients: so LayerNorm is "
        "RMSNorm; with tie_embeddings the rows of the head lose their means, too",
    )
    beta1: float = knob(0.9, "AdamW: decay of the first moment")
    beta2: float = knob(0.95, "AdamW: decay of the second moment")
    muon_momentum: float = knob(0.95, "Muon: decay of the momentum")
    grad_clip: float = knob(1.0, "largest norm of the whole gradient; 0 = no clipping")
    skip_spikes: float = knob(
        0.0,
        "skip an update whose gradient norm is this many standard deviations above the mean of "
        "the last 128 ones; 6 is usual, 0 = never",
    )


@dataclass(frozen=True, kw_only=True)
class DataKnobs:
    """What is read, and how much of it."""

    dataset: str = knob(
        "python",
        "folder under data/, made by data/prepare.py; or a text file, or a folder of text files "
        "with a / in its path: a text is prepared first; or a mixture such as code:0.7,books:0.3, "
        "in which each row comes from one of the data sets, by share",
    )
    doc_mask: bool = knob(
        False, "no token attends to another document, and positions begin anew with each"
    )
    doc_windows: bool = knob(
        False, "training windows begin where documents begin, and cut only those that are longer"
    )
    answers_only: bool = knob(
        True,
        "of conversations, only the answers count in the training loss; they alone always count in "
        "the validation loss",
    )
    batch_size: int = knob(32, "sequences per optimizer step, over all devices together")
    eval_iters: int = knob(
        0, "validation windows per evaluation, evenly spread, always the same; 0 = all windows"
    )


@dataclass(frozen=True, kw_only=True)
class RunKnobs:
    """What the run begins with, what it reports and what it stores."""

    out_dir: str = knob(
        "out/run", "folder of the run: checkpoints, config.json, metrics.jsonl, tokenizer"
    )
    resume: Literal["no", "yes", "auto"] = knob(
        "no", "continue the run in out_dir; auto = continue it if there is one, else begin"
    )
    init_from: str = knob(
        "",
        "begin with the weights of a run, of a checkpoint file or of a Hugging Face folder, which "
        "decide the architecture; '' = from scratch",
    )
    branch: str = knob(
        "",
        "begin where another run was, its optimizer and place in the data included: a checkpoint "
        "of it, or its folder for the newest; schedule and max_iters may be others",
    )
    lora_rank: int = knob(
        0, "train only adapters of this rank, beside the weights of init_from; 0 = all weights"
    )
    lora_alpha: float = knob(16.0, "scale of the adapters, which is lora_alpha / lora_rank")
    seed: int = knob(1337, "random seed of the weights, the data order and dropout")
    eval_interval: int = knob(250, "steps between evaluations; 0 = evaluate only at the end")
    log_interval: int = knob(10, "steps between log lines")
    save_interval: int = knob(250, "steps between checkpoints; 0 = save only at the end")
    keep: int = knob(2, "how many of the newest checkpoints stay, beside the best one")
    keep_every: int = knob(0, "the checkpoints of every so many steps stay for good; 0 = none")
    watch: bool = knob(
        False,
        "with each log line, record how large activations and gradients are in each layer; costs "
        "one micro-batch more",
    )
    profile: int = knob(
        0,
        "steps whose operators are timed, after the first three: the log lists the costliest, and "
        "trace.json.gz has all; 0 = none",
    )
    sample_prompt: str = knob("", "beginning of the sample that is printed at the end")
    sample_tokens: int = knob(200, "tokens of the sample that is printed at the end; 0 = none")
    sample_interval: int = knob(0, "steps between more such samples before the end; 0 = none")
    tracker: Literal["none", "tensorboard", "wandb", "trackio"] = knob(
        "none", "program to send the metrics to, beside metrics.jsonl"
    )


@dataclass(frozen=True, kw_only=True)
class MachineKnobs:
    """How this machine does the work. The defaults suit what it has."""

    device: str = knob("auto", "auto (CUDA, then MPS, then CPU), cpu, mps, cuda or cuda:N")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = knob(
        "auto",
        "type of the matrix products; weights stay float32. auto = bfloat16 where the hardware "
        "has it, else float32",
    )
    stream_dtype: Literal["float32", "bfloat16"] = knob(
        "float32",
        "type of the residual stream in training; bfloat16 takes less memory and less time on a "
        "GPU, and needs dtype=bfloat16",
    )
    compile: Literal["auto", True, False] = knob(
        "auto", "torch.compile; auto = where it works and saves more time than it takes"
    )
    micro_batch_size: int = knob(
        0, "sequences that one device processes at once; 0 = the largest number that fits"
    )
    threads: int = knob(
        0,
        "threads that compute on the CPU; 0 = OMP_NUM_THREADS, or else one for each core that "
        "other programs leave free when the run begins; a resumed run keeps its number",
    )
    activation_checkpointing: bool = knob(
        False, "compute each Block twice instead of storing its activations: slower, less memory"
    )
    parallel: Literal["auto", "ddp", "fsdp"] = knob(
        "auto",
        "with several ranks (torchrun): ddp = each rank has all weights, fsdp = each rank has a "
        "part of every matrix; auto = ddp if all of it fits on one device",
    )
    sharded: Literal["auto", True, False] = knob(
        "auto",
        "each rank writes its part of a checkpoint, and python -m run.sharded makes one file of "
        "the parts; auto = with fsdp, where one machine could not hold the whole",
    )


GROUPS = {  # the headings of --help, and the knobs below them
    "model": ModelConfig,
    "optimizer": OptimizerKnobs,
    "data": DataKnobs,
    "run": RunKnobs,
    "machine": MachineKnobs,
}
FIRST_KNOBS = (  # what somebody new to the program needs to know
    "dataset out_dir init_from max_iters batch_size optimizer learning_rate "
    "n_layer n_head n_embd block_size norm"
).split()
BOUNDS = (  # a bound in words, as a test, and the knobs that it holds for
    ("1 or more", lambda v: v >= 1, "batch_size log_interval keep"),
    ("0 or more", lambda v: v >= 0, "min_lr warmup_iters weight_decay gain_decay"),
    ("0 or more", lambda v: v >= 0, "grad_clip skip_spikes seed"),
    ("0 or more", lambda v: v >= 0, "eval_interval eval_iters save_interval keep_every"),
    ("0 or more", lambda v: v >= 0, "max_iters minutes micro_batch_size threads lora_rank"),
    ("0 or more", lambda v: v >= 0, "sample_tokens sample_interval profile"),
    ("0 or more", lambda v: v >= 0, "taper_start taper_end"),
    ("above 0", lambda v: v > 0, "learning_rate embed_lr lora_alpha"),
    ("in [0, 1)", lambda v: 0 <= v < 1, "beta1 beta2 muon_momentum"),
    ("in (0, 1]", lambda v: 0 < v <= 1, "decay_fraction"),
    ("below 2**43", lambda v: v < 2**43, "seed"),  # times a million it fits into 64 bits
    ("at most 100", lambda v: v <= 100, "profile"),  # a trace of more is hard to open
    ("at most 1,000,000", lambda v: v <= 1_000_000, "batch_size micro_batch_size minutes"),
)


def norms_with(name: str) -> str:
    """'norm=dyt or norm=derf': the norms that have a parameter or a constant of this name."""
    has = (k for k, entry in NORMS.items() if name in (*entry.start, *entry.constants))
    return " or ".join(f"norm={kind}" for kind in has)


# Knobs that count only beside others: they, the others in words, and as a test of all knobs and of
# `launched`: whether a launcher such as torchrun has started this process.
NEEDS = (
    (
        "rope_factor rope_low_freq rope_high_freq rope_original_context",
        "rope_scaling=llama3",
        lambda k: k["rope_scaling"] == "llama3",
    ),
    ("norm_impl", "a norm", lambda k: k["norm"] != "none"),
    ("norm_eps", "a norm with an eps", lambda k: "eps" in NORMS[k["norm"]].constants),
    ("prms_p", norms_with("p"), lambda k: "p" in NORMS[k["norm"]].constants),
    ("norm_alpha", norms_with("alpha"), lambda k: "alpha" in NORMS[k["norm"]].scalars),
    ("minutes", "max_iters=0", lambda k: k["max_iters"] == 0),
    ("muon_momentum", "optimizer=muon", lambda k: k["optimizer"] == "muon"),
    ("min_lr", "a falling lr_schedule", lambda k: k["lr_schedule"] != "constant"),
    ("taper_start taper_end", "norm=tapernorm", lambda k: NORMS[k["norm"]].fades_from),
    ("decay_fraction", "lr_schedule=wsd", lambda k: k["lr_schedule"] == "wsd"),
    ("lora_alpha", "lora_rank above 0", lambda k: k["lora_rank"] > 0),
    ("gain_decay", "a norm with a gain", lambda k: "gain" in NORMS[k["norm"]].start),
    ("embed_lr gain_decay", "lora_rank=0", lambda k: k["lora_rank"] == 0),
    (
        "beta1 beta2",  # Muon trains all adapters
        "optimizer=adamw or lora_rank=0",
        lambda k: k["optimizer"] == "adamw" or k["lora_rank"] == 0,
    ),
    (
        "sample_prompt",
        "sample_tokens above 0",
        lambda k: k["sample_tokens"] > 0 or not k["sample_prompt"],
    ),
    (
        "sample_interval",
        "sample_tokens above 0",
        lambda k: k["sample_tokens"] > 0 or not k["sample_interval"],
    ),
    (
        "parallel",
        "torchrun, which starts several ranks",
        lambda k: k["parallel"] == "auto" or k["launched"],
    ),
)


@dataclass(frozen=True, kw_only=True)
class Config(OptimizerKnobs, DataKnobs, RunKnobs, MachineKnobs):
    """One training run: the model, and every knob of how it is trained."""

    model: ModelConfig = field(default_factory=ModelConfig)

    def __post_init__(self):
        problems = [
            f"{name} must be {bound}, got {getattr(self, name)}"
            for bound, holds, names in BOUNDS
            for name in names.split()
            if not holds(getattr(self, name))
        ]
        problems = problems or self._problems_together()
        if problems:
            raise ValueError("; ".join(problems))

    def _problems_together(self) -> list[str]:
        """What is wrong with knobs that are each within their bounds, but do not fit together."""
        problems = []
        if self.min_lr > self.learning_rate:
            problems.append(
                f"min_lr={self.min_lr} must not be above learning_rate={self.learning_rate}"
            )
        if not self.max_iters and not self.minutes:
            problems.append(
                "max_iters=0 takes as many steps as minutes allow: write minutes=3, for instance, "
                "or max_iters as a number of steps"
            )
        if 0 < self.max_iters < self.warmup_iters:
            problems.append(
                f"warmup_iters={self.warmup_iters} must not be above max_iters={self.max_iters}"
            )
        if NORMS[self.model.norm].fades_from:
            problems += self._taper_problems()
        if self.micro_batch_size and self.batch_size % self.micro_batch_size:
            near = max(m for m in range(1, self.micro_batch_size) if self.batch_size % m == 0)
            problems.append(
                f"batch_size={self.batch_size} must be a multiple of "
                f"micro_batch_size={self.micro_batch_size}: the nearest is {near}"
            )
        if self.keep_every and (not self.save_interval or self.keep_every % self.save_interval):
            problems.append(
                f"keep_every={self.keep_every} must be a multiple of "
                f"save_interval={self.save_interval}, for no others are saved"
            )
        if self.dataset in ("", ".", ".."):
            problems.append(
                f"dataset must be the name of a folder under data/, or of a text, "
                f"got {self.dataset!r}"
            )
        if self.lora_rank and not self.init_from:
            problems.append(
                f"lora_rank={self.lora_rank} needs weights to adapt: name them with init_from"
            )
        if self.lora_rank > self.model.n_embd:
            problems.append(
                f"lora_rank={self.lora_rank} must be at most n_embd={self.model.n_embd}"
            )
        if self.centred_writers and self.lora_rank:
            problems.append(
                f"centred_writers=true would move the weights that lora_rank={self.lora_rank} "
                f"freezes: leave out one of the two"
            )
        if self.centred_writers and self.model.norm_pos not in ("pre", "lns", "final"):
            problems.append(
                f"centred_writers=true is for a stream that no norm writes into: with "
                f"norm_pos={self.model.norm_pos} gains would bring the mean back, so use "
                f"norm_pos=pre, lns or final"
            )
        return problems

    def _taper_problems(self) -> list[str]:
        problems, norm, end = [], self.model.norm, self.taper_end
        if not 0 < self.taper_start < end:
            problems.append(
                f"norm={norm} fades between two steps: 0 < taper_start < taper_end, got "
                f"taper_start={self.taper_start} and taper_end={end}"
            )
        if 0 < self.max_iters < end:
            problems.append(f"taper_end={end} must not be above max_iters={self.max_iters}")
        if self.init_from:
            problems.append(
                f"init_from: the norms of these weights (norm={norm}) have been faded, and would "
                f"be put back: go on with the run that made them, or begin with other weights"
            )
        return problems

    def flat(self) -> dict[str, Any]:
        """All knobs in one dict, the model's too: what config.json and checkpoints hold."""
        own = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "model"}
        return own | dataclasses.asdict(self.model)


SYNONYMS = {  # what other programs call it -> what it is called here, or how it is done here
    "lr": "learning_rate",
    "dim": "n_embd",
    "d_model": "n_embd",
    "hidden_size": "n_embd",
    "n_layers": "n_layer",
    "n_heads": "n_head",
    "n_kv_heads": "n_kv_head",
    "max_seq_len": "block_size",
    "context": "block_size",
    "gradient_accumulation_steps": (
        "batch_size is that of a whole step, and micro_batch_size says how many fit at once"
    ),
    "max_steps": "max_iters",
    **dict.fromkeys(
        ("epochs", "num_epochs", "num_train_epochs"),
        "max_iters counts the optimizer steps, and the log says how many epochs they are",
    ),
    "num_samples": "sample.py has it",
    "temperature": "sample.py has it",
    "lr_decay_iters": "max_iters",
    "decay_lr": "lr_schedule",
    "lora_r": "lora_rank",
    "wandb_log": "tracker",
    "wandb_project": "write tracker=wandb, and set the environment variable WANDB_PROJECT",
    "wandb_run_name": "write tracker=wandb, and set the environment variable WANDB_NAME",
    "start": "prompt",
    "out_dir": "write the folder as a word of its own, without out_dir=",
    "init_from": "write the folder as a word of its own, without init_from=",
    "eval_only": "python sample.py FOLDER eval=val evaluates a run",
    "backend": "torchrun starts several ranks, and nothing else needs to be said",
    "bias": "no layer has a bias but norm=layernorm, and norm=layernorm_nobias has none",
    "eps": "norm_eps",
    "always_save_checkpoint": "save_interval",
    "config": "write the preset as a word of its own, without config=",
    "weight_tying": "tie_embeddings",
    "intermediate_size": "n_hidden",
}
PATHS = ("out_dir", "dataset", "init_from", "out")  # knobs and options that name a place
BOOLEANS = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
LONGEST_NUMBER = 100  # characters; int() of a very long text takes seconds


@cache  # the types are read from the text of the annotations, which takes milliseconds
def knobs_of(*classes: type) -> dict[str, tuple[Any, dataclasses.Field]]:
    """name -> (type, field) of every knob of the dataclasses."""
    return {
        f.name: (get_type_hints(cls)[f.name], f)
        for cls in classes
        for f in dataclasses.fields(cls)
        if "help" in f.metadata
    }


def without_effect(
    given: Iterable[str], values: dict[str, Any], knobs: dict, needs: tuple
) -> dict[str, str]:
    """Those of the knobs `given` that do not count beside the other `values`, and what they need.

    Where `values` has no value for one of `knobs`, its default counts; `knobs` is as in
    parse_knobs, `needs` as in NEEDS.
    """
    complete = {name: knob_field.default for name, (_, knob_field) in knobs.items()} | values
    return {
        name: need
        for names, need, counts in needs
        for name in names.split()
        if name in given and not counts(complete)
    }


def refuse_without_effect(useless: dict[str, str], values: dict[str, Any], where: str) -> None:
    """ValueError that names the knobs that without_effect has found, if there are any."""
    if useless:
        told = [f"{name}={values[name]} has no effect without {useless[name]}" for name in useless]
        raise ValueError(
            f"{where}: {'; '.join(told)}: leave out what has no effect, or add what it needs"
        )


def read_arguments(argv: list[str], knobs: dict) -> tuple[list[str], dict[str, Any]]:
    """The words of a command line, and its knobs; `knobs` is what knobs_of returns. ValueError."""
    options = [argument.lstrip("-") for argument in argv if argument.startswith("-")]
    refuse_unknown([name for name in options if "=" not in name], knobs, "command line")
    words, pairs = split_arguments(argv)
    return words, parse_knobs(pairs, knobs, "command line")


def refuse_unknown(names: Iterable[str], knobs: dict, where: str) -> None:
    """ValueError if there is no knob of one of these names: it names the one that is meant, or says
    how the thing is done here.
    """
    for name in names:
        if name in knobs:
            continue
        near = [SYNONYMS[name]] if name in SYNONYMS else get_close_matches(name, knobs, 1, 0.6)
        hint = "--help lists all"
        if near and near[0] in knobs:
            hint = f"did you mean {near[0]}?"
        elif near and " " in near[0]:
            hint = near[0]
        raise ValueError(f"{where}: unknown knob {name!r}; {hint}")


def parse_knobs(values: dict[str, Any], knobs: dict, where: str) -> dict[str, Any]:
    """Gives every value the type of its knob; `knobs` is what knobs_of returns.

    Raises ValueError, which names the nearest knob if there is none of that name. `where` says
    where the values are from: "command line", or a file.
    """
    refuse_unknown(values, knobs, where)
    parsed = {}
    for name, value in values.items():
        # Only a foreign JSON file or checkpoint can hold anything else. It is not printed, because
        # it may be nested so deeply that repr() fails.
        if not isinstance(value, (str, int, float)):
            kind = type(value).__name__
            raise ValueError(f"{where}: {name} must be a number or a text, got {kind}")
        try:
            parsed[name] = parse_value(name, value, knobs[name][0])
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None
    return parsed


def parse_value(name: str, value: str | int | float, kind: Any) -> str | int | float:
    """The value as the type `kind` of the knob `name`; ValueError if it is not of that type.

    A preset gives numbers and booleans as such, a command line gives everything as text.
    """
    if get_origin(kind) is Literal:
        return parse_choice(name, value, get_args(kind))
    if kind is bool:
        return parse_choice(name, value, (True, False))
    if kind is str:
        if not isinstance(value, str):
            raise ValueError(f"{name} must be text in quotes, got {value!r:.80}")
        if name == "out_dir" and not value:  # Path("") would be the current folder
            raise ValueError("out_dir must be a folder, got ''")
        # A shell leaves the ~ of key=~/place as it is.
        return expand_home(value) if name in PATHS else value
    return _parse_number(name, value, kind)


def parse_choice(name: str, value: str | int | float, choices: tuple) -> Any:
    """The one of `choices` that `value` names; ValueError if there is none.

    True and False are also written true and false, yes and no, 1 and 0, in any case.
    """
    for choice in choices:
        if isinstance(choice, bool):
            if BOOLEANS.get(str(value).lower()) is choice:
                return choice
        elif value == choice:
            return choice
    *others, last = (str(choice).lower() for choice in choices)
    raise ValueError(f"{name} must be {', '.join(others)} or {last}, got {value!r:.80}")


def _parse_number(name: str, value: str | int | float, kind: type) -> int | float:
    number, wanted = value, {int: "a whole number", float: "a number"}[kind]
    # Python also takes 1_6 and the digits of other scripts, which are more likely slips.
    plain = isinstance(value, str) and value.isascii() and "_" not in value
    if plain and len(value) <= LONGEST_NUMBER:
        with suppress(ValueError):
            number = kind(value)
    is_number = isinstance(number, (int, kind)) and not isinstance(number, bool)
    if is_number and isinstance(number, int) and abs(number) >= 2**63:
        # A knob has 64 bits, and float() of a larger whole number may fail.
        is_number, wanted = False, f"{wanted} below 2**63"
    if not is_number:
        raise ValueError(f"{name} must be {wanted}, got {value!r:.80}")
    if isinstance(number, float) and not math.isfinite(number):
        raise ValueError(f"{name} must be finite, got {value!r:.80}")
    return kind(number)
