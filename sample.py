"""Continue a prompt with a trained model:  python sample.py out/small prompt="def main(" [...]
Or see how well it predicts a text:        python sample.py out/small eval=val

Reading order: the options; main and what it calls, which is the way of a prompt from the command
line to token ids, and of the answer back to the screen; generate, the loop over new tokens; the
cache of keys and values; and the arithmetic of drawing a token, in functions of tensors alone.
"""

import codecs
import dataclasses
import functools
import math
import re
import sys
import time
from collections.abc import Callable, Iterator, Set
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any, Literal

if __name__ == "__main__":  # before the imports that take seconds
    from config.command import start

    start()

import torch
import torch.nn.functional as F
from torch import Tensor

from config.command import (
    one_line,
    printable,
    reader_left,
    run_command,
    shell_path,
    user_errors,
    warn,
)
from config.help import help_text
from config.schema import knobs_of, read_arguments, refuse_without_effect, without_effect
from model import Decoder, ModelConfig, knob
from run.evaluate import evaluate, open_known_dataset
from run.machine import (
    autocast,
    choose_device,
    choose_dtype,
    choose_threads,
    disable_cudnn_attention,
    keep_freed_memory,
    processor,
)
from run.parallel import uncompiled, uses_fsdp
from run.setup import Run
from text.chat import Chat, template_source
from text.prompt import prompt_ids, prompt_text
from text.tokenizer import Tokenizer, load_tokenizer
from weights.open import load_model
from weights.quantize import (
    can_pack_matrices,
    pack_matrices,
    quantize_int8,
    round_matrices,
    sum_matrices,
)

USAGE = """python sample.py FOLDER [key=value ...]

FOLDER is that of a run, or a model in Hugging Face's form. Every knob with its default:"""
# Tokens that pay for compiling a step: on a CPU by the figures of docs/LOG.md, on CUDA computed and
# not measured. There, an eager token is 30 launches for each Block, 350 in all for 12 Blocks, of 7
# to 10 us each. As one graph it takes 0.5 ms, so it saves 2 to 3 ms. Compiling takes 20 to 40 s.
LONG_TEXT = {"cpu": 8_000, "cuda": 12_000}
# How the text at the end of a training is drawn; small models would repeat themselves otherwise.
SAMPLE_OF_A_RUN = {"temperature": 0.8, "top_p": 0.9, "repetition_penalty": 1.15}

# -- The options -----------------------------------------------------------------------------------

FOR_GENERATE = (  # the options that are arguments of generate
    "max_new_tokens num_samples temperature top_k top_p min_p repetition_penalty seed compile"
).split()
FOR_EVAL = "dataset eval_iters block_size micro_batch_size"
NEEDS = (  # as in config/schema.py: options that count only beside others
    (FOR_EVAL, "eval=val or eval=train", lambda k: k["eval"] != "none"),
    (
        f"{' '.join(FOR_GENERATE)} stop prompt special interactive chat raw",
        "eval=none",
        lambda k: k["eval"] == "none",
    ),
    ("prompt", "interactive=false", lambda k: not k["interactive"]),
    ("system", "chat=true", lambda k: k["chat"]),
    ("special interactive num_samples", "chat=false", lambda k: not k["chat"]),
    ("top_k", "a temperature above 0", lambda k: k["temperature"] != 0),
    (
        "top_p min_p seed",
        "a temperature above 0 and a top_k other than 1",
        lambda k: k["temperature"] != 0 and k["top_k"] != 1,
    ),
    (
        "num_samples",  # they would all be the same
        "a temperature above 0 and a top_k other than 1",
        lambda k: k["num_samples"] == 1 or (k["temperature"] != 0 and k["top_k"] != 1),
    ),
)


@dataclass(frozen=True, kw_only=True)
class SampleOptions:
    """What is sampled or evaluated, and how."""

    prompt: str = knob(
        "",
        "text to continue; FILE:path = what is in a file, - = what is on standard input, both "
        "without their last end of line",
    )
    special: bool = knob(
        False, "special tokens that the prompt spells, such as </s>, are these tokens, not text"
    )
    checkpoint: str = knob("latest", "latest, best or a step")
    max_new_tokens: int = knob(200, "tokens to generate")
    stop: str = knob("", "a continuation ends before this text, which is not printed; '' = no text")
    num_samples: int = knob(1, "texts to generate, all at once")
    temperature: float = knob(
        0.8, "divides the logits: below 1 safer, above 1 wilder, 0 = always the likeliest token"
    )
    top_k: int = knob(0, "draw from the k likeliest tokens; 0 = from all")
    top_p: float = knob(
        1.0, "draw from the fewest tokens that reach this probability together; 1 = from all"
    )
    min_p: float = knob(
        0.0, "draw from tokens of at least this share of the likeliest's probability; 0 = from all"
    )
    repetition_penalty: float = knob(
        1.0, "above 1 makes tokens less likely that the text has already"
    )
    seed: int = knob(1337, "of the draws: the same seed gives the same text")
    device: str = knob("auto", "auto (CUDA, then MPS, then CPU), cpu, mps, cuda or cuda:N")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = knob(
        "auto",
        "of the matrix products. auto = bfloat16 where the hardware has it, else float32. Texts of "
        "a program that computes in float32 are only equal with dtype=float32",
    )
    quantize: Literal["none", "int8"] = knob(
        "none", "int8 = matrices as whole numbers, with a scale for each output"
    )
    compile: Literal["auto", True, False] = knob(
        "auto",
        "compile the step that makes a token: it takes seconds, and then each token comes faster; "
        f"auto = on a CPU for one text of at least {LONG_TEXT['cpu']:,} tokens, on CUDA for texts "
        f"of at least {LONG_TEXT['cuda']:,}",
    )
    eval: Literal["none", "val", "train"] = knob(
        "none", "instead of sampling, print the loss on this split of dataset"
    )
    dataset: str = knob(
        "", "eval: a data set, named as for train.py, but no text; '' = what the run was trained on"
    )
    eval_iters: int = knob(
        0, "eval: number of windows, spread evenly, always the same ones; 0 = the whole split"
    )
    block_size: int = knob(0, "eval: tokens of a window; 0 = the model's context, but at most 2048")
    micro_batch_size: int = knob(
        0,
        "eval: windows at once; 0 = as many as fit. Only the last digits of the loss depend on it",
    )
    interactive: bool = knob(False, "ask for prompts until the end of the input (Ctrl-D)")
    chat: bool = knob(
        False, "talk by the model's chat template: prompt is a message, without one ask for them"
    )
    system: str = knob("", "chat: the system message")
    raw: bool = knob(False, "let control characters through to the terminal")

    def __post_init__(self):
        penalty = self.repetition_penalty
        rules = {  # name -> (whether the rule is kept, the rule in words)
            "max_new_tokens": (self.max_new_tokens >= 1, "1 or more"),
            "num_samples": (1 <= self.num_samples <= 10_000, "between 1 and 10,000"),
            "temperature": (0 <= self.temperature < math.inf, "0 (the likeliest token) or more"),
            "top_k": (self.top_k >= 0, "0 (off) or more"),
            "top_p": (0 < self.top_p <= 1, "in (0, 1]"),
            "min_p": (0 <= self.min_p <= 1, "in [0, 1]"),
            "repetition_penalty": (0.01 <= penalty <= 100, "between 0.01 and 100"),
            "seed": (0 <= self.seed < 2**63, "0 or more, and below 2**63"),
            "stop": (not re.search("[\ud800-\udfff]", self.stop), "text in UTF-8"),
        }
        for name in ("eval_iters", "block_size", "micro_batch_size"):
            rules[name] = (getattr(self, name) >= 0, "0 (automatic) or more")
        problems = [
            f"{name} must be {rule}, got {getattr(self, name)}"
            for name, (kept, rule) in rules.items()
            if not kept
        ]
        if self.quantize == "int8" and self.dtype == "float16":
            problems.append(
                "quantize=int8 would overflow in float16: use dtype=bfloat16 or float32"
            )
        if problems:
            raise ValueError("; ".join(problems))

    @property
    def arithmetic(self) -> str:
        """What the speed and the last digits of the logits depend on, as it is printed."""
        parts = [self.device, self.dtype]
        if self.quantize != "none":
            parts.append(self.quantize)
        return f"({', '.join(parts)})"


# -- The command -----------------------------------------------------------------------------------


def main(argv: list[str]) -> int:
    """Returns the exit code: 0 done, 2 the user's error, 3 NaN or Inf, 130 after Ctrl-C."""
    try:
        sample_or_evaluate(argv)
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return 130
    except FloatingPointError as error:
        print(f"error: {one_line(error)}", file=sys.stderr)
        return 3
    return 0


def sample_or_evaluate(argv: list[str]) -> None:
    if {"-h", "--help"} & set(argv):
        print(help_text(USAGE, SampleOptions))
        return
    with ExitStack() as stack:
        with user_errors():
            folder, options = parse_arguments(argv)
            for name in ("prompt", "stop"):
                if "\\n" in getattr(options, name):
                    warn(
                        f"{name} has the two signs \\ and n; a new line is written {name}=$'...\\n'"
                    )
            prompt = prompt_text(options.prompt)  # '' with eval and with interactive
            model, tokenizer, known = load_model(
                folder, options.checkpoint, options.device, options.block_size
            )
            chat = None
            if options.chat:
                chat = stack.enter_context(Chat(tokenizer, options.system))
                if not (template_source(tokenizer) or known.get("answers")):
                    warn(f"{folder} has no chat template: a plain one is used")
            if chat and prompt:
                ids = chat.ask(prompt)
            else:
                ids = prompt_ids(tokenizer, prompt, options.special)
            torch.set_num_threads(choose_threads(0))
            prepare_for_inference(model, options)
            if options.eval != "none":
                print_evaluation(model, known, folder, options)
                return
        if options.interactive or (chat and not prompt):
            answer_prompts(model, tokenizer, options, chat)
        else:
            shown = "" if chat else prompt
            print_samples(model, tokenizer, ids, options, shown, chat and chat.ends)


def parse_arguments(argv: list[str]) -> tuple[Path, SampleOptions]:
    """The folder and the options, with what auto stands for in device, dtype and compile."""
    known = knobs_of(SampleOptions)
    words, given = read_arguments(argv, known)
    if len(words) != 1:
        raise ValueError(
            f"name one folder of a run, got {' '.join(words) or 'none'}: "
            f"python sample.py out/small prompt='...'"
        )
    useless = without_effect(given, given, known, NEEDS)
    refuse_without_effect(useless, given, "command line")
    options = SampleOptions(**given)
    device = choose_device(options.device)
    dtype = choose_dtype(options.dtype, device)
    compile = options.compile
    if compile == "auto":
        compile = pays_for_compiling(device, options.max_new_tokens, options.num_samples)
    chosen = {"device": device, "dtype": dtype, "compile": compile}
    return Path(words[0]), dataclasses.replace(options, **chosen)


def pays_for_compiling(device: str, tokens: int, num_samples: int) -> bool:
    """Whether texts of so many new tokens come sooner if the step of a token is compiled.

    Several texts are compiled on CUDA, where a token takes as many launches as for one, and the
    products are cuBLAS's either way; on a CPU they are slower compiled.
    """
    kind = torch.device(device).type
    return tokens >= LONG_TEXT.get(kind, math.inf) and (kind == "cuda" or num_samples == 1)


def prepare_for_inference(model: Decoder, options: SampleOptions) -> None:
    """Stores the model's matrices in the form in which they are read the fastest, in place. The
    options are those of parse_arguments.

    int8 changes what the model computes. The other forms change its last digits at most.
    """
    dtype = getattr(torch, options.dtype)
    disable_cudnn_attention(options.device)
    on_cpu = options.device == "cpu"
    if options.quantize == "int8":
        quantize_int8(model)
    elif on_cpu and options.compile is True:
        sum_matrices(model, dtype)
    elif on_cpu and can_pack_matrices(dtype):
        # MKL reads a small float32 matrix faster if it is not packed. On Intel's processors that is
        # so for larger matrices, too (docs/LOG.md).
        smallest = 2**22 if "Intel" in processor("cpu") else 2**17
        pack_matrices(model, dtype, smallest)
    elif dtype != torch.float32:
        round_matrices(model, dtype)
    if on_cpu:
        keep_freed_memory()
    if options.compile is True or model.config.norm_impl == "compile":
        print("compiling, which takes a while", file=sys.stderr, flush=True)


def print_evaluation(
    model: Decoder, known: dict[str, Any], folder: Path, options: SampleOptions
) -> None:
    data = open_known_dataset(options.dataset, known, folder)
    found = evaluate(
        model,
        data,
        options.eval,
        options.device,
        options.dtype,
        windows=options.eval_iters,
        block_size=options.block_size,
        batch=options.micro_batch_size,
    )
    print(found, options.arithmetic)


def answer_prompts(
    model: Decoder, tokenizer: Tokenizer, options: SampleOptions, chat: Chat | None
) -> None:
    """Asks for a prompt and continues it, or answers it in a chat, until the input ends. One cache
    serves all of them, so what was said before is not read again."""
    with autocast(options.device, options.dtype):
        cache = empty_cache(model, options.num_samples)
    sys.stdin.reconfigure(errors="surrogateescape")  # so one bad line does not take others along
    while not reader_left(sys.stdout):
        try:
            prompt = input("prompt> " if sys.stdin.isatty() else "")
            ids = chat.ask(prompt) if chat else prompt_ids(tokenizer, prompt, options.special)
        except EOFError:
            return
        except ValueError as error:  # not UTF-8, or a character that is not in the vocabulary
            print(f"error: {one_line(error)}", file=sys.stderr)
        else:
            ends = chat and chat.ends
            answer = print_samples(model, tokenizer, ids, options, ends=ends, cache=cache)
            if chat:
                chat.answered(answer)


def print_samples(
    model: Decoder,
    tokenizer: Tokenizer,
    ids: list[int],
    options: SampleOptions,
    prompt: str = "",
    ends: Set[int] | None = None,
    cache: "KVCache | None" = None,
) -> str:
    """Prints the prompt, the first continuation of `ids` as it comes, then the other ones; and on
    stderr the speed. Returns the first continuation. The cache is that of generate.

    A continuation ends where the model ends its text, with an id of `ends`, or before options.stop.
    The work stops when all have ended.
    """
    ends = ends or tokenizer.end_ids
    block_size = model.config.block_size
    if left_out := window_start(len(ids), block_size):
        print(
            f"warning: the prompt has {len(ids):,} tokens, the model sees at most {block_size:,} "
            f"at once: the first {left_out:,} are left out",
            file=sys.stderr,
        )
    texts = [Continuation(options.stop) for _ in range(options.num_samples)]
    going = set(range(options.num_samples))  # the samples that have not ended
    count = 0  # of new tokens
    arguments = {name: getattr(options, name) for name in FOR_GENERATE} | {"cache": cache}
    print_safely(prompt, options.raw)
    start = time.perf_counter()
    with autocast(options.device, options.dtype):
        for new_ids in generate(model, ids, vocab_size=tokenizer.vocab_size, **arguments):
            count += len(going)
            going = {i for i in going if new_ids[i] not in ends}
            new = {i: texts[i].add(tokenizer.decode_bytes([new_ids[i]])) for i in going}
            print_safely(new.get(0, ""), options.raw)
            going = {i for i in going if not texts[i].stopped}
            if not going or reader_left(sys.stdout):
                break
    if reader_left(sys.stdout):
        return texts[0].shown
    seconds = time.perf_counter() - start
    print_safely(texts[0].add(b"", last=True) + "\n", options.raw)
    for text in texts[1:]:
        text.add(b"", last=True)
        print_safely(f"---\n{prompt}{text.shown}\n", options.raw)
    rate = f"{count:,} tokens in {seconds:.2f} s: {count / seconds:,.0f} tokens/s"
    print(f"{rate} {options.arithmetic}", file=sys.stderr)
    return texts[0].shown


class Continuation:
    """A text that grows by the bytes of one token after another, up to the first `stop` in it."""

    def __init__(self, stop: str = ""):
        self.stop, self.stopped = stop, False
        self.shown, self.waiting = "", ""  # what add has returned, and what it holds back
        self.utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def add(self, content: bytes, last: bool = False) -> str:
        """Returns what can be printed now. The rest of a character is still to come, and so may be
        that of `stop`, so their beginnings are held back, but not after the last bytes."""
        if self.stopped:
            return ""
        text = self.waiting + self.utf8.decode(content, last)
        if self.stop and self.stop in text:
            new, self.waiting, self.stopped = text.partition(self.stop)[0], "", True
        else:
            keep = len(text) - (0 if last else beginning_at_the_end(text, self.stop))
            new, self.waiting = text[:keep], text[keep:]
        self.shown += new
        return new


def beginning_at_the_end(text: str, whole: str) -> int:
    """The length of the longest beginning of `whole`, but not all of it, with which `text` ends:
    ('a cat s', 'so') -> 1."""
    lengths = range(min(len(text), len(whole) - 1), 0, -1)
    return next((n for n in lengths if text.endswith(whole[:n])), 0)


def sample_of(run: Run) -> str:
    """A text by the model of a run as it is now, for train.py to print. '' without sample_tokens.

    FloatingPointError if the logits are not finite."""
    config = run.config
    if not config.sample_tokens:
        return ""
    if uses_fsdp(config, run.ranks):
        place = shell_path(run.folder)
        merge = f"python -m run.sharded {place}, then " if config.sharded else ""
        sample = f"{merge}python sample.py {place} prompt=... makes a text"
        return f"{sample}: no rank has all weights now\n"
    note, tokenizer, prompt = "", load_tokenizer(run.folder), config.sample_prompt
    try:
        ids = prompt_ids(tokenizer, prompt)
    except ValueError as error:  # the preset's prompt has characters that the data set has not
        reason = one_line(error)
        note = f"the sample starts from nothing, not with sample_prompt: {reason}\n"
        prompt, ids = "", prompt_ids(tokenizer, "")
    disable_cudnn_attention(config.device)
    arguments = {"seed": config.seed, "vocab_size": tokenizer.vocab_size} | SAMPLE_OF_A_RUN
    with uncompiled(run.model) as model, autocast(config.device, config.dtype):
        new = [i for (i,) in generate(model, ids, config.sample_tokens, **arguments)]
    text = tokenizer.decode(takewhile(lambda i: i not in tokenizer.end_ids, new))
    return f"{note}--- sample ---\n{prompt}{text}\n"


def print_safely(text: str, raw: bool) -> None:
    """Prints at once. A terminal gets no control characters, unless they are wanted `raw`."""
    if sys.stdout.isatty() and not raw:
        text = printable(text)
    sys.stdout.write(text)
    sys.stdout.flush()


# -- The loop over new tokens ----------------------------------------------------------------------


@torch.inference_mode()  # for a generator: only while it runs, not in the caller between two tokens
def generate(
    model: Decoder,
    ids: list[int],
    max_new_tokens: int,
    *,
    num_samples: int = 1,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    repetition_penalty: float = 1.0,
    seed: int = 0,
    vocab_size: int | None = None,
    compile: bool = False,
    cache: "KVCache | None" = None,
) -> Iterator[list[int]]:
    """Continues `ids` (at least one) in num_samples ways at once. Each new token is yielded as a
    list with one id for each sample.

    Ids from vocab_size up, which are a vocabulary's padding, are never drawn; None = no padding.
    The same arguments give the same ids, and torch's own random state is neither used nor changed.
    `compile` changes last digits, so it may change ids; without a compiler it is given up, and a
    warning says so. A `cache` from empty_cache(model, num_samples) serves one call after another:
    what it holds of the ids is not read again, and compiled code keeps its memory. That changes
    last digits, too. The model is left in eval mode.
    FloatingPointError if the logits are not finite; ValueError if the cache is for another
    num_samples.
    """
    model.eval()
    device, block_size = model.embed.weight.device, model.config.block_size
    generator = torch.Generator(device).manual_seed(seed)
    seen = torch.zeros(num_samples, model.config.vocab_size, dtype=torch.bool, device=device)
    seen[:, ids] = True
    size = min(block_size, len(ids) + max_new_tokens)
    if compile:  # every size of the cache is compiled by itself, so there are few: powers of two
        size = 1 << (size - 1).bit_length()
    cache = cache or empty_cache(model, num_samples)
    if (made_for := len(cache.keys[0])) != num_samples:
        raise ValueError(
            f"the cache is for num_samples={made_for}, not {num_samples}: make another"
        )
    cache.make_room(size)
    kept = cache.keep(ids[window_start(len(ids), block_size) :])
    window = torch.tensor([cache.ids], device=device)  # what the model sees: [1, T], later [B, T]
    unread = window[:, kept:]  # the part of the window that is not in the cache yet
    static = None  # the same cache for compiled code, while that reads one token after another
    for _ in range(max_new_tokens):
        start = window_start(window.shape[1], block_size)
        if start:  # the window is full: drop its older half, and read the rest again
            window = unread = window[:, start:]
            cache.length, static = 0, None
            cache.ids = cache.ids[start:]
        uniform = torch.rand(num_samples, 1, generator=generator, device=device)
        drawing = (uniform, seen, repetition_penalty, vocab_size, temperature, top_k, top_p, min_p)
        if compile and cache.length and unread.shape == (num_samples, 1):
            # The compiler's guards look at every weight. After the first token the code is known to
            # fit, so they are skipped.
            known = static is not None
            static = static or StaticCache(cache)
            try:
                with torch.compiler.set_stance("default", skip_guard_eval_unsafe=known):
                    new = compiled_next_ids(device.type)(model, unread, static, *drawing)
            except torch._dynamo.exc.TorchDynamoException as error:
                warn(f"torch.compile does not work here, going on without: {one_line(error):.200}")
                compile, static = False, None
        if static is None:
            new = next_ids(model, unread, cache, *drawing)
        *new_ids, finite = new.tolist()  # the only place where the CPU waits for the device
        if not finite:
            raise FloatingPointError(
                "the model's logits hold NaN or Inf: its weights are damaged, or too large for "
                "this dtype (then dtype=float32 helps)"
            )
        cache.length = window.shape[1]
        if static:
            static.length.fill_(cache.length)
        if len(unread) < num_samples:
            cache.repeat()
        unread = new[:-1, None].clone()  # [B, 1]; a CUDA graph overwrites `new`
        seen.scatter_(1, unread, True)
        window = torch.cat((window.expand(num_samples, -1), unread), dim=1)
        cache.ids.append(new_ids[0])
        yield new_ids


def next_ids(
    model: Decoder,
    ids: Tensor,
    cache: "KVCache",
    uniform: Tensor,
    seen: Tensor,
    repetition_penalty: float,
    vocab_size: int | None,
    temperature: float,
    *filters: float,
) -> Tensor:
    """Reads ids [1 or B, T], which follow those in the cache, and draws what comes next: [B + 1]
    ids, of which the last is 1 if all logits are finite, else 0.

    `uniform` [B, 1] from [0, 1) decides the draw, `seen` [B, V] says which tokens a text has
    already. The CPU need not wait for anything in here, so it can be compiled as one graph.
    """
    logits = model.logits(model.features(ids, cache)[:, -1]).float()  # [1 or B, V]
    finite = torch.isfinite(logits.sum())
    logits = penalise(logits.expand(len(seen), -1), seen, repetition_penalty)[:, :vocab_size]
    if temperature == 0:
        new = logits.argmax(-1)
    else:
        new = draw_ids(logits_to_probabilities(logits, temperature, *filters), uniform)
    return torch.cat((new, finite[None].long()))


@functools.cache
def compiled_next_ids(device: str) -> Callable[..., Tensor]:
    """next_ids compiled; on CUDA as a graph, all of whose kernels are launched at once."""
    how = {}
    if device == "cuda":
        how = {"mode": "reduce-overhead"}
    elif device == "cpu":
        # By default the compiler writes a norm or a rotation into the loop of the product that
        # reads it, which computes it again for every row of the matrix. So it stores such values:
        # those that read more than 0 tensors, or take more than 6 operations.
        how = {"options": {"realize_reads_threshold": 0, "realize_opcount_threshold": 6}}
    return torch.compile(next_ids, fullgraph=True, **how)


def window_start(length: int, block_size: int) -> int:
    """The index of the first of `length` tokens that the model still sees.

    Up to block_size tokens it sees all. Then the older half of its window is dropped, and the rest
    is read again from position 0. So the model always sees a context as in training, and the next
    block_size / 2 tokens cost one step each.
    """
    half = max(1, block_size // 2)
    return -(-max(0, length - block_size) // half) * half


# -- The cache of keys and values ------------------------------------------------------------------


class KVCache:
    """The keys and values of B sequences, for each layer [B, K, size, D], of which the first
    `length` tokens are filled, also after Ctrl-C. `ids` are what the first sequence reads: those in
    the cache, and those that follow.

    Each layer has tensors of its own: compiled code that writes into a part of a tensor would copy
    the whole of it.
    """

    def __init__(self, config: ModelConfig, batch: int, size: int, device, dtype=torch.float32):
        shape = (batch, config.kv_heads, size, config.head_size)
        layers = range(config.n_layer)
        self.keys = [torch.zeros(shape, device=device, dtype=dtype) for _ in layers]
        self.values = [torch.zeros(shape, device=device, dtype=dtype) for _ in layers]
        self.length = 0
        self.ids: list[int] = []

    def keep(self, ids: list[int]) -> int:
        """Keeps the tokens with which the first sequence and `ids`, what is to be read now, both
        begin, and returns their number. At least one token is left to be read.

        Less than half of `ids` is not kept: tokens that follow others need a mask in attention,
        which computes what the mask hides, too. To read all, without a mask, is then less of it.
        """
        pairs = zip(self.ids[: self.length], ids[:-1], strict=False)
        common = len(list(takewhile(lambda pair: pair[0] == pair[1], pairs)))
        self.length = common if 2 * common >= len(ids) else 0
        self.ids = list(ids)
        return self.length

    def make_room(self, size: int) -> None:
        """Makes the memory of each sequence that of `size` tokens, if it is smaller."""
        if self.keys[0].shape[2] < size:  # so the keys come last: an interrupt leaves them small
            self.values = [
                F.pad(values, (0, 0, 0, size - values.shape[2])) for values in self.values
            ]
            self.keys = [F.pad(keys, (0, 0, 0, size - keys.shape[2])) for keys in self.keys]

    def positions(self, T: int) -> slice:
        """The positions of the next T tokens."""
        return slice(self.length, self.length + T)

    def extend(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Adds the k and v [b, K, T, D] of T new tokens to a layer, for the first b sequences.

        Returns all their keys and values in the layer, [b, K, length + T, D], and a mask
        [T, length + T] that says which of them each new token sees. The mask is None if a new token
        sees all, or if it sees all up to itself because the cache was empty.
        """
        start, end = self.length, self.length + k.shape[2]
        keys, values = self.keys[layer][: len(k)], self.values[layer][: len(k)]
        keys[:, :, start:end] = k
        values[:, :, start:end] = v
        mask = None
        if 0 < start < end - 1:
            mask = k.new_ones(end - start, end, dtype=torch.bool).tril(start)
        if layer == len(self.keys) - 1:  # the last layer: now all of them have the new tokens
            self.length = end
        return keys[:, :, :end], values[:, :, :end], mask

    def repeat(self) -> None:
        """Copies the first sequence, which is the prompt, to all others."""
        for memory in self.keys + self.values:
            memory[1:, :, : self.length] = memory[:1, :, : self.length]


class StaticCache(KVCache):
    """The same cache with its length as a tensor, for compiled code: a token takes the same
    operations on the same memory at every length.

    All of the memory is read, and a mask hides what is not filled.
    """

    def __init__(self, cache: KVCache):
        self.keys, self.values = cache.keys, cache.values
        self.length = torch.full((1,), cache.length, device=cache.keys[0].device)
        for memory in self.keys + self.values:  # then a CUDA graph does not copy it
            torch._dynamo.mark_static_address(memory)

    def positions(self, T: int) -> Tensor:
        return self.length

    def extend(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """k and v are those of one token, [B, K, 1, D]; returns [B, K, size, D] and [1, size]."""
        keys, values = self.keys[layer], self.values[layer]
        keys.index_copy_(2, self.length, k.to(keys.dtype))
        values.index_copy_(2, self.length, v.to(values.dtype))
        filled = torch.arange(keys.shape[2], device=k.device) <= self.length
        return keys, values, filled[None]


def empty_cache(model: Decoder, num_samples: int) -> KVCache:
    """A cache for `generate`, which gives it memory. Under the autocast in which it will be used:
    that decides about its dtype."""
    return KVCache(model.config, num_samples, 0, model.embed.weight.device, cache_dtype(model))


def cache_dtype(model: Decoder) -> torch.dtype:
    """The dtype of keys and values: that of autocast if it is active, else that of the weights.

    On a CPU it is the weights', float32: there PyTorch's attention of one token takes at most a
    third of the time that it takes in bfloat16.
    """
    weight = model.embed.weight
    kind = weight.device.type
    if torch.is_autocast_enabled(kind) and kind != "cpu":
        return torch.get_autocast_dtype(kind)
    return weight.dtype


# -- From logits to an id --------------------------------------------------------------------------


def penalise(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """logits [B, V] with those of the tokens that were `seen` [B, V] bool lowered, if penalty > 1.

    Keskar et al. 2019, arXiv 1909.05858, section 4.1. The paper divides every logit; here, as in
    all implementations, negative ones are multiplied.
    """
    if penalty == 1:
        return logits
    return torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)


def logits_to_probabilities(
    logits: Tensor, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0
) -> Tensor:
    """fp32 logits [B, V] -> the probabilities to draw from, [B, V].

    Each of these steps works on what the step before it left, made to sum to 1 again:
    1. temperature divides the logits. 0 is the limit: the likeliest token has probability 1.
    2. top_k keeps the k likeliest tokens; 0, or more than V, keeps all.
    3. top_p keeps the fewest tokens, the likeliest first, that reach p together.
       Holtzman et al. 2019, arXiv 1904.09751.
    4. min_p keeps the tokens that have at least min_p times the likeliest's probability.
       Nguyen et al. 2024, arXiv 2407.01082.
    """
    if temperature == 0:
        return F.one_hot(logits.argmax(-1), logits.shape[-1]).float()
    shifted = logits - logits.amax(-1, keepdim=True)  # at most 0, so that no temperature overflows
    probabilities = (shifted / max(temperature, 1e-6)).softmax(-1)
    if 0 < top_k < logits.shape[-1]:
        kept, where = probabilities.topk(top_k)
        probabilities = normalised(torch.zeros_like(probabilities).scatter(-1, where, kept))
    if top_p < 1:
        ordered, where = probabilities.sort(descending=True)
        # What all likelier tokens have together: exactly 0 for the first, so that it always stays.
        before = ordered.cumsum(-1) - ordered
        # A top_p below the smallest number of fp32 would be 0 there.
        kept = ordered.masked_fill((before >= top_p) & (before > 0), 0)
        probabilities = normalised(probabilities.scatter(-1, where, kept))
    if min_p > 0:
        least = min_p * probabilities.amax(-1, keepdim=True)
        probabilities = normalised(probabilities.masked_fill(probabilities < least, 0))
    return probabilities


def normalised(weights: Tensor) -> Tensor:
    return weights / weights.sum(-1, keepdim=True)


def draw_ids(probabilities: Tensor, uniform: Tensor) -> Tensor:
    """An id for each row of probabilities [B, V]: the first at which their running sum is above the
    row's number in uniform [B, 1], from [0, 1).

    torch.multinomial would draw a number for every entry, one after the other. That took a third of
    the time of a small model's step.
    """
    wide = torch.float32 if probabilities.is_mps else torch.float64  # which MPS does not have
    sums = probabilities.cumsum(-1, dtype=wide)
    below = sums[:, -1:] * (1 - 2**-23)  # however it is rounded, the last sum stays above
    return torch.searchsorted(sums, uniform * below, right=True).flatten()


if __name__ == "__main__":
    sys.exit(run_command(main, sys.argv[1:]))
