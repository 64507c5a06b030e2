"""Every knob does to what is learned what it is for: it changes it, or only its rounding, or not one bit of it."""

import pytest
import torch
from conftest import ROOT, SMALL, prepare_words

import checkpoint
import metrics
import train
from config.schema import Config, knobs_of
from model import ModelConfig
from run import claim_folder, read_config, set_up

CHANGES = [  # knob=another value, and what it needs beside it to matter
    "init_from=BASE", "lora_rank=3 init_from=BASE lora_rank=2", "lora_alpha=1 init_from=BASE lora_rank=2",
    "seed=5", "seed=5 init_from=BASE", "dataset=OTHER", "batch_size=2", "max_iters=6",
    "optimizer=muon", "learning_rate=2e-3", "embed_lr=2", "embed_lr=2 optimizer=muon", "min_lr=1e-4",
    "lr_schedule=linear", "warmup_iters=1", "decay_fraction=0.75 lr_schedule=wsd", "weight_decay=0",
    "weight_decay=0 optimizer=muon", "beta1=0.8", "beta2=0.9", "muon_momentum=0.8 optimizer=muon", "grad_clip=0.01",
    "skip_spikes=6", "dtype=bfloat16",
    "n_layer=1", "n_head=1", "n_kv_head=1", "n_embd=16", "head_dim=8", "ffn=geglu", "n_hidden=32", "block_size=16",
    "vocab_size=20", "tie_embeddings=true", "dropout=0.1", "norm=layernorm", "norm_pos=post", "qk_norm=true",
    "norm_eps=1e-3", "prms_p=0.5 norm=prmsnorm", "norm_alpha=0.25 norm=dyt",
    "rope_theta=500000", "rope_scaling=llama3", "rope_factor=4 rope_scaling=llama3",
    "rope_low_freq=0.5 rope_scaling=llama3", "rope_high_freq=8 rope_scaling=llama3",
    "rope_original_context=4096 rope_scaling=llama3"]
ROUNDS = ["micro_batch_size=2", "norm_impl=fused norm=layernorm"]
KEEPS = ["resume=auto", "eval_interval=2", "eval_iters=2", "log_interval=3", "watch=true", "save_interval=3", "keep=9",
         "sample_prompt=the", "sample_tokens=3", "tracker=wandb", "parallel=fsdp", "sharded=false",
         "activation_checkpointing=true"]  # parallel and sharded: of one rank
ELSEWHERE = ["out_dir", "device", "compile"]  # tests have folders of their own, are on the CPU, and see test_train.py


def name_of(knob):
    return knob.partition("=")[0]


@pytest.fixture(scope="module")
def build(tmp_path_factory, data_folder):
    """build('key=value', ...) sets up a very small run. BASE has weights of another seed, OTHER another text."""
    folder = tmp_path_factory.mktemp("knobs")

    def build(*knobs):
        small = {name_of(k): k for k in [*SMALL, f"dataset={data_folder / 'words'}", f"out_dir={folder / 'run'}",
                                         "batch_size=4", "max_iters=5", *knobs]}
        places = [k.replace("BASE", str(folder / "base")).replace("OTHER", str(folder / "other"))
                  for k in small.values()]
        return set_up(read_config([str(ROOT / "config" / "tiny.py"), *places]))

    prepare_words(folder, "other", seed=1)
    base = build("out_dir=BASE", "seed=7")
    claim_folder(base)
    assert train.save(base, checkpoint.path_of(base.folder, base.step))
    return build


@pytest.fixture(scope="module")
def learned(build):
    """learned('key=value', ...): name -> weights after four steps. All of these are spikes, if anyone asks."""
    done = {}

    def learned(*knobs):
        if knobs not in done:
            run = build(*knobs)
            run.grad_norms = [1e-6] * 64
            for _ in range(4):
                train.train_step(run)
            done[knobs] = {name: p.detach() for name, p in run.model.named_parameters() if p.requires_grad}
        return done[knobs]

    return learned


def differ(a, b):
    return a.keys() != b.keys() or any(not torch.equal(a[name], b[name]) for name in a)


def test_every_knob_is_known_to_change_what_is_learned_or_not_to():
    kinds = [{name_of(k) for k in kind} for kind in (CHANGES, ROUNDS, KEEPS, ELSEWHERE)]
    assert set().union(*kinds) == knobs_of(Config, ModelConfig).keys()
    assert sum(map(len, kinds)) == len(knobs_of(Config, ModelConfig))  # each is of one kind


def test_the_same_knobs_learn_the_same(learned):
    assert not differ(learned(), learned("seed=1337"))  # which is the default


@pytest.mark.parametrize("words", CHANGES)
def test_a_knob_of_the_training_or_the_model_changes_what_is_learned(learned, words):
    knob, *beside = words.split()
    assert differ(learned(*beside), learned(*beside, knob))


@pytest.mark.parametrize("words", ROUNDS)
def test_a_knob_of_speed_changes_rounding_only(learned, words):
    knob, *beside = words.split()
    one, other = learned(*beside), learned(*beside, knob)
    assert differ(one, other)
    assert all(torch.allclose(one[name], other[name], atol=1e-5) for name in one)  # four steps go 200 times as far


def test_knobs_of_what_surrounds_the_training_change_not_one_bit_of_it(start, tmp_path, monkeypatch):
    sent = []
    monkeypatch.setitem(metrics.TRACKERS, "wandb", lambda folder, knobs: sent.append)
    states = []
    for out, knobs in (("run", []), ("other", KEEPS)):
        assert start("dropout=0.1", "max_iters=7", *knobs, out=out)[0] == 0
        state = checkpoint.load_newest(tmp_path / out)
        states.append(state["model"] | {f"{n}.{k}": t for n, s in state["optimizer"].items() for k, t in s.items()})
    assert sent and not differ(*states)


def test_the_rate_of_the_schedule_is_the_rate_told_and_used(build):
    run = build("learning_rate=3e-3", "min_lr=1e-3", "warmup_iters=2", "max_iters=6", "lr_schedule=linear",
                "weight_decay=0", "beta1=0", "beta2=0")  # so AdamW's step is the rate, up or down
    for rate in (1e-3, 2e-3, 3e-3, 2.5e-3, 2e-3, 1.5e-3):
        before = run.model.head.weight.detach().clone()
        _, told, _ = train.train_step(run)
        assert told == pytest.approx(rate)
        assert (run.model.head.weight - before).abs().max().item() == pytest.approx(rate, rel=1e-3)
