"""Others beside us, on the same machine, data and shapes: transformers, llama2.c's run, and nanoGPT to the same loss.

What the benches share comes first. Others run as they are, in processes of their own; that of transformers is this
file: `python bench_beside.py CHILD ...`, for the benches alone.
"""

import contextlib
import json
import re
import shutil
import statistics
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import torch

from bench_norm import at_least_one, in_turn, machine
from config.schema import Config, knobs_of, split_arguments, typed, user_errors
from cost import flops_per_token
from data.loader import Dataset, batch, open_dataset
from data.prepare import prepare
from data.tokenizer import ByteTokenizer
from device import autocast, choose_device, choose_dtype, matmul_rate, to_device
from hf import to_hf
from llama2c import ENTRY, write_bin
from metrics import read_metrics
from model import Decoder, ModelConfig, knob
from run import Run, find_dataset, fit_to_data, read_config, set_up

ROOT = Path(__file__).resolve().parent


# -- what the benches share --------------------------------------------------------------------------------------------

def own_options(kind: type, arguments: list[str], most: int = 1) -> tuple[Any, list[str], dict[str, str]]:
    """A bench's options, of the dataclass `kind`; at most so many words without '='; and what else is set."""
    places, pairs = split_arguments(arguments)
    if len(places) > most:
        raise ValueError(f"it takes {most or 'no'} word{'s' * (most != 1)} without '=', got {' '.join(places)}")
    own = knobs_of(kind)
    options = kind(**typed({name: text for name, text in pairs.items() if name in own}, own, "command line"))
    for name in ("steps", "rounds", "tokens"):
        at_least_one(getattr(options, name, 1))
    return options, places, {name: text for name, text in pairs.items() if name not in own}


def written(knobs: dict[str, Any]) -> list[str]:
    return [f"{name}={value}" for name, value in knobs.items()]


def values_in_turn(calls: dict[Any, Callable[[], Any]], rounds: int) -> dict[Any, list]:
    """What each call returned in each round, A B B A."""
    values: dict[Any, list] = {name: [] for name in calls}
    for name in in_turn(list(calls), rounds):
        values[name].append(calls[name]())
    return values


middle = statistics.median


def spread(values: list[float], scale: float = 1, digits: int = 0) -> str:
    """Median and quartiles: '138 (131-176)'."""
    low, _, high = statistics.quantiles(values * (2 if len(values) == 1 else 1), n=4, method="inclusive")
    middle_, low, high = (f"{scale * value:,.{digits}f}" for value in (middle(values), low, high))
    return f"{middle_} ({low}-{high})"


def print_table(rows: list[tuple[str, ...]]) -> None:
    """Rows as aligned lines, the first of them the heads."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print("  ".join(cell.rjust(width) if i else cell.ljust(width)
                        for i, (cell, width) in enumerate(zip(row, widths, strict=True))), flush=True)


def fresh_run(config: Config, **changes: Any) -> Run:
    """A run at its first step that will leave nothing behind."""
    with tempfile.TemporaryDirectory() as folder:
        return set_up(replace(config, out_dir=str(Path(folder) / "run"), resume="no", **changes))


def finished(command: list, folder: Path | None = None) -> subprocess.CompletedProcess:
    """A program that ran to its end, with its output as bytes; ValueError with its last words if it failed."""
    done = subprocess.run([str(word) for word in command], cwd=folder, capture_output=True)
    if done.returncode:
        words = (done.stderr.strip() or done.stdout.strip()).decode(errors="replace").splitlines()
        program = " ".join(Path(word).name for word in map(str, command[:2]))
        raise ValueError(f"{program} ended with {done.returncode}: {words[-1] if words else 'it said nothing'}")
    return done


class OwnProcess(contextlib.AbstractContextManager):
    """A function that CHILDREN names, in a process of its own: what we set for ours, such as what glibc does with freed
    memory, does not reach it, and it is what somebody would get who ran just that. Called in turn with ours.

    ValueError with the process's last words if it failed.
    """

    def __init__(self, name: str, config: Config, **more: Any):
        self.errors = tempfile.TemporaryFile()
        command = [sys.executable, str(ROOT / "bench_beside.py"), name, *written(config.flat() | more)]
        self.child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.errors)
        self.answer()  # it is ready, and no longer in the way of what is timed

    def __call__(self, *arguments: Any) -> float:
        with contextlib.suppress(BrokenPipeError):  # then there is no answer either
            self.child.stdin.write(json.dumps(arguments).encode() + b"\n")
            self.child.stdin.flush()
        return self.answer()

    def answer(self) -> Any:
        if line := self.child.stdout.readline():
            return json.loads(line)
        self.errors.seek(0)
        words = (self.errors.read().decode(errors="replace").strip() or "it said nothing").splitlines()[-1]
        self.__exit__()
        if self.child.returncode == 2:
            raise ValueError(words.removeprefix("error: "))
        raise ValueError(f"transformers ended with {self.child.returncode}: {words}")

    def __exit__(self, *_: Any) -> None:
        with contextlib.suppress(BrokenPipeError):
            self.child.stdin.close()  # at the end of its input it ends
        self.child.wait()
        self.child.stdout.close()
        self.errors.close()


def finished_json(command: list, folder: Path | None = None) -> Any:
    """What a program printed as its last line, in JSON."""
    return json.loads(finished(command, folder).stdout.splitlines()[-1])


# -- transformers ------------------------------------------------------------------------------------------------------

COMPARABLE = {"norm": "rmsnorm", "norm_pos": "pre", "ffn": "swiglu", "dropout": 0.0, "lora_rank": 0,
              "activation_checkpointing": False}


def check_comparable(config: Config) -> None:
    """ValueError if transformers' Llama, or a plain loop around it, would compute something else."""
    knobs = config.flat()
    other = [f"{name}={wanted} (here it is {knobs[name]})" for name, wanted in COMPARABLE.items()
             if knobs[name] != wanted]
    if other or knobs["dtype"] == "float16":
        raise ValueError(f"transformers is compared on what Llama has, {', '.join(other) or 'no dtype=float16'}")


def hf_model(config: ModelConfig) -> torch.nn.Module:
    """transformers' model of this shape (Llama, or Qwen 3 with qk_norm), with random weights in fp32."""
    try:
        import transformers
    except ImportError:
        raise ValueError("transformers is not installed: pip install -e '.[hf]'") from None
    transformers.logging.set_verbosity_error()
    about = transformers.AutoConfig.for_model(**to_hf(config, ByteTokenizer(), "float32"))
    return transformers.AutoModelForCausalLM.from_config(about)


def hf_step(config: Config) -> Callable[[], float]:
    """A function that does the next step as a minimal loop around transformers does, and returns its seconds: the
    batches, the autocast and the number of micro-batches are ours, the loss, the schedule and AdamW are not."""
    data = open_dataset(find_dataset(config.dataset, None))
    config = fit_to_data(replace(config, dtype=choose_dtype(config.dtype, config.device)), data, None)
    model = hf_model(config.model).to(config.device).train()
    forward = torch.compile(model) if config.compile else model
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.learning_rate, betas=(config.beta1, config.beta2),
                                  weight_decay=config.weight_decay, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - min(step / config.max_iters, 1))
    steps = count()

    def step() -> float:
        start = time.perf_counter()
        x, _ = batch(data, next(steps), config.batch_size, config.model.block_size, config.seed)
        for part in to_device(x, config.device).split(config.micro_batch_size):
            with autocast(config.device, config.dtype):
                loss = forward(input_ids=part, labels=part).loss * (len(part) / len(x))
            loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        loss.item()  # waits for the device, and is what a log prints
        return time.perf_counter() - start

    return step


def hf_rate(config: Config) -> Callable[[int, int], float]:
    """A function of samples and tokens that returns the tokens/s of transformers' generate in float32, less the first
    token, which reads the prompt: as ours are timed."""
    model = hf_model(config.model).to(config.device).eval()
    model.generation_config.eos_token_id = None  # no sample ends early

    def rate(samples: int, tokens: int) -> float:
        came: list[float] = []  # the prompt, and then every new token, is given to the streamer
        streamer = SimpleNamespace(put=lambda _: came.append(time.perf_counter()), end=lambda: None)
        model.generate(torch.zeros(samples, 1, dtype=torch.long, device=model.device), max_new_tokens=tokens + 1,
                       do_sample=True, temperature=1.0, top_k=0, top_p=1.0, pad_token_id=0, streamer=streamer)
        return samples * tokens / (came[tokens + 1] - came[1])

    return rate


CHILDREN = {"step": hf_step, "rate": hf_rate}


# -- llama2.c ----------------------------------------------------------------------------------------------------------

def llama2c_rate(program: str, model: Decoder, folder: Path) -> Callable[[int], float]:
    """A function of a number of tokens that lets llama2.c's `run` make them with this model's weights, and returns
    tokens/s as `run` counts them, less the first. Its files are put into the folder. ValueError if it cannot run."""
    path = Path(program).resolve()
    if not path.is_file():
        raise ValueError(f"llama2c={program} is not a file: name the run that llama2.c's make builds")
    write_bin(folder / "model.bin", model.config, model.state_dict())
    pieces = (ENTRY.pack(0.0, 1) + b".") * model.config.vocab_size  # it prints them, but they are not in the way
    (folder / "tokenizer.bin").write_bytes(struct.pack("<I", 1) + pieces)

    def rate(tokens: int) -> float:
        # Without top-p, which is on by default and sorts the vocabulary for each token: ours does not either.
        done = finished([path, folder / "model.bin", "-z", folder / "tokenizer.bin", "-n", tokens + 1, "-t", "1",
                         "-p", "1", "-s", "1"])
        found = re.search(rb"achieved tok/s: ([0-9.]+)", done.stderr)
        if not found:
            raise ValueError(f"{program} does not say how fast it was")
        return float(found[1])

    return rate


# -- nanoGPT -----------------------------------------------------------------------------------------------------------

RECIPE = ("config/train_shakespeare_char.py", "--device=cpu", "--compile=False", "--eval_iters=20", "--log_interval=1",
          "--block_size=64", "--batch_size=12", "--n_layer=4", "--n_head=4", "--n_embd=128", "--max_iters=2000",
          "--lr_decay_iters=2000", "--dropout=0.0")  # its README's, for a CPU
EVALUATE = """import json, sys, numpy as np, torch
from model import GPT, GPTConfig
saved, T = torch.load(sys.argv[1], map_location="cpu", weights_only=True), 64
model = GPT(GPTConfig(**saved["model_args"]))
model.load_state_dict(saved["model"])
model.eval()
val = torch.from_numpy(np.fromfile(sys.argv[2], np.uint16).astype(np.int64))
n = (len(val) - 1) // T
x, y = val[:n * T].view(n, T), val[1:n * T + 1].view(n, T)
with torch.no_grad():
    total = sum(model(x[i:i + 64], y[i:i + 64])[1].item() * len(x[i:i + 64]) for i in range(0, n, 64))
print(json.dumps([total / n, model.get_num_params()]))"""  # with its own model.py; over the windows of our evaluation


@dataclass(frozen=True, kw_only=True)
class NanoBench:
    """The options of `bench.py nanogpt FOLDER TEXT` as they are written; train.py's knobs can be set, too."""

    preset: str = knob("config/shakespeare_char_cpu.py", "what train.py is given")
    rounds: int = knob(1, "runs of each program, in turn")


class Training(NamedTuple):
    """What came of one whole process."""

    seconds: float
    loss: float  # nats per token, over all windows of the validation text
    steps: int
    step: float  # seconds, the median
    flops: float  # of all steps


def nanogpt(arguments: list[str]) -> None:
    """Trains nanoGPT and ours on one text, and ours once more for about as long as nanoGPT took."""
    options, places, knobs = own_options(NanoBench, arguments, most=2)
    preset = Path(options.preset) if Path(options.preset).is_file() else ROOT / options.preset
    if len(places) != 2 or not Path(places[0], "train.py").is_file() or not Path(places[1]).is_file():
        raise ValueError("name a checkout of nanoGPT and a text: python bench.py nanogpt FOLDER TEXT")
    config = read_config([str(preset), *written(knobs)])
    if config.model.block_size != 64:
        raise ValueError(f"nanoGPT has windows of 64 tokens, so block_size must be 64, got {config.model.block_size}")
    device = choose_device(config.device)
    rate = matmul_rate(device, choose_dtype(config.dtype, device))
    with tempfile.TemporaryDirectory() as work:
        theirs, data = prepare_both(*map(Path, places), Path(work))
        ours = partial(run_ours, preset, knobs, data)
        found = values_in_turn({"nanoGPT": partial(run_nanogpt, theirs), "ours": ours}, options.rounds)
        first, seconds = found["ours"][0], {name: middle([t.seconds for t in runs]) for name, runs in found.items()}
        steps = max(1, config.warmup_iters, first.steps + round((seconds["nanoGPT"] - seconds["ours"]) / first.step))
        found["ours, as long"] = [ours(max_iters=steps) for _ in range(options.rounds)]
    print(f"{machine(device)}; matrix products: {rate / 1e9:,.0f} GFLOP/s")
    rows = [("", "s of the process", "of nanoGPT's", "steps", "of matmul rate", "val loss", "less nanoGPT's")]
    for name, runs in found.items():
        median, loss = middle([t.seconds for t in runs]), middle([t.loss for t in runs])
        rows.append((name, spread([t.seconds for t in runs], 1, 1), f"{median / seconds['nanoGPT']:.2f}",
                     f"{runs[0].steps:,}", f"{runs[0].flops / median / rate:.0%}", f"{loss:.4f}",
                     f"{loss - found['nanoGPT'][0].loss:+.4f}"))
    print_table(rows)


def prepare_both(folder: Path, text: Path, work: Path) -> tuple[Path, Dataset]:
    """A copy of nanoGPT whose data is `text`, prepared by its own program, and our data set of it. ValueError if
    the two do not have the same validation tokens."""
    theirs = work / "nanoGPT"
    shutil.copytree(folder, theirs, ignore=shutil.ignore_patterns(".git", "out*", "*.bin", "*.pkl", "*.ipynb"))
    place = theirs / "data" / "shakespeare_char"
    shutil.copy(text, place / "input.txt")
    finished([sys.executable, place / "prepare.py"])
    prepare([str(text)], work / "ours", "char")
    data = open_dataset(work / "ours")
    if not np.array_equal(np.fromfile(place / "val.bin", np.uint16), data.val):
        raise ValueError(f"{text}: nanoGPT's validation tokens are not ours; take a text in ASCII without \\r")
    return theirs, data


def run_nanogpt(theirs: Path) -> Training:
    """Its whole training, and the loss of what it has saved."""
    start = time.perf_counter()
    done = finished([sys.executable, "train.py", *RECIPE], theirs)
    seconds = time.perf_counter() - start
    saved, val = theirs / "out-shakespeare-char" / "ckpt.pt", theirs / "data" / "shakespeare_char" / "val.bin"
    loss, parameters = finished_json([sys.executable, "-c", EVALUATE, saved, val], theirs)
    steps = [float(ms) / 1000 for ms in re.findall(rb"iter \d+: loss .*, time ([0-9.]+)ms", done.stdout)]
    flops = len(steps) * 12 * 64 * (6 * parameters + 12 * 4 * 128 * 64)  # batch, context; layers, width, context
    return Training(seconds, loss, len(steps), middle(steps), flops)


def run_ours(preset: Path, knobs: dict[str, Any], data: Dataset, **more: Any) -> Training:
    """All of train.py, imports and evaluation included, and its last loss."""
    with tempfile.TemporaryDirectory() as out:
        words = [preset, *written(knobs | {"dataset": data.folder, "out_dir": out} | more)]
        start = time.perf_counter()
        finished([sys.executable, ROOT / "train.py", *words])
        seconds, records = time.perf_counter() - start, read_metrics(Path(out))
    config = read_config([str(word) for word in words])
    model, steps = replace(config.model, vocab_size=data.meta["vocab_size"]), records[-1]["step"]
    return Training(seconds, [record["val_loss"] for record in records if "val_loss" in record][-1], steps,
                    middle([r["step_ms"] for r in records if "step_ms" in r]) / 1000,
                    steps * config.batch_size * model.block_size * flops_per_token(model))


if __name__ == "__main__":
    with user_errors(), contextlib.redirect_stdout(sys.stderr):
        call = CHILDREN[sys.argv[1]](read_config(sys.argv[2:]))
        print("null", file=sys.__stdout__, flush=True)
        for line in sys.stdin:
            print(json.dumps(call(*json.loads(line))), file=sys.__stdout__, flush=True)
