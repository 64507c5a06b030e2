"""Train a decoder:  python train.py [PRESET] [key=value ...]

Read it from the top: main; train, the loop; train_step with its gradients; validation_losses; and
what comes once before the loop, warm_up and fix_length. How a run is set up, saved and logged is in
run/.

run.step counts the steps that are done. So it is also the index, from 0, of the next one. Log lines
and checkpoints are named by it after the step: they count from 1.
"""

import math
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext, suppress
from dataclasses import replace
from pathlib import Path

if __name__ == "__main__":  # before the imports that take seconds
    from config.command import start

    start()

import torch
from torch import Tensor

from config.command import counted, user_errors, warn
from config.help import training_help
from config.schema import Config
from data.loader import batch, val_starts
from model import IGNORED
from run import parallel
from run.evaluate import mean_loss
from run.folder import (
    claim_folder,
    prune_checkpoints,
    refuse_foreign,
    save_checkpoint,
    save_if_best,
)
from run.log import Log, Tracker, is_finished, open_tracker
from run.machine import autocast, to_device
from run.metrics import plot_losses
from run.optim import check_finite, spike_threshold, with_norm
from run.ranks import exit_with, join
from run.setup import Run, read_config, set_up, undone
from run.signals import Interrupts
from run.taper import taper
from run.watch import observe_next_batch
from sample import print_safely, sample_of
from weights.lock import Lock

USAGE = """python train.py [PRESET] [key=value ...]

PRESET is a file, config/small.py if none is named, or a run's folder, to go on with it."""
NOT_FINITE = 3  # exit code after NaN or Inf


def main(argv: list[str]) -> int:
    """Returns the exit code: 0 done, 1 disk or data failed while training, 2 a mistake of the user,
    3 NaN or Inf, 128 + n after signal n."""
    if {"-h", "--help"} & set(argv):
        print(training_help(USAGE))
        return 0
    with user_errors():
        ranks, config, lock = join(), None, nullcontext()
        with ranks.all_or_exit():
            if ranks.is_main:
                config = read_config(argv)
                refuse_foreign(Path(config.out_dir))
                lock = Lock(Path(config.out_dir))
        config = ranks.from_main(config)
    with lock:
        with user_errors():
            run = set_up(config, ranks)
            finished = is_finished(run)
            if finished:
                prune_checkpoints(run)  # a kill may have come after the last save, before this
                at = f"already at step {run.step} of {run.config.max_iters}"
                print(f"{at}: nothing to do (a larger max_iters would go on)")
            else:
                tell_of_rise(run)
                warm_up(run)
                fix_length(run)
                ranks.expect_answers(run.config.device)
                tracker = open_tracker(run)
                claim_folder(run, lock)
        code = 0 if finished else train(run, tracker)
        if code == 0 and ranks.is_main:
            with user_errors():
                show_result(run)
    return code


def show_result(run: Run) -> None:
    """Draws loss.png and prints a sample."""
    try_to_show("loss.png", lambda: plot_losses(run.folder))
    try_to_show("the sample", lambda: print_safely(sample_of(run), raw=False))


def try_to_show(what: str, show: Callable[[], object]) -> None:
    """Calls show(). Its failure is a warning, and not a failure of the run."""
    try:
        show()
    except Exception as error:  # matplotlib and PyTorch raise dozens of kinds
        warn(f"{what} could not be made ({error!r:.300}); the run does not need it")


def tell_of_rise(run: Run) -> None:
    """Says so if a resumed run has a higher learning rate from here on, as it has if a finished one
    gets a larger max_iters: the schedule of the longer run is not at its end there."""
    if run.config_before is None:
        return
    before = learning_rate_at(max(0, run.step - 1), run.config_before)
    planned, now = (learning_rate_at(run.step, c) for c in (run.config_before, run.config))
    if now > max(before, planned):
        print(
            f"the learning rate rises from {before:.2e} to {now:.2e} at step {run.step + 1}, "
            f"because its schedule has changed"
        )


def train(run: Run, tracker: Tracker | None) -> int:
    """The loop: evaluate if due, save if due, stop if asked, step, log. Returns the exit code."""
    config = run.config
    unsaved = run.past != run.folder  # whether there is something that no checkpoint here holds
    with Interrupts(run.ranks) as interrupts, Log(run, tracker, interrupts) as log:
        try:
            while True:
                taper(run)  # nothing unless norm=tapernorm
                at_end = run.step >= config.max_iters

                evaluation_due = at_end or is_due(run.step, config.eval_interval)
                if evaluation_due and not log.has_evaluation(run.step):
                    losses = validation_losses(run, interrupts)
                    if losses:  # else a signal came, and the resumed run evaluates
                        log.evaluation(run.step, losses)
                        save_if_best(run, run.data.mean(losses))
                        unsaved = True  # a checkpoint holds the best validation loss, too

                if is_due(run.step, config.sample_interval) and not at_end and run.ranks.is_main:
                    try_to_show("the sample", lambda: log.line(sample_of(run).rstrip()))

                last = interrupts.agreed() or at_end
                if unsaved and (last or is_due(run.step, config.save_interval)):
                    unsaved = not save_checkpoint(run, required=last)
                if last:
                    break

                if config.watch and run.ranks.is_main and log.is_due(run.step + 1):
                    log.watch(run.step + 1, observe_next_batch(run))

                start = time.perf_counter()
                done = train_step(run, interrupts)  # has waited for the gradients
                if done is not None:  # else a signal came, and the resumed run does the step anew
                    log.training(run.step, *done, time.perf_counter() - start)
                    unsaved = True
        except (FloatingPointError, OSError) as error:  # OSError: disk or data
            log.fault(error)
            return NOT_FINITE if isinstance(error, FloatingPointError) else 1
        log.end(run.step)
    return 128 + interrupts.came if interrupts.came else 0


def is_due(step: int, interval: int) -> bool:
    return bool(interval and step and step % interval == 0)


def train_step(run: Run, interrupts: Interrupts | None = None) -> tuple[float, float, float] | None:
    """One optimizer step on the batch of run.step: (its loss before the step in nats per token, the
    learning rate, the gradient's norm). FloatingPointError comes before any weight has changed.

    None if a signal came between two micro-batches. Then nothing has changed.
    """
    config, ranks, optimizers, scaler = run.config, run.ranks, run.optimizers, run.scaler
    lr = learning_rate_at(run.step, config)
    optimizers.set_lr(lr)
    # Dropout's masks, like the batch and the learning rate, are a function of seed and step. So no
    # random state is saved, and a resumed run draws what an uninterrupted one would have drawn.
    if config.model.dropout:
        torch.manual_seed(config.seed * 1_000_003 + run.step + (ranks.rank << 43))
    loss = accumulate_gradients(run, interrupts)
    if loss is None:
        optimizers.zero_grad()
        return None
    read_ahead(run)  # the GPU is still at work
    for optimizer in optimizers:
        scaler.unscale_(optimizer)
    optimizers.centre_gradients()  # nothing unless centred_writers is set
    norm = parallel.clip_gradients(run.model.parameters(), config.grad_clip)
    loss, norm = torch.stack((ranks.mean_(loss), norm)).tolist()  # the one wait for the device

    check_finite(loss, norm, scaler, run.step + 1)
    threshold = spike_threshold(run.grad_norms, config.skip_spikes)  # inf unless skip_spikes is set
    if math.isfinite(norm):  # else a float16 gradient overflowed, and update() halves its scale
        run.grad_norms = with_norm(run.grad_norms, norm, threshold)
        if norm <= threshold:
            for optimizer in optimizers:
                scaler.step(optimizer)
            optimizers.centre_writers()
        elif ranks.is_main:
            warn(f"step {run.step + 1}: gradient norm {norm:.3g} > {threshold:.3g}, update skipped")
    scaler.update()
    optimizers.zero_grad()
    run.step += 1
    return loss, lr, norm


def accumulate_gradients(run: Run, interrupts: Interrupts | None = None) -> Tensor | None:
    """Adds the gradient of the batch of run.step to the parameters' .grad. Returns the mean loss of
    this rank's share of the batch, a scalar on the device; None if a signal came, to any rank, when
    a part of the batch was done."""
    config, ranks, data = run.config, run.ranks, run.data
    run.model.train()
    windows = windows_of(run, run.step)
    count = len(windows[0]) // config.micro_batch_size
    # Every token that counts has the same weight. Of conversations only answers do, and one
    # micro-batch or rank has more of them than another.
    tokens_per_rank = counted_tokens(windows[1])
    if any(source.answers for source in data.sources):
        tokens_per_rank = max(1, ranks.sum(tokens_per_rank)) / ranks.size
    mean = torch.zeros((), device=config.device)
    for i, part in enumerate(zip(*(tensor.chunk(count) for tensor in windows), strict=True)):
        if i and interrupts is not None and interrupts.agreed():
            return None
        parallel.average_gradients_in_backward(run.forward, now=i == count - 1)
        with autocast(config.device, config.dtype):
            loss = run.forward(*(to_device(tensor, config.device) for tensor in part))
            loss = loss / (tokens_per_rank / max(1, counted_tokens(part[1])))
        run.scaler.scale(loss).backward()
        mean += loss.detach()
    parallel.average_what_fsdp_skips(run.model, config, ranks)
    return mean


def windows_of(run: Run, step: int) -> tuple[Tensor, ...]:
    """This rank's share of the batch of a step, on the CPU. OSError if a rank cannot read its own.

    The windows of an epoch are shuffled, and each comes once; every rank takes its share of them.
    """
    if run.ahead and run.ahead[0] == step:
        return run.ahead[1]
    config, ranks, T = run.config, run.ranks, run.config.model.block_size
    with ranks.all_or_none():  # if one rank alone stopped here, the others would wait for it
        return batch(run.data, step, config.batch_size, T, config.seed, ranks.rank, ranks.size)


def read_ahead(run: Run) -> None:
    """Reads the windows of the next step, if a device computes meanwhile."""
    run.ahead = None
    if run.config.device != "cpu" and run.step + 1 != run.config.max_iters:
        with suppress(OSError):  # the next step reads again, and tells of it
            run.ahead = (run.step + 1, windows_of(run, run.step + 1))


def counted_tokens(targets: Tensor) -> int:
    """How many of the targets count in the loss."""
    return int((targets != IGNORED).sum())


def learning_rate_at(step: int, config: Config) -> float:
    """The learning rate of a step, of which 0 is the first: linear warm-up, then the schedule.

    cosine and linear fall to min_lr at step max_iters. wsd stays at the peak and falls linearly in
    the last decay_fraction of the steps. constant stays.
    """
    peak, floor, total = config.learning_rate, config.min_lr, config.max_iters
    if step < config.warmup_iters:
        return peak * (step + 1) / (config.warmup_iters + 1)
    if config.lr_schedule == "constant":
        return peak
    start = config.warmup_iters
    if config.lr_schedule == "wsd":
        start = max(start, total * (1 - config.decay_fraction))
    done = min(1.0, max(0.0, (step - start) / max(1, total - start)))
    left = {"cosine": (1 + math.cos(math.pi * done)) / 2, "linear": 1 - done, "wsd": 1 - done}
    return floor + (peak - floor) * left[config.lr_schedule]


def validation_losses(run: Run, interrupts: Interrupts) -> list[float]:
    """Of each source of the data, the mean loss, nats per token, over its validation windows, which
    are always the same; [] if a signal came. FloatingPointError if one is NaN or Inf."""
    config, T, losses = run.config, run.config.model.block_size, []
    with run.ranks.all_or_none():
        run.data.check_unchanged()
    run.model.eval()
    micro, device, dtype = config.micro_batch_size, config.device, config.dtype
    for source in run.data.sources:
        starts = val_starts(len(source.val), T, config.eval_iters)
        loss = mean_loss(
            run.forward, source, "val", starts, T, micro, device, dtype, interrupts, run.ranks
        )
        if loss is None:
            losses = []
            break
        losses.append(loss)
    parallel.free_gathered_weights(run.model, config, run.ranks)
    for loss in losses:
        if not math.isfinite(loss):
            raise FloatingPointError(f"validation loss {loss} at step {run.step}")
    return losses


def warm_up(run: Run) -> None:
    """Computes one gradient and throws it away, so that the loop meets no surprise.

    It compiles the model, or gives that up if the compiler does not work. It halves a micro-batch
    that does not fit the GPU; meanwhile it holds memory for the optimizer's moments, which every
    step but the first needs. And it takes DDP past its first backward, which sums gradients in
    another order than all later ones, so that a resumed run equals an uninterrupted one. On several
    ranks such a failure ends the run: one rank cannot change its settings alone.
    """
    alone, start = run.ranks.size == 1, time.perf_counter()
    compiles = run.config.compile or run.config.model.norm_impl == "compile"
    nothing_can_fail = alone and run.config.device == "cpu" and not compiles
    if nothing_can_fail or 0 < run.config.max_iters <= run.step:
        return
    if compiles:
        print("compiling the model, which takes a while", flush=True)
    moments = run.optimizers.reserve_moments()
    while True:
        config = run.config
        try:
            accumulate_gradients(run)
            break
        except torch.cuda.OutOfMemoryError:
            micro = config.micro_batch_size
            if not alone or micro == 1:
                raise
            smaller = max(m for m in range(1, micro // 2 + 1) if config.batch_size % m == 0)
            print(f"out of GPU memory with micro_batch_size={micro}: trying {smaller}")
            run.config = replace(config, micro_batch_size=smaller)
        except torch._dynamo.exc.TorchDynamoException as error:
            reason = str(error).strip().splitlines()[0]
            if not config.compile and config.model.norm_impl == "compile":
                raise ValueError(
                    f"norm_impl=compile does not work here, norm_impl=eager does: {reason:.200}"
                ) from error
            if not alone or not config.compile:
                raise
            print(f"torch.compile does not work here, going on without: {reason:.200}")
            run.config, run.forward = replace(config, compile=False), run.model
        run.optimizers.zero_grad()
        torch.cuda.empty_cache()
    run.optimizers.zero_grad()
    del moments
    if run.config.compile or run.config.model.norm_impl == "compile":
        print(f"compiled in {time.perf_counter() - start:.0f} s; later runs find it cached")


def fix_length(run: Run) -> None:
    """Turns `minutes` into max_iters, by the time that the first steps take. Then these are undone,
    so all that follows is a run of max_iters steps like any other. ValueError if the time is too
    short for the warm-up of the learning rate.
    """
    config, seconds = run.config, []
    if config.max_iters:
        return

    def take(count: int) -> float:
        for _ in range(count):
            start = time.perf_counter()
            train_step(run)
            seconds.append(time.perf_counter() - start)
        usual = sorted(seconds[1:])  # without the first one, which makes the moments
        return usual[len(usual) // 4]  # faster than the mean, which other work for a moment raises

    steps, least = None, max(1, config.warmup_iters)
    with undone(run), suppress(FloatingPointError):
        share = 0.02 * 60 * config.minutes  # of the time
        few = run.ranks.from_main(min(200, round(share / take(3))))
        steps = run.ranks.from_main(round(60 * config.minutes / take(few)))
    if steps is None:
        steps = least  # the training meets the NaN or Inf again, and tells of it
    elif steps < least:
        raise ValueError(
            f"minutes={config.minutes:g} allows {counted(steps, 'step*')} here, and "
            f"warmup_iters={config.warmup_iters}: take more minutes, or less warm-up"
        )
    else:
        print(f"{steps:,} steps take about {config.minutes:g} minutes here: max_iters={steps}")
    run.config = replace(config, max_iters=steps)


if __name__ == "__main__":
    exit_with(main, sys.argv[1:])
