"""Continue a prompt with a trained model:  python sample.py out/small prompt="def main(" [key=value ...]
Or see how well it predicts a text:       python sample.py out/small eval=val

From the text to its tokens' ids and back; what is between is generate.py's.
"""

import codecs
import dataclasses
import math
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Literal

import torch

from config.schema import help_text, knobs_of, print_help, split_arguments, typed, user_errors
from data.tokenizer import Tokenizer
from device import autocast, choose_device, choose_dtype, keep_freed_memory, without_cudnn_attention
from evaluate import evaluate, open_known
from generate import generate, window_start
from model import Decoder, knob
from quantize import can_pack, pack_matrices, quantize_int8, round_matrices
from weights import load_model

USAGE = "python sample.py FOLDER [key=value ...]\n\nFOLDER is a run's or Hugging Face's. Every knob with its default:"
LARGEST_PROMPT = 1_000_000  # bytes of a file or of standard input; far above any context
FOR_EVAL = ("dataset", "eval_iters", "block_size", "micro_batch_size")
ARGUMENTS = ("max_new_tokens", "num_samples", "temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed",
             "compile")
# What a terminal would obey instead of show: C0 but newline and tab, DEL and C1, and the overrides of text direction.
UNSAFE = dict.fromkeys({*range(32), *range(127, 160), *range(0x202A, 0x202F), *range(0x2066, 0x206A)} - {9, 10})


def prompt_ids(tokenizer: Tokenizer, text: str) -> list[int]:
    """The ids that a text starts with: bos, as a document does in training, unless its tokenizer leaves it out and a
    text follows; then the text's own. ValueError if it cannot be encoded.

    An empty text without bos begins like a line: with a newline, or with the first token if that is not in the
    vocabulary.
    """
    text.encode()  # a command line that is not UTF-8 arrives as lone surrogates, which tokenizers treat differently
    bos = tokenizer.bos_id is not None and (tokenizer.bos_before_prompts or not text)
    ids = ([tokenizer.bos_id] if bos else []) + tokenizer.encode(text)
    if ids:
        return ids
    try:
        return tokenizer.encode("\n")
    except ValueError:
        return [0]


@dataclass(frozen=True, kw_only=True)
class SampleOptions:
    """What is sampled or evaluated, and how."""

    prompt: str = knob("", "text to continue; FILE:path = a file's, - = standard input's; their last newline does not "
                       "count")
    checkpoint: str = knob("latest", "latest, best or a step")
    max_new_tokens: int = knob(200, "tokens to generate")
    num_samples: int = knob(1, "texts to generate, all at once")
    temperature: float = knob(0.8, "divides the logits: below 1 safer, above 1 wilder, 0 = always the likeliest token")
    top_k: int = knob(0, "draw from the k likeliest tokens; 0 = from all")
    top_p: float = knob(1.0, "draw from the fewest tokens that reach this probability together; 1 = from all")
    min_p: float = knob(0.0, "draw from tokens of at least this share of the likeliest's probability; 0 = from all")
    repetition_penalty: float = knob(1.0, "above 1 makes tokens that were there already less likely")
    seed: int = knob(1337, "of the draws: the same seed gives the same text")
    device: str = knob("auto", "auto (CUDA, then MPS, then CPU), cpu, mps, cuda or cuda:N")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = knob(
        "auto", "of the matrix products. auto = bfloat16 where the hardware has it, else float32")
    quantize: Literal["none", "int8"] = knob("none", "int8 = matrices as whole numbers with a scale for each output")
    compile: bool = knob(False, "compile what a token takes: seconds at first, then long texts come faster")
    eval: Literal["none", "val", "train"] = knob("none", "instead of sampling, print the loss on this split of dataset")
    dataset: str = knob("", "eval: folder under data/, made by data/prepare.py; '' = what the run was trained on")
    eval_iters: int = knob(0, "eval: windows, evenly spread, always the same; 0 = the whole split")
    block_size: int = knob(0, "eval: tokens of a window; 0 = the model's context, but at most 2048")
    micro_batch_size: int = knob(0, "eval: windows at once; 0 = as fits. Not the loss but its last digits depend on it")
    interactive: bool = knob(False, "ask for prompts until the end of the input (Ctrl-D)")
    raw: bool = knob(False, "let control characters through to the terminal")

    def __post_init__(self):
        rules = {"max_new_tokens": (self.max_new_tokens >= 1, "1 or more"),
                 "num_samples": (1 <= self.num_samples <= 10_000, "between 1 and 10,000"),
                 "temperature": (0 <= self.temperature < math.inf, "0 (the likeliest token) or more"),
                 "top_k": (self.top_k >= 0, "0 (off) or more"),
                 "top_p": (0 < self.top_p <= 1, "in (0, 1]"),
                 "min_p": (0 <= self.min_p <= 1, "in [0, 1]"),
                 "repetition_penalty": (0.01 <= self.repetition_penalty <= 100, "above 0, from 0.01 to 100"),
                 "seed": (0 <= self.seed < 2**64, "0 or more, and below 2**64")}
        rules |= {name: (getattr(self, name) >= 0, "0 (automatic) or more") for name in FOR_EVAL[1:]}
        problems = [f"{name} must be {rule}, got {getattr(self, name)}"
                    for name, (kept, rule) in rules.items() if not kept]
        if self.interactive and self.prompt:
            problems.append("interactive=true asks for the prompts: leave prompt out")
        if self.eval != "none" and (self.interactive or self.compile or self.prompt):
            problems.append(f"eval={self.eval} samples nothing: leave prompt, interactive and compile out")
        if self.eval == "none" and (idle := [name for name in FOR_EVAL if getattr(self, name)]):
            problems.append(f"{' and '.join(idle)} only count with eval=val or eval=train")
        if self.quantize == "int8" and self.dtype == "float16":
            problems.append("quantize=int8 would overflow in float16: use dtype=bfloat16 or float32")
        if problems:
            raise ValueError("; ".join(problems))

    @property
    def arithmetic(self) -> str:
        """What the speed and the last digits depend on."""
        return f"({self.device}, {self.dtype}{'' if self.quantize == 'none' else f', {self.quantize}'})"


def main(argv: list[str]) -> int:
    """Returns the exit code: 0 done, 2 the user's error, 3 NaN or Inf, 130 after Ctrl-C."""
    try:
        run(argv)
        sys.stdout.flush()
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return 130
    except BrokenPipeError:  # whoever read us has had enough; without this, Python would complain at its exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except FloatingPointError as error:
        print(f"error: {error}", file=sys.stderr)
        return 3
    return 0


def run(argv: list[str]) -> None:
    if {"-h", "--help"} & set(argv):
        print_help(help_text(USAGE, SampleOptions))
        return
    with user_errors():
        folder, options = parse(argv)
        text = prompt_text(options.prompt) if options.eval == "none" and not options.interactive else ""
        model, tokenizer, known = load_model(folder, options.checkpoint, options.device)
        ids = prompt_ids(tokenizer, text)
        for_inference(model, options)
        if options.eval != "none":
            data = open_known(options.dataset, known, folder)
            found = evaluate(model, data, options.eval, options.device, options.dtype, windows=options.eval_iters,
                             block_size=options.block_size, batch=options.micro_batch_size)
            print(found, options.arithmetic)
            return
    sys.stdout.reconfigure(errors="replace")  # where the output cannot hold a character, a ? is better than an end
    if options.interactive:
        converse(model, tokenizer, options)
    else:
        respond(model, tokenizer, ids, options, echo=text)


def parse(argv: list[str]) -> tuple[Path, SampleOptions]:
    """The folder and the options, with device and dtype resolved."""
    places, pairs = split_arguments(argv)
    if len(places) != 1:
        raise ValueError(f"name one folder of a run, got {' '.join(places) or 'none'}: "
                         f"python sample.py out/small prompt='...'")
    options = SampleOptions(**typed(pairs, knobs_of(SampleOptions), "command line"))
    device = choose_device(options.device)
    return Path(places[0]), dataclasses.replace(options, device=device, dtype=choose_dtype(options.dtype, device))


def prompt_text(prompt: str) -> str:
    """The text that prompt=... stands for."""
    if prompt == "-":
        if sys.stdin is None:
            raise ValueError("prompt=-, but there is no standard input")
        return read_text(sys.stdin.buffer, "standard input")
    if prompt.startswith("FILE:"):
        path = Path(prompt.removeprefix("FILE:"))
        if path.exists() and not path.is_file():  # a FIFO would wait for ever
            raise ValueError(f"{path} is not a regular file: a pipe can come in by prompt=-")
        with open(path, "rb") as file:
            return read_text(file, file.name)
    return prompt


def read_text(file: BinaryIO, name: str) -> str:
    """A prompt's text without its last newline, which echo and editors put there. ValueError if long or not UTF-8."""
    content = file.read(LARGEST_PROMPT + 1)
    if len(content) > LARGEST_PROMPT:
        raise ValueError(f"{name} is longer than {LARGEST_PROMPT:,} bytes: give its end, a model sees no more of it")
    try:
        return content.decode().removesuffix("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{name} is not UTF-8 text (at byte {error.start})") from error


def for_inference(model: Decoder, options: SampleOptions) -> None:
    """Stores the matrices as they are used, so that each token reads less. Only int8 changes more than last digits."""
    dtype = getattr(torch, options.dtype)
    without_cudnn_attention(options.device)
    if options.quantize == "int8":
        quantize_int8(model)
    elif options.device == "cpu" and can_pack(dtype) and not options.compile:  # a compiler cannot look into these
        pack_matrices(model, dtype)
    elif dtype != torch.float32:
        round_matrices(model, dtype)
    if options.device == "cpu":
        keep_freed_memory()


def converse(model: Decoder, tokenizer: Tokenizer, options: SampleOptions) -> None:
    """Asks for prompts and continues them until the input ends."""
    while True:
        try:
            ids = prompt_ids(tokenizer, input("prompt> " if sys.stdin.isatty() else ""))
        except EOFError:
            return
        except ValueError as error:  # characters that the vocabulary lacks, or bytes that are not UTF-8
            print(f"error: {error}", file=sys.stderr)
            continue
        respond(model, tokenizer, ids, options)


def respond(model: Decoder, tokenizer: Tokenizer, ids: list[int], options: SampleOptions, echo: str = "") -> None:
    """Prints `echo` and the continuation of ids as it comes; further samples follow whole, and the speed on stderr.

    A sample is over where the model ends its text, and all of it when every sample is.
    """
    block_size = model.config.block_size
    left_out = window_start(len(ids), block_size)
    if left_out:
        print(f"warning: the prompt has {len(ids):,} tokens, the model sees at most {block_size:,} at once: the first "
              f"{left_out:,} are left out", file=sys.stderr)
    decoder = codecs.getincrementaldecoder("utf-8")("replace")  # holds back the bytes of an unfinished character
    texts: list[list[int]] = [[] for _ in range(options.num_samples)]
    going, count = set(range(options.num_samples)), 0
    arguments = {name: getattr(options, name) for name in ARGUMENTS}
    show(echo, options.raw)
    start = time.perf_counter()
    with autocast(options.device, options.dtype):
        for new in generate(model, ids, vocab_size=tokenizer.vocab_size, **arguments):
            count += len(going)
            going = {i for i in going if new[i] not in tokenizer.end_ids}
            for i in going:
                texts[i].append(new[i])
            if 0 in going:
                show(decoder.decode(tokenizer.decode_bytes(new[:1])), options.raw)
            if not going:
                break
    seconds = time.perf_counter() - start
    show(decoder.decode(b"", final=True) + "\n", options.raw)
    for text in texts[1:]:
        show(f"---\n{echo}{tokenizer.decode_bytes(text).decode(errors='replace')}\n", options.raw)
    print(f"{count:,} tokens in {seconds:.2f} s: {count / seconds:,.0f} tokens/s {options.arithmetic}",
          file=sys.stderr)


def show(text: str, raw: bool) -> None:
    """Writes at once; a terminal gets no control characters unless they are wanted `raw`."""
    sys.stdout.write(text.translate(UNSAFE) if sys.stdout.isatty() and not raw else text)
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
