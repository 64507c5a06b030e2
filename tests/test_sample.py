"""sample.py: what is printed is what was generated, and every wrong input is one line."""

import contextlib
import dataclasses
import gzip
import io
import itertools
import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import sentencepiece
import torch
from test_generate import tiny

import sample
from config.command import printable
from config.schema import Config
from model import Decoder, ModelConfig
from sample import SampleOptions, generate, prepare_for_inference, prompt_ids
from text.prompt import read_prompt
from text.tokenizer import (
    ByteTokenizer,
    CharTokenizer,
    SentencePieceTokenizer,
    tokenizer_sha256,
)
from weights import checkpoint
from weights.open import load_model

ROOT = Path(__file__).parent.parent
CHARS = "\nabcdefgh"
END = 256  # of ByteTokenizer: its bos, which also begins a text


def save_run(folder: Path, tokenizer, model: Decoder | None = None, step: int = 10) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(folder)
    model = model or tiny(vocab_size=tokenizer.vocab_size, block_size=16)
    state = {
        "step": step,
        "model": dict(model.state_dict()),
        "optimizer": {},
        "scaler": {},
        "config": Config(model=model.config, out_dir=str(folder)).flat(),
        "data": {"tokenizer_sha256": tokenizer_sha256(folder)},
        "base": {},
        "best_val_loss": 1.0,
        "grad_norms": [],
    }
    checkpoint.save(checkpoint.path_of(folder, step), state)
    return folder


def save_table(folder: Path, successors: dict[int, list[int]]) -> Path:
    """The run of a model over bytes that draws each next one from `successors` of the last one,
    which are equally likely.
    """
    shape = dict(n_layer=1, n_head=1, n_embd=258, n_hidden=8, block_size=64, vocab_size=257)
    model = Decoder(ModelConfig(**shape))
    with torch.no_grad():
        for weight in (model.head.weight, model.blocks[0].attn.out.weight):
            weight.zero_()
        model.blocks[0].ffn.down.weight.zero_()  # so each token keeps its row of the embedding
        model.embed.weight.copy_(torch.eye(257, 258))
        for last, following in successors.items():
            model.head.weight[following, last] = 100.0
    return save_run(folder, ByteTokenizer(), model)


def save_text(folder: Path, text: bytes, prompt: bytes = b"") -> Path:
    """The run of a model that continues the prompt with this text, and then ends it. In the two
    together, no byte may be followed by different ones.
    """
    chain = [*(prompt[-1:] or [END]), *text, END]
    return save_table(folder, {a: [b] for a, b in zip(chain, chain[1:], strict=False)})


@pytest.fixture
def run(tmp_path) -> Path:
    return save_run(tmp_path / "run", CharTokenizer(CHARS))


def sampled(capsys, *argv) -> tuple[str, str]:
    assert sample.main([str(word) for word in argv]) == 0
    return capsys.readouterr()


def refused(capsys, *argv) -> str:
    """The one line of an error that is the user's."""
    with pytest.raises(SystemExit) as exit:
        sample.main([str(word) for word in argv])
    out, err = capsys.readouterr()
    assert exit.value.code == 2 and out == ""
    assert err.startswith("error: ") and err.count("\n") == 1, err
    return err


def give_input(monkeypatch, content: bytes | None) -> None:
    """What standard input holds; None: there is none. (Nothing else replaces it in one process.)"""
    stream = content if content is None else io.TextIOWrapper(io.BytesIO(content), encoding="utf-8")
    monkeypatch.setattr(sys, "stdin", stream)


# Prompts


def test_a_prompt_starts_with_bos_or_else_like_a_line():
    assert prompt_ids(ByteTokenizer(), "hi") == [256, 104, 105]
    assert prompt_ids(ByteTokenizer(), "") == [256]
    assert prompt_ids(CharTokenizer("b\na"), "") == [0]
    assert prompt_ids(CharTokenizer("\t\nab"), "") == [1]
    assert prompt_ids(CharTokenizer("xyz"), "") == [0]
    assert prompt_ids(CharTokenizer("xyz"), "zy") == [2, 1]
    with pytest.raises(ValueError, match="not text in UTF-8 after 'hi'"):
        prompt_ids(ByteTokenizer(), "hi\udcff")


def test_a_prompt_of_which_the_tokenizer_loses_a_part_draws_a_warning(capsys):
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["a bad cab"]),
        model_writer=model,
        model_type="char",
        vocab_size=8,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    tokenizer = SentencePieceTokenizer(model.getvalue())
    prompt_ids(tokenizer, "a cab")
    prompt_ids(tokenizer, "")
    assert capsys.readouterr().err == ""
    prompt_ids(tokenizer, "a 7 cab")
    words = "the tokenizer loses some of the prompt, the model sees 'a cab'"
    assert capsys.readouterr().err == f"warning: {words}\n"


def test_an_empty_prompt_starts_from_bos_and_standard_input_is_not_read(
    tmp_path, capsys, monkeypatch
):
    run = save_text(tmp_path / "run", b"A")
    give_input(monkeypatch, b"not asked for")
    assert sampled(capsys, run, "prompt=")[0] == sampled(capsys, run)[0] == "A\n"
    assert sys.stdin.read() == "not asked for"


def test_the_prompt_comes_from_a_file_or_from_standard_input_without_its_last_newline(
    tmp_path, capsys, monkeypatch
):
    run, path = save_text(tmp_path / "run", b"h", prompt=b"\n"), tmp_path / "prompt.txt"
    path.write_bytes(b"ab\n\n")
    assert sampled(capsys, run, f"prompt=FILE:{path}")[0] == "ab\nh\n"
    monkeypatch.setenv("HOME", str(tmp_path))
    assert sampled(capsys, run, "prompt=FILE:~/prompt.txt")[0] == "ab\nh\n"
    give_input(monkeypatch, b"cd\n\n")
    assert sampled(capsys, run, "prompt=-")[0] == "cd\nh\n"
    give_input(monkeypatch, b"")
    assert "nothing came from standard input" in refused(capsys, run, "prompt=-")


@pytest.mark.parametrize(
    "content, text",
    [
        (b"the dog\r\n", "the dog"),
        (b"one\r\ntwo\r\n", "one\r\ntwo"),
        (b"one\r\n\r\n", "one\r\n"),
        (b"one\r", "one\r"),
        (b"one", "one"),
        (b"\xef\xbb\xbfa\n", "a"),
    ],
)
def test_the_last_end_of_line_of_a_prompt_goes_as_a_whole(content, text):
    assert read_prompt(io.BytesIO(content), "p.txt") == text


@pytest.mark.parametrize(
    "content, words",
    [
        (b"caf\xe9", "p.txt: byte 3 is not UTF-8 .0xE9, which is 'é' in Windows-1252"),
        ("the dog\n".encode("utf-16-le"), "p.txt is probably text in UTF-16LE, .*: iconv -f UTF"),
        (gzip.compress(b"the dog"), "p.txt is gzip, not text in UTF-8: unpack it first"),
        (b"the\0dog", "p.txt is binary .it has NUL bytes"),
    ],
    ids=["Latin-1", "UTF-16", "gzip", "NUL"],
)
def test_a_prompt_that_is_no_text_is_refused_in_the_words_for_data(content, words):
    with pytest.raises(ValueError, match=words):
        read_prompt(io.BytesIO(content), "p.txt")


def test_prompts_that_cannot_be_read_are_refused(run, capsys, monkeypatch):
    path = run / "prompt.txt"
    assert "No such file" in refused(capsys, run, f"prompt=FILE:{path}")
    path.write_bytes(b"ab\xff")
    assert "byte 2 is not UTF-8" in refused(capsys, run, f"prompt=FILE:{path}")
    path.write_bytes(b"a" * 1_000_001)
    assert "longer than 1,000,000 bytes" in refused(capsys, run, f"prompt=FILE:{path}")
    os.mkfifo(run / "fifo")
    assert "is not a regular file: use prompt=-" in refused(capsys, run, f"prompt=FILE:{run}/fifo")
    assert "prompt=FILE: names no file" in refused(capsys, run, "prompt=FILE:")
    assert f"{run} is a folder: " in refused(capsys, run, f"prompt=FILE:{run}")
    give_input(monkeypatch, b"\xff")
    assert "standard input: byte 0 is not UTF-8" in refused(capsys, run, "prompt=-")
    assert "'xz'" in refused(capsys, run, "prompt=azax")
    assert "the prompt is not text in UTF-8" in refused(capsys, run, "prompt=\udcff")


def test_a_prompt_longer_than_the_context_keeps_its_end_and_warns(run, capsys):
    out, err = sampled(capsys, run, "prompt=" + "abcdefgh" * 5, "max_new_tokens=5")
    assert out.startswith("abcdefgh" * 5)
    assert err.startswith(
        "warning: the prompt has 40 tokens, the model sees at most 16 at once: "
        "the first 24 are left out\n"
    )


def test_interactive_asks_until_the_input_ends_and_survives_bad_prompts(run, capsys, monkeypatch):
    short = "max_new_tokens=20"
    texts = [sampled(capsys, run, f"prompt={p}", short)[0] for p in ("ab", "", "cd")]
    texts = [text.removeprefix(p) for text, p in zip(texts, ("ab", "", "cd"), strict=True)]
    give_input(monkeypatch, b"ab\nxyz\n\na\xff\ncd\n")
    out, err = sampled(capsys, run, "interactive=true", short)
    assert out == "".join(texts)
    assert "error: the prompt is not text in UTF-8 after 'a'" in err
    assert "error: characters 'xyz' are not among" in err and err.count("tokens/s") == 3


# What is printed


def test_the_command_prints_prompt_and_continuation_and_the_speed_on_stderr(run, capsys):
    out, err = sampled(capsys, run, "prompt=abc", "max_new_tokens=30", "seed=1", "top_k=99")
    assert out.startswith("abc") and len(out) == 3 + 30 + 1 and set(out) <= set(CHARS)
    assert err.startswith("30 tokens in ") and "tokens/s (cpu, " in err and err.count("\n") == 1
    assert sampled(capsys, run, "prompt=abc", "max_new_tokens=30", "seed=1")[0] == out
    assert sampled(capsys, run, "prompt=abc", "max_new_tokens=30", "seed=2")[0] != out


def test_every_option_that_generate_has_reaches_it_and_what_it_yields_is_printed(
    run, capsys, no_code
):
    sample.compiled_next_ids.cache_clear()
    values = {
        "max_new_tokens": 40,
        "num_samples": 2,
        "temperature": 2.0,
        "top_k": 6,
        "top_p": 0.8,
        "min_p": 0.4,
        "repetition_penalty": 1.5,
        "seed": 8,
    }
    words = [f"{name}={value}" for name, value in values.items()]
    out, _ = sampled(capsys, run, "prompt=ab", "dtype=float32", "compile=true", *words)
    assert sample.compiled_next_ids.cache_info().currsize == 1  # it was compiled
    model, tokenizer, _ = load_model(run)

    def printed(options):
        rows = zip(*generate(model, [1, 2], **{"max_new_tokens": 200} | options), strict=True)
        return "---\n".join(f"ab{tokenizer.decode(row)}\n" for row in rows)

    assert out == printed(values)
    for name in values:  # each of them matters here
        assert out != printed({k: v for k, v in values.items() if k != name}), name


def test_each_sample_ends_by_itself_and_only_what_is_shown_is_counted(tmp_path, capsys):
    following = [*b"abc", END]
    run = save_table(tmp_path / "run", {token: following for token in following})
    out, err = sampled(capsys, run, "prompt=a", "num_samples=5", "temperature=1", "seed=3")
    drawn = generate(load_model(run)[0], [END, 97], 200, num_samples=5, seed=3)
    rows = [list(row) for row in zip(*drawn, strict=True)]
    texts = [bytes(row[: row.index(END)]).decode() for row in rows]
    assert out == "---\n".join(f"a{text}\n" for text in texts) and len(set(map(len, texts))) > 2
    assert err.startswith(f"{sum(len(text) + 1 for text in texts)} tokens in ")


@pytest.mark.parametrize("text, shown", [(b"A\xc3", "A\ufffd"), (b"", "")])
def test_a_text_ends_where_the_model_ends_it(text, shown, tmp_path, capsys):
    out, err = sampled(capsys, save_text(tmp_path / "run", text), "prompt=")
    assert out == f"{shown}\n" and err.startswith(f"{len(text) + 1} tokens in ")


@pytest.mark.parametrize("stop", ["a", "ab", "aab", "abab", "ba\n", ""])
def test_a_continuation_ends_before_its_stop_however_it_comes_in_pieces(stop):
    for letters in itertools.product("ab\n", repeat=6):
        text = "".join(letters)
        wanted = text.partition(stop)[0] if stop else text
        for size in (1, 2, 5):
            growing = sample.Continuation(stop)
            pieces = [text[i : i + size].encode() for i in range(0, len(text), size)]
            printed = []
            for piece in pieces:
                printed.append(growing.add(piece))
                assert growing.stopped or stop.startswith(growing.waiting)  # nothing else waits
            printed.append(growing.add(b"", last=True))
            assert "".join(printed) == growing.shown == wanted, (text, size)
            assert growing.stopped == bool(stop and stop in text)


def test_a_stop_of_several_tokens_is_not_printed_and_ends_the_work(tmp_path, capsys, monkeypatch):
    run = save_text(tmp_path / "run", "abé\ncde".encode(), prompt=b">")
    assert written(run, "prompt=>", "stop=bx") == [">", "a", "bé", "\n", "c", "d", "e", "\n"]
    capsys.readouterr()
    assert written(run, "prompt=>", "stop=é\nc") == [">", "a", "b", "\n"]
    assert capsys.readouterr().err.startswith("6 tokens in ")  # é has two
    give_input(monkeypatch, b">\n>\n")
    assert sampled(capsys, run, "interactive=true", "stop=\n")[0] == "abé\nabé\n"
    assert sampled(capsys, run, "prompt=>", "stop=>")[0] == ">abé\ncde\n"  # the prompt stays


def test_each_sample_ends_at_its_own_stop(tmp_path, capsys):
    following = [*b"abc", END]
    run = save_table(tmp_path / "run", {token: following for token in following})
    words = ("prompt=a", "num_samples=6", "temperature=1", "seed=3")
    whole = sampled(capsys, run, *words)[0].split("---\n")
    out, err = sampled(capsys, run, *words, "stop=bc")
    ends = [text.find("bc") for text in whole]
    assert max(ends) > 0 and min(ends) == -1  # some of them stop there, others do not
    texts = [text[:end] + "\n" if end >= 0 else text for text, end in zip(whole, ends, strict=True)]
    assert out == "---\n".join(texts)
    # A text is the prompt, its tokens and a newline; then came "bc", or the model's own end.
    tokens = [len(text) - 2 + (2 if end >= 0 else 1) for text, end in zip(texts, ends, strict=True)]
    assert err.startswith(f"{sum(tokens)} tokens in ")


@pytest.mark.parametrize("name", ["prompt", "stop"])
def test_a_backslash_and_an_n_are_told(run, capsys, name):
    with contextlib.suppress(SystemExit):  # CHARS has no backslash
        sample.main([str(run), f"{name}=a\\nb", "max_new_tokens=1"])
    said = f"warning: {name} has the two signs \\ and n; a new line is written {name}=$'...\\n'"
    assert said in capsys.readouterr().err


class Written(list):
    """A standard output that notes what arrives with each flush, up to `most` times: then somebody
    presses Ctrl-C.
    """

    def __init__(self, terminal: bool, most: int = 1000):
        super().__init__()
        self.pending, self.most, self.isatty = "", most, lambda: terminal

    def write(self, text: str):
        self.pending += text

    def flush(self):
        if len(self) == self.most:
            raise KeyboardInterrupt
        self += [self.pending] if self.pending else []
        self.pending = ""

    def reconfigure(self, **options):
        pass


def written(run: Path, *argv: str, terminal: bool = True) -> list[str]:
    with contextlib.redirect_stdout(Written(terminal)) as out:
        assert sample.main([str(run), *argv]) == 0
    return list(out)


def test_characters_of_several_tokens_are_written_whole_and_at_once(tmp_path):
    whole = save_text(tmp_path / "whole", "aé😀z".encode(), prompt=b">")
    assert written(whole, "prompt=>") == [">", "a", "é", "😀", "z", "\n"]
    broken = save_text(tmp_path / "broken", b"a\xe9b\xf0\x9f")
    assert written(broken, "prompt=") == ["a", "\ufffdb", "\ufffd\n"]


def test_a_terminal_gets_no_control_characters_unless_raw(tmp_path):
    text, prompt = "\x1b]0;x\x07\r\n\t\x7f\u009b\u202eé", "\x1b[2J\u2066"
    run = save_text(tmp_path / "run", text.encode(), prompt.encode())
    words = (run, f"prompt={prompt}")
    assert "".join(written(*words)) == "[2J]0;x\n\té\n"
    assert "".join(written(*words, "raw=true")) == f"{prompt}{text}\n"
    assert "".join(written(*words, terminal=False)) == f"{prompt}{text}\n"


def test_a_terminal_gets_nothing_that_it_does_not_show_but_what_joins_letters():
    hidden = "\u200b\u200e\u200f\u061c\ufeff\u2028\u2066\u00ad\U000e0041"
    assert printable(f"a{hidden}b\u200cc\u200dd\u06dd\t\n") == "ab\u200cc\u200dd\u06dd\t\n"


def test_a_checkpoint_of_another_run_in_the_folder_is_refused(tmp_path, run, capsys):
    config = Config(model=load_model(run)[0].config, out_dir=str(run)).flat()
    (run / "config.json").write_text(json.dumps(config | {"data": {}}))
    sampled(capsys, run, "prompt=a", "max_new_tokens=1")
    (run / "config.json").write_text(json.dumps(config | {"norm_pos": "post", "seed": 7}))
    for which in ("latest", "10"):
        error = refused(capsys, run, "prompt=a", f"checkpoint={which}")
        assert "ckpt_00000010.pt is not of the run that" in error
        assert "norm_pos: checkpoint=pre, now=post" in error and "seed: checkpoint=1337" in error


@pytest.mark.parametrize("knob", ["norm", "mynob"])
def test_a_checkpoint_with_a_knob_of_other_code_is_told_once(tmp_path, run, capsys, knob):
    """It is sound, so no older one takes its place."""
    for step in (11, 12):
        save_run(run, CharTokenizer(CHARS), step=step)
        state = torch.load(checkpoint.path_of(run, step), weights_only=True)
        torch.save(
            state | {"config": state["config"] | {knob: "mynorm"}}, checkpoint.path_of(run, step)
        )
    error = refused(capsys, run, "prompt=a")
    assert error.count("mynorm" if knob == "norm" else "mynob") == 1
    assert "ckpt_00000012.pt: " in error and "the version of the program that wrote it" in error


def test_ctrl_c_ends_with_130_and_no_traceback(run, capsys):
    with contextlib.redirect_stdout(Written(True, most=2)) as out:
        assert sample.main([str(run), "prompt=a"]) == 130
    assert len(out) == 2 and out[0] == "a" and capsys.readouterr() == ("", "\n")


@pytest.mark.skipif(sys.platform == "win32", reason="no SIGPIPE")
def test_a_reader_that_stops_early_ends_the_command_quietly(run):
    program, words = str(ROOT / "sample.py"), ["prompt=a", "max_new_tokens=100000", "compile=false"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(
        [sys.executable, program, str(run), *words], cwd=ROOT, **pipes
    ) as process:
        process.stdout.read(10)
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait(20) == 0


# The model


def test_the_named_checkpoint_is_sampled(tmp_path, capsys):
    model = tiny(vocab_size=len(CHARS))
    run = save_run(tmp_path / "run", CharTokenizer(CHARS), model, step=10)
    words = ("prompt=a", "max_new_tokens=50")
    early, _ = sampled(capsys, run, *words)
    model.head.weight.data.neg_()
    save_run(run, CharTokenizer(CHARS), model, step=20)
    assert sampled(capsys, run, *words)[0] != early
    assert sampled(capsys, run, *words, "checkpoint=10")[0] == early
    checkpoint.path_of(run, 10).rename(run / "best.pt")
    assert sampled(capsys, run, *words, "checkpoint=best")[0] == early
    assert "steps in" in refused(capsys, run, "prompt=a", "checkpoint=30")
    assert "latest, best or a step" in refused(capsys, run, "prompt=a", "checkpoint=newest")


def test_a_tokenizer_of_another_data_set_is_refused(run, tmp_path, capsys):
    CharTokenizer("\nabcdefgx").save(run)
    assert "not the one this model was trained with" in refused(capsys, run, "prompt=a")
    small = save_run(tmp_path / "small", CharTokenizer(CHARS), tiny(vocab_size=5))
    assert "has 9 tokens, the model knows only 5" in refused(capsys, small, "prompt=a")


def test_a_padded_vocabulary_is_sampled_without_its_padding(tmp_path, capsys):
    run = save_run(tmp_path / "run", CharTokenizer(CHARS), tiny(vocab_size=64))
    out, _ = sampled(capsys, run, "prompt=a", "temperature=20", "num_samples=8")
    assert set(out) <= set(CHARS + "-")


def test_what_is_sampled_in_bfloat16_is_the_saved_model_under_autocast_to_the_bit(run):
    saved, prepared = load_model(run)[0], load_model(run)[0]
    prepare_for_inference(prepared, SampleOptions(device="cpu", dtype="bfloat16"))
    assert prepared.blocks[0].attn.q.weight.dtype == torch.bfloat16
    ids = torch.arange(9)[None]
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(prepared(ids), saved(ids))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_quantized_model_samples_and_says_so(run, capsys, dtype):
    words = ("prompt=ab", "max_new_tokens=40", "quantize=int8", f"dtype={dtype}")
    out, err = sampled(capsys, run, *words)
    assert err.endswith(f"tokens/s (cpu, {dtype}, int8)\n") and len(out) == 43


def test_logits_that_are_not_finite_end_the_command_with_one_line(tmp_path, capsys):
    model = tiny(vocab_size=len(CHARS))
    model.head.weight.data.fill_(3e38)  # finite, as saved weights always are
    run = save_run(tmp_path / "run", CharTokenizer(CHARS), model)
    assert sample.main([str(run), "prompt=a"]) == 3
    out, err = capsys.readouterr()
    assert err.startswith("error: the model's logits hold NaN or Inf") and err.count("\n") == 1


# The options


def test_help_lists_every_option_with_its_meaning(capsys):
    out, _ = sampled(capsys, "--help")
    assert all(f"  {field.name}=" in out for field in dataclasses.fields(SampleOptions))


@pytest.mark.parametrize(
    "words, said",
    [
        (["temprature=1"], "did you mean temperature?"),
        (["--start=a"], "did you mean prompt?"),
        (["--out_dir=out"], "write the folder as a word of its own, without out_dir="),
        (["--init_from=gpt2-xl"], "write the folder as a word of its own, without init_from="),
        (["seed=9223372036854775808"], "seed must be a whole number below 2**63"),
        (["top_k=1.5"], "top_k must be a whole number"),
        (["temperature=nan"], "temperature must be finite"),
        (["prompt=a", "interactive=true"], "prompt=a has no effect without interactive=false"),
        (["eval=val", "prompt=a"], "prompt=a has no effect without eval=none"),
        (["eval=val", "interactive=true"], "interactive=True has no effect without eval=none"),
        (["eval=val", "temperature=0.5"], "temperature=0.5 has no effect without eval=none"),
        (["dataset=x", "eval_iters=3"], "eval_iters=3 has no effect without eval=val or eval=tr"),
        (["temperature=0", "top_k=9"], "top_k=9 has no effect without a temperature above 0"),
        (["temperature=0", "num_samples=2"], "num_samples=2 has no effect without a temperature"),
        (["top_k=1", "seed=3"], "seed=3 has no effect without a temperature above 0 and a top_k"),
        (["eval=val", "stop=a"], "stop=a has no effect without eval=none"),
        (["stop=\udcff"], "stop must be text in UTF-8"),
        (["eval=val", "special=true"], "special=True has no effect without eval=none"),
        (["quantize=int8", "dtype=float16"], "would overflow in float16"),
        (["device=cuda:99"], "device=cuda:99 is not on this machine"),
    ],
)
def test_wrong_arguments_are_refused_in_one_line(words, said, run, capsys):
    assert said in refused(capsys, run, *words)


def test_a_folder_that_is_not_one_is_refused_in_one_line(tmp_path, capsys):
    assert "one folder of a run, got none" in refused(capsys)
    assert "one folder of a run, got a b" in refused(capsys, "a", "b")
    assert "does not exist: name a folder of a run" in refused(capsys, tmp_path / "nothing")
    assert "gpt2-xl is GPT-2, which is no Llama" in refused(capsys, "gpt2-xl")


@pytest.mark.parametrize(
    "name, bad",
    [
        *(("temperature", bad) for bad in (-0.1, float("nan"), float("inf"))),
        *(("repetition_penalty", bad) for bad in (0.0, float("nan"))),
        *(("top_p", bad) for bad in (0.0, 1.1)),
        *(("min_p", bad) for bad in (-0.1, 1.1)),
        *(("num_samples", bad) for bad in (0, 10**9)),
        *(("seed", bad) for bad in (-1, 2**63)),
        ("max_new_tokens", 0),
        *((name, -1) for name in ("top_k", "eval_iters", "block_size", "micro_batch_size")),
    ],
)
def test_values_that_mean_nothing_are_refused(name, bad):
    with pytest.raises(ValueError, match=f"^{name} must be .*, got {bad}$"):
        SampleOptions(**{name: bad}, eval="val")


def test_all_problems_are_listed_at_once():
    with pytest.raises(ValueError, match="temperature.*; top_k.*; top_p"):
        SampleOptions(temperature=-1.0, top_k=-1, top_p=2.0)


@pytest.mark.parametrize(
    "words, wanted",
    [
        ("device=cpu max_new_tokens=8000", True),
        ("device=cpu max_new_tokens=7999", False),
        ("device=cpu max_new_tokens=8000 num_samples=2", False),
        ("device=cpu compile=true", True),
        ("device=cpu max_new_tokens=8000 compile=false", False),
        ("device=cuda:1 max_new_tokens=12000", True),
        ("device=cuda:1 max_new_tokens=12000 num_samples=8", True),
        ("device=cuda:1 max_new_tokens=11999", False),
        ("device=mps max_new_tokens=99999", False),
    ],
)
def test_a_long_text_is_compiled(words, wanted, monkeypatch):
    for name in ("choose_device", "choose_dtype"):  # which ask this machine what it has
        monkeypatch.setattr(sample, name, lambda wanted, *_: wanted)
    _, options = sample.parse_arguments(["out/x", *words.split()])
    assert options.compile is wanted


def test_without_a_compiler_the_text_comes_all_the_same(run, capsys, monkeypatch):
    def broken(*_, **__):
        raise RuntimeError("no compiler here")

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=broken))
    sample.compiled_next_ids.cache_clear()
    torch._dynamo.reset()
    words = ["prompt=ab", "dtype=float32", "max_new_tokens=9"]
    out, err = sampled(capsys, run, *words, "compile=true")
    sample.compiled_next_ids.cache_clear()
    assert "torch.compile does not work here, going on without: " in err
    assert "no compiler here" in err and out == sampled(capsys, run, *words)[0]
