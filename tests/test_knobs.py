"""What each knob does to what is learned: it changes it, or only how it is rounded, or not one bit.

A knob that is forgotten somewhere on its way from the command line into the training fails here.
"""

import pytest
import torch
from conftest import ROOT, SMALL, prepare_words, tracker_to

import train
from config.schema import Config, knobs_of
from model import ModelConfig
from run import log
from run.setup import read_config, set_up
from weights import checkpoint

# knob=another value than usual. BASE stands for a run, OTHER for another data set.
CHANGES = (
    "seed=5 dataset=OTHER init_from=BASE batch_size=2 max_iters=6 dtype=bfloat16 "
    "optimizer=muon learning_rate=2e-3 embed_lr=2 min_lr=1e-4 lr_schedule=linear warmup_iters=1 "
    "weight_decay=0 gain_decay=0.5 beta1=0.8 beta2=0.9 grad_clip=0.01 skip_spikes=6 "
    "centred_writers=true "
    "n_layer=1 n_head=1 n_kv_head=1 n_embd=16 head_dim=8 ffn=geglu n_hidden=32 block_size=16 "
    "vocab_size=20 tie_embeddings=true dropout=0.1 norm=layernorm norm_pos=post qk_norm=true "
    "norm_eps=1e-3 embed_scale=sqrt rope_theta=500000 rope_scaling=llama3"
).split()
CHANGES_BESIDE = (  # the same, and which knobs must be set beside it
    ("seed=5", "init_from=BASE"),
    ("lora_rank=3", "init_from=BASE lora_rank=2"),
    ("lora_alpha=1", "init_from=BASE lora_rank=2"),
    ("embed_lr=2", "optimizer=muon"),
    ("weight_decay=0", "optimizer=muon"),
    ("muon_momentum=0.8", "optimizer=muon"),
    ("decay_fraction=0.75", "lr_schedule=wsd"),
    ("prms_p=0.5", "norm=prmsnorm"),
    ("norm=ssnorm", "n_layer=1"),
    ("norm_pos=lns", "n_layer=2"),
    ("norm_pos=mix", "n_layer=2"),
    ("norm_pos=final", "n_layer=2"),
    ("induction_init=true", "n_layer=2"),
    ("norm_alpha=0.25", "norm=dyt"),
    ("rope_factor=4", "rope_scaling=llama3"),
    ("rope_low_freq=0.5", "rope_scaling=llama3"),
    ("rope_high_freq=8", "rope_scaling=llama3"),
    ("rope_original_context=4096", "rope_scaling=llama3"),
    ("stream_dtype=bfloat16", "dtype=bfloat16"),
)
ROUNDS = (("micro_batch_size=2", ""), ("norm_impl=fused", "norm=layernorm"))
KEEPS = (  # sharded does nothing with one rank
    "resume=auto eval_interval=2 eval_iters=2 log_interval=3 watch=true save_interval=3 keep=9 "
    "keep_every=3 sample_prompt=the sample_tokens=3 sample_interval=2 tracker=wandb "
    "profile=2 sharded=false activation_checkpointing=true"
).split()
# test_train.py, test_parallel.py, test_minutes.py, test_branch.py, test_documents.py, test_chat.py,
# test_taper.py, test_threads.py
ELSEWHERE = (
    "out_dir device threads compile parallel minutes branch doc_mask doc_windows answers_only "
    "taper_start taper_end"
).split()


def name_of(knob):
    return knob.partition("=")[0]


@pytest.fixture(scope="module")
def command_line(tmp_path_factory, data_folder):
    """command_line('key=value', ...) is that of a very small run; BASE began with another seed."""
    folder = tmp_path_factory.mktemp("knobs")
    prepare_words(folder, "other", seed=1)

    def command_line(*knobs):
        usual = [*SMALL, "batch_size=4", "max_iters=5"]
        usual += [f"dataset={data_folder / 'words'}", f"out_dir={folder / 'run'}"]
        words = {name_of(knob): knob for knob in (*usual, *knobs)}  # the last one of a name wins
        places = {"=BASE": f"={folder / 'base'}", "=OTHER": f"={folder / 'other'}"}
        for place, path in places.items():
            words = {name: word.replace(place, path) for name, word in words.items()}
        return [str(ROOT / "config" / "tiny.py"), *words.values()]

    assert train.main(command_line("out_dir=BASE", "seed=7", "max_iters=2")) == 0
    return command_line


@pytest.fixture(scope="module")
def learned(command_line):
    """learned('key=value', ...): name -> weights after four steps, each of which is a spike for
    skip_spikes.
    """
    done = {}

    def learned(*knobs):
        if knobs not in done:
            run = set_up(read_config(command_line(*knobs)))
            run.grad_norms = [1e-6] * 64
            for _ in range(4):
                train.train_step(run)
            trained = ((n, p) for n, p in run.model.named_parameters() if p.requires_grad)
            done[knobs] = {name: p.detach() for name, p in trained}
        return done[knobs]

    return learned


def differ(a, b):
    return a.keys() != b.keys() or any(not torch.equal(a[name], b[name]) for name in a)


def test_every_knob_is_of_exactly_one_kind():
    changes = [*CHANGES, *(knob for knob, _ in CHANGES_BESIDE)]
    kinds = (changes, [knob for knob, _ in ROUNDS], KEEPS, ELSEWHERE)
    names = [name for kind in kinds for name in {name_of(knob) for knob in kind}]
    assert sorted(names) == sorted(knobs_of(Config, ModelConfig))


def test_the_same_knobs_learn_the_same(learned):
    assert not differ(learned(), learned("seed=1337"))  # the default


@pytest.mark.parametrize("knob, beside", [*((knob, "") for knob in CHANGES), *CHANGES_BESIDE])
def test_a_knob_of_the_training_or_the_model_changes_what_is_learned(learned, knob, beside):
    assert differ(learned(*beside.split()), learned(*beside.split(), knob))


@pytest.mark.parametrize("knob, beside", ROUNDS)
def test_a_knob_of_speed_changes_rounding_only(learned, knob, beside):
    one, other = learned(*beside.split()), learned(*beside.split(), knob)
    assert differ(one, other)
    for name in one:  # four steps move a weight 200 times as far as this
        assert torch.allclose(one[name], other[name], atol=1e-5)


def test_knobs_of_what_surrounds_the_training_change_not_one_bit_of_it(
    start, tmp_path, monkeypatch
):
    sent, states = [], []
    monkeypatch.setitem(log.TRACKERS, "wandb", lambda folder, knobs: tracker_to(sent))
    for out, knobs in (("run", []), ("other", KEEPS)):
        assert start("dropout=0.1", "max_iters=7", *knobs, out=out)[0] == 0
        state = checkpoint.load_newest(tmp_path / out)
        moments = {
            f"{name}.{moment}": tensor
            for name, moments in state["optimizer"].items()
            for moment, tensor in moments.items()
        }
        states.append(state["model"] | moments)
    assert sent and not differ(*states)


def test_the_rate_of_the_schedule_is_the_rate_told_and_used(command_line):
    # Without decay and without averages, a step of AdamW moves each weight by the learning rate.
    knobs = "weight_decay=0 beta1=0 beta2=0 learning_rate=3e-3 min_lr=1e-3 max_iters=6".split()
    run = set_up(read_config(command_line(*knobs, "warmup_iters=2", "lr_schedule=linear")))
    for rate in (1e-3, 2e-3, 3e-3, 2.5e-3, 2e-3, 1.5e-3):
        before = run.model.head.weight.detach().clone()
        _, told, _ = train.train_step(run)
        assert told == pytest.approx(rate)
        assert (run.model.head.weight - before).abs().max().item() == pytest.approx(rate, rel=1e-3)
