"""Conversations: their rows, templates, token ids and answers; training on answers; talking."""

import json
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from gguf import GGUFReader
from test_tokenizer import BYTE_LEVEL, LLAMA, NAMES, save_hugging_face
from test_weights import save_hf
from transformers import AutoTokenizer, GenerationConfig

import sample
import text.chat
import train
from data.corpus import open_corpus
from data.loader import batch, open_dataset, val_starts
from data.prepare import prepare
from exchange import gguf, hf
from model import IGNORED, Decoder
from run.evaluate import mean_loss
from run.setup import read_config, set_up, text_dataset
from text.chat import Chat, ChatTemplate, encode_conversation, plain_template, template_of
from text.messages import conversation_in
from text.tokenizer import ByteTokenizer, CharTokenizer, load_tokenizer

TALK = [
    {"role": "user", "content": "What is wrapped?"},
    {"role": "assistant", "content": "A text, of several lines."},
    {"role": "user", "content": "And think of one?"},
    {"role": "assistant", "content": "It stays as it is."},
]
SYSTEM = {"role": "system", "content": "Be short."}
MARKS = (
    "<|im_start|> <|im_end|> <|start_header_id|> <|end_header_id|> <|eot_id|> [INST] [/INST]"
).split()
# How each family writes a conversation. What is between << and >> is what the model says.
FAMILIES = {
    "chatml": """{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}
{%- if m.role == 'assistant' %}<<{{ m.content + '<|im_end|>' }}>>{% else %}
{{- m.content + '<|im_end|>' }}{% endif %}{{ '\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}""",
    "llama 3": """{{ bos_token }}{% for m in messages %}
{{- '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' }}
{%- if m.role == 'assistant' %}<<{{ m.content | trim + '<|eot_id|>' }}>>{% else %}
{{- m.content | trim + '<|eot_id|>' }}{% endif %}{% endfor %}
{%- if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}
{%- endif %}""",
    "zephyr": """{% for m in messages %}{{ '<|' + m.role + '|>\n' }}
{%- if m.role == 'assistant' %}<<{{ m.content + eos_token }}>>{% else %}
{{- m.content + eos_token }}{% endif %}{{ '\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}""",
    "mistral": """{{ bos_token }}{% for m in messages %}
{%- if (m.role == 'user') != (loop.index0 % 2 == 0) %}
{{- raise_exception('roles must alternate') }}{% endif %}
{%- if m.role == 'user' %}{{ '[INST] ' + m.content + ' [/INST]' }}
{%- else %}<<{{ ' ' + m.content + eos_token }}>>{% endif %}{% endfor %}""",
    "qwen 3": """{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}
{%- if m.role == 'assistant' %}<<{% if loop.last %}{{ '<think>\n\n</think>\n\n' }}{% endif %}
{{- m.content + '<|im_end|>' }}>>{% else %}{{ m.content + '<|im_end|>' }}{% endif %}
{{- '\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}""",
}


def marked(family):
    """With the tags by which transformers finds what the model says."""
    source = FAMILIES[family].replace("<<", "{% generation %}")
    return source.replace(">>", "{% endgeneration %}")


def bare(family):
    return FAMILIES[family].replace("<<", "").replace(">>", "")


def save_tokenizer(folder, kind, template):
    """The files of a tokenizer with the special tokens of all families."""
    first = max(max(kind["model"]["vocab"].values()), *(t["id"] for t in kind["added_tokens"])) + 1
    how = kind["added_tokens"][0]
    more = [how | {"id": first + i, "content": name} for i, name in enumerate(MARKS)]
    config = NAMES | {"chat_template": template, "tokenizer_class": "PreTrainedTokenizerFast"}
    made = kind | {"added_tokens": [*kind["added_tokens"], *more]}
    save_hugging_face(folder, made, tokenizer_config=config)


def encoded(tokenizer, messages):
    with template_of(tokenizer) as template:
        return encode_conversation(tokenizer, template, messages)


def answers_of(talk):
    counts = np.zeros(len(talk.ids), dtype=int)
    for begin, end in talk.answers:
        counts[begin:end] = 1
    return counts.tolist()


# Against transformers


@pytest.mark.parametrize("kind", [BYTE_LEVEL, LLAMA], ids=["bytes", "llama"])
@pytest.mark.parametrize("family", FAMILIES)
def test_ids_and_answers_are_those_of_transformers(family, kind, tmp_path):
    save_tokenizer(tmp_path, kind, marked(family))
    ours, theirs = load_tokenizer(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    talks = [TALK, TALK[:2]] + ([] if family == "mistral" else [[SYSTEM, *TALK]])
    with template_of(ours) as template:
        for messages in talks:
            expected = theirs.apply_chat_template(
                messages, return_assistant_tokens_mask=True, return_dict=True
            )
            found = encode_conversation(ours, template, messages)
            assert found.ids == expected["input_ids"]
            assert answers_of(found) == expected["assistant_masks"] and sum(answers_of(found)) > 9
            how = {"add_generation_prompt": True, "tokenize": False}
            assert template.prompt(messages[:-1]) == theirs.apply_chat_template(
                messages[:-1], **how
            )


@pytest.mark.parametrize("family", FAMILIES)
def test_without_tags_the_answers_are_found_all_the_same(family, tmp_path):
    found = []
    for template in (marked(family), bare(family)):
        save_tokenizer(tmp_path, BYTE_LEVEL, template)
        found.append(encoded(load_tokenizer(tmp_path), TALK))
    assert found[0] == found[1]


def test_what_a_template_marks_is_the_answer_whatever_stands_around_it():
    source = """{% for m in messages %}{{ m.role + ':' }}
{%- if m.role == 'assistant' %}{% generation %}{{ m.content[:6] }}{% endgeneration %}
{{- m.content[6:] }}{% else %}{{ m.content }}{% endif %}{{ '</s>' }}{% endfor %}"""
    with ChatTemplate(source, {}, ["</s>"]) as template:
        text, answers = template.render(TALK)
    assert [text[begin:end] for begin, end in answers] == ["A text", "It sta"]


def test_a_template_of_several_is_the_default_one(tmp_path):
    several = [
        {"name": "tool_use", "template": "no"},
        {"name": "default", "template": bare("chatml")},
    ]
    save_tokenizer(tmp_path, BYTE_LEVEL, several)
    assert encoded(load_tokenizer(tmp_path), TALK).text.startswith("<|im_start|>user\n")


# The plain template


def test_the_plain_template_ends_answers_with_the_end_token():
    tokenizer = ByteTokenizer()
    talk = encoded(tokenizer, [SYSTEM, *TALK])
    said = [tokenizer.decode_bytes(talk.ids[a:b]).decode() for a, b in talk.answers]
    assert said == [m["content"] for m in TALK if m["role"] == "assistant"]
    assert all(talk.ids[end - 1] == 256 for _, end in talk.answers)
    assert talk.ids[0] == 256 and talk.ids.count(256) == 1 + 5


def test_a_tokenizer_without_an_end_token_has_no_plain_template():
    with pytest.raises(ValueError, match="char tokenizer has no end token, by which an answer"):
        plain_template(CharTokenizer("abc"))


# Templates of strangers


@pytest.mark.parametrize(
    "source, said",
    [
        ("{{ ''.__class__.__mro__ }}", "access to attribute '__class__'"),
        ("{{ messages.append(1) }}", "access to attribute 'append'.*unsafe|is not safely callable"),
        ("{{ 'x' * 10**10 }}", "it takes too much memory"),
        ("{% for i in range(99999) %}{{ 'y' * 9999 }}{% endfor %}", "more than 16,777,216 char"),
        ("{{ raise_exception('only in\nEnglish') }}", "fails: only in"),
        ("{{ range(10**9) }}", "Range too big"),
        ("{% if %}", "Expected an expression"),
        ("{{ nothing.at.all }}", "'nothing' is undefined"),
        ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "recursion"),
    ],
)
def test_a_template_that_fails_says_why(source, said):
    with pytest.raises(ValueError, match=said):
        with ChatTemplate(source, {}, []) as template:
            template.prompt(TALK)


def test_a_template_that_never_ends_is_stopped(monkeypatch):
    monkeypatch.setattr(text.chat, "SECONDS", 1.0)
    endless = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
    with pytest.raises(ValueError, match="takes more than 1 s or too much memory"):
        with ChatTemplate(endless, {}, []) as template:
            template.prompt(TALK)


@pytest.mark.parametrize(
    "source, said",
    [
        ("{{ messages | length }}{{ messages }}", "depends on the messages after it"),
        ("{% for m in messages %}{{ m.content | upper }}{% endfor %}", "keep the text of an ans"),
    ],
)
def test_answers_that_cannot_be_found_are_refused(source, said):
    with ChatTemplate(source, {}, ["</s>"]) as template:
        with pytest.raises(ValueError, match=said):
            template.render(TALK)


# Rows


def test_a_prompt_and_its_completion_are_a_message_and_an_answer():
    row = {"prompt": "a", "completion": "b", "id": 7}
    expected = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    assert conversation_in(row) == expected
    assert conversation_in({"prompt": expected[:1], "completion": expected[1:]}) == expected


@pytest.mark.parametrize(
    "row, said",
    [
        ({"messages": []}, "its messages are [], not a list of messages"),
        ({"messages": "hi"}, "its messages are 'hi', not a list"),
        ({"messages": [3]}, "message 1 is 3, not an object with role and content"),
        ({"messages": [TALK[0], {"role": "assistant"}]}, "message 2 has 'role', but no 'content'"),
        (
            {"messages": [{"from": "a", "value": ""}]},
            "message 1 has 'from', 'value', but no 'role'",
        ),
        ({"messages": [{}]}, "message 1 is {}, not an object with role and content"),
        ({"messages": [{"role": 1, "content": ""}]}, "message 1: its role is 1, not a text"),
        ({"messages": TALK[:1]}, "its roles are 'user', and none is 'assistant', whose words"),
        ({"messages": TALK[1:]}, "its first message is the assistant's"),
        ({"prompt": "a", "completion": None}, "message 2: its content is None, not a text"),
        (
            {"messages": [TALK[0], TALK[1] | {"content": "\ud800"}]},
            "message 2 spells half a surrogate",
        ),
        ({"instruction": "a"}, "it has 'instruction', but no 'messages', nor 'prompt'"),
    ],
)
def test_rows_that_are_no_conversations_say_why(tmp_path, capsys, row, said):
    lines = [{"messages": TALK}, row]
    (tmp_path / "talks.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(ValueError) as raised:
        prepare([str(tmp_path / "talks.jsonl")], tmp_path / "set", "byte")
    assert f"talks.jsonl: line 2: {said}" in str(raised.value) and "\n" not in str(raised.value)
    assert not (tmp_path / "set").exists()


def test_conversations_may_stand_in_any_kind_of_rows(tmp_path):
    pyarrow = pytest.importorskip("pyarrow", reason="pyarrow reads parquet")
    from pyarrow import parquet

    rows = [{"messages": TALK}, {"messages": [SYSTEM, *TALK]}]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "a.json").write_text(json.dumps(rows))
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    for name in ("a.jsonl", "a.json", "a.parquet"):
        pieces = open_corpus([str(tmp_path / name)]).pieces()
        assert [piece.messages for piece in pieces] == [row["messages"] for row in rows]
    (tmp_path / "b.csv").write_text("prompt,completion\nHi,Hello\nBye,Goodbye\n")
    first = next(open_corpus([str(tmp_path / "b.csv")]).pieces()).messages
    assert first == conversation_in({"prompt": "Hi", "completion": "Hello"})


def test_texts_beside_conversations_are_refused(tmp_path):
    (tmp_path / "talks.jsonl").write_text(json.dumps({"messages": TALK}) + "\n")
    (tmp_path / "text.txt").write_text("a text")
    with pytest.raises(ValueError, match="text.txt are texts, and talks.jsonl conversations"):
        prepare([str(tmp_path)], tmp_path / "out" / "set", "byte")


# A data set of conversations


def talks(count=40):
    for i in range(count):
        asked, answer = f"Say {i}.", " ".join(["so"] * (1 + i % 7)) + f" {i}"
        yield [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]


@pytest.fixture(scope="module")
def chats(tmp_path_factory):
    """A folder with talks.jsonl and the data set made of it."""
    folder = tmp_path_factory.mktemp("chats")
    lines = "".join(json.dumps({"messages": messages}) + "\n" for messages in talks())
    (folder / "talks.jsonl").write_text(lines)
    prepare([str(folder / "talks.jsonl")], folder / "set", "byte")
    return folder


def test_only_the_tokens_of_answers_count(chats):
    data = open_dataset(chats / "set", doc_mask=True)
    assert data.fingerprint["answers"] is True
    for split, n in (("train", 36), ("val", 4)):
        tokens, documents = getattr(data, split), data.documents[split]
        assert len(documents) == n
        x, y, _ = data.windows(split, np.array([0]), len(tokens) - 1)
        learned, begins = y[0].tolist(), [*documents[1:], len(tokens)]
        for begin, end in zip(documents, begins, strict=True):
            text = bytes(min(int(i), 255) for i in tokens[begin:end])
            answer = text.split(b"assistant\n")[1].removesuffix(b"\n")
            wanted = [i for i in learned[max(0, begin - 1) : end - 1] if i != IGNORED]
            assert bytes(min(i, 255) for i in wanted) == answer and wanted[-1] == 256
        assert torch.equal(x[0], torch.from_numpy(tokens[:-1].astype(np.int64)))


def test_few_conversations_are_split_whole(tmp_path):
    lines = "".join(json.dumps({"messages": messages}) + "\n" for messages in talks(3))
    (tmp_path / "few.jsonl").write_text(lines)
    prepare([str(tmp_path / "few.jsonl")], tmp_path / "set", "byte")
    data = open_dataset(tmp_path / "set", doc_mask=True)
    assert [len(data.documents[split]) for split in ("train", "val")] == [2, 1]
    (tmp_path / "few.jsonl").write_text(lines.splitlines()[0])
    with pytest.raises(ValueError, match="too little text, none is left for train"):
        prepare([str(tmp_path / "few.jsonl")], tmp_path / "one", "byte")


def test_other_answers_or_other_roles_are_other_data(tmp_path, monkeypatch):
    names, path = [], tmp_path / "talks.jsonl"
    for role in ("user", "system"):
        lines = [{"messages": [talk[0] | {"role": role}, talk[1]]} for talk in talks(9)]
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
        names.append(text_dataset(path, open_corpus([str(path)]), None).name)
    assert names[0] != names[1]

    def without_answers(*arguments):
        return replace(encode_conversation(*arguments), answers=[(0, 1)])

    prepare([str(path)], tmp_path / "one", "byte")
    monkeypatch.setattr("data.prepare.encode_conversation", without_answers)
    prepare([str(path)], tmp_path / "other", "byte")
    one, other = (open_dataset(tmp_path / name) for name in ("one", "other"))
    assert np.array_equal(one.train, other.train)
    assert one.fingerprint["content_sha256"] != other.fingerprint["content_sha256"]


def run_of(chats, tmp_path, *knobs):
    words = "n_layer=1 n_embd=32 n_head=2 block_size=32 batch_size=8 max_iters=3 warmup_iters=1"
    place = [f"dataset={chats / 'set'}", f"out_dir={tmp_path / 'run'}"]
    place += ["device=cpu", "dtype=float32"]
    return set_up(read_config(["config/tiny.py", *words.split(), *place, *knobs]))


def test_every_token_of_an_answer_counts_the_same_in_whichever_micro_batch(chats, tmp_path):
    found = []
    for micro in (8, 2, 1):  # some windows of one sequence have no answer at all
        run = run_of(chats, tmp_path, f"micro_batch_size={micro}")
        loss = train.accumulate_gradients(run)
        found.append((loss, [p.grad for p in run.model.parameters()]))
    x, y = batch(run.data, 0, 8, 32, run.config.seed)
    assert min((row != IGNORED).sum() for row in y) < max((row != IGNORED).sum() for row in y)
    logits = run.model(x).flatten(0, 1)
    expected = torch.nn.functional.cross_entropy(logits, y.flatten(), ignore_index=IGNORED)
    for loss, gradients in found:
        assert loss == pytest.approx(expected.item(), rel=1e-5)
        for ours, first in zip(gradients, found[0][1], strict=True):
            assert torch.allclose(ours, first, atol=1e-6)


def test_a_batch_without_answers_counts_for_nothing(chats, tmp_path, monkeypatch):
    run, told = run_of(chats, tmp_path), []
    monkeypatch.setattr(type(run.ranks), "sum", lambda self, value: told.append(value) or value)
    x, y = batch(run.data, 0, 8, 32, run.config.seed)
    monkeypatch.setattr(train, "batch", lambda *_: (x, torch.full_like(y, IGNORED)))
    assert train.accumulate_gradients(run) == 0 and told == [0]
    assert all((p.grad == 0).all() for p in run.model.parameters())


def test_the_validation_loss_is_the_mean_over_the_tokens_of_answers(chats, tmp_path):
    run = run_of(chats, tmp_path)
    starts = val_starts(len(run.data.val), 32, 0)
    x, y = run.data.windows("val", starts, 32)
    logits = run.model.eval()(x).flatten(0, 1)
    expected = torch.nn.functional.cross_entropy(logits, y.flatten(), ignore_index=IGNORED)
    for batch_size in (1, 3, 8):
        found = mean_loss(run.model, run.data, "val", starts, 32, batch_size, "cpu", "float32")
        assert found == pytest.approx(expected.item(), rel=1e-6)


def test_all_tokens_can_count_in_training_and_answers_alone_in_evaluation(chats, tmp_path):
    data = [run_of(chats, tmp_path, f"answers_only={said}").data for said in ("true", "false")]
    trained = [(batch(d, 0, 8, 32, seed=1)[1] == IGNORED).sum() for d in data]
    assert trained[0] > 0 and trained[1] == 0
    evaluated = [d.windows("val", np.array([0, 32]), 32)[1] for d in data]
    assert torch.equal(*evaluated) and (evaluated[0] == IGNORED).any()


def test_texts_have_no_answers_to_count_alone(start):
    code, _, err = start("answers_only=false")
    assert code == 2 and "words holds texts, and no conversations with answers: leave it out" in err


def test_a_run_on_conversations_is_exact_after_a_resume_and_evaluates_answers(
    start, tmp_path, chats, capsys
):
    from weights import checkpoint

    knobs = (f"dataset={chats / 'set'}", "doc_mask=true", "doc_windows=true", "eval_iters=0")
    code, out, _ = start(*knobs, "max_iters=6", "save_interval=3", out="whole")
    assert code == 0 and "answers" in out
    assert start(*knobs, "max_iters=6", "save_interval=2", out="parts")[0] == 0
    (tmp_path / "parts" / "ckpt_00000006.pt").unlink()
    assert start(*knobs, "max_iters=6", "save_interval=3", "resume=yes", out="parts")[0] == 0
    whole, parts = (checkpoint.load_newest(tmp_path / name) for name in ("whole", "parts"))
    assert all(torch.equal(w, parts["model"][n]) for n, w in whole["model"].items())
    logged = next(line for line in out.splitlines() if line.startswith("val_loss:")).split()[1]
    words = ["eval=val", f"dataset={chats / 'set'}", "dtype=float32", "micro_batch_size=8"]
    assert sample.main([str(tmp_path / "whole"), *words]) == 0
    printed = capsys.readouterr().out
    assert f"val loss      {logged} nats" in printed and "those of answers count" in printed


# Talking


@pytest.fixture
def spoken(monkeypatch):
    """The ids that the model is given; it always answers 'yes' and ends its turn."""
    given = []

    def generate(model, ids, max_new_tokens, **rest):
        given.append(ids)
        yield from ([i] for i in [*b"yes", 256, *b"more"])

    monkeypatch.setattr(sample, "generate", generate)
    return given


def say(monkeypatch, text):
    import io

    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text.encode())))


def test_a_chat_keeps_what_was_said_and_ends_each_turn(
    start, tmp_path, chats, spoken, monkeypatch, capsys
):
    assert start(f"dataset={chats / 'set'}", "max_iters=2")[0] == 0
    say(monkeypatch, "one\ntwo\n")
    assert sample.main([str(tmp_path / "run"), "chat=true", "system=Be kind."]) == 0
    told = capsys.readouterr()
    assert told.out == "yes\nyes\n" and "plain one" not in told.err
    tokenizer = ByteTokenizer()
    with Chat(tokenizer, "Be kind.") as chat:
        assert spoken[0] == chat.ask("one")
        chat.answered("yes")
        assert spoken[1] == chat.ask("two")
    assert b"Be kind." in tokenizer.decode_bytes(spoken[1])


def test_what_was_said_is_not_read_again(start, tmp_path, chats, monkeypatch):
    assert start(f"dataset={chats / 'set'}", "block_size=240", "max_iters=2")[0] == 0
    read, features = [], Decoder.features

    def watched(model, ids, *rest):
        read.append(ids.shape[1])
        return features(model, ids, *rest)

    monkeypatch.setattr(Decoder, "features", watched)
    say(monkeypatch, "one\ntwo\n")
    words = ["chat=true", f"system={'Be kind. ' * 10}", "temperature=0", "max_new_tokens=4"]
    assert sample.main([str(tmp_path / "run"), *words]) == 0
    assert read[0] > 120 and read[1:4] == read[5:] == [1, 1, 1]
    assert read[4] < 80  # what ends the first answer, and the second message


def test_one_message_gets_one_answer(start, tmp_path, chats, spoken, capsys):
    assert start(f"dataset={chats / 'set'}", "max_iters=2")[0] == 0
    assert sample.main([str(tmp_path / "run"), "chat=true", "prompt=one"]) == 0
    assert capsys.readouterr().out == "yes\n" and len(spoken) == 1


def test_a_model_of_texts_is_talked_to_with_a_warning(start, tmp_path, spoken, capsys):
    (tmp_path / "text.txt").write_text("a text " * 200)
    prepare([str(tmp_path / "text.txt")], tmp_path / "set", "byte")
    assert start(f"dataset={tmp_path / 'set'}", "max_iters=2")[0] == 0
    assert sample.main([str(tmp_path / "run"), "chat=true", "prompt=one"]) == 0
    assert "has no chat template: a plain one is used" in capsys.readouterr().err


def test_a_message_that_the_template_refuses_is_no_part_of_the_conversation(tmp_path):
    save_tokenizer(tmp_path, BYTE_LEVEL, bare("mistral"))
    with Chat(load_tokenizer(tmp_path)) as chat:
        first = chat.ask("one")
        with pytest.raises(ValueError, match="roles must alternate"):
            chat.ask("two")
        chat.messages.clear()
        assert chat.ask("one") == first


@pytest.mark.parametrize("family, end", [("chatml", "<|im_end|>"), ("llama 3", "<|eot_id|>")])
def test_an_answer_ends_with_what_the_template_puts_behind_it(family, end, tmp_path):
    save_tokenizer(tmp_path, BYTE_LEVEL, bare(family))
    tokenizer = load_tokenizer(tmp_path)
    with Chat(tokenizer) as chat:
        assert chat.ends == tokenizer.end_ids | {tokenizer.special[end]} > tokenizer.end_ids


# In and out


def test_a_chat_model_is_tuned_exported_and_read_by_transformers(tmp_path, chats, monkeypatch):
    monkeypatch.setattr("run.setup.DATA", tmp_path)  # where the talks are prepared
    source, out, exported = tmp_path / "theirs", tmp_path / "tuned", tmp_path / "exported"
    save_hf(source, vocab_size=640)
    save_tokenizer(source, BYTE_LEVEL, marked("chatml"))
    knobs = ["max_iters=2", "warmup_iters=1", "block_size=32", "doc_mask=true", "device=cpu"]
    talks = f"dataset={chats / 'talks.jsonl'}"
    tune = ["config/finetune.py", f"init_from={source}", talks, f"out_dir={out}", *knobs]
    assert train.main([*tune, "sample_tokens=0"]) == 0
    assert hf.main(["export", str(out), str(exported)]) == 0
    theirs, before = (AutoTokenizer.from_pretrained(place) for place in (exported, source))
    assert theirs.chat_template == before.chat_template
    # The folder named only </s>; without the end of a turn, others would let the model speak on.
    end, eos = (theirs.convert_tokens_to_ids(name) for name in ("<|im_end|>", "</s>"))
    assert GenerationConfig.from_pretrained(source).eos_token_id == eos
    assert GenerationConfig.from_pretrained(exported).eos_token_id == sorted([eos, end])
    assert gguf.main([str(out), str(tmp_path / "x.gguf")]) == 0
    fields = GGUFReader(tmp_path / "x.gguf").fields
    ends = [fields[f"tokenizer.ggml.{name}_token_id"].contents() for name in ("eos", "eot")]
    assert ends == [eos, end]
    asked = theirs.apply_chat_template(TALK[:3], add_generation_prompt=True)["input_ids"]
    with Chat(load_tokenizer(out)) as chat:
        chat.messages += TALK[:2]
        assert chat.ask(TALK[2]["content"]) == asked
    assert "apply_chat_template" in (exported / "README.md").read_text()


def test_a_model_of_the_plain_template_takes_it_along(start, tmp_path, chats):
    assert start(f"dataset={chats / 'set'}", "max_iters=2")[0] == 0
    assert hf.main(["export", str(tmp_path / "run"), str(tmp_path / "exported")]) == 0
    theirs = AutoTokenizer.from_pretrained(tmp_path / "exported")
    talk = encoded(ByteTokenizer(), [SYSTEM, *TALK])
    assert theirs.apply_chat_template([SYSTEM, *TALK])["input_ids"] == talk.ids
    assert gguf.main([str(tmp_path / "run"), str(tmp_path / "x.gguf")]) == 0
    said = GGUFReader(tmp_path / "x.gguf").fields["tokenizer.chat_template"].contents()
    assert said == theirs.chat_template == plain_template(ByteTokenizer())
    again = load_tokenizer(tmp_path / "exported")
    with Chat(again, SYSTEM["content"]) as theirs, Chat(ByteTokenizer(), "Be short.") as ours:
        assert theirs.ask("one") == ours.ask("one") and theirs.ends == ours.ends
