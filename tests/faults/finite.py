"""A number that is not one stops the run before it is saved: exit code 3, and the good checkpoints stay.

A gradient that is merely far too large goes into the update, or is left out of it with skip_spikes.
"""

import json
import math
import os
import random
import re
import signal
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

import checkpoint
import metrics
import run as run_module
import train
from model import Decoder

from .harness import Report, command, curve, difference, fault, run, traceback_in, words

KNOBS = {"micro_batch_size": 2, "eval_interval": 5}  # 12 steps of 4 micro-batches; saves at 4, 8 and 12
VALUES = (math.nan, math.inf, -math.inf)
KINDS = [{"optimizer": optimizer, "dtype": dtype} for optimizer in ("adamw", "muon")
         for dtype in ("float32", "bfloat16")]


def poison(tensor: torch.Tensor, value: float, pick: random.Random) -> None:
    """One element of it, any one."""
    tensor.detach().view(-1)[pick.randrange(tensor.numel())] = value


def any_of(parameters, pick: random.Random) -> torch.Tensor:
    return pick.choice([parameter for _, parameter in sorted(parameters)])


# --- the places: each replaces something in a child, so that `value` comes in at optimizer step `step` (from 0)

def in_the_loss(value: float, step: int, pick: random.Random) -> None:
    """Of one micro-batch."""
    forward, at = Decoder.forward, 4 * step + pick.randrange(4)
    calls = iter(range(10**9))

    def poisoned(self, *arguments):
        loss = forward(self, *arguments)
        return loss + value if self.training and next(calls) == at else loss

    Decoder.forward = poisoned


def in_a_gradient(value: float, step: int, pick: random.Random) -> None:
    """Of one parameter in one micro-batch."""
    build, at = run_module.build, 4 * step + pick.randrange(4)
    calls = iter(range(10**9))

    def hooked(*arguments) -> run_module.Run:
        made = build(*arguments)

        def poisoned(gradient: torch.Tensor) -> torch.Tensor:
            if next(calls) == at:
                gradient = gradient.clone()
                poison(gradient, value, pick)
            return gradient

        any_of(made.model.named_parameters(), pick).register_hook(poisoned)
        return made

    run_module.build = hooked


def before_the_step(step: int, change: Callable[[run_module.Run], None]) -> None:
    train_step = train.train_step

    def changed(run: run_module.Run):
        if run.step == step:
            change(run)
        return train_step(run)

    train.train_step = changed


def in_a_weight(value: float, step: int, pick: random.Random) -> None:
    before_the_step(step, lambda run: poison(any_of(run.model.named_parameters(), pick), value, pick))


def in_a_weight_before_a_save(value: float, step: int, pick: random.Random) -> None:
    """Just after the update, so that no loss has shown it when it would be saved."""
    train_step = train.train_step

    def changed(run: run_module.Run):
        done = train_step(run)
        if run.step == (8, 12)[step % 2]:
            poison(any_of(run.model.named_parameters(), pick), value, pick)
        return done

    train.train_step = changed


def in_a_moment(value: float, step: int, pick: random.Random) -> None:
    """Of the optimizer, which shows in no loss of this step."""
    def change(run: run_module.Run) -> None:
        state = run.optimizers.state_dict()
        moments = [(f"{name} {key}", tensor) for name, held in state.items() for key, tensor in held.items()
                   if tensor.dim()]
        poison(any_of(moments, pick), value, pick)

    before_the_step(step, change)


def in_the_validation_loss(value: float, step: int, pick: random.Random) -> None:
    """Of any evaluation but the first: two micro-batches each, at steps 5, 10 and 12."""
    forward, at = Decoder.forward, pick.randrange(2, 6)
    calls = iter(range(10**9))

    def poisoned(self, *arguments):
        loss = forward(self, *arguments)
        return loss if self.training or next(calls) != at else loss + value

    Decoder.forward = poisoned


PLACES = (in_a_gradient, in_a_moment, in_the_loss, in_a_weight, in_a_weight_before_a_save, in_the_validation_loss)


@fault("NaN or Inf in a loss, gradient, weight or moment", whole=100, few=2)
def not_a_number(tries: int, folder: Path) -> Report:
    """At a random step after the first save, in each place, with both optimizers, in float32 and bfloat16."""
    report, data_sets, wholes = Report(), words(folder), {}
    for i in range(tries):
        pick = random.Random(i)
        place, value, kind = PLACES[i % len(PLACES)], pick.choice(VALUES), i % 2 if tries < 10 else i % 4
        whole, out, step = folder / f"whole{kind}", folder / f"run{i}", pick.randint(5, 11)
        if whole not in wholes:
            wholes[whole] = run(command(whole, **KNOBS, **KINDS[kind]), data_sets)
            assert wholes[whole][0] == 0, wholes[whole]
        code, text = run(command(out, **KNOBS, **KINDS[kind]), data_sets, partial(place, value, step, pick))
        written = not_finite_in(out)
        failure = written or unsaid(code, text, out) or broken_records(out)
        if not failure:
            code, text = run(command(out, resume="auto", **KNOBS, **KINDS[kind]), data_sets)
            failure = difference(whole, out) if code == 0 else f"the resumed run ended with {code}: {text[-300:]}"
        report.count(failure and f"{value} {place.__name__}, step {step}, {KINDS[kind]}: {failure}",
                     silent=bool(written))
    report.note = f"{len(PLACES)} places, {len(KINDS)} kinds of training"
    return report


def not_finite_in(folder: Path) -> str:
    """The first tensor in any checkpoint of a run that holds NaN or Inf, as a failure."""
    for path in folder.glob("*.pt"):
        state = torch.load(path, weights_only=True)  # checkpoint.load would refuse it
        tensors = list(state["model"].items()) + [(f"{n} {k}", t) for n, held in state["optimizer"].items()
                                                  for k, t in held.items()]
        for name, tensor in tensors:
            if not torch.isfinite(tensor).all():
                return f"{path.name}: {name} is not finite"
    return ""


def unsaid(code: int, text: str, folder: Path) -> str:
    """A failure unless the run stopped with 3 and one line with the step and the last good checkpoint, which is as good
    as ever: the newest two are there, with or without the one of the last step."""
    said = [line for line in text.splitlines() if line.startswith("error:")]
    if traceback_in(text) or code != 3 or len(said) != 1:
        return traceback_in(text) or f"exit code {code}, {said}: {text[-300:]}"
    step = re.search(r"step (\d+)", said[0])
    there = [at for at, _ in checkpoint.all_in(folder)]
    if not step or f"Last good checkpoint: {checkpoint.path_of(folder, there[-1]).name}" not in said[0]:
        return f"the line does not name the step and the last good checkpoint: {said[0]}"
    last = max((r["step"] for r in metrics.read_metrics(folder)), default=0)
    if there not in ([at for at in (4, 8, 12) if at <= last][-2:], [at for at in (4, 8, 12) if at < last][-2:]):
        return f"the checkpoints are {there} after step {last}"
    checkpoint.load_newest(folder)
    return ""


def broken_records(folder: Path) -> str:
    """A failure if a line of metrics.jsonl is not JSON, which has no NaN."""
    def refuse(word: str) -> None:
        raise ValueError(word)

    for line in (folder / metrics.FILE).read_text(encoding="utf-8").splitlines():
        try:
            json.loads(line, parse_constant=refuse)
        except ValueError as error:
            return f"metrics.jsonl: {line!r} ({error})"
    return ""


# --- spikes

LONG = {"max_iters": 60, "eval_interval": 0, "save_interval": 20}


@fault("a spike in the gradient, with skip_spikes=6", whole=20, few=1)
def skipped_spikes(tries: int, folder: Path) -> Report:
    """Three of them each. The run is also cut at one of them, and resumed."""
    report, data_sets = Report(), words(folder)
    for i in range(tries):
        pick = random.Random(i)
        spikes = sorted(pick.sample(range(33, 60), 3))
        whole, cut, seen = folder / f"whole{i}", folder / f"cut{i}", folder / f"seen{i}"
        knobs = LONG | KINDS[i % 4] | {"skip_spikes": 6.0}
        result = run(command(whole, **knobs), data_sets, partial(spiked, spikes, seen))
        failure = not_skipped(result, spikes, unchanged(seen))
        at = pick.choice(spikes) + pick.randint(-1, 1)
        if not failure:
            code, text = run(command(cut, **knobs), data_sets, partial(spiked, spikes, folder / f"first{i}", at))
            failure = "" if code == 143 else f"it was to stop at step {at} but ended with {code}: {text[-300:]}"
        if not failure:
            code, text = run(command(cut, resume="auto", **knobs), data_sets, partial(spiked, spikes,
                                                                                      folder / f"second{i}"))
            failure = difference(whole, cut) if code == 0 else f"the resumed run ended with {code}: {text[-300:]}"
        report.count(failure and f"spikes at {spikes}, cut at {at}: {failure}")
    return report


def spiked(spikes: list[int], seen: Path, stop_at: int = -1) -> None:
    """In a child: the gradients of these steps are 1,000 times what they are, and `seen` gets the number of each step
    that leaves the weights unchanged. SIGTERM comes in step `stop_at`."""
    build, train_step, runs = run_module.build, train.train_step, []

    def hooked(*arguments) -> run_module.Run:
        runs.append(build(*arguments))
        for parameter in runs[-1].model.parameters():
            parameter.register_hook(lambda gradient: gradient * (1000.0 if runs[-1].step in spikes else 1.0))
        return runs[-1]

    def watched(run: run_module.Run):
        before, step = [p.detach().clone() for p in run.model.parameters()], run.step
        if step == stop_at:
            os.kill(os.getpid(), signal.SIGTERM)
        done = train_step(run)
        if all(torch.equal(a, b) for a, b in zip(before, run.model.parameters(), strict=True)):
            with open(seen, "a") as file:
                file.write(f"{step}\n")
        return done

    run_module.build, train.train_step = hooked, watched


def unchanged(seen: Path) -> list[int]:
    return [int(line) for line in seen.read_text().splitlines()] if seen.exists() else []


def not_skipped(result: tuple[int, str], spikes: list[int], skipped: list[int]) -> str:
    code, text = result
    said = [int(n) - 1 for n in re.findall(r"^warning: step (\d+): the gradient norm \S+ is above \S+, its update is "
                                           r"skipped$", text, re.MULTILINE)]
    if code or traceback_in(text):
        return f"exit code {code}: {text[-600:]}"
    return "" if skipped == said == spikes else f"spikes at {spikes}, skipped {skipped}, said {said}"


@fault("no spike, with skip_spikes=6; a spike without it", whole=5, few=0)
def nothing_skipped(tries: int, folder: Path) -> Report:
    """300 steps are bit for bit the run without the rule; and without the rule even a spike goes into the update."""
    report, data_sets = Report(), words(folder)
    for i in range(tries):
        calm = {"max_iters": 300, "learning_rate": 1e-4, "seed": i}  # at 1e-3 these models have spikes of their own
        knobs = calm | {"eval_interval": 100, "save_interval": 100} | KINDS[i % 4]
        off, on, seen = folder / f"off{i}", folder / f"on{i}", folder / f"seen{i}"
        codes = run(command(off, **knobs), data_sets)[0], run(command(on, skip_spikes=6.0, **knobs), data_sets)[0]
        failure = difference(off, on) if codes == (0, 0) else f"exit codes {codes}"
        if not failure and len(curve(on)) < 300:
            failure = f"only {len(curve(on))} records"
        if not failure:
            code, text = run(command(folder / f"spike{i}", **LONG), data_sets, partial(spiked, [40], seen))
            failure = f"exit code {code}, unchanged by {unchanged(seen)}" if code or unchanged(seen) else ""
        report.count(failure)
    return report
