"""How a training run is set up: what the user asks for is checked, then the run is built.

Reading order: Run; set_up and what it calls: read_and_check, which checks on the main rank;
resolve, which replaces every `auto`; build, which makes model and optimizers on every rank; last
where the checkpoint, the first weights and the data come from.
"""

import hashlib
import json
import math
import os
import shlex
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from config.command import expand_home, names_folder, shell_path, warn
from config.preset import NOT_DECIDED_BY_WEIGHTS, make_config, read_knobs
from config.schema import Config
from data import DATA
from data.corpus import Corpus, open_corpus
from data.loader import Dataset, check_length, check_prepared, open_dataset, read_meta, val_starts
from data.mixture import Mixture, mix, read_shares
from data.prepare import prepare
from model import Decoder, parameter_count
from run import sharded
from run.machine import (
    add_in_fixed_order,
    choose_device,
    choose_dtype,
    choose_threads,
    keep_freed_memory,
    memory_estimate,
    most_tokens,
    pays_to_compile,
    total_memory,
)
from run.metrics import read_metrics
from run.optim import Optimizers
from run.parallel import (
    build_on_ranks,
    empty_optimizer_state,
    muon_class,
    put_weights,
    refuse_what_fsdp_cannot,
    shapes_only,
    spread_optimizer_state,
    wrap,
)
from run.ranks import ALONE, Ranks
from text.tokenizer import FILES as TOKENIZER_FILES
from text.tokenizer import tokenizer_file, tokenizer_sha256
from weights import checkpoint
from weights.hf_folder import is_hf_folder
from weights.lock import Lock
from weights.open import (
    Weights,
    knobs_of_base,
    open_base,
    open_weights,
    refuse_longer_than_context,
)

SCHEDULE = (  # the knobs on which the learning rate of a step depends
    "learning_rate min_lr lr_schedule warmup_iters decay_fraction max_iters"
).split()


Data = Dataset | Mixture


@dataclass
class Run:
    """The parts of one training run."""

    config: Config  # resolved: nothing is auto any more
    data: Data
    model: Decoder
    forward: nn.Module  # what a step calls: the model, compiled or with DDP around it if so decided
    optimizers: Optimizers
    scaler: torch.amp.GradScaler
    ranks: Ranks = ALONE
    step: int = 0  # optimizer steps done
    ahead: tuple[int, tuple[Tensor, ...]] | None = None  # a step, and its windows, read before it
    past: Path | None = None  # the folder that its checkpoint is from: its own, or that of a trunk
    best_val_loss: float = math.inf
    # What the checkpoints say of the weights of init_from: their context, and, if the run trains
    # adapters for them, their path and checksum.
    base: dict[str, Any] = field(default_factory=dict)
    grad_norms: list[float] = field(default_factory=list)  # of the last steps, to find spikes
    # If the run is resumed: the config, but with the schedule of the learning rate and the interval
    # of records as they were until now.
    config_before: Config | None = None
    damaged: set[Path] = field(default_factory=set)  # checkpoints found damaged when it was resumed
    written: dict[str, bytes] = field(default_factory=dict)  # config.json and tokenizer, on main
    lock: Lock | None = None  # of out_dir, on main; a run that writes nothing has none

    @property
    def folder(self) -> Path:
        return Path(self.config.out_dir)


def read_config(argv: list[str]) -> Config:
    """The checked Config of a command line. With init_from, the weights decide its model."""
    knobs = read_knobs(argv, launched=dist.is_initialized())
    return make_config(knobs, knobs_of_base(knobs))


def set_up(wanted: Config, ranks: Ranks = ALONE) -> Run:
    """Checks everything, prepares a text that is not a data set yet, builds or restores the run.

    Main reads and decides, and tells the other ranks. They need only the data set on their own
    disk.
    """
    with ranks.all_or_exit():
        device = choose_device(wanted.device, ranks.local_rank, ranks.local_size)
    config, data, begin, told = wanted, None, None, None
    with ranks.all_or_exit():
        if ranks.is_main:
            config, data, begin = read_and_check(wanted, device, ranks)
            folders = [source.folder for source in data.sources]
            told = config, folders, data.fingerprint, shapes_only(begin)
    if ranks.size > 1:
        config, folders, fingerprint, outline = ranks.from_main(told)
        with ranks.all_or_exit():
            data = data or open_same_data(folders, fingerprint, config)
        config, begin = replace(config, device=device), begin or outline
    return build(config, data, begin, ranks)


def read_and_check(
    wanted: Config, device: str, ranks: Ranks
) -> tuple[Config, Data, dict[str, Any]]:
    """On the main rank: the resolved config, the data, and what the run begins with. That is
    `saved`, the checkpoint to go on from, or None; `weights`, those of init_from, or None; and
    `base`, see Run. ValueError or OSError for all that a user can get wrong."""
    saved = find_checkpoint(wanted)
    start = find_first_weights(wanted, saved)
    tokenizer = None  # a text that must be prepared gets a tokenizer of its own
    if wanted.init_from:
        tokenizer = saved["folder"] if saved else start.folder
    data = open_data(wanted, saved, tokenizer)
    if saved:
        refuse_other_data(saved, data)
    check_data(wanted, data, start)
    refuse_other_tokenizer(Path(wanted.out_dir), data)
    config = resolve(wanted, device, data, saved, ranks)
    refuse_what_fsdp_cannot(config, ranks)
    if saved:
        for line in checkpoint.compare_with_run(saved, config.flat(), data.fingerprint):
            print(f"resuming with {line}")
    base = ({"context": start.context} if start else {}) | (saved["base"] if saved else {})
    if config.lora_rank:
        # A relative path, so that the run and the weights can be moved together.
        path = Path(os.path.relpath(start.place.resolve(), Path(config.out_dir).resolve()))
        base |= {"path": path.as_posix(), "checksum": start.checksum()}
        if start.state and not saved:
            warn(
                f"these adapters work only beside {start.place}, which the run there removes or "
                f"replaces if it goes on: before it does, copy its folder, and begin with the copy"
            )
    return config, data, {"saved": saved, "weights": start and start.tensors, "base": base}


def resolve(
    wanted: Config, device: str, data: Data, saved: dict[str, Any] | None, ranks: Ranks
) -> Config:
    """The config in which every `auto` has become a value, and so have vocab_size=0 and
    micro_batch_size=0. Later only train.warm_up changes two values, before the first step: it makes
    a micro-batch smaller that does not fit, and does without a compiler that does not work.

    ValueError if the ranks cannot share the batch, or the model needs far more than the memory.
    """
    vocab_size = wanted.model.vocab_size or data.fingerprint["vocab_size"]
    config = replace(
        wanted,
        device=device,
        dtype=choose_dtype(wanted.dtype, device),
        model=replace(wanted.model, vocab_size=vocab_size),
    )
    if saved:
        kept = kept_choices(wanted, device, saved["config"], ranks.size)
        config = replace(config, max_iters=kept_length(wanted, saved["config"]), **kept)
    config = replace(config, threads=choose_threads(config.threads))
    torch.set_num_threads(config.threads)  # here, too, because a rate may be measured below
    if config.stream_dtype not in ("float32", config.dtype):
        raise ValueError(
            f"stream_dtype={config.stream_dtype} needs products of the same type, and here they "
            f"are in {config.dtype}: set dtype={config.stream_dtype}, or leave stream_dtype=float32"
        )
    check_batch(config, ranks.size)

    room = total_memory(device) / (ranks.local_size if device == "cpu" else 1)
    # How much of it is used, and what is hopeless: on CUDA the estimate is a good one.
    usable, hopeless = (0.9, 1.05) if device.startswith("cuda") else (0.8, 1.5)
    parallel = config.parallel
    if parallel == "auto":
        fits_whole = sum(memory_estimate(config, micro_batch=1)) < usable * room
        parallel = "ddp" if ranks.size == 1 or fits_whole else "fsdp"
    shards = ranks.size if parallel == "fsdp" else 1
    least = sum(memory_estimate(config, 1, shards))
    if least > hopeless * room:
        raise ValueError(
            f"{parameter_count(config.model) / 1e9:.1f} billion parameters need about "
            f"{least / 1e9:,.0f} GB to train, {device} has {room / 1e9:,.0f} GB: lower n_embd, "
            f"n_layer, block_size or vocab_size, or have more devices share it"
        )
    sharded = config.sharded
    if sharded == "auto":
        # Weights and moments in fp32, and the same again while they are written to a file.
        gathered = 2 * 12 * parameter_count(config.model)
        sharded = shards > 1 and gathered > total_memory("cpu")
    micro_batch_size = config.micro_batch_size
    if not micro_batch_size:
        share = config.batch_size // ranks.size
        divisors = [m for m in range(1, share + 1) if share % m == 0]
        fit = [m for m in divisors if sum(memory_estimate(config, m, shards)) < usable * room]
        fit = [m for m in fit if m * config.model.block_size <= most_tokens(device)]
        micro_batch_size = max(fit, default=1)
    tokens = micro_batch_size * config.model.block_size
    if tokens > most_tokens(device):
        raise ValueError(
            f"micro_batch_size={micro_batch_size} times block_size={config.model.block_size} is "
            f"more than the {most_tokens(device):,} tokens up to which an Apple M1 or M2 computes "
            f"right gradients: lower one of the two, or set device=cpu"
        )
    return replace(
        config,
        parallel=parallel,
        sharded=sharded,
        micro_batch_size=micro_batch_size,
        compile=pays_to_compile(config) if config.compile == "auto" else config.compile,
    )


@contextmanager
def undone(run: Run) -> Iterator[None]:
    """Undoes the steps that a run which has not begun does meanwhile."""
    trained = [p.detach() for p in run.model.parameters() if p.requires_grad]
    parameters = [sharded.local_part(p) for p in trained]
    before, scaler = [p.to("cpu", copy=True) for p in parameters], run.scaler.state_dict()
    yield
    for parameter, old in zip(parameters, before, strict=True):
        parameter.copy_(old)
    for optimizer in run.optimizers:
        optimizer.state.clear()
    run.scaler.load_state_dict(scaler)
    run.step, run.grad_norms = 0, []


def kept_choices(wanted: Config, device: str, before: dict[str, Any], ranks: int) -> dict[str, Any]:
    """What a resumed run takes from `before`, the config in its checkpoint, where the user says
    auto: so it stays bitwise the same run. On another device it takes nothing."""
    if before.get("device") != device:
        return {}
    automatic = {name for name in ("dtype", "compile") if getattr(wanted, name) == "auto"}
    if "dtype" in automatic:
        choose_dtype(before.get("dtype", "auto"), device)  # ValueError on an older GPU
    kept = {name: before[name] for name in automatic if before.get(name, "auto") != "auto"}
    # Of these the checkpoint of another program may have any number, or none.
    micro, threads = before.get("micro_batch_size", 0), before.get("threads", 0)
    if wanted.micro_batch_size == 0 and micro >= 1:
        kept["micro_batch_size"] = micro
    if wanted.threads == 0 and "OMP_NUM_THREADS" not in os.environ:
        if 1 <= threads <= (os.cpu_count() or 1):  # else it is another machine
            kept["threads"] = threads
    if wanted.batch_size % (ranks * kept.get("micro_batch_size", 1)):
        kept.pop("micro_batch_size", None)  # there are more ranks now
    return kept


def kept_length(wanted: Config, before: dict[str, Any]) -> int:
    """The max_iters of a resumed run. ValueError if `minutes` would fix it a second time."""
    fixed = before["max_iters"] if before.get("minutes") == wanted.minutes else 0
    if wanted.max_iters or fixed:
        return wanted.max_iters or fixed
    raise ValueError(
        f"minutes={wanted.minutes:g} cannot change the length of a run that has begun, which is "
        f"max_iters={before['max_iters']}: write max_iters with the steps that you want in all"
    )


def check_batch(config: Config, ranks: int) -> None:
    """ValueError, with the nearest sizes, if the ranks cannot share the batch."""
    unit = ranks * max(1, config.micro_batch_size)
    if config.batch_size % unit == 0:
        return
    below, above = config.batch_size // unit * unit, -(-config.batch_size // unit) * unit
    nearest = f"nearest are {below} and {above}" if below else f"nearest is {above}"
    micro = ""
    if config.micro_batch_size:
        micro = f" times micro_batch_size={config.micro_batch_size} (0 = automatic)"
    raise ValueError(
        f"batch_size={config.batch_size} must be a multiple of the {ranks} ranks that share it"
        f"{micro}: {nearest}; or start fewer ranks"
    )


def refuse_other_data(saved: dict[str, Any], data: Data) -> None:
    """ValueError if a run that goes on is given other data than it was begun with."""
    before, run = saved["data"], saved["folder"]
    if all(before.get(key) == now for key, now in data.fingerprint.items() if key != "name"):
        return
    name, place = before.get("name"), data.place
    if name == data.name:
        raise ValueError(
            f"this is not the run of the checkpoint: {place} does not hold the data any more with "
            f"which the run in {run} was begun: put them back, or begin another run"
        )
    raise ValueError(
        f"this is not the run of the checkpoint: {place} does not hold the data of {name}, with "
        f"which the run in {run} was begun: leave dataset as it was, or begin another run"
    )


def refuse_other_tokenizer(folder: Path, data: Data) -> None:
    """ValueError if out_dir has a tokenizer's file that the run will not replace by its own: then
    there would be two, and none of our programs could know which one counts."""
    own = tokenizer_file(data.folder).name
    for name in TOKENIZER_FILES:
        if name != own and (folder / name).exists():
            raise ValueError(
                f"{folder / name} is not the tokenizer of {data.folder}, which is in {own}: "
                f"move it away, or name another out_dir"
            )


def check_data(config: Config, data: Data, start: Weights | None) -> None:
    """ValueError if the data have another tokenizer than the weights of init_from, more tokens
    than vocab_size, a split that is shorter than one window, or no answer to evaluate; or if
    answers_only is set for texts, which have none."""
    if start is not None and start.data["tokenizer_sha256"] != data.fingerprint["tokenizer_sha256"]:
        place = shell_path(start.folder)
        raise ValueError(
            f"{data.folder} was not made with the tokenizer of {start.folder}: python "
            f"data/prepare.py TEXT tokenizer={place} name=NAME makes a data set with it, and so "
            f"does dataset=TEXT"
        )
    tokens, wanted = data.fingerprint["vocab_size"], config.model.vocab_size
    if 0 < wanted < tokens:
        raise ValueError(
            f"vocab_size={wanted} is below the {tokens} tokens of {data.folder}: "
            f"leave it 0 (automatic) or choose a larger one"
        )
    if not config.answers_only and not any(source.answers for source in data.sources):
        raise ValueError(
            f"answers_only=false has no effect: {data.place} holds texts, and no conversations "
            f"with answers: leave it out"
        )
    T = config.model.block_size
    for source in data.sources:
        check_length(len(source.train), T)
        starts = val_starts(len(source.val), T, config.eval_iters)
        if source.answers and not source.in_answers("val", starts + 1, T).any():
            raise ValueError(
                f"{source.folder}: the validation windows hold no answer, which alone would count: "
                f"set eval_iters=0, or prepare more conversations"
            )


def build(config: Config, data: Data, begin: dict[str, Any], ranks: Ranks) -> Run:
    """Model, optimizers and scaler on every rank, at the first step or at the saved one."""
    torch.set_num_threads(config.threads)
    if config.device.startswith("cuda"):
        torch.cuda.set_device(config.device)
        torch.set_float32_matmul_precision("high")  # TF32 for the products that stay in float32
    elif config.device == "cpu":
        keep_freed_memory()
        add_in_fixed_order(bool(config.compile))

    weights, saved = begin["weights"], begin["saved"]
    in_parts = bool(saved) and "shards" in saved
    model = build_on_ranks(config, ranks, seed=None if weights or saved else config.seed)
    if weights:
        put_weights(model, weights, ranks, frozen=bool(config.lora_rank))
    if saved and not in_parts:
        put_weights(model, saved["model"], ranks)

    optimizers = Optimizers(
        model,
        optimizer=config.optimizer,
        weight_decay=config.weight_decay,
        betas=(config.beta1, config.beta2),
        momentum=config.muon_momentum,
        embed_lr=config.embed_lr,
        gain_decay=config.gain_decay,
        centred_writers=config.centred_writers,
        muon=muon_class(config, ranks),
    )
    scaler_device = torch.device(config.device).type
    scaler = torch.amp.GradScaler(scaler_device, enabled=config.dtype == "float16")
    forward = wrap(model, config, ranks)
    run = Run(config, data, model, forward, optimizers, scaler, ranks, base=begin["base"])
    if not saved:
        optimizers.centre_writers()
        return run

    if in_parts:
        optimizers.load_state_dict(read_parts_into(model, saved))
    else:
        optimizers.load_state_dict(spread_optimizer_state(saved["optimizer"], model, ranks))
    if not saved["config"].get("centred_writers"):  # else they are, and rounding would move them
        optimizers.centre_writers()
    if saved["scaler"]:  # it is empty if the run was not in float16
        scaler.load_state_dict(saved["scaler"])
    run.step, run.grad_norms, run.past = saved["step"], saved["grad_norms"], saved["folder"]
    names = (*SCHEDULE, "log_interval")
    before = {name: saved["config"][name] for name in names if name in saved["config"]}
    run.config_before = replace(config, **before)
    run.damaged = set(saved["damaged"])
    # Else it was measured on other windows.
    if saved["config"].get("eval_iters") == config.eval_iters:
        run.best_val_loss = saved["best_val_loss"]
    return run


def read_parts_into(model: Decoder, saved: dict[str, Any]) -> dict[str, dict[str, Tensor]]:
    """Reads this rank's part of a sharded checkpoint: the weights into the model, and the
    optimizer's state, which is returned."""
    parameters = checkpoint.check_weights(model, saved["model"], frozen=False)
    weights = {name: parameter.detach() for name, parameter in parameters.items()}
    moments = empty_optimizer_state(saved["optimizer"], model)
    sharded.read_into({"model": weights, "optimizer": moments}, Path(saved["shards"]))
    return moments


# Where the checkpoint, the first weights and the data come from.


def find_checkpoint(config: Config) -> dict[str, Any] | None:
    """The checkpoint to go on from, or None for a new run. ValueError if the run does not fit what
    is in out_dir: a new run never overwrites another one."""
    folder = Path(config.out_dir)
    numbered = checkpoint.all_in(folder)
    if is_hf_folder(folder):
        raise ValueError(
            f"out_dir={folder} is a Hugging Face folder, whose files would be lost: name another"
        )
    best = [*folder.glob("best.pt"), *folder.glob("best_*.shards")]
    # A run that was killed before its first save has best.pt alone. It may begin again.
    saved_before = config.save_interval and any(
        r["step"] > config.save_interval for r in read_metrics(folder)
    )
    if best and not numbered and saved_before:
        raise ValueError(
            f"{folder} has {best[0].name} but no checkpoint to go on from any more: name another "
            f"out_dir; init_from={shell_path(best[0])} begins with these weights there"
        )
    if config.resume == "no" and (numbered or best):
        newest = numbered[-1][1].name if numbered else best[0].name
        raise ValueError(
            f"{folder} already holds a run ({newest}): train.py {shell_path(folder)} goes on with "
            f"it, another out_dir begins another"
        )
    if not numbered and config.resume == "yes":
        raise ValueError(
            f"resume=yes, but there is no checkpoint in {folder}: resume=auto would start afresh"
        )
    if not numbered:
        return find_trunk(config) if config.branch else None
    damaged: dict[Path, str] = {}
    saved = checkpoint.load_newest(folder, sharded.load_parts, damaged)
    file = saved.get("shards", checkpoint.path_of(folder, saved["step"]))
    checkpoint.check_can_go_on(saved, Path(file))
    refuse_another_trunk(config, saved)
    return saved | {"damaged": damaged, "folder": folder}


def find_trunk(config: Config) -> dict[str, Any]:
    """The checkpoint of another run that branch=... names, for a run that has none of its own.
    OSError or ValueError if there is none, or if no training could go on from it elsewhere."""
    place = Path(expand_home(config.branch))
    if not place.exists():
        raise FileNotFoundError(
            f"branch={config.branch} does not exist: name a checkpoint of a run, or its folder"
        )
    if place.is_dir() and place.suffix != ".shards":
        saved = checkpoint.load_newest(place, sharded.load_parts)
        place = Path(saved.get("shards", checkpoint.path_of(place, saved["step"])))
    else:
        saved = sharded.load_parts(place)
    checkpoint.check_can_go_on(saved, place)
    if saved["config"].get("lora_rank"):
        raise ValueError(
            f"branch={config.branch} is a run of adapters, which names its weights by their place "
            f"beside it: branch a run that trains all weights"
        )
    if 0 < config.max_iters <= saved["step"]:
        raise ValueError(
            f"branch={config.branch} has done {saved['step']} steps, and max_iters="
            f"{config.max_iters} counts them, too: set a larger one, or name an earlier checkpoint"
        )
    print(f"branching off at step {saved['step']} of {place.parent}")
    begun = {"best_val_loss": math.inf, "damaged": {}, "folder": place.parent}
    return saved | begun


def refuse_another_trunk(config: Config, saved: dict[str, Any]) -> None:
    """ValueError if a run that goes on names another branch than it began with, which would not be
    read, and yet be recorded."""
    before, now = saved["config"].get("branch", ""), config.branch
    if before == now or (before and now and Path(before).resolve() == Path(now).resolve()):
        return
    begun = f"was begun with branch={before}" if before else "was begun without branch"
    raise ValueError(
        f"the run in {config.out_dir} {begun}: {'put branch back' if before else 'leave it out'}, "
        f"or name another out_dir"
    )


def find_first_weights(config: Config, saved: dict[str, Any] | None) -> Weights | None:
    """The weights of init_from, or None without it. A run that goes on has its own weights and gets
    None, unless it trains adapters: then it needs the weights that they belong to."""
    if saved:
        refuse_another_start(config, saved)
    if not config.init_from:
        return None
    if saved:
        if not (config.lora_rank and saved["config"].get("lora_rank")):
            return None
        file = checkpoint.path_of(Path(config.out_dir), saved["step"])
        return open_base(saved["base"], file, moved=Path(config.init_from))
    start = open_weights(Path(config.init_from))
    refuse_longer_than_context(config.model.block_size, start.context)
    for name in checkpoint.ARCHITECTURE:
        said, found = getattr(config.model, name), getattr(start.config, name)
        if name not in NOT_DECIDED_BY_WEIGHTS and said != found:
            raise ValueError(
                f"{start.folder / 'config.json'} says {name}={said}, but the weights there have "
                f"{found}: one of the two is not from this run"
            )
    return start


def refuse_another_start(config: Config, saved: dict[str, Any]) -> None:
    """ValueError if a run that goes on names other weights in init_from than it began with: they
    would not be read, and yet be recorded. Only if the weights of its adapters have been moved may
    it name the new place."""
    before, now = saved["config"].get("init_from", ""), config.init_from
    if before == now or (before and now and Path(before).resolve() == Path(now).resolve()):
        return
    base = saved["base"].get("path")
    if now and base and not (Path(config.out_dir) / base).exists():
        return  # open_base compares the checksum
    begun = f"was begun with init_from={before}" if before else "was begun without init_from"
    raise ValueError(
        f"the run in {saved['folder']} {begun} and goes on with its own weights: "
        f"{'put init_from back' if before else 'leave init_from out'}, or name another out_dir"
    )


def dataset_folder(name: str) -> Path:
    """The folder of the prepared data set that dataset=NAME means, whether or not it exists. NAME
    is the path of the folder, or the name of one under data/.
    """
    path = Path(expand_home(name))
    return path if names_folder(name) or (path / "meta.json").is_file() else DATA / name


def find_same_data(known: dict[str, Any], expected: Path | None = None) -> Path | None:
    """The data set that has the content and the tokenizer of the fingerprint `known`: the one in
    the folder `expected`, or one under data/, whatever its name is now. None if there is none.
    """
    paths = sorted(DATA.glob("*/meta.json"), key=lambda path: path.parent.name != known.get("name"))
    for path in [expected / "meta.json", *paths] if expected else paths:
        try:
            meta = read_meta(path)
        except (ValueError, OSError):  # told when it is opened, if it is the one that is needed
            continue
        if all(meta[key] == known.get(key) for key in ("content_sha256", "tokenizer_sha256")):
            return path.parent
    return None


def find_dataset_of_run(name: str, saved: dict[str, Any], tokenizer: Path | None) -> Path | None:
    """The data set with which the run of the checkpoint `saved` was begun, which said dataset=NAME.
    None if it is gone, or if the user now names another one.

    So a run that was begun with a text goes on when the text is gone or has been edited. ValueError
    if the text has been edited and the data set is gone: nothing can make it again.
    """
    if name != saved["config"].get("dataset"):
        return None
    expected, text = dataset_folder(name), text_meant(name)
    found = find_same_data(saved["data"], expected)
    if found is None and text and text.exists():
        made, before = text_dataset(text, open_corpus([name]), tokenizer), saved["data"].get("name")
        of_this_text = made.name[:-8] == str(before)[:-8]  # all but the hash
        if of_this_text and made.name != before:
            raise ValueError(
                f"{name} has changed since this run was begun, and {DATA / before}, made of it "
                f"then, is gone: put one of them back as it was, or name another out_dir"
            )
    if found in (None, expected):
        return found
    state = "has changed since" if (text or expected).exists() else "is not here"
    if text and text.exists():
        with suppress(ValueError, OSError):  # it has become unreadable
            if text_dataset(text, open_corpus([name]), tokenizer).name == saved["data"].get("name"):
                return found
    print(f"{name} {state}: going on with {found}, the data that this run was begun with")
    return found


def text_meant(name: str) -> Path | None:
    """The text, which may be missing, that dataset=NAME means; None if it means a data set."""
    folder, path = dataset_folder(name), Path(expand_home(name))
    if (folder / "meta.json").is_file():
        return None
    return path if names_folder(name) or (path.is_file() and not folder.exists()) else None


def find_dataset(name: str, tokenizer: Path | None) -> Path:
    """The folder of the data set that dataset=NAME means. NAME is the path of a data set, the name
    of one under data/, or the path of a text.

    A text is prepared first, with the tokenizer in the folder `tokenizer`, or with one of its own.
    The name of the new data set contains a hash of the text and the tokenizer. So the same text is
    prepared only once, and again when the text or the tokenizer has changed.
    """
    folder, text = dataset_folder(name), text_meant(name)
    if text is None:
        if tokenizer is not None and not folder.exists():
            raise ValueError(
                f"{folder}: no such data set; write dataset=PATH-OF-A-TEXT, or make it with: "
                f"python data/prepare.py TEXT name={shlex.quote(folder.name)} "
                f"tokenizer={shell_path(tokenizer)}"
            )
        if name == "python" and not folder.exists():
            print(f"{folder} is not there yet: preparing it from this Python's standard library")
            prepare(["python"], folder)
        return folder
    if not text.exists():
        raise ValueError(f"dataset={name} does not exist: name a folder under {DATA}, or a text")
    corpus = open_corpus([name])
    folder = text_dataset(text, corpus, tokenizer)
    if not folder.exists():
        print(f"preparing {name} as {folder}")
        try:
            prepare(corpus, folder, tokenizer and str(tokenizer))
        except OSError:
            if not (folder / "meta.json").is_file():  # else another process has just made it
                raise
    return folder


def find_sources(names: Sequence[str], tokenizer: Path | None) -> list[Path]:
    """The folders of the data sets of a mixture, in the order of `names`. They need one tokenizer,
    so texts are prepared with `tokenizer`, or with that of the first source that is a data set
    already, or else with that of the first text."""
    folders = {}  # data sets come before texts, so that their tokenizer is known by then
    for name in sorted(names, key=lambda name: text_meant(name) is not None):
        folders[name] = find_dataset(name, tokenizer)
        check_prepared(folders[name])
        tokenizer = tokenizer or folders[name]
    return [folders[name] for name in names]


def text_dataset(text: Path, corpus: Corpus, tokenizer: Path | None) -> Path:
    """The folder for the data set of a text, whether or not it exists. All of it is read."""
    digest = hashlib.sha256(b"" if tokenizer is None else tokenizer_sha256(tokenizer).encode())
    for piece in corpus.pieces():
        digest.update(f"{piece.split} {piece.start} {len(piece.text)} ".encode())
        digest.update(piece.text.encode())
        if piece.messages:
            digest.update(json.dumps(piece.messages).encode())
    return DATA / f"{text.resolve().stem.lstrip('.')}-{digest.hexdigest()[:8]}"


def open_data(
    config: Config, saved: dict[str, Any] | None = None, tokenizer: Path | None = None
) -> Data:
    """The data set or the mixture that a run reads. For `saved` and `tokenizer` see
    find_dataset_of_run."""
    name = config.dataset
    if shares := read_shares(name):
        return mixture_of(name, find_sources(list(shares), tokenizer), config)
    folder = find_dataset_of_run(name, saved, tokenizer) if saved else None
    folder = folder or find_dataset(name, tokenizer)
    return open_source(folder, config)


def open_source(folder: Path, config: Config) -> Dataset:
    return open_dataset(folder, config.doc_mask, config.doc_windows, config.answers_only)


def mixture_of(name: str, folders: Sequence[Path], config: Config) -> Mixture:
    sources = [open_source(folder, config) for folder in folders]
    return mix(name, sources, read_shares(name))


def open_same_data(folders: Sequence[Path], fingerprint: dict[str, Any], config: Config) -> Data:
    """The data in this rank's folders; ValueError if they are not those that main has there."""
    if len(folders) > 1:
        data = mixture_of(config.dataset, folders, config)
    else:
        data = open_source(folders[0], config)
    if data.fingerprint != fingerprint:
        raise ValueError(
            f"{data.place} on {socket.gethostname()} is not the data set that rank 0 has there: "
            f"copy it"
        )
    return data
