"""Train a decoder:  python train.py config/small.py [key=value ...]

Reading order: main, which has run.py check all that a user can get wrong before anything is created; train, the loop;
train_step and validation_loss, what it repeats; and last what surrounds them.
"""

import dataclasses
import math
import signal
import sys
import time
from contextlib import nullcontext
from itertools import takewhile
from pathlib import Path
from typing import Any

import torch

import checkpoint
import sharded
import watch
from config.schema import Config, as_place, catch_signals, help_text, print_help, restore_signals, user_errors, warn
from cost import flops_per_token
from data.loader import batch, val_starts
from data.tokenizer import load_tokenizer
from device import autocast, matmul_rate, peak_memory, to_device, without_cudnn_attention
from evaluate import mean_loss
from generate import generate
from lock import Lock
from metrics import Log, has_evaluation, open_tracker, plot_losses, read_metrics, summary
from model import ModelConfig
from optim import SPIKE_WINDOW, lr_at, spike_threshold
from parallel import accumulate, clip_gradients, finish_gradients, gathered, is_shared, plain, release
from run import Run, claim_folder, read_config, set_up
from sample import prompt_ids, show
from world import ALONE, World, join, leave

USAGE = ("python train.py [PRESET] [key=value ...]\n\nPRESET is a file, config/small.py if none is named, or a run's "
         "folder, to go on with it. Every knob, and what it is where the preset is silent:")
NOT_FINITE = 3  # exit code after NaN or Inf
SAMPLING = dict(temperature=0.8, top_p=0.9, repetition_penalty=1.15)  # small models repeat themselves otherwise


class Interrupts:
    """Ctrl-C, SIGTERM and a closed terminal become a flag, looked at wherever stopping is safe; a second signal quits
    at once, but not with several ranks, whose launcher passes on what it gets itself and has its own time limit."""

    def __init__(self, world: World = ALONE):
        self.world, self.noted, self.came = world, 0, 0  # came: what all ranks know of

    def __enter__(self) -> "Interrupts":
        self.before = catch_signals(self.note)
        return self

    def __exit__(self, *_) -> None:
        restore_signals(self.before)

    def note(self, number: int, frame: Any = None) -> None:
        if self.noted and number != signal.SIGHUP and self.world.size == 1:  # shell and kernel may each send a SIGHUP
            raise SystemExit(128 + number)
        self.ask_to_stop(number)

    def ask_to_stop(self, number: int) -> None:
        """As if the signal had come first, but never as a second one: for a reader of our output that has gone."""
        self.noted = self.noted or number

    def agreed(self) -> bool:
        """Whether a signal came to any rank so far. All ranks must ask at the same place, and get the same answer."""
        self.came = self.world.largest(self.noted)
        return bool(self.came)


def main(argv: list[str]) -> int:
    """Returns the exit code: 0 done, 1 a fault on the way, 2 the user's error, 3 NaN or Inf, 128 + the signal's."""
    if {"-h", "--help"} & set(argv):
        print_help(help_text(USAGE, Config, ModelConfig))
        return 0
    with user_errors():
        world = join()
        config = world.share(world.main(read_config, argv))
        lock = world.main(Lock, Path(config.out_dir)) or nullcontext()
    with lock:
        with user_errors():
            run = set_up(config, world)
            finished = is_finished(run)
            if not finished:
                tracker = world.main(open_tracker, run.config.tracker, run.folder, run.config.flat())
                world.main(claim_folder, run)
        code = 0 if finished else train(run, tracker)
        with user_errors():  # the run is over and saved, so a signal may end the rest at once
            if code == 0 and world.is_main:
                plot_losses(run.folder)
                show_sample(run)
    return code


def train(run: Run, tracker=None) -> int:
    """The loop: evaluate, save, step. Returns the exit code."""
    config, world = run.config, run.world
    changed = not run.restored  # since the last checkpoint
    with Interrupts(world) as interrupts, open_log(run, tracker, interrupts) as log:
        try:
            while True:
                if evaluation_is_due(run, log):
                    val_loss = validation_loss(run, interrupts)
                    if val_loss is not None:  # None: a signal came in between; the resumed run evaluates again
                        log.evaluation(run.step, val_loss)
                        save_if_best(run, val_loss)
                        changed = True
                last = interrupts.agreed() or run.step >= config.max_iters
                if changed and (last or (config.save_interval and run.step and run.step % config.save_interval == 0)):
                    changed = not save(run, checkpoint.path_of(run.folder, run.step), must=last)
                    world.main(checkpoint.prune, run.folder, config.keep, run.step)
                if last:
                    break
                if config.watch and world.is_main and log.is_due(run.step + 1):
                    log.watch(run.step + 1, observe(run))
                done = timed_step(run) if log.steps_timed else first_step(run, interrupts)
                if done:
                    changed = True
                    if run.config.compile and not log.steps_timed:  # run.config: first_step may have given it up
                        log.line(f"compiled in {done[-1]:.0f} s, the first step included; later runs find it cached")
                    log.training(run.step, *done)
        except (FloatingPointError, OSError) as error:  # OSError: the last save failed, or the data changed
            bad_numbers, good = isinstance(error, FloatingPointError), checkpoint.all_in(run.folder)
            cure = " A lower learning_rate or more warmup_iters is the usual cure." if bad_numbers else ""
            log.line(f"error: {error}. Last good checkpoint: {good[-1][1].name if good else 'none yet'}.{cure}",
                     sys.stderr)
            return NOT_FINITE if bad_numbers else 1
        log.line(f"peak memory {peak_memory(config.device) / 1e9:.2f} GB")
        if interrupts.came:
            name = signal.Signals(interrupts.came).name
            log.line(f"{name}: saved at step {run.step}; train.py {as_place(run.folder)} goes on from here")
            return 128 + interrupts.came
    return 0


def open_log(run: Run, tracker, interrupts: Interrupts) -> Log:
    """The log of this run, with the summary printed."""
    config, rate = run.config, matmul_rate(run.config.device, run.config.dtype)
    tokens = config.batch_size * config.model.block_size
    log = Log(run.folder, first_step=run.step, last_step=config.max_iters, interval=config.log_interval,
              tokens_per_step=tokens, flops_per_step=tokens * flops_per_token(config.model, config.lora_rank),
              matmul_rate=rate * run.world.size, bytes_per_token=run.data.bytes_per_token("val"),
              device=config.device, tracker=tracker, stop=interrupts.ask_to_stop, world=run.world)
    if run.world.is_main:
        log.line(summary(config, run.data, run.step, rate, run.world.size))
    return log


def observe(run: Run) -> watch.Scales:
    """The scales that the next step will meet inside the model, on its first micro-batch; the run does not change."""
    config = run.config
    x, y = batch(run.data, run.step, config.batch_size, config.model.block_size, config.seed)
    x, y = (to_device(part[:config.micro_batch_size], config.device) for part in (x, y))
    return watch.observe(run.model, x, y, config.dtype, run.scaler.get_scale())


def timed_step(run: Run, first: bool = False) -> tuple[float, float, float, float]:
    """One optimizer step: (loss, learning rate, gradient norm, seconds)."""
    start = time.perf_counter()
    if first:
        fix_sum_order(run)
    return *train_step(run), time.perf_counter() - start  # train_step has waited for the device


def first_step(run: Run, interrupts: Interrupts | None = None) -> tuple[float, float, float, float] | None:
    """The first step of a process, where two things may turn out not to work here; they are mended, and said.

    None if there was no step: a signal reached the compiler too, and it stopped. With several ranks nothing is mended,
    since the others would not know.
    """
    while True:
        try:
            return timed_step(run, first=True)
        except torch.cuda.OutOfMemoryError:
            micro = run.config.micro_batch_size
            if run.world.size > 1 or micro == 1 or run.updated:  # which cannot be taken back
                raise
            smaller = max(m for m in range(1, micro // 2 + 1) if run.config.batch_size % m == 0)
            print(f"out of GPU memory with micro_batch_size={micro}: trying {smaller}")
            run.config = dataclasses.replace(run.config, micro_batch_size=smaller)
        except torch._dynamo.exc.TorchDynamoException as error:
            if not run.config.compile or run.world.size > 1:
                raise
            if interrupts is not None and interrupts.noted:
                return None
            print(f"torch.compile does not work here, going on without: {str(error).strip().splitlines()[0]:.200}")
            run.forward, run.config = run.model, dataclasses.replace(run.config, compile=False)
        run.optimizers.zero_grad()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def train_step(run: Run) -> tuple[float, float, float]:
    """One optimizer step over the global batch of run.step: (loss before it in nats per token, lr, gradient norm).

    FloatingPointError is raised before anything has changed. Dropout's masks, like the batch and the learning rate,
    are a function of (seed, step), so nothing random needs to be saved.
    """
    config, step = run.config, run.step
    lr = lr_at(step, schedule=config.lr_schedule, peak=config.learning_rate, floor=config.min_lr,
               warmup=config.warmup_iters, total=config.max_iters, decay_fraction=config.decay_fraction)
    run.optimizers.set_lr(lr)
    torch.manual_seed(config.seed * 1_000_003 + step + (run.world.rank << 43))
    total = gradients(run)
    for optimizer in run.optimizers:
        run.scaler.unscale_(optimizer)
    norm = clip_gradients(run.model.parameters(), config.grad_clip)
    loss, norm = torch.stack((run.world.mean_(total), norm)).tolist()  # the one wait for the device
    check_finite(run, loss, norm)
    if math.isfinite(norm) and not skipped_as_spike(run, norm):  # an Inf here is float16's: update() halves its scale
        run.updated = True
        for optimizer in run.optimizers:
            run.scaler.step(optimizer)
    run.scaler.update()
    run.optimizers.zero_grad()
    run.step += 1
    return loss, lr, norm


def gradients(run: Run) -> torch.Tensor:
    """Leaves the gradient of run.step's global batch in the parameters; returns the loss of this rank's part of it."""
    config, world = run.config, run.world
    world.together(run.data.check_unchanged)  # where one rank alone would find it, the others would wait
    run.model.train()
    x, y = batch(run.data, run.step, config.batch_size, config.model.block_size, config.seed, world.rank, world.size)
    parts = len(x) // config.micro_batch_size
    total = torch.zeros((), device=config.device)
    for i, (inputs, targets) in enumerate(zip(x.chunk(parts), y.chunk(parts), strict=True)):
        accumulate(run.forward, last=i == parts - 1)
        with autocast(config.device, config.dtype):
            loss = run.forward(to_device(inputs, config.device), to_device(targets, config.device)) / parts
        run.scaler.scale(loss).backward()
        total += loss.detach()
    finish_gradients(run.model, config, world)
    return total


def fix_sum_order(run: Run) -> None:
    """DDP sums gradients in another order from its second backward on; one whose result is thrown away lets a resumed
    run begin with that order, so that it stays bitwise the same run."""
    if run.world.size > 1 and run.config.parallel == "ddp":
        gradients(run)
        run.optimizers.zero_grad()


def check_finite(run: Run, loss: float, norm: float) -> None:
    """With float16 the gradient may overflow: the scaler skips that step and halves its scale, down to 1 here."""
    fp16 = run.scaler.is_enabled()
    if not math.isfinite(loss) or (not math.isfinite(norm) and (not fp16 or run.scaler.get_scale() < 1)):
        raise FloatingPointError(f"loss {loss}, gradient norm {norm} at step {run.step + 1}: stopped before the update")


def skipped_as_spike(run: Run, norm: float) -> bool:
    """Whether this update is to be left out, by the rule of skip_spikes; the norm is remembered either way."""
    threshold = spike_threshold(run.grad_norms, run.config.skip_spikes)
    run.grad_norms = [*run.grad_norms, min(norm, threshold)][-SPIKE_WINDOW:]
    spike = norm > threshold
    if spike and run.world.is_main:
        warn(f"step {run.step + 1}: the gradient norm {norm:.3g} is above {threshold:.3g}, its update is skipped")
    return spike


@torch.no_grad()
def validation_loss(run: Run, interrupts: Interrupts | None = None) -> float | None:
    """Mean loss (nats per token) over the validation windows, always the same ones; None if a signal came."""
    config = run.config
    run.world.together(run.data.check_unchanged)
    run.model.eval()
    block_size = config.model.block_size
    loss = mean_loss(run.forward, run.data.val, val_starts(len(run.data.val), block_size, config.eval_iters),
                     block_size, config.micro_batch_size, config.device, config.dtype,
                     stop=lambda: interrupts is not None and interrupts.agreed(), world=run.world)
    release(run.model, config, run.world)
    if loss is not None and not math.isfinite(loss):
        raise FloatingPointError(f"validation loss {loss} at step {run.step}")
    return loss


def is_finished(run: Run) -> bool:
    """Whether nothing is left to do, which is then said: the last step is done, saved and evaluated."""
    config, world = run.config, run.world
    finished = run.step >= config.max_iters and world.share(
        world.main(lambda: has_evaluation(read_metrics(run.folder), run.step)))
    if finished:
        world.main(checkpoint.prune, run.folder, config.keep, run.step)  # a kill may have come before it
        print(f"already at step {run.step} of {config.max_iters}: nothing to do (a larger max_iters would go on)")
    return finished


def evaluation_is_due(run: Run, log: Log) -> bool:
    interval = run.config.eval_interval
    due = run.step >= run.config.max_iters or (interval and run.step and run.step % interval == 0)
    return bool(due) and not has_evaluation(log.records, run.step)


def save_if_best(run: Run, val_loss: float) -> None:
    """best.pt is for sampling and export: it holds no optimizer state."""
    before = run.best_val_loss
    if val_loss < before:
        run.best_val_loss = val_loss
        if not save(run, run.folder / "best.pt", optimizer=False):
            run.best_val_loss = before


def save(run: Run, path: Path, optimizer: bool = True, must: bool = False) -> bool:
    """Saves a checkpoint. If the disk will not take it, there is a warning (and False), or an OSError if it `must`."""
    config, world = run.config, run.world
    learned = {name: p.detach() for name, p in run.model.named_parameters() if p.requires_grad}
    state = {"step": run.step, "model": learned, "optimizer": run.optimizers.state_dict() if optimizer else {},
             "scaler": run.scaler.state_dict(), "config": config.flat(), "data": run.data.fingerprint,
             "base": run.base, "best_val_loss": run.best_val_loss, "grad_norms": run.grad_norms}
    if config.sharded:
        path = sharded.path_of(path, run.step)
    try:
        world.together(world.only_main(keep_folder), run)
        if config.sharded:
            sharded.save(path, state, world)
        else:
            world.together(world.only_main(checkpoint.save), path, gathered(state, world))
    except OSError as error:
        first_line = str(error).partition("\n")[0]
        reason = f"{path} could not be saved ({first_line:.200})"
        if must:
            raise OSError(reason) from error
        if world.is_main:
            warn(f"{reason}; training goes on")
        return False
    return True


def keep_folder(run: Run) -> None:
    if not run.folder.is_dir():
        warn(f"{run.folder} has vanished and is made again")
        claim_folder(run)


def show_sample(run: Run) -> None:
    """A text by the weights just trained, up to its end, if one is wanted."""
    if not run.config.sample_tokens:
        return
    if is_shared(run.config, run.world):
        one_file = f"python sharded.py {run.folder}, then " if run.config.sharded else ""
        print(f"{one_file}python sample.py {run.folder} prompt=... makes a text: no rank has all weights now")
        return
    config, tokenizer, prompt = run.config, load_tokenizer(run.folder), run.config.sample_prompt
    try:
        start = prompt_ids(tokenizer, prompt)
    except ValueError as error:  # a preset's prompt may have characters that this text has not
        print(f"the sample starts from nothing, not with sample_prompt: {error}")
        prompt, start = "", prompt_ids(tokenizer, "")
    without_cudnn_attention(config.device)
    with autocast(config.device, config.dtype):
        ids = [new for new, in generate(plain(run.model), start, config.sample_tokens, vocab_size=tokenizer.vocab_size,
                                        seed=config.seed, **SAMPLING)]
    text = tokenizer.decode(takewhile(lambda i: i not in tokenizer.end_ids, ids))
    show(f"--- sample ---\n{prompt}{text}\n", raw=False)


if __name__ == "__main__":
    leave(main, sys.argv[1:])
