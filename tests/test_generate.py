"""generate: its cache is exact, compiled too, and its draws follow the distribution."""

import copy
import re
from functools import partial
from itertools import pairwise

import pytest
import torch
from torch._dynamo.utils import counters
from torch._inductor.utils import run_and_get_code

from model import Decoder, ModelConfig
from sample import (
    KVCache,
    compiled_next_ids,
    draw_ids,
    empty_cache,
    generate,
    logits_to_probabilities,
    penalise,
    window_start,
)
from weights.quantize import sum_matrices

TINY = dict(n_layer=2, n_head=4, n_embd=16, n_hidden=24, block_size=8, vocab_size=11)


def tiny(**knobs) -> Decoder:
    """A small model whose weights are large enough that its distributions are far from flat."""
    model = Decoder(ModelConfig(**TINY | knobs))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.4, generator=generator)
    return model.eval()


def ids_of(model: Decoder, *arguments, **options) -> list[list[int]]:
    return list(generate(model, *arguments, **options))


def first_text(model: Decoder, *arguments, **options) -> list[int]:
    return [ids[0] for ids in generate(model, *arguments, **options)]


def greedy_without_cache(model: Decoder, ids: list[int], count: int) -> list[int]:
    ids = list(ids)
    for _ in range(count):
        seen = ids[window_start(len(ids), model.config.block_size) :]
        ids.append(int(model(torch.tensor([seen]))[0, -1].argmax()))
    return ids[-count:]


def record_logits(model: Decoder) -> list[torch.Tensor]:
    """A list that gets the logits of each later call, [B, V]."""
    found, logits = [], model.logits
    model.logits = lambda x: (found.append(logits(x)), found[-1])[1]
    return found


def chi_square(counts: torch.Tensor, probabilities: torch.Tensor) -> float:
    """Pearson's statistic in standard deviations above its mean."""
    expected = probabilities * counts.sum()
    freedom = counts.numel() - 1
    return float((((counts - expected) ** 2 / expected).sum() - freedom) / (2 * freedom) ** 0.5)


# The cache and the window


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("block_size", [1, 7, 8])
def test_cached_logits_equal_uncached_ones_before_and_far_past_the_block_size(kv_heads, block_size):
    model, prompt = tiny(n_kv_head=kv_heads, block_size=block_size), [3, 1, 4]
    found = record_logits(model)
    new = ids_of(model, prompt, 40, num_samples=2, seed=5)
    assert len(found) == 40
    for row in range(2):
        ids = prompt + [ids[row] for ids in new]
        for step, logits in enumerate(found[:40]):
            end = len(prompt) + step
            window = ids[window_start(end, block_size) : end]
            wanted = model(torch.tensor([window]))[0, -1]
            torch.testing.assert_close(logits[min(row, len(logits) - 1)], wanted, atol=1e-5, rtol=0)


@pytest.mark.parametrize("length", [1, 8, 9, 30])
def test_greedy_ids_equal_those_without_a_cache(length):
    model, prompt = tiny(n_kv_head=2), [(7 * i) % 11 for i in range(length)]
    ids = first_text(model, prompt, 30, temperature=0.0)
    assert ids == greedy_without_cache(model, prompt, 30)
    assert len(set(ids)) > 2


def test_a_text_continued_in_two_parts_is_the_same_text():
    model = tiny()
    whole = first_text(model, [5], 25, temperature=0.0)
    assert first_text(model, [5] + whole[:13], 12, temperature=0.0) == whole[13:]


def test_only_the_newest_token_is_computed_until_the_window_is_full():
    model, lengths = tiny(), []
    model.embed.register_forward_hook(lambda _, inputs, y: lengths.append(inputs[0].shape[1]))
    ids_of(model, [1, 2, 3], 14)
    assert lengths == [3, 1, 1, 1, 1, 1, 5, 1, 1, 1, 5, 1, 1, 1]


def test_the_window_drops_its_older_half_when_it_is_full():
    lengths = (0, 1, 8, 9, 12, 13, 16, 17)
    assert [window_start(length, 8) for length in lengths] == [0, 0, 0, 4, 4, 8, 8, 12]
    assert [window_start(length, 1) for length in (1, 2, 3)] == [0, 1, 2]
    for block_size in range(1, 10):
        for length in range(block_size, 50):
            assert block_size // 2 < length - window_start(length, block_size) <= block_size


def test_under_autocast_keys_stay_in_float32_on_a_cpu_and_the_cache_is_still_exact():
    model, dtypes = tiny(), []
    found = record_logits(model)
    handle = model.blocks[0].register_forward_hook(
        lambda _, inputs, y: dtypes.append(inputs[3].keys[0].dtype)
    )
    with torch.autocast("cpu", torch.bfloat16):
        ids = [3] + first_text(model, [3], 7)
        handle.remove()
        assert dtypes == [torch.float32] * 7
        for length, logits in enumerate(found[:7], 1):
            wanted = model(torch.tensor([ids[:length]]))[0, -1]
            torch.testing.assert_close(logits[0], wanted, atol=0.05, rtol=0.05)


# One cache for several texts

# Each text has four tokens. Its prompt is: so many tokens of the prompt and the text before it, and
# new ones. Last is how many tokens must be read.
TURNS = {
    "the first prompt": (0, [3, 1, 4], 3),
    "all that came, and more": (7, [1, 5], 3),  # of a text's last token there are no keys
    "a text that was cut, and more": (11, [9, 2], 2),
    "the same again": (13, [], 1),
    "a beginning": (4, [], 1),
    "something else": (0, [2, 7, 1, 8, 2, 8], 6),
    "less than half is the same": (1, [6, 6, 6, 6], 5),
    "more than the window of 16": (9, [1, 2, 3, 4, 5, 6, 7, 8, 9], 10),
    "the window that has moved, and more": (22, [5], 2),
    "the window that moved within the text": (27, [], 1),
}
GREEDY, DRAWN = {"temperature": 0.0}, {"num_samples": 3, "top_k": 5, "vocab_size": 9}


@pytest.mark.parametrize(
    "options",
    [GREEDY, {"seed": 4}, DRAWN, DRAWN | {"compile": True}],
    ids=["greedy", "drawn", "samples", "compiled"],
)
def test_texts_that_share_a_cache_are_those_of_new_caches_and_read_less(
    options, use_backend, monkeypatch, capsys
):
    """And its memory stays where it is: on CUDA, a graph is recorded for each place."""
    use_backend("eager")
    layers = 1 if options.get("compile") else 2  # to trace a layer takes long
    model, read, keep = tiny(n_layer=layers, n_kv_head=2, block_size=16), [], KVCache.keep
    cache, ids, memory = empty_cache(model, options.get("num_samples", 1)), [], []
    for turn, (kept, more, unread) in TURNS.items():
        prompt = ids[:kept] + more
        wanted = ids_of(model, prompt, 4, **options)
        with monkeypatch.context() as patch:
            patch.setattr(
                KVCache, "keep", lambda c, i: (n := keep(c, i), read.append(len(i) - n))[0]
            )
            assert ids_of(model, prompt, 4, cache=cache, **options) == wanted, turn
        assert read[-1] == unread, turn
        ids = prompt + [new[0] for new in wanted]
        memory.append((cache.keys[0].shape[2], cache.keys[0].data_ptr()))
    assert all((a[0] == b[0]) == (a[1] == b[1]) for a, b in pairwise(memory))
    assert memory[2][0] == memory[-1][0] == 16
    assert capsys.readouterr().err == ""  # the compiler was not given up


def test_a_cache_for_another_number_of_samples_is_refused():
    model = tiny()
    with pytest.raises(ValueError, match="cache is for num_samples=1, not 2: make another"):
        ids_of(model, [1], 3, num_samples=2, cache=empty_cache(model, 1))


@pytest.mark.parametrize("place", ["blocks.0", "blocks.1", "norm"])
@pytest.mark.parametrize("call", [1, 2, 11, 15, 16])
def test_after_an_interrupt_the_cache_holds_what_it_says(place, call):
    """In the first prompt, its text, the window that moves, the second prompt and its text; after
    one layer or all of them."""
    model = tiny(block_size=12)
    cache, calls = empty_cache(model, 2), []

    def interrupt(*_):
        calls.append(place)
        if len(calls) == call:
            raise KeyboardInterrupt

    handle = model.get_submodule(place).register_forward_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        for prompt in ([3, 1, 4], [3, 1, 4, 1, 5]):
            ids_of(model, prompt, 14, num_samples=2, cache=cache)
    handle.remove()
    for prompt in ([3, 1, 4], [3, 1, 4, 1, 5, 9], cache.ids[: cache.length] + [2]):
        found = ids_of(model, prompt, 4, num_samples=2, cache=copy.deepcopy(cache))
        assert found == ids_of(model, prompt, 4, num_samples=2)


# The draws


def test_the_same_seed_gives_the_same_ids_and_all_samples_and_seeds_differ():
    model = tiny()
    first, again, other = (ids_of(model, [1], 20, num_samples=3, seed=seed) for seed in (3, 3, 4))
    assert first == again
    assert len({*zip(*first, strict=True), *zip(*other, strict=True)}) == 6


def test_first_tokens_follow_the_distribution():
    model, prompt = tiny(), [3, 1]
    options = {"temperature": 1.5, "top_k": 8, "top_p": 0.97, "min_p": 0.01}
    (drawn,) = ids_of(model, prompt, 1, num_samples=20_000, seed=1, **options)
    with torch.no_grad():
        wanted = logits_to_probabilities(model(torch.tensor([prompt]))[:, -1], **options)[0]
    counts = torch.bincount(torch.tensor(drawn), minlength=11).float()
    kept = wanted > 0
    assert 3 < kept.sum() < 9 and not counts[~kept].any()
    assert abs(chi_square(counts[kept], wanted[kept])) < 4


def test_pairs_of_tokens_follow_the_joint_distribution_and_samples_are_independent():
    model = tiny(vocab_size=4)
    drawn = ids_of(model, [2], 2, num_samples=20_000, temperature=2.0)
    first, second = (torch.tensor(ids) for ids in drawn)
    counts = torch.bincount(first * 4 + second, minlength=16).float()
    with torch.no_grad():
        after = [(model(torch.tensor([ids]))[0, -1] / 2).softmax(-1) for ids in ([2], [2, 0])]
        after += [(model(torch.tensor([[2, a]]))[0, -1] / 2).softmax(-1) for a in (1, 2, 3)]
    wanted = torch.cat([after[0][a] * after[1 + a] for a in range(4)])
    assert abs(chi_square(counts, wanted)) < 4
    neighbours = torch.bincount(first[:-1] * 4 + first[1:], minlength=16).float()
    alone = torch.bincount(first, minlength=4) / len(first)
    assert abs(chi_square(neighbours, torch.outer(alone, alone).flatten())) < 4


def test_padded_ids_are_never_drawn():
    model = tiny()
    wild = {"num_samples": 20, "temperature": 50.0}
    assert max(map(max, ids_of(model, [1], 30, **wild))) == 10
    for options in (wild, {"temperature": 0.0}, wild | {"top_k": 11}):
        assert max(map(max, ids_of(model, [1], 30, vocab_size=3, **options))) <= 2


def test_a_repetition_penalty_spreads_greedy_ids():
    model = tiny()
    without, spread = (
        first_text(model, [1], 11, temperature=0.0, repetition_penalty=p) for p in (1.0, 100.0)
    )
    assert len(set(spread)) > len(set(without))


def test_generate_leaves_no_trace_in_the_callers_torch():
    model, before, graphs = tiny().train(), torch.get_rng_state(), []
    handle = model.norm.register_forward_hook(lambda _, inputs, y: graphs.append(y.requires_grad))
    tokens = generate(model, [1], 5, seed=9)
    next(tokens)
    assert torch.is_grad_enabled() and not torch.is_inference_mode_enabled()
    list(tokens)
    handle.remove()
    assert graphs == [False] * 5
    assert torch.equal(before, torch.get_rng_state())
    assert torch.is_grad_enabled() and not torch.is_inference_mode_enabled()
    model.train()(torch.tensor([[1, 2]]), torch.tensor([[2, 3]])).backward()


def test_dropout_is_off_while_sampling():
    model = tiny(dropout=0.5)
    texts = [first_text(model.train(), [1], 20, temperature=0.0) for _ in range(2)]
    assert texts[0] == texts[1]


def test_logits_that_are_not_finite_are_named():
    model = tiny()
    model.head.weight.data[2, 0] = float("nan")
    with pytest.raises(FloatingPointError, match="model's logits hold NaN"):
        ids_of(model, [1], 5)


# Compiled


@pytest.fixture
def use_backend(monkeypatch):
    """use_backend("eager") sends what is compiled from here on to that backend: making code each
    time would take minutes. Nothing is compiled yet.
    """

    def use(name: str) -> None:
        monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=name))

    torch._dynamo.reset()
    compiled_next_ids.cache_clear()
    yield use
    torch._dynamo.reset()
    compiled_next_ids.cache_clear()


FILTERS = {"top_k": 5, "top_p": 0.9, "min_p": 0.01, "repetition_penalty": 1.3, "vocab_size": 9}


@pytest.mark.parametrize(
    "knobs, options",
    [
        ({"n_kv_head": 2}, {"temperature": 0.0}),
        ({"n_kv_head": 2}, {"num_samples": 2} | FILTERS),
        ({"qk_norm": True, "norm": "layernorm", "ffn": "gelu"}, {"num_samples": 3, "seed": 4}),
    ],
    ids=["grouped-greedy", "grouped-filtered", "layernorm-samples"],
)
def test_one_graph_gives_the_same_ids_at_every_length_before_and_past_the_block_size(
    knobs, options, use_backend
):
    use_backend("eager")
    model, before = tiny(n_layer=1, **knobs), counters["stats"]["unique_graphs"]
    for prompt in ([3], [1, 2, 3], list(range(9))):
        ids = ids_of(model, prompt, 20, compile=True, **options)
        assert ids == ids_of(model, prompt, 20, **options)
    assert counters["stats"]["unique_graphs"] == before + 1


def test_the_guards_of_the_compiled_step_are_evaluated_for_the_first_token_of_a_cache_alone(
    monkeypatch,
):
    skipped = []

    def skips() -> bool:
        return torch._dynamo.eval_frame._stance.skip_guard_eval_unsafe

    def watched(function, **_):
        def run(*arguments):
            skipped.append(skips())
            return function(*arguments)

        return run

    monkeypatch.setattr(torch, "compile", watched)
    compiled_next_ids.cache_clear()
    ids_of(tiny(n_layer=1), [3], 4, compile=True)
    compiled_next_ids.cache_clear()
    assert skipped == [False, True, True] and not skips()


def test_texts_of_several_models_that_are_made_in_turn_stay_apart(use_backend):
    use_backend("eager")
    shapes = ({}, {}, {"n_embd": 32}, {"n_layer": 2})  # the first two share their code
    models = [tiny(**{"n_layer": 1, "block_size": 16} | shape) for shape in shapes]
    models[1].embed.weight.data *= -1
    alone = [ids_of(model, [3], 12) for model in models]
    together = zip(*(generate(model, [3], 12, compile=True) for model in models), strict=True)
    assert list(together) == list(zip(*alone, strict=True))
    assert alone[0] != alone[1]


@pytest.mark.parametrize(
    "block_size, sizes, graphs",
    [
        (64, [(2, 17), (2, 25), (2, 30)], 1),  # a small change of the size compiles nothing anew
        (4096, [(2**i - 2, 2) for i in range(2, 13)], 2),  # one size is compiled for, then any
    ],
    ids=["near sizes", "all sizes"],
)
def test_few_graphs_serve_texts_of_all_sizes(block_size, sizes, graphs, use_backend):
    use_backend("eager")
    model, before = tiny(n_layer=1, block_size=block_size), counters["stats"]["unique_graphs"]
    for prompt, count in sizes:
        ids = ids_of(model, [1] * prompt, count, compile=True, seed=prompt)
        assert ids == ids_of(model, [1] * prompt, count, seed=prompt)
    assert 1 <= counters["stats"]["unique_graphs"] - before <= graphs


@pytest.mark.slow
def test_compiled_code_gives_the_same_ids_copies_no_keys_and_rotates_before_it_sums(use_backend):
    use_backend("inductor")
    model = sum_matrices(tiny(n_embd=64), torch.float32)
    ids, (code,) = run_and_get_code(ids_of, model, [3], 12, temperature=0.0, compile=True)
    assert ids == ids_of(model, [3], 12, temperature=0.0)
    inputs = re.findall(r"assert_size_stride\(arg\d+_1, \(1, 4, 8, 16\)", code)
    assert len(inputs) == 4  # two layers, keys and values
    assert "empty_strided_cpu((1, 4, 8, 16)" not in code
    loops = code.split("for(int64_t x")
    rotating = [loop for loop in loops if "%" in loop]  # it finds a channel's partner in its head
    assert rotating and not any("_vec = tmp_acc" in loop for loop in rotating)


# The arithmetic

SHARES = [0.5, 0.2, 0.2, 0.1]
LOGITS = torch.tensor([SHARES]).log()
FIRST, THREE = [1, 0, 0, 0], [5 / 9, 2 / 9, 2 / 9, 0]


@pytest.mark.parametrize(
    "options, wanted",
    [
        ({}, SHARES),
        ({"temperature": 0.5}, [25 / 34, 4 / 34, 4 / 34, 1 / 34]),
        ({"temperature": 0.0}, FIRST),
        ({"temperature": 1e-60}, FIRST),
        ({"temperature": 1e300}, [0.25, 0.25, 0.25, 0.25]),
        ({"top_k": 1}, FIRST),
        ({"top_k": 3}, THREE),
        ({"top_k": 4}, SHARES),
        ({"top_k": 99}, SHARES),
        ({"top_p": 1e-9}, FIRST),
        ({"top_p": 1e-320}, FIRST),  # which is 0 in fp32
        ({"top_p": 0.49}, FIRST),
        ({"top_p": 0.75}, THREE),
        ({"top_p": 0.95}, SHARES),
        ({"min_p": 0.3}, THREE),
        ({"min_p": 0.19}, SHARES),
        ({"min_p": 1.0}, FIRST),
        ({"temperature": 0.5, "min_p": 0.3}, FIRST),  # temperature is first: 4 < 0.3 * 25
        ({"top_k": 3, "top_p": 0.55}, FIRST),  # top_p sees what top_k left: 5/9 is enough
    ],
)
def test_probabilities_are_those_computed_by_hand(options, wanted):
    found = logits_to_probabilities(LOGITS, **options)
    torch.testing.assert_close(found, torch.tensor([wanted]).float())


def test_each_row_is_filtered_by_itself_and_the_logits_stay():
    logits = torch.stack((LOGITS[0], LOGITS[0].flip(0)))
    before = logits.clone()
    rows = logits_to_probabilities(logits, top_k=3, top_p=0.7, min_p=0.1)
    torch.testing.assert_close(rows[0].sort().values, rows[1].sort().values)
    assert rows.argmax(-1).tolist() == [0, 3]
    assert torch.equal(logits, before)


def test_extreme_logits_and_ties_give_probabilities_too():
    extreme = torch.tensor([[3e38, -3e38, 0.0]])
    assert logits_to_probabilities(extreme, temperature=0.5).tolist() == [[1, 0, 0]]
    assert logits_to_probabilities(torch.zeros(1, 3), temperature=0.0).tolist() == [[1, 0, 0]]
    equal = logits_to_probabilities(torch.zeros(2, 9), top_k=4)
    assert (equal > 0).sum(-1).tolist() == [4, 4]  # exactly k


DRAWN_FROM = torch.tensor([[0.0, 0.2, 0.0, 0.5, 0.3, 0.0]])


def test_each_id_is_drawn_as_often_as_its_probability_says_and_never_at_zero():
    uniform = torch.rand(100_000, 1, generator=torch.Generator().manual_seed(0))
    ids = draw_ids(DRAWN_FROM.expand(100_000, -1), uniform)
    shares = ids.bincount(minlength=6) / len(ids)
    assert torch.allclose(shares, DRAWN_FROM[0], atol=5e-3)
    assert not shares[DRAWN_FROM[0] == 0].any()


@pytest.mark.parametrize(
    "number, wanted", [(0.0, 1), (0.1999, 1), (0.2001, 3), (1 - 2**-24, 4), (1.0, 4)]
)
def test_a_draw_is_where_the_running_sum_passes_the_number(number, wanted):
    assert draw_ids(DRAWN_FROM, torch.tensor([[number]])).tolist() == [wanted]


def test_a_penalty_lowers_seen_logits_of_either_sign():
    logits = torch.tensor([[2.0, -2.0, 2.0, -2.0]])
    seen = torch.tensor([[True, True, False, False]])
    assert penalise(logits, seen, 2.0).tolist() == [[1.0, -4.0, 2.0, -2.0]]
    assert penalise(logits, seen, 1.0).tolist() == logits.tolist()
