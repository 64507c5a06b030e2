"""A number that is NaN or Inf must stop the run before it is saved, with exit code 3, and the good
checkpoints must stay.

A gradient that is merely far too large goes into the update, or with skip_spikes is left out of it.
"""

import math
import os
import random
import re
import signal
from functools import partial
from pathlib import Path

import torch

import run.setup
import train
from model import Decoder
from run.metrics import read_metrics
from weights import checkpoint

from .harness import (
    Ended,
    Report,
    Silent,
    after_call,
    at_batch,
    bad_end,
    bad_resume,
    before_call,
    curve,
    difference,
    fault,
    train_child,
    uncut,
    untidy,
)

# 12 steps of 4 micro-batches; saves at 4, 8 and 12.
KNOBS = {"micro_batch_size": 2, "eval_interval": 5}
VALUES = (math.nan, math.inf, -math.inf)
KINDS = [
    {"optimizer": optimizer, "dtype": dtype}
    for optimizer in ("adamw", "muon")
    for dtype in ("float32", "bfloat16")
]


def poison(tensor: torch.Tensor, value: float, pick: random.Random) -> None:
    """One element of it, any one."""
    tensor.detach().view(-1)[pick.randrange(tensor.numel())] = value


def any_parameter(built: run.setup.Run, pick: random.Random) -> torch.Tensor:
    return pick.choice([parameter for _, parameter in sorted(built.model.named_parameters())])


# The places: each brings `value` into a child at optimizer step `step`, counted from 0


def in_the_loss(value: float, step: int, pick: random.Random) -> None:
    """Of one micro-batch."""
    poison_forward(value, 4 * step + pick.randrange(4), training=True)


def in_the_validation_loss(value: float, step: int, pick: random.Random) -> None:
    """Of any evaluation but the first. Each has two micro-batches, at steps 5, 10 and 12."""
    poison_forward(value, pick.randrange(2, 6), training=False)


def poison_forward(value: float, at: int, training: bool) -> None:
    forward, calls = Decoder.forward, iter(range(10**9))

    def poisoned(self, *arguments):
        loss = forward(self, *arguments)
        return loss + value if self.training == training and next(calls) == at else loss

    Decoder.forward = poisoned


def in_a_gradient(value: float, step: int, pick: random.Random) -> None:
    """Of one parameter in one micro-batch."""
    at, calls = 4 * step + pick.randrange(4), iter(range(10**9))

    def poisoned(gradient: torch.Tensor) -> torch.Tensor:
        if next(calls) == at:
            gradient = gradient.clone()
            poison(gradient, value, pick)
        return gradient

    def hook(built: run.setup.Run, *_) -> None:
        any_parameter(built, pick).register_hook(poisoned)

    after_call(run.setup, "build", hook)


def in_a_weight(value: float, step: int, pick: random.Random) -> None:
    def act(current: run.setup.Run, *_) -> None:
        if current.step == step:
            poison(any_parameter(current, pick), value, pick)

    before_call(train, "train_step", act)


def in_a_weight_before_a_save(value: float, step: int, pick: random.Random) -> None:
    """Just after the update, so that no loss has shown it when it would be saved."""

    def act(_, current: run.setup.Run, *rest) -> None:
        if current.step == (8, 12)[step % 2]:
            poison(any_parameter(current, pick), value, pick)

    after_call(train, "train_step", act)


def in_a_moment(value: float, step: int, pick: random.Random) -> None:
    """Of the optimizer, which shows in no loss of this step."""

    def act(current: run.setup.Run, *_) -> None:
        if current.step == step:
            states = current.optimizers.state_dict()
            keys = [(n, k) for n, state in states.items() for k, t in state.items() if t.dim()]
            name, key = pick.choice(sorted(keys))
            poison(states[name][key], value, pick)

    before_call(train, "train_step", act)


PLACES = (
    in_a_gradient,
    in_a_moment,
    in_the_loss,
    in_a_weight,
    in_a_weight_before_a_save,
    in_the_validation_loss,
)


@fault("NaN or Inf in a loss, gradient, weight or moment", whole=100, few=1)
def not_a_number(report: Report, tries: int, folder: Path) -> None:
    """At a random step after the first save, in each place, with both optimizers, in float32 and
    bfloat16. No checkpoint may hold it, and the resumed run must end as the uncut one."""
    for i in range(tries):
        pick, kind = random.Random(i), i % 2 if tries < 10 else i % 4
        place, value, step = PLACES[i % len(PLACES)], pick.choice(VALUES), pick.randint(5, 11)
        knobs, out = KNOBS | KINDS[kind], folder / f"run{i}"
        whole = uncut(folder / f"whole{kind}", **knobs)
        ended = train_child(out, partial(place, value, step, pick), **knobs)
        failure = not_finite_in(out) or bad_end(ended, 3) or bad_line(ended, out) or untidy(out)
        failure = failure or bad_resume(whole, out, **knobs)
        report.count(f"{value} {place.__name__}, step {step}, {KINDS[kind]}", failure)
    report.note = f"{len(PLACES)} places, {len(KINDS)} kinds of training"


def not_finite_in(folder: Path) -> str:
    """The first tensor in any checkpoint of a run that holds NaN or Inf, as a failure."""
    for path in folder.glob("*.pt"):
        state = torch.load(path, weights_only=True)  # checkpoint.load would refuse it
        for name, tensors in (("model", state["model"]), *state["optimizer"].items()):
            for key, tensor in tensors.items():
                if not torch.isfinite(tensor).all():
                    return Silent(f"{path.name}: {key} of {name} is not finite")
    return ""


def bad_line(ended: Ended, folder: Path) -> str:
    """A failure unless the error names the step and the last good checkpoint, and the newest two
    checkpoints are there, with or without that of the last step."""
    line = next(line for line in ended.text.splitlines() if line.startswith("error:"))
    there = [at for at, _ in checkpoint.all_in(folder)]
    newest = f"Last good checkpoint: {checkpoint.path_of(folder, there[-1]).name}"
    if not re.search(r"step \d+", line) or newest not in line:
        return f"the line does not name the step and the last good checkpoint: {line}"
    last = max((record["step"] for record in read_metrics(folder)), default=0)
    due = [at for at in (4, 8, 12) if at <= last]
    if there not in (due[-2:], [at for at in due if at < last][-2:]):
        return f"the checkpoints are {there} after step {last}"
    return ""


# Spikes

LONG = {"max_iters": 60, "eval_interval": 0, "save_interval": 20}


@fault("a spike in the gradient, with skip_spikes=6", whole=20, few=0)
def skipped_spikes(report: Report, tries: int, folder: Path) -> None:
    """Three spikes in each run. Exactly these updates must be left out, with a warning for each.
    The run is also stopped near one of them, and the resumed run must end as the other."""
    for i in range(tries):
        pick = random.Random(i)
        spikes = sorted(pick.sample(range(33, 60), 3))
        whole, cut, seen = folder / f"whole{i}", folder / f"cut{i}", folder / f"seen{i}"
        knobs = LONG | KINDS[i % 4] | {"skip_spikes": 6.0}
        ended = train_child(whole, partial(spiked, spikes, seen), **knobs)
        warnings = re.findall(r"^warning: step (\d+): .* update skipped$", ended.text, re.M)
        said, skipped = [int(number) - 1 for number in warnings], unchanged(seen)
        failure = bad_end(ended)
        if not skipped == said == spikes:
            failure = failure or f"skipped {skipped}, said {said}"
        at, other = pick.choice(spikes) + pick.randint(-1, 1), folder / f"other{i}"
        ended = train_child(cut, partial(spiked, spikes, other, at), **knobs)
        failure = failure or bad_end(ended, 143)
        failure = failure or bad_resume(whole, cut, partial(spiked, spikes, other), **knobs)
        report.count(f"spikes at {spikes}, cut at {at}", failure)


def spiked(spikes: list[int], seen: Path, stop_at: int = -1) -> None:
    """In a child: the gradients of these steps are 1,000 times what they are. The number of each
    step that leaves the weights unchanged is written to `seen`. SIGTERM comes in step `stop_at`."""
    before: list[torch.Tensor] = []

    def hook(built: run.setup.Run, *_) -> None:
        for parameter in built.model.parameters():
            parameter.register_hook(lambda g: g * (1000.0 if built.step in spikes else 1.0))

    def remember(current: run.setup.Run, *_) -> None:
        before[:] = [parameter.detach().clone() for parameter in current.model.parameters()]

    def compare(done, current: run.setup.Run, *_) -> None:
        if done and all(map(torch.equal, before, current.model.parameters())):
            with open(seen, "a") as file:
                file.write(f"{current.step - 1}\n")

    after_call(run.setup, "build", hook)
    before_call(train, "train_step", remember)
    after_call(train, "train_step", compare)
    at_batch(stop_at, partial(os.kill, os.getpid(), signal.SIGTERM))


def unchanged(seen: Path) -> list[int]:
    return [int(line) for line in seen.read_text().splitlines()] if seen.exists() else []


@fault("no spike, with skip_spikes=6; a spike without it", whole=5, few=0)
def nothing_skipped(report: Report, tries: int, folder: Path) -> None:
    """300 calm steps must be bit for bit those without the rule. And without the rule even a spike
    must go into the update."""
    for i in range(tries):
        # At a learning rate of 1e-3 these models have spikes of their own.
        calm = {"max_iters": 300, "learning_rate": 1e-4, "seed": i}
        knobs = calm | {"eval_interval": 100, "save_interval": 100} | KINDS[i % 4]
        off, on, seen = folder / f"off{i}", folder / f"on{i}", folder / f"seen{i}"
        ends = train_child(off, **knobs), train_child(on, skip_spikes=6.0, **knobs)
        failure = bad_end(ends[0]) or bad_end(ends[1]) or difference(off, on)
        if len(curve(on)) < 300:
            failure = failure or f"only {len(curve(on))} records"
        ended = train_child(folder / f"spike{i}", partial(spiked, [40], seen), **LONG)
        failure = failure or bad_end(ended)
        if unchanged(seen):
            failure = failure or f"the weights did not change in {unchanged(seen)}"
        report.count(f"seed {i}", failure)
