"""lab.bench gpu runs whole on a CPU, survives parts that fail or hang, and judges what it finds."""

import json
import math
import re
import shlex
import time
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import ROOT

from lab import bench_gpu, gpu_parts
from lab.bench import BENCHES, TrainBench
from lab.bench_gpu import PARTS, figures_of, figures_table, what_is_missing
from lab.gpu_parts import Figure, GpuBench
from lab.measure import as_arguments, read_options
from run.machine import memory_estimate
from run.setup import read_config

ON_CARD = GpuBench(device="cuda:0", dataset="python")
A_FIGURE = json.dumps({"name": "speed", "value": 3.0})


# The table


def test_a_figure_is_ok_within_its_bounds_and_off_outside_and_never_ok_if_it_is_nan():
    cases = {
        Figure("a", 50.0, "%", low=50, source="wanted"): "at least 50, wanted  ok",
        Figure("a", 49.9, "%", low=50, source="wanted"): "at least 50, wanted  off",
        Figure("a", 2.5, "s", high=2, source="computed"): "at most 2, computed  off",
        Figure("a", 26.4, "GB", 25.08, 27.72, "simulated"): "25.1 to 27.7, simulated  ok",
        Figure("a", 2, "", 2, 2, "wanted"): "2, wanted  ok",
        Figure("a", math.nan, "nats", high=1, source="wanted"): "at most 1, wanted  off",
        Figure("a", 7.0, "%"): "%",
        Figure(note="failed: no"): "failed: no",
    }
    for figure, words in cases.items():
        assert figures_table([figure]).splitlines()[1].endswith(words)


def test_the_table_is_aligned_and_numbers_keep_three_digits():
    rows = [Figure("speed", 523187.4, "tokens/s", part="124m"), Figure("x", 0.00127, part="norm")]
    assert figures_table(rows).splitlines() == [
        "part  figure  measured  unit      expected  verdict",
        "124m  speed   523,187   tokens/s",
        "norm  x       0.00127",
    ]


# How a part is run


def shell(text):
    return ["sh", "-c", text]


def is_gone(pid):
    """Nobody may have waited for it, so it may be left as a zombie."""
    status = Path(f"/proc/{pid}/status")
    return not status.exists() or "State:\tZ" in status.read_text()


def test_a_part_over_its_limit_keeps_its_figures_and_is_killed_with_all_below_it(tmp_path):
    """torchrun starts its ranks in sessions of their own, as setsid does. The second sleep has lost
    the process that started it."""
    pids, quiet = tmp_path / "pids", "60 >/dev/null & echo $! >>"
    begin = f"echo '{A_FIGURE}'; setsid sleep {quiet}{pids}; (sleep {quiet}{pids})"
    first, last = figures_of("slow", shell(f"{begin}; pwd >>{pids}; sleep 60"), 1)
    assert (first.part, first.name, first.value) == ("slow", "speed", 3.0)
    assert last.note == "failed: it took more than 1 s"
    *below, work = pids.read_text().split()
    end = time.monotonic() + 10
    while not all(map(is_gone, below)):
        assert time.monotonic() < end
        time.sleep(0.01)
    assert len(below) == 2 and not Path(work).exists()


def test_a_part_that_fails_keeps_its_figures_and_its_last_words_become_one_line():
    command = shell(f"echo '{A_FIGURE}'; printf 'Traceback\\nCUDA error: gone\\n\\n' >&2; exit 3")
    first, last = figures_of("bad", command, 60)
    assert first.value == 3.0 and last.note == "failed: it ended with 3: CUDA error: gone"
    assert figures_table([last]).count("\n") == 1


# The whole command


@pytest.mark.slow
def test_on_a_cpu_a_part_trains_a_tiny_model_and_what_needs_a_card_is_named(measure, tmp_path):
    code, out, err = measure("gpu", "parts=124m,memory", "device=cpu", "dataset=words")
    assert code == 0, err
    assert "cpu, tiny: small models, and no verdict on the speed of a card" in out
    table = out.split("\n\n")[1]
    assert re.search(r"^124m +loss at step 1 .* ln V +ok$", table, re.M)
    assert re.search(r"^124m +speed, eager +[\d,]+ +tokens/s$", table, re.M)
    assert re.search(r"^124m +of products +[\d.e-]+ +%$", table, re.M)  # without a verdict
    assert re.search(r"^memory +not here: it needs CUDA$", table, re.M)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_on_a_cpu_every_part_does_what_it_says(measure, data_folder, monkeypatch):
    # The limits are those of a card, and the machine of the tests may be busy.
    patient = {name: replace(part, seconds=600) for name, part in PARTS.items()}
    monkeypatch.setattr(bench_gpu, "PARTS", patient)
    text = f"text={data_folder / 'words.txt'}"
    code, out, err = measure("gpu", "device=cpu", "dataset=words", text)
    assert code == 0, err
    lines = out.split("\n\n")[1].splitlines()[1:]
    assert {line.split()[0] for line in lines} == PARTS.keys()
    bad = [line for line in lines if re.search(r"failed:| off$", line)]
    absent = [line.split()[0] for line in lines if "not here:" in line]
    assert bad == [] and absent == ["memory", "nanogpt"]


def test_the_parts_of_one_card_take_at_most_eight_minutes():
    one = [part for part in PARTS.values() if part.needs in ("", "CUDA")]
    assert sum(part.seconds for part in one) <= 480 and len(one) == 10


def test_what_a_part_needs_is_missing_only_where_it_is(monkeypatch):
    with_all = replace(ON_CARD, nanogpt="folder", text="file")
    cpu, mps = (replace(ON_CARD, device=device) for device in ("cpu", "mps"))
    needs = {part.needs for part in PARTS.values()} - {""}
    for count, told in ((1, {"several devices"}), (2, set())):
        monkeypatch.setattr("torch.cuda.device_count", lambda count=count: count)
        assert {need for need in needs if what_is_missing(need, with_all)} == told
    assert {need for need in needs if what_is_missing(need, mps)} == needs
    assert {need for need in needs if what_is_missing(need, cpu)} == needs - {"several devices"}


class Asked(Exception):
    """Stands for what would need a card."""


@pytest.fixture
def asked_by(monkeypatch, tmp_path, data_folder):
    """asked_by(part): the Config of the first run that a part builds on a card, or the words of the
    first program that it starts there."""

    def ask(what, *_):
        raise Asked(what)

    def asked(part):
        with pytest.raises(Asked) as found:
            list(PARTS[part].measure(replace(ON_CARD, text=str(data_folder / "words.txt"))))
        return found.value.args[0]

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    for name in ("fresh_run", "output_of"):
        monkeypatch.setattr(gpu_parts, name, ask)
    return asked


@pytest.mark.parametrize("part", "124m 350m 1b norm muon".split())
def test_on_a_card_a_part_builds_the_whole_preset(asked_by, part):
    config = asked_by(part)
    assert config.device == "cuda:0" and config.model.vocab_size == 50304


@pytest.mark.parametrize("part", "memory resume shakespeare ranks".split())
def test_on_a_card_a_part_starts_train_py_with_knobs_that_it_takes(asked_by, part):
    _, program, *words = map(str, asked_by(part))
    config = read_config(words)
    assert Path(program).name == "train.py" and config.device.startswith("cuda")
    assert config.model.n_embd >= 384  # not the tiny one


def test_on_a_card_sampling_is_measured_with_options_that_the_bench_takes(asked_by):
    _, _, module, what, *words = map(str, asked_by("sample"))
    options, places, knobs = read_options(BENCHES[what][1], words)
    assert module == "lab.bench" and options.compile
    assert read_config([*places, *as_arguments(knobs)]).model.n_embd == 2048


def test_a_speed_is_held_against_a_goal_on_a_card_alone():
    assert ON_CARD.wanted(low=50) == {"low": 50}
    assert GpuBench(device="cpu").wanted(low=50) == {}


# docs/speed.md


def test_the_trainings_that_docs_propose_for_a_card_fit_80_gb():
    """lab.bench train holds two runs of ours at once, and transformers' in two more processes, each
    of which was simulated to take up to twice our memory."""
    text = (ROOT / "docs" / "speed.md").read_text(encoding="utf-8")
    commands = re.findall(r"python -m lab\.bench train (config/llama_[^\n`#]+)", text)
    for command in commands:
        options, places, knobs = read_options(TrainBench, shlex.split(command))
        config = read_config([*places, *as_arguments(knobs)])
        config = replace(config, device="cuda:0", dtype="bfloat16")
        sizes = [m for m in range(1, config.batch_size + 1) if config.batch_size % m == 0]
        fit = [m for m in sizes if sum(memory_estimate(config, m)) < 0.8 * 80e9]
        fixed, activations = memory_estimate(config, config.micro_batch_size or max(fit))
        needed = 2 * fixed + activations
        if options.beside == "transformers":
            needed += 2 * 2 * (fixed + activations)
        assert needed < 80e9, f"{command} needs about {needed / 1e9:.0f} GB"
    assert commands
