"""Documents in a data set: where they begin, a mask between them, windows that begin with them."""

import json
import random

import numpy as np
import pytest
import torch
from test_tokenizer import BYTE_LEVEL, save_hugging_face
from transformers import LlamaForCausalLM

import model as model_module
import train
from data.loader import batch, document_windows, open_dataset
from data.prepare import prepare
from exchange.hf import config_to_hf
from model import Decoder, ModelConfig, document_mask
from run.setup import read_config, set_up
from weights import checkpoint
from weights.hf_folder import hf_name


def rows(count=60, seed=0):
    pick = random.Random(seed)
    return [f"{i} " + "".join(pick.choices("abc ", k=pick.randrange(1, 60))) for i in range(count)]


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    """The folder of a data set of short documents, with bos before each; and the documents."""
    folder, documents = tmp_path_factory.mktemp("texts"), rows()
    lines = "".join(json.dumps({"text": text}) + "\n" for text in documents)
    (folder / "rows.jsonl").write_text(lines)
    prepare([str(folder / "rows.jsonl")], folder / "set", "byte")
    return folder / "set", documents


def of(texts, **options):
    return open_dataset(texts[0], **options)


# Where documents begin


def test_each_document_begins_where_its_text_does(texts):
    data, found = of(texts, doc_mask=True), []
    for split in ("train", "val"):
        tokens, starts = getattr(data, split), data.documents[split]
        assert starts[0] == 0 and len(starts) > 3
        for start, end in zip(starts, [*starts[1:], len(tokens)], strict=True):
            assert tokens[start] == 256  # bos
            found.append(bytes(tokens[start + 1 : end].tolist()).decode())
    assert sorted(found) == sorted(texts[1])


def test_the_end_token_between_two_documents_belongs_to_the_first_one(tmp_path):
    save_hugging_face(
        tmp_path, BYTE_LEVEL | {"post_processor": None}, tokenizer_config={"eos_token": "</s>"}
    )
    for name in "abc":
        (tmp_path / f"{name}.txt").write_text(f"{name} text of many words " * 9)
    texts = [str(tmp_path / f"{name}.txt") for name in "abc"]
    prepare(texts, tmp_path / "set", str(tmp_path))
    data = open_dataset(tmp_path / "set", doc_mask=True)
    starts, tokens = data.documents["train"], data.train
    assert len(starts) == 3 and (tokens[starts[1:] - 1] == 2).all()
    assert (tokens[starts] != 2).all() and (tokens == 2).sum() == 2


def test_documents_without_a_token_between_them_are_known_too(tmp_path):
    for name, text in (("a.txt", "one"), ("b.txt", "two"), ("c.txt", "three")):
        (tmp_path / name).write_text(text)
    prepare([str(tmp_path)], tmp_path / "set", "char")  # whose tokenizer has no bos
    data = open_dataset(tmp_path / "set", doc_mask=True)
    lengths = {  # each is so short that it is cut 90/10
        split: sorted(np.diff([*starts, len(getattr(data, split))]).tolist())
        for split, starts in data.documents.items()
    }
    assert lengths == {"train": [2, 2, 4], "val": [1, 1, 1]}


@pytest.mark.parametrize(
    "damage, said",
    [
        (lambda content: content[:-8], "its size or checksum differs"),
        (lambda content: content[:8] + content[:-8], "its size or checksum differs"),
    ],
)
def test_a_damaged_file_of_places_is_found_before_the_training(texts, tmp_path, damage, said):
    copy = tmp_path / "copy"
    copy.mkdir()
    for path in texts[0].iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    path = copy / "train.documents.bin"
    path.write_bytes(damage(path.read_bytes()))
    open_dataset(copy)  # which does not need it
    with pytest.raises(ValueError, match=said):
        open_dataset(copy, doc_mask=True)
    path.unlink()
    with pytest.raises(OSError, match="train.documents.bin: no such file"):
        open_dataset(copy, doc_windows=True)


def test_a_data_set_of_an_older_version_says_what_is_missing(texts, tmp_path, monkeypatch):
    data = of(texts)
    old = {name: value for name, value in data.meta.items() if name != "places"}
    monkeypatch.setattr("data.loader.read_meta", lambda path: old)
    assert open_dataset(texts[0]).fingerprint == data.fingerprint
    with pytest.raises(ValueError, match="does not say where documents begin.*prepare the data"):
        of(texts, doc_mask=True)


# Positions and windows


def test_positions_restart_with_each_document_and_with_the_window(texts):
    data = of(texts, doc_mask=True)
    x, y, positions = batch(data, 3, 8, 32, seed=1)
    assert torch.equal(x[:, 1:], y[:, :-1])
    assert positions.dtype == torch.int64 and (positions[:, 0] == 0).all()
    expected = torch.zeros_like(x)
    for row in range(len(x)):
        for t in range(1, x.shape[1]):
            expected[row, t] = 0 if x[row, t] == 256 else expected[row, t - 1] + 1
    assert torch.equal(positions, expected)
    assert torch.equal(x, batch(of(texts), 3, 8, 32, seed=1)[0])  # the same windows as without


def test_windows_of_documents_begin_with_them_and_cut_only_long_ones(texts):
    data, T = of(texts, doc_windows=True), 32
    starts, documents = document_windows(data, T), data.documents["train"].tolist()
    for before, start in zip(starts, starts[1:], strict=False):
        inside = [d for d in documents if before < d <= before + T]
        assert start == (inside[-1] if inside else before + T)
        assert start in documents or not inside
    assert len(data.train) - (starts[-1] + T) < 2 * T
    epochs = [data.rows(e * len(starts) + np.arange(len(starts)), T, 1)[0] for e in (0, 1)]
    whole = {tuple(data.train[s : s + T].tolist()) for s in starts}
    for x in epochs:
        assert {tuple(window) for window in x.tolist()} == whole
    assert not torch.equal(*epochs)


# The mask in the model


def packed(heads=4, kv_heads=0, layers=2, **knobs):
    """A model, two windows of which the first holds three texts, and their positions."""
    config = ModelConfig(
        n_layer=layers,
        n_head=heads,
        n_kv_head=kv_heads,
        n_embd=64,
        block_size=64,
        vocab_size=50,
        **knobs,
    )
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, 50, (2, 48), generator=generator)
    first = torch.cat([torch.arange(n) for n in (10, 30, 8)])
    return Decoder(config, 1).eval(), ids, torch.stack((first, torch.arange(48)))


def alone(model, ids):
    return torch.cat([model(ids[:1, a:b]) for a, b in ((0, 10), (10, 40), (40, 48))], dim=1)


@pytest.mark.parametrize("knobs", [{}, {"kv_heads": 2}, {"qk_norm": True}])
@pytest.mark.parametrize("dtype, most", [("float32", 1e-6), ("bfloat16", 2e-3)])
@torch.inference_mode()
def test_logits_of_a_text_inside_a_window_are_those_of_the_text_alone(knobs, dtype, most):
    model, ids, positions = packed(**knobs)
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16"):
        found = model(ids, positions=positions)
        assert (found[:1] - alone(model, ids)).abs().max() <= most
        assert (found[1:] - model(ids[1:])).abs().max() <= most
        assert (found[:1] - model(ids[:1])).abs().max() > 0.01  # without the mask they differ


@torch.inference_mode()
def test_each_document_of_a_window_has_the_logits_of_transformers():
    model, ids, positions = packed(kv_heads=2)
    about = config_to_hf(model.config, SPECIAL, "float32")
    theirs = LlamaForCausalLM(LlamaForCausalLM.config_class(**about)).eval()
    theirs.load_state_dict({hf_name(name): p for name, p in model.named_parameters()})
    found, begin = model(ids, positions=positions), 0
    for end in (10, 40, 48):
        expected = theirs(ids[:1, begin:end]).logits
        assert (found[:1, begin:end] - expected).abs().max() < 1e-6
        begin = end


class SPECIAL:
    """What config_to_hf asks of a tokenizer."""

    end_ids, bos_id, config, generation = frozenset(), None, {}, {}


@torch.no_grad()
def test_the_mask_for_flex_attention_is_the_same_and_traces_as_one_graph(monkeypatch):
    """As on CUDA: there compiled code gets it. Here the graph runs without Inductor, whose kernel
    for this needs other processors."""
    model, ids, positions = packed(kv_heads=2, layers=1)
    dense = model(ids, positions=positions)
    monkeypatch.setattr(model_module, "document_mask", lambda p, flex: document_mask(p, flex=True))
    traced = torch.compile(model, fullgraph=True, backend="eager")
    assert (traced(ids, positions=positions) - dense).abs().max() < 1e-6


def test_gradients_with_checkpointed_blocks_are_those_without():
    model, ids, positions = packed()
    gradients = []
    for model.activation_checkpointing in (False, True):
        loss = model.train()(ids, ids, positions)
        gradients.append(torch.autograd.grad(loss, list(model.parameters())))
    assert all(map(torch.equal, *gradients))


# Training


def test_training_with_a_mask_is_exact_after_a_resume(start, tmp_path, texts):
    knobs = (f"dataset={texts[0]}", "doc_mask=true", "doc_windows=true", "dropout=0.1")
    assert start(*knobs, "max_iters=8", "save_interval=4", out="whole")[0] == 0
    assert start(*knobs, "max_iters=8", "save_interval=3", out="parts")[0] == 0
    (tmp_path / "parts" / "ckpt_00000008.pt").unlink()
    assert start(*knobs, "max_iters=8", "save_interval=4", "resume=yes", out="parts")[0] == 0
    whole, parts = (checkpoint.load_newest(tmp_path / name) for name in ("whole", "parts"))
    assert all(torch.equal(w, parts["model"][n]) for n, w in whole["model"].items())


@pytest.mark.parametrize("knob", ["doc_mask=true", "doc_windows=true"])
def test_each_of_the_two_knobs_changes_what_is_learned(texts, tmp_path, knob):
    learned = []
    for knobs in ([], [knob]):
        place = [f"dataset={texts[0]}", f"out_dir={tmp_path / 'run'}"]
        words = "n_layer=1 n_embd=32 n_head=2 block_size=32 batch_size=4 max_iters=3 warmup_iters=1"
        run = set_up(read_config(["config/tiny.py", *words.split(), *place, *knobs]))
        for _ in range(3):
            train.train_step(run)
        learned.append(run.model.head.weight.detach())
    assert not torch.equal(*learned)


def test_the_evaluation_of_a_run_uses_its_mask(start, tmp_path, texts, capsys):
    import sample

    knobs = (f"dataset={texts[0]}", "doc_mask=true", "max_iters=2", "eval_iters=0")
    code, out, _ = start(*knobs)
    logged = next(line for line in out.splitlines() if line.startswith("val_loss:")).split()[1]
    words = ["eval=val", f"dataset={texts[0]}", "dtype=float32", "micro_batch_size=8"]
    assert sample.main([str(tmp_path / "run"), *words]) == 0
    assert f"val loss      {logged} nats" in capsys.readouterr().out


def test_a_watched_run_sees_no_logits_across_documents(texts):
    from run.watch import largest_logit

    _, _, positions = packed()
    q, k = torch.zeros(2, 1, 48, 4), torch.zeros(2, 1, 48, 4)
    q[0, 0, 20, 0] = k[0, 0, 5, 0] = 10.0  # the query is in the second text, the key in the first
    assert largest_logit(q, k) == 50
    assert largest_logit(q, k, document_mask(positions)) == 0
