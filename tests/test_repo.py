"""The promises of the house: what stands at the root, which way imports point, that the loop is
visible, what is never called, and that every command of the README runs."""

import ast
import json
import re
import shlex
import subprocess
import sys
from collections import defaultdict
from functools import cache
from pathlib import Path

import pytest
import torch
from conftest import launch_here
from test_weights import save_hf

import data.prepare
import sample
import train
from exchange import gguf, hf
from lab import bench, compare, curves, timing, watch
from run import sharded

ROOT = Path(__file__).parent.parent
PROGRAMS = ("train", "sample", "model", "norm")  # the whole of the root
# From the ground up: a file may import from lower rooms and from its own, never from a higher one.
ROOMS = "norm model config text data weights run sample train lab/exchange".split()
INSTALLED = ("py-modules", "packages")
COMMANDS = {
    "train.py": train.main,
    "sample.py": sample.main,
    "data/prepare.py": data.prepare.main,
    "-m lab.bench": bench.main,
    "-m lab.compare": compare.main,
    "-m lab.curves": curves.main,
    "-m lab.watch": watch.main,
    "-m exchange.hf": hf.main,
    "-m exchange.gguf": gguf.main,
    "-m run.sharded": sharded.main,
}


@cache
def tracked():
    """Every file of the repository, as git lists them."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return [name for name in done.stdout.split("\n") if (ROOT / name).is_file()]


@cache
def trees():
    """name of a file outside tests -> its syntax tree."""
    names = [n for n in tracked() if n.endswith(".py") and not n.startswith("tests/")]
    return {name: ast.parse((ROOT / name).read_text(encoding="utf-8")) for name in names}


def room_of(name):
    """The index in ROOMS of a file or a module: 'run/log.py' and 'run.log' live in 'run'. What
    reads the published files, in docs, stands above all of them."""
    first = re.split(r"[./]", name)[0]
    if first == "docs":
        return len(ROOMS)
    return next((i for i, room in enumerate(ROOMS) if first in room.split("/")), None)


def imported(tree):
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        if isinstance(node, ast.ImportFrom):
            yield node.module


def test_four_programs_stand_at_the_root():
    there = {name for name in tracked() if name.endswith(".py") and "/" not in name}
    assert there == {f"{name}.py" for name in PROGRAMS}


def test_an_installation_in_place_finds_every_room():
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    listed = (ast.literal_eval(re.search(rf"^{n} = (.*)$", text, re.M)[1]) for n in INSTALLED)
    assert {name for names in listed for name in names} == {n for r in ROOMS for n in r.split("/")}


@pytest.mark.parametrize("command", COMMANDS)
def test_every_program_starts_and_ends_alike(command):
    """What start and run_command promise is tested in test_command.py."""
    name = command.removeprefix("-m ").removesuffix(".py").replace(".", "/") + ".py"
    text = (ROOT / name).read_text(encoding="utf-8")
    assert text.index("\n    start()\n") < re.search("\nimport (torch|numpy)", text).start()
    last = "sys.exit(run_command(main, sys.argv[1:]))"
    if name == "train.py":  # whose ranks end together
        last = "exit_with(main, sys.argv[1:])"
    assert text.endswith(f'if __name__ == "__main__":\n    {last}\n')


def test_imports_point_one_way():
    for name, tree in trees().items():
        for module in imported(tree):
            if (room := room_of(module)) is not None:
                assert room <= room_of(name), f"{name} imports {module}, which stands above it"


def test_a_folder_is_small_enough_to_know():
    sizes = defaultdict(int)
    for name in trees():
        if not name.startswith("config/"):  # where presets are data
            sizes[name.rpartition("/")[0]] += not name.endswith("__init__.py")
    assert max(sizes.values()) <= 14, sizes


def test_files_of_a_room_do_not_import_each_other_in_a_circle():
    names = {name.removesuffix(".py").replace("/", "."): tree for name, tree in trees().items()}
    names = {name.removesuffix(".__init__"): tree for name, tree in names.items()}
    needs = {name: set() for name in names}
    for name, tree in names.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom):
                inside = {f"{node.module}.{alias.name}" for alias in node.names}
                needs[name] |= (inside | {node.module}) & names.keys()
            if isinstance(node, ast.Import):
                needs[name] |= {alias.name for alias in node.names} & names.keys()
    done = set()
    while len(done) < len(names):
        ready = {name for name in names if name not in done and needs[name] - {name} <= done}
        assert ready, f"a circle among {names.keys() - done}"
        done |= ready


def test_model_and_norm_work_copied_out_alone(tmp_path):
    for name in ("model.py", "norm.py"):
        (tmp_path / name).write_text((ROOT / name).read_text())
    (tmp_path / "use.py").write_text(
        "import torch, model\n"
        "decoder = model.Decoder(model.ModelConfig(vocab_size=9, n_layer=1, n_embd=16, n_head=2))\n"
        "ids = torch.zeros(1, 3).long()\n"
        "decoder(ids, ids).backward()\n"
        "print(*decoder(ids).shape)\n"
    )
    done = subprocess.run([sys.executable, "use.py"], cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout == "1 3 9\n", done.stderr


def lines_of(tree, name):
    function = next(n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef) and n.name == name)
    return function.end_lineno - function.lineno + 1


def test_the_loop_and_the_step_each_fit_a_screen():
    tree = trees()["train.py"]
    assert max(lines_of(tree, name) for name in ("train", "train_step")) <= 60


def test_the_config_of_a_run_changes_nowhere_but_before_the_loop():
    changes = []
    for name, tree in trees().items():
        for function in (n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef)):
            for node in ast.walk(function):
                targets = [ast.unparse(t) for t in getattr(node, "targets", [])]
                if any(re.search(r"\brun\.config\b(?!\.)", target) for target in targets):
                    changes.append(f"{name}: {function.name}")
    assert set(changes) == {"train.py: warm_up", "train.py: fix_length"}


# Names that two files have on purpose.
SHARED_NAMES = {
    "main": "every command has one",
}


def test_a_public_name_has_one_meaning():
    homes = defaultdict(list)
    for name, tree in trees().items():
        for node in tree.body:
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_"):
                homes[node.name].append(name)
    twice = {name: files for name, files in homes.items() if len(files) > 1}
    assert {name: files for name, files in twice.items() if name not in SHARED_NAMES} == {}
    assert SHARED_NAMES.keys() <= twice.keys()


def test_nothing_runs_code_from_a_file():
    """No exec, eval, pickle and the like; torch.load only with weights_only=True."""
    modules = {"pickle", "marshal", "shelve", "dill", "joblib", "yaml", "runpy", "importlib"}
    calls = ("exec", "eval", "compile", "__import__", "os.system", "np.load")
    for name, tree in trees().items():
        used = set(imported(tree)) - {"importlib.util"}  # find_spec, which runs nothing
        assert not modules & {module.split(".")[0] for module in used}, name
        for node in ast.walk(tree):
            if isinstance(node, ast.Call):
                called = ast.unparse(node.func)
                settings = {k.arg: ast.unparse(k.value) for k in node.keywords}
                assert called not in calls, name
                assert settings.get("shell") != "True", name
                assert called != "torch.load" or settings.get("weights_only") == "True", name


def test_nothing_depends_on_what_python_removes_when_it_optimises():
    """python -O removes every assert, and -OO every docstring."""
    for name, tree in trees().items():
        for node in ast.walk(tree):
            assert not isinstance(node, ast.Assert), f"{name}:{node.lineno}"
            assert getattr(node, "attr", getattr(node, "id", "")) != "__doc__", name


def test_no_star_and_no_relative_imports():
    for name, tree in trees().items():
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom):
                assert node.level == 0 and node.names[0].name != "*", name


def test_every_module_and_every_public_class_says_what_it_is():
    for name, tree in trees().items():
        assert ast.get_docstring(tree), name
        for node in tree.body:
            if isinstance(node, ast.ClassDef) and not node.name.endswith("Tokenizer"):
                assert ast.get_docstring(node), f"{name}.{node.name}"


# Commands


@pytest.mark.parametrize("command", [c for c in COMMANDS if c.startswith("-m ")])
def test_a_command_in_a_folder_says_how_to_start_it(command, tmp_path):
    """Started as a file, from the root, its folder or elsewhere; and never with a traceback."""
    module = command.removeprefix("-m ")
    path = ROOT / (module.replace(".", "/") + ".py")
    for folder in (ROOT, path.parent, tmp_path):
        program = [sys.executable, str(path), "--help"]
        done = subprocess.run(program, cwd=folder, capture_output=True, text=True)
        assert done.returncode == 2, done.stderr
        assert done.stderr.count("\n") == 1 and f"python -m {module}" in done.stderr


# README.md


def readme():
    return (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_readme_is_short():
    assert len(readme().splitlines()) <= 200


def test_the_readmes_table_of_files_is_what_ls_shows():
    section = readme().split("\n## The files")[1].split("\n## ")[0]
    cells = re.findall(r"^\| (`.*?) \|", section, re.M)
    told = [name for cell in cells for name in re.findall(r"`([\w./]+)`", cell)]
    assert len(set(told)) == len(told) and all((ROOT / name).exists() for name in told)
    there = {f.split("/")[0] + ("/" if "/" in f else "") for f in tracked()}
    assert set(told) == there - {".ci/", ".gitignore", "README.md"}


@pytest.mark.parametrize("page", [n for n in tracked() if n.endswith(".md")])
def test_links_between_pages_lead_somewhere(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        path, _, anchor = target.partition("#")
        if path.startswith(("http:", "https:")):
            continue
        file = (ROOT / page).parent / path if path else ROOT / page
        assert file.exists(), f"{page} links to {target}"
        if anchor and file.suffix == ".md":
            heads = re.findall(r"^#+ (.*)$", file.read_text(encoding="utf-8"), re.M)
            anchors = {re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in heads}
            assert anchor in anchors, f"{page} links to {target}"


def readme_commands():
    """(command, arguments) of each line of a code block marked sh that starts one of our programs.
    Several ranks are what test_parallel.py is about; here one stands for them."""
    blocks = re.findall(r"^```sh\n(.*?)^```", readme(), re.M | re.S)
    for line in "".join(blocks).splitlines():
        words = shlex.split(line, comments=True)
        if words[:1] == ["torchrun"]:
            yield words[3], [word for word in words[4:] if not word.startswith("parallel=")]
        elif words[:2] == ["python", "-m"]:
            yield f"-m {words[2]}", words[3:]
        elif words[:1] == ["python"]:
            yield words[1], words[2:]


FEW = {
    "n_layer": 2,
    "n_head": 2,
    "n_kv_head": 1,
    "n_embd": 16,
    "n_hidden": 16,
    "block_size": 16,
    "batch_size": 4,
    "micro_batch_size": 2,
    "max_iters": 2,
    "warmup_iters": 1,
    "eval_iters": 2,
    "sample_tokens": 4,
    "vocab_size": 0,
    "dataset": "words",
    "device": "cpu",
    "dtype": "float32",
    "compile": "false",
    "resume": "auto",
    "steps": 2,
    "processes": 2,
    "seeds": 1,
}
LEFT_OUT = {  # of FEW, what the command does not know
    "train.py": ("steps", "processes", "seeds"),
    "-m lab.bench": ("processes", "seeds"),
    "-m lab.compare": ("resume", "sample_tokens"),
}
TUNE = (  # of FEW, what is left where weights decide the rest
    "batch_size micro_batch_size max_iters warmup_iters eval_iters sample_tokens device dtype "
    "compile resume"
).split()


def test_readme_commands_run_one_after_the_other(
    monkeypatch, tmp_path, data_folder, capsys, no_code
):
    """On a tiny model, a tiny text and the CPU, but otherwise to the letter and in their order."""
    prepare = data.prepare.prepare
    prepare([str(data_folder / "words.txt")], tmp_path / "data" / "words", vocab_size=300)
    monkeypatch.chdir(tmp_path)
    for module in ("run.setup", "run.evaluate"):
        monkeypatch.setattr(f"{module}.DATA", tmp_path / "data")
    monkeypatch.setattr(
        data.prepare,
        "prepare",
        lambda corpus, out, *options: prepare(corpus, tmp_path / "data" / out.name, *options),
    )
    (tmp_path / "my_folder").mkdir()
    for name in ("my.txt", *(f"my_folder/{i}.md" for i in range(20))):
        (tmp_path / name).write_text(f"some text of mine, {name}\n" * 200)
    talks = [{"prompt": f"What is {i}?", "completion": f"It is {i}."} for i in range(30)]
    (tmp_path / "talks.jsonl").write_text("".join(json.dumps(t) + "\n" for t in talks))
    save_hf(tmp_path / "my_llama", "GQA, llama3 scaling")
    prepare([str(tmp_path / "my.txt")], tmp_path / "my_llama" / "data", vocab_size=280)
    tokenizer = tmp_path / "my_llama" / "data" / "tokenizer.model"
    tokenizer.rename(tmp_path / "my_llama" / "tokenizer.model")
    monkeypatch.setattr(compare, "launch", launch_here)
    monkeypatch.setattr(timing, "time_elsewhere", timing.time_arms)
    ran = []
    for command, arguments in readme_commands():
        places = [
            str(ROOT / a) if a.startswith("config/") else a for a in arguments if "=" not in a
        ]
        knobs = dict(a.removeprefix("--").split("=", 1) for a in arguments if "=" in a)
        if places[:1] == ["norm"]:
            knobs |= {"shapes": "8x16", "kinds": "rmsnorm", "impls": "eager", "steps": "2"}
        elif "init_from" in knobs:
            knobs |= {name: FEW[name] for name in TUNE}
        elif command in LEFT_OUT and places[:1] != ["--list"]:
            few = {k: v for k, v in FEW.items() if k in knobs or k not in LEFT_OUT[command]}
            told = ("resume", "dataset")
            knobs |= few | {k: knobs[k] for k in told if k in knobs and "." in knobs[k]}
            knobs |= {"max_iters": 3} if "branch" in knobs else {}  # more than the trunk has done
        elif command == "sample.py":
            knobs |= {"eval_iters": 2} if "eval" in knobs else {"max_new_tokens": 3}
        words = [*places, *(f"{k}={v}" for k, v in knobs.items())]
        assert COMMANDS[command](words) == 0, (command, arguments)
        ran.append(command)
    assert set(ran) == COMMANDS.keys()

    text = (ROOT / "docs" / "python.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"^```python\n(.*?)^```", text, re.M | re.S)
    found = {}
    exec(block, found)
    config = found["model"].config
    assert len(found["hidden"]) == len(found["attention"]) == config.n_layer
    assert torch.allclose(found["attention"][0].sum(-1), torch.tensor(1.0))
    assert torch.equal(found["logits"], found["model"](found["ids"]))
    assert len(found["gains"]) == 2 * config.n_layer + 1
