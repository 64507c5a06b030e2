"""Other programs beside ours, on the same machine, data and shapes: transformers for the speed of a
step and of sampling, nanoGPT for the time of a whole training.

Others run as they are, in processes of their own. That of transformers is this file, started as
`python -m lab.bench_beside CHILD key=value ...` by the benches alone. Order: processes;
transformers, which `lab.bench train` and `sample` are compared with; `lab.bench nanogpt`.
"""

import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from itertools import count
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import torch

from config.command import user_errors
from config.schema import Config
from data.loader import Dataset, batch, open_dataset
from data.prepare import prepare
from exchange.hf import config_to_hf
from lab.measure import (
    as_arguments,
    machine_line,
    print_columns,
    read_options,
    spread,
    that_count,
    values_in_turn,
)
from model import ModelConfig, knob
from run.evaluate import evaluate
from run.machine import (
    autocast,
    choose_device,
    choose_dtype,
    flops_per_token,
    matmul_rate,
    to_device,
)
from run.metrics import read_metrics
from run.setup import find_dataset, read_config
from text.tokenizer import ByteTokenizer
from weights.open import load_model

ROOT = Path(__file__).resolve().parent.parent


# -- Processes -------------------------------------------------------------------------------------


def with_our_modules() -> dict[str, str]:
    """The environment of a process that finds our modules in whatever folder it is started."""
    path = filter(None, (str(ROOT), os.environ.get("PYTHONPATH")))
    return os.environ | {"PYTHONPATH": os.pathsep.join(path)}


def last_words(output: bytes) -> str:
    lines = output.decode(errors="replace").strip().splitlines()
    return lines[-1] if lines else "it said nothing"


def output_of(command: list, folder: Path | None = None) -> bytes:
    """What a program printed. ValueError with its last words if it failed."""
    words = [str(word) for word in command]
    done = subprocess.run(words, cwd=folder, env=with_our_modules(), capture_output=True)
    if done.returncode:
        name = words[2] if words[1] == "-m" else " ".join(Path(word).name for word in words[:2])
        said = last_words(done.stderr.strip() or done.stdout)
        raise ValueError(f"{name} ended with {done.returncode}: {said}")
    return done.stdout


def json_of(command: list, folder: Path | None = None) -> Any:
    """What a program printed as its last line, in JSON."""
    return json.loads(output_of(command, folder).splitlines()[-1])


class OwnProcess(contextlib.AbstractContextManager):
    """Calls a function of CHILDREN in a process of its own, in turn with ours.

    So what our programs set, such as what glibc does with freed memory, does not reach it, and it
    is as fast as for somebody who runs nothing else. ValueError with its last words if it failed.
    """

    def __init__(self, name: str, config: Config, **more: Any):
        knobs = as_arguments(that_count([], config.flat() | more))
        self.errors = tempfile.TemporaryFile()
        self.child = subprocess.Popen(
            [sys.executable, "-m", "lab.bench_beside", name, *knobs],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.errors,
            env=with_our_modules(),
        )
        self.answer()  # the child has started, so it does not disturb what is timed next

    def __call__(self, *arguments: Any) -> float:
        with contextlib.suppress(BrokenPipeError):  # if it has ended, answer() says so
            self.child.stdin.write(json.dumps(arguments).encode() + b"\n")
            self.child.stdin.flush()
        return self.answer()

    def answer(self) -> Any:
        if line := self.child.stdout.readline():
            return json.loads(line)
        self.errors.seek(0)
        said = last_words(self.errors.read())
        self.__exit__()
        if self.child.returncode == 2:
            raise ValueError(said.removeprefix("error: "))
        raise ValueError(f"transformers ended with {self.child.returncode}: {said}")

    def __exit__(self, *_: Any) -> None:
        with contextlib.suppress(BrokenPipeError):
            self.child.stdin.close()  # the child ends at the end of its input
        self.child.wait()
        self.child.stdout.close()
        self.errors.close()


# -- transformers ----------------------------------------------------------------------------------

COMPARABLE = {
    "norm": "rmsnorm",
    "norm_pos": "pre",
    "ffn": "swiglu",
    "dropout": 0.0,
    "lora_rank": 0,
    "activation_checkpointing": False,
}


def check_comparable(config: Config) -> None:
    """ValueError if transformers' Llama and a plain loop around it would do something else."""
    knobs = config.flat()
    other = [
        f"{name}={wanted} (here it is {knobs[name]})"
        for name, wanted in COMPARABLE.items()
        if knobs[name] != wanted
    ]
    if knobs["dtype"] == "float16":
        other.append("no dtype=float16")
    if other:
        raise ValueError(f"transformers is compared on what Llama has: {', '.join(other)}")


def hf_model(config: ModelConfig) -> torch.nn.Module:
    """transformers' Llama of this shape (Qwen 3 if qk_norm), with random weights in fp32."""
    try:
        import transformers
    except ImportError:
        raise ValueError("transformers is not installed: pip install -e '.[hf]'") from None
    transformers.logging.set_verbosity_error()
    about = transformers.AutoConfig.for_model(**config_to_hf(config, ByteTokenizer(), "float32"))
    return transformers.AutoModelForCausalLM.from_config(about)


def hf_step(config: Config) -> Callable[[], float]:
    """plain_loop with transformers' model of this shape."""
    data = open_dataset(find_dataset(config.dataset, None))
    vocab_size = config.model.vocab_size or data.meta["vocab_size"]
    config = replace(
        config,
        model=replace(config.model, vocab_size=vocab_size),
        dtype=choose_dtype(config.dtype, config.device),
    )
    return plain_loop(hf_model(config.model).to(config.device), data, config)


def plain_loop(model: torch.nn.Module, data: Dataset, config: Config) -> Callable[[], float]:
    """A function that does the next step of a minimal loop around transformers' model and returns
    its seconds. The batches, autocast and the number of micro-batches are ours; the loss, the
    schedule and AdamW are not."""
    model.train()
    forward = torch.compile(model) if config.compile else model
    optimizer = torch.optim.AdamW(
        model.parameters(),
        lr=config.learning_rate,
        betas=(config.beta1, config.beta2),
        weight_decay=config.weight_decay,
        fused=True,
    )

    def falling(step: int) -> float:
        return 1 - min(step / max(1, config.max_iters), 1)

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, falling)
    steps = count()

    def step() -> float:
        start = time.perf_counter()
        x, *_ = batch(data, next(steps), config.batch_size, config.model.block_size, config.seed)
        for part in to_device(x, config.device).split(config.micro_batch_size):
            with autocast(config.device, config.dtype):
                loss = forward(input_ids=part, labels=part).loss * (len(part) / len(x))
            loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        loss.item()  # for the log; it waits for the device
        return time.perf_counter() - start

    return step


def hf_rate(config: Config) -> Callable[[int, int], float]:
    """generate_rate with transformers' model of this shape."""
    return partial(generate_rate, hf_model(config.model).to(config.device))


def generate_rate(model: torch.nn.Module, tokens: int, samples: int) -> float:
    """Tokens/s of transformers' own generate in float32. As with ours, the first token, which reads
    the prompt, is not timed."""
    model.eval()
    model.generation_config.eos_token_id = None  # no sample ends early
    came: list[float] = []  # when the streamer was given the prompt, and then every new token
    streamer = SimpleNamespace(put=lambda _: came.append(time.perf_counter()), end=lambda: None)
    prompts = torch.zeros(samples, 1, dtype=torch.long, device=model.device)
    drawing = dict(do_sample=True, temperature=1.0, top_k=0, top_p=1.0, pad_token_id=0)
    model.generate(prompts, max_new_tokens=tokens + 1, streamer=streamer, **drawing)
    return samples * tokens / (came[tokens + 1] - came[1])


CHILDREN = {"step": hf_step, "rate": hf_rate}


# -- nanoGPT ---------------------------------------------------------------------------------------

# The command of nanoGPT's README for a CPU.
RECIPE = """
config/train_shakespeare_char.py --device=cpu --compile=False --eval_iters=20 --log_interval=1
--block_size=64 --batch_size=12 --n_layer=4 --n_head=4 --n_embd=128 --max_iters=2000
--lr_decay_iters=2000 --dropout=0.0
""".split()
WINDOW = 64  # tokens, those of RECIPE; the losses of both are those of such windows
# What ours has besides if it trains for as long: longer windows pay then, and so does the compiler.
AS_LONG = dict(
    block_size=128,
    batch_size=16,
    n_layer=3,  # so there is time for more steps
    n_head=4,
    n_kv_head=2,
    optimizer="muon",
    muon_momentum=0.9,
    beta2=0.99,
    compile=True,
)
# Its loss by its own model.py, over the same windows as ours.
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
    parts = list(zip(x.split(64), y.split(64)))
    total = sum(model(some, targets)[1].item() * len(some) for some, targets in parts)
print(json.dumps([total / n, model.get_num_params()]))"""


@dataclass(frozen=True, kw_only=True)
class NanoBench:
    """The options of `lab.bench nanogpt FOLDER TEXT` as they are written; every knob of a run can
    be set, too."""

    preset: str = knob("config/shakespeare_char_cpu.py", "what train.py is given")
    rounds: int = knob(1, "runs of each program, in turn")


class Training(NamedTuple):
    """What a whole training, imports and evaluation included, came to."""

    seconds: float
    loss: float  # nats per token, over all windows of the validation text
    steps: int
    step: float  # seconds, the median
    flops: float  # of all steps


def nanogpt(arguments: list[str]) -> None:
    """Trains nanoGPT and ours on one text, and ours once more for about as long as nanoGPT took."""
    options, places, knobs = read_options(NanoBench, arguments)
    preset = Path(options.preset) if Path(options.preset).is_file() else ROOT / options.preset
    if not (
        len(places) == 2 and Path(places[0], "train.py").is_file() and Path(places[1]).is_file()
    ):
        raise ValueError(
            "name a checkout of nanoGPT and a text: python -m lab.bench nanogpt FOLDER TEXT"
        )
    config = read_config([str(preset), *as_arguments(knobs)])
    if config.model.block_size < WINDOW:
        raise ValueError(
            f"nanoGPT has windows of {WINDOW} tokens, so block_size must be {WINDOW} or more, "
            f"got {config.model.block_size}"
        )
    with tempfile.TemporaryDirectory() as work:
        theirs, data = prepare_both(*map(Path, places), Path(work))
        ours = partial(run_ours, preset, knobs, data)
        programs = {"nanoGPT": partial(run_nanogpt, theirs), "ours": ours}
        found = values_in_turn(programs, options.rounds)
        few = max(20, config.warmup_iters)
        ours(**AS_LONG, max_iters=few)  # it compiles, and the others find the code in the cache
        steps = steps_as_long([ours(**AS_LONG, max_iters=few)], found["nanoGPT"])
        long = partial(ours, **AS_LONG, max_iters=max(few, steps))
        found["ours, as long"] = [long() for _ in range(options.rounds)]
    device = choose_device(config.device)
    report_nanogpt(found, device, matmul_rate(device, choose_dtype(config.dtype, device)))


def steps_as_long(ours: list[Training], theirs: list[Training]) -> int:
    """The steps with which ours would take as long as theirs."""
    left = median_seconds(theirs) - median_seconds(ours)
    return max(1, ours[0].steps + round(left / ours[0].step))


def report_nanogpt(found: dict[str, list[Training]], device: str, rate: float) -> None:
    """Prints a line for each program; `rate` is that of matrix products in FLOP/s."""
    print(f"{machine_line(device)}; matrix products: {rate / 1e9:,.0f} GFLOP/s")
    head = ("", "s of the process", "of nanoGPT's", "steps", "of matmul rate", "val loss")
    rows = [(*head, "less nanoGPT's")]
    theirs = found["nanoGPT"]
    for name, runs in found.items():
        seconds, loss = median_seconds(runs), median(run.loss for run in runs)
        row = [name, spread([run.seconds for run in runs], 1, 1)]
        row += [f"{seconds / median_seconds(theirs):.2f}", f"{runs[0].steps:,}"]
        row += [f"{runs[0].flops / seconds / rate:.0%}"]
        row += [f"{loss:.4f}", f"{loss - theirs[0].loss:+.4f}"]
        rows.append(tuple(row))
    print_columns(rows)


def median_seconds(runs: list[Training]) -> float:
    return median(run.seconds for run in runs)


def prepare_both(folder: Path, text: Path, work: Path) -> tuple[Path, Dataset]:
    """A copy of nanoGPT whose data is `text`, prepared by its own program, and our data set of that
    text. ValueError if the two do not have the same validation tokens."""
    theirs = work / "nanoGPT"
    no_use = shutil.ignore_patterns(".git", "out*", "*.bin", "*.pkl", "*.ipynb")
    shutil.copytree(folder, theirs, ignore=no_use)
    place = theirs / "data" / "shakespeare_char"
    shutil.copy(text, place / "input.txt")
    output_of([sys.executable, place / "prepare.py"])
    prepare([str(text)], work / "ours", "char")
    data = open_dataset(work / "ours")
    if not np.array_equal(np.fromfile(place / "val.bin", np.uint16), data.val):
        raise ValueError(
            f"{text}: nanoGPT's validation tokens are not ours; take a text in ASCII without \\r"
        )
    return theirs, data


def run_nanogpt(theirs: Path) -> Training:
    """Its whole training, and the loss of the model that it saved."""
    start = time.perf_counter()
    said = output_of([sys.executable, "train.py", *RECIPE], theirs)
    seconds = time.perf_counter() - start
    saved = theirs / "out-shakespeare-char" / "ckpt.pt"
    val = theirs / "data" / "shakespeare_char" / "val.bin"
    loss, parameters = json_of([sys.executable, "-c", EVALUATE, saved, val], theirs)
    milliseconds = map(float, re.findall(rb"iter \d+: loss .*, time ([0-9.]+)ms", said))
    steps = [ms / 1000 for ms in milliseconds]
    # RECIPE has batches of 12 windows of 64 tokens, 4 layers and a width of 128.
    flops = len(steps) * 12 * 64 * (6 * parameters + 12 * 4 * 128 * 64)
    return Training(seconds, loss, len(steps), median(steps), flops)


def run_ours(preset: Path, knobs: dict[str, Any], data: Dataset, **more: Any) -> Training:
    """The whole of train.py, and the loss of the model that it saved."""
    with tempfile.TemporaryDirectory() as out:
        own = {"dataset": data.folder, "out_dir": out}
        words = [str(preset), *as_arguments(knobs | more | own)]
        start = time.perf_counter()
        output_of([sys.executable, ROOT / "train.py", *words])
        seconds, records = time.perf_counter() - start, read_metrics(Path(out))
        config = read_config(words)
        device = choose_device(config.device)
        dtype = choose_dtype(config.dtype, device)
        model = load_model(out, device=device)[0]
        loss = evaluate(model, data, "val", device, dtype, block_size=WINDOW).loss
    step = median(record["step_ms"] for record in records if "step_ms" in record) / 1000
    steps = records[-1]["step"]
    flops = steps * config.batch_size * config.model.block_size * flops_per_token(model.config)
    return Training(seconds, loss, steps, step, flops)


if __name__ == "__main__":
    with user_errors(), contextlib.redirect_stdout(sys.stderr):  # stdout is for answers alone
        call = CHILDREN[sys.argv[1]](read_config(sys.argv[2:]))
        print("null", file=sys.__stdout__, flush=True)
        for line in sys.stdin:
            print(json.dumps(call(*json.loads(line))), file=sys.__stdout__, flush=True)
