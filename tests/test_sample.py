"""sample.py: what is printed is what was generated, and every wrong input is one line."""

import dataclasses
import io
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_generate import tiny

import checkpoint
import sample
from config.schema import Config
from data.tokenizer import ByteTokenizer, CharTokenizer, tokenizer_sha256
from generate import generate
from model import Decoder
from sample import SampleOptions, prompt_ids
from weights import load_model

ROOT = Path(__file__).parent.parent
CHARS = "\nabcdefgh"


def test_a_prompt_starts_with_bos_or_else_like_a_line():
    assert prompt_ids(ByteTokenizer(), "hi") == [256, 104, 105]
    assert prompt_ids(ByteTokenizer(), "") == [256]
    assert prompt_ids(CharTokenizer("b\na"), "") == [0]
    assert prompt_ids(CharTokenizer("\t\nab"), "") == [1]
    assert prompt_ids(CharTokenizer("xyz"), "") == [0]
    assert prompt_ids(CharTokenizer("xyz"), "zy") == [2, 1]
    with pytest.raises(ValueError, match="surrogates"):
        prompt_ids(ByteTokenizer(), "\udcff")


def save_run(folder: Path, tokenizer, model: Decoder | None = None, step: int = 10) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(folder)
    model = model or tiny(vocab_size=tokenizer.vocab_size, block_size=16)
    config = Config(model=model.config, out_dir=str(folder))
    state = {"step": step, "model": dict(model.state_dict()), "optimizer": {}, "scaler": {}, "config": config.flat(),
             "data": {"tokenizer_sha256": tokenizer_sha256(folder)}, "base": {}, "best_val_loss": 1.0,
             "grad_norms": []}
    checkpoint.save(checkpoint.path_of(folder, step), state)
    return folder


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


def give_input(monkeypatch, content: bytes) -> None:
    stream = io.TextIOWrapper(io.BytesIO(content), encoding="utf-8")
    monkeypatch.setattr(sys, "stdin", stream)


def script(monkeypatch, *steps: list[int]) -> None:
    """Lets generate yield these ids instead of a model's."""
    monkeypatch.setattr(sample, "generate", lambda *arguments, **options: iter(steps))


def test_the_command_prints_prompt_and_continuation_and_the_speed_on_stderr(run, capsys):
    out, err = sampled(capsys, run, "prompt=abc", "max_new_tokens=30", "seed=1", "top_k=99")
    assert out.startswith("abc") and len(out) == 3 + 30 + 1 and set(out) <= set(CHARS)
    assert err.startswith("30 tokens in ") and "tokens/s (cpu, " in err and err.count("\n") == 1
    assert sampled(capsys, run, "prompt=abc", "max_new_tokens=30", "seed=1")[0] == out
    assert sampled(capsys, run, "prompt=abc", "max_new_tokens=30", "seed=2")[0] != out


def test_the_command_prints_what_generate_yields(run, capsys):
    model, tokenizer, _ = load_model(run)
    ids = [tokens[0] for tokens in generate(model, tokenizer.encode("ab"), 40, temperature=0.7, top_p=0.9, seed=6)]
    out, _ = sampled(capsys, run, "prompt=ab", "max_new_tokens=40", "temperature=0.7", "top_p=0.9", "seed=6",
                     "dtype=float32")
    assert out == "ab" + tokenizer.decode(ids) + "\n"


def test_further_samples_follow_the_first_one_separated_by_a_line(run, capsys, monkeypatch):
    script(monkeypatch, [1, 2, 3], [1, 2, 3])
    out, _ = sampled(capsys, run, "prompt=h", "num_samples=3")
    assert out == "haa\n---\nhbb\n---\nhcc\n"


def test_an_empty_prompt_starts_from_bos(tmp_path, capsys, monkeypatch):
    run = save_run(tmp_path / "run", ByteTokenizer())
    given = []
    monkeypatch.setattr(sample, "generate", lambda model, ids, **options: given.append(ids) or iter([[65]]))
    assert sampled(capsys, run, "prompt=")[0] == "A\n"
    give_input(monkeypatch, b"not asked for")
    assert sampled(capsys, run)[0] == "A\n"
    assert given == [[256], [256]]


def test_the_prompt_comes_from_a_file_or_from_standard_input_without_its_last_newline(run, capsys, monkeypatch):
    path = run / "prompt.txt"
    path.write_bytes(b"ab\n\n")
    script(monkeypatch, [8])
    assert sampled(capsys, run, f"prompt=FILE:{path}")[0] == "ab\nh\n"
    give_input(monkeypatch, b"cd\n")
    assert sampled(capsys, run, "prompt=-")[0] == "cdh\n"
    monkeypatch.setattr(sys, "stdin", None)
    assert "there is no standard input" in refused(capsys, run, "prompt=-")


def test_prompts_that_cannot_be_read_are_refused(run, capsys, monkeypatch):
    path = run / "prompt.txt"
    assert "No such file" in refused(capsys, run, f"prompt=FILE:{path}")
    path.write_bytes(b"ab\xff")
    assert "not UTF-8 text (at byte 2)" in refused(capsys, run, f"prompt=FILE:{path}")
    path.write_bytes(b"a" * 1_000_001)
    assert "longer than 1,000,000 bytes" in refused(capsys, run, f"prompt=FILE:{path}")
    os.mkfifo(run / "fifo")
    assert "is not a regular file: a pipe can come in by prompt=-" in refused(capsys, run, f"prompt=FILE:{run}/fifo")
    give_input(monkeypatch, b"\xff")
    assert "standard input is not UTF-8" in refused(capsys, run, "prompt=-")
    assert "'xz'" in refused(capsys, run, "prompt=azax")
    assert "surrogates not allowed" in refused(capsys, run, "prompt=\udcff")


def test_a_prompt_longer_than_the_context_keeps_its_end_and_warns(run, capsys):
    out, err = sampled(capsys, run, "prompt=" + "abcdefgh" * 5, "max_new_tokens=5")
    assert out.startswith("abcdefgh" * 5)
    assert err.startswith("warning: the prompt has 40 tokens, the model sees at most 16 at once: "
                          "the first 24 are left out\n")


def test_the_named_checkpoint_is_sampled(tmp_path, capsys):
    model = tiny(vocab_size=len(CHARS))
    run = save_run(tmp_path / "run", CharTokenizer(CHARS), model, step=10)
    early, _ = sampled(capsys, run, "prompt=a")
    model.head.weight.data.neg_()
    save_run(run, CharTokenizer(CHARS), model, step=20)
    assert sampled(capsys, run, "prompt=a")[0] != early
    assert sampled(capsys, run, "prompt=a", "checkpoint=10")[0] == early
    checkpoint.path_of(run, 10).rename(run / "best.pt")
    assert sampled(capsys, run, "prompt=a", "checkpoint=best")[0] == early
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


def test_wrong_arguments_are_refused_in_one_line(run, tmp_path, capsys):
    assert "one folder of a run, got none" in refused(capsys)
    assert "one folder of a run, got a b" in refused(capsys, "a", "b")
    assert "does not exist: name a folder of a run" in refused(capsys, tmp_path / "nothing", "prompt=a")
    assert "did you mean temperature?" in refused(capsys, run, "temprature=1")
    assert "top_k must be a whole number" in refused(capsys, run, "top_k=1.5")
    assert "temperature must be finite" in refused(capsys, run, "temperature=nan")
    assert "leave prompt out" in refused(capsys, run, "prompt=a", "interactive=true")
    for words in ("prompt=a", "interactive=true", "compile=true"):
        assert "leave prompt, interactive and compile out" in refused(capsys, run, words, "eval=val")
    assert "dataset and eval_iters only count with eval=val" in refused(capsys, run, "dataset=x", "eval_iters=3")
    assert "would overflow in float16" in refused(capsys, run, "quantize=int8", "dtype=float16")
    assert "device=cuda:99 is not on this machine" in refused(capsys, run, "device=cuda:99")


@pytest.mark.parametrize(("name", "bad"), [
    ("temperature", -0.1), ("temperature", float("nan")), ("temperature", float("inf")), ("top_k", -1), ("top_p", 0.0),
    ("top_p", 1.1), ("min_p", -0.1), ("min_p", 1.1), ("max_new_tokens", 0), ("num_samples", 0), ("num_samples", 10**9),
    ("repetition_penalty", 0.0), ("repetition_penalty", float("nan")), ("seed", -1), ("seed", 2**64),
    ("eval_iters", -1), ("block_size", -1), ("micro_batch_size", -1)])
def test_values_that_mean_nothing_are_refused(name, bad):
    with pytest.raises(ValueError, match=f"^{name} must be .*, got {bad}$"):
        SampleOptions(**{name: bad}, eval="val")


def test_all_problems_are_listed_at_once():
    with pytest.raises(ValueError, match="temperature.*; top_k.*; top_p"):
        SampleOptions(temperature=-1.0, top_k=-1, top_p=2.0)


def test_every_option_that_generate_has_reaches_it(run, capsys, monkeypatch):
    given = {}
    monkeypatch.setattr(sample, "generate", lambda model, ids, **options: given.update(options) or iter([[1, 1]]))
    values = {"max_new_tokens": 7, "num_samples": 2, "temperature": 0.3, "top_k": 4, "top_p": 0.6, "min_p": 0.02,
              "repetition_penalty": 1.5, "seed": 8, "compile": True}
    sampled(capsys, run, "prompt=a", *(f"{name}={value}" for name, value in values.items()))
    assert given == values | {"vocab_size": len(CHARS)}


def test_help_lists_every_option_with_its_meaning(capsys):
    out, _ = sampled(capsys, "--help")
    assert all(f"  {field.name}=" in out for field in dataclasses.fields(SampleOptions))


class Written(list):
    """A standard output that notes what arrives with each flush."""

    def __init__(self, terminal: bool):
        super().__init__()
        self.pending, self.isatty = "", lambda: terminal

    def write(self, text: str):
        self.pending += text

    def flush(self):
        self.append(self.pending)
        self.pending = ""

    def reconfigure(self, **options):
        pass


@pytest.fixture
def byte_run(tmp_path) -> Path:
    return save_run(tmp_path / "bytes", ByteTokenizer())


def written(monkeypatch, run: Path, text: bytes, *argv: str, terminal: bool = True) -> list[str]:
    """What is written while the model yields the bytes of `text`."""
    out = Written(terminal)
    monkeypatch.setattr(sys, "stdout", out)
    script(monkeypatch, *([byte] for byte in text))
    assert sample.main([str(run), *argv]) == 0
    return [piece for piece in out if piece]


def test_characters_of_several_tokens_are_written_whole_and_at_once(byte_run, monkeypatch):
    assert written(monkeypatch, byte_run, "aé😀z".encode(), "prompt=>") == [">", "a", "é", "😀", "z", "\n"]
    assert written(monkeypatch, byte_run, b"a\xe9b\xf0\x9f", "prompt=") == ["a", "\ufffdb", "\ufffd\n"]


def test_a_terminal_gets_no_control_characters_unless_raw(byte_run, monkeypatch):
    text = "\x1b]0;x\x07\r\n\t\x7f\u009b\u202e\u2066é"
    prompt = "prompt=\x1b[2J"
    assert "".join(written(monkeypatch, byte_run, text.encode(), prompt)) == "[2J]0;x\n\té\n"
    assert "".join(written(monkeypatch, byte_run, text.encode(), prompt, "raw=true")) == f"\x1b[2J{text}\n"
    assert "".join(written(monkeypatch, byte_run, text.encode(), prompt, terminal=False)) == f"\x1b[2J{text}\n"


def test_a_text_ends_where_the_model_ends_it(byte_run, monkeypatch, capsys):
    later = []

    def steps(model, ids, **options):
        yield from ([65], [0xc3], [256])
        later.append(1)
        yield [66]

    monkeypatch.setattr(sample, "generate", steps)
    out, err = sampled(capsys, byte_run, "prompt=")
    assert out == "A\ufffd\n" and err.startswith("3 tokens in ") and not later


def test_each_sample_ends_by_itself_and_only_what_is_shown_is_counted(byte_run, monkeypatch, capsys):
    script(monkeypatch, [65, 97, 256], [256, 98, 66], [67, 99, 68], [69, 256, 70], [71, 72, 73])
    out, err = sampled(capsys, byte_run, "prompt=>", "num_samples=3")
    assert out == ">A\n---\n>abc\n---\n>\n"
    assert err.startswith("7 tokens in ")


def test_a_model_that_ends_its_text_at_once_gives_an_empty_one(tmp_path, capsys):
    model = tiny(vocab_size=257, tie_embeddings=True)
    model.embed.weight.data[256] *= 100  # after which it finds itself likeliest
    run = save_run(tmp_path / "run", ByteTokenizer(), model)
    out, err = sampled(capsys, run, "prompt=", "temperature=0")
    assert out == "\n" and err.startswith("1 tokens in ")


def test_what_is_sampled_in_bfloat16_is_the_saved_model_under_autocast_to_the_bit(run, capsys, monkeypatch):
    given = []
    monkeypatch.setattr(sample, "generate", lambda model, ids, **options: given.append(model) or iter([[1]]))
    sampled(capsys, run, "prompt=ab", "dtype=bfloat16")
    ids = torch.arange(9)[None]
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(given[0](ids), load_model(run)[0](ids))
    assert given[0].blocks[0].attn.q.weight.dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_quantized_model_samples_and_says_so(run, capsys, monkeypatch, dtype):
    given, plain = [], sample.generate
    monkeypatch.setattr(sample, "generate", lambda model, *rest, **named: given.append(model) or plain(model, *rest,
                                                                                                      **named))
    out, err = sampled(capsys, run, "prompt=ab", "max_new_tokens=40", "quantize=int8", f"dtype={dtype}")
    assert err.endswith(f"tokens/s (cpu, {dtype}, int8)\n") and len(out) == 43
    assert {p.dtype for p in given[0].buffers()} >= {torch.int8}


def test_interactive_asks_until_the_input_ends_and_survives_bad_prompts(run, capsys, monkeypatch):
    give_input(monkeypatch, b"ab\nxyz\n\ncd\n")
    monkeypatch.setattr(sample, "generate", lambda model, ids, **options: iter([[token] for token in ids]))
    out, err = sampled(capsys, run, "interactive=true")
    assert out == "ab\n\n\ncd\n"
    assert "error: characters 'xyz' are not among" in err and err.count("tokens/s") == 3


def test_ctrl_c_ends_with_130_and_no_traceback(run, capsys, monkeypatch):
    def interrupted(*arguments, **options):
        yield [1]
        raise KeyboardInterrupt

    monkeypatch.setattr(sample, "generate", interrupted)
    assert sample.main([str(run), "prompt=a"]) == 130
    assert capsys.readouterr() == ("aa", "\n")


def test_logits_that_are_not_finite_end_the_command_with_one_line(tmp_path, capsys):
    model = tiny(vocab_size=len(CHARS))
    model.head.weight.data.fill_(3e38)  # finite, as saved weights always are
    run = save_run(tmp_path / "run", CharTokenizer(CHARS), model)
    assert sample.main([str(run), "prompt=a"]) == 3
    out, err = capsys.readouterr()
    assert err.startswith("error: the model's logits hold NaN or Inf") and err.count("\n") == 1


@pytest.mark.skipif(sys.platform == "win32", reason="no SIGPIPE")
def test_a_reader_that_stops_early_ends_the_command_quietly(run):
    command = [sys.executable, str(ROOT / "sample.py"), str(run), "prompt=a", "max_new_tokens=100000"]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.read(10)
    process.stdout.close()
    assert process.stderr.read() == b""
    process.stderr.close()
    assert process.wait(20) == 0
