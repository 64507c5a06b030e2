"""The promises of the house: which way imports point, how large files are, what is never called, what README says."""

import ast
import io
import re
import shlex
import subprocess
import sys
import tokenize
from pathlib import Path

from conftest import launch_here
from test_weights import save_hf

import bench
import compare
import data.prepare
import hf
import sample
import sharded
import train

ROOT = Path(__file__).parent.parent
SOURCES = sorted(p for p in [*ROOT.glob("*.py"), *ROOT.glob("config/*.py"), *ROOT.glob("data/*.py")])
TESTS = sorted((ROOT / "tests").glob("*.py"))
MAY_IMPORT = {  # module: what of ours it may import; a command may not be imported but where it says so
    "norm_triton": set(), "norm": {"norm_triton"}, "device": set(), "optim": {"device", "norm"}, "loss": {"norm"},
    "model": {"loss", "norm"}, "lora": {"model"}, "quantize": {"device", "model", "norm"},
    "cost": {"config.schema", "device", "lora", "loss", "model", "norm"},
    "data": set(), "data.tokenizer_json": set(), "data.tokenizer": {"data.tokenizer_json"}, "data.corpus": set(),
    "data.loader": {"data", "data.tokenizer"}, "data.prepare": {"data", "data.tokenizer", "data.corpus"},
    "config": set(), "config.schema": {"model"}, "checkpoint": {"config.schema", "cost", "model"},
    "lock": {"config.schema"}, "world": set(), "evaluate": {"data.loader", "device", "model", "world"},
    "sharded": {"checkpoint", "config.schema", "data", "lock", "world"},
    "parallel": {"checkpoint", "config.schema", "lora", "model", "norm", "optim", "world"},
    "weights": {"checkpoint", "config.schema", "data.tokenizer", "evaluate", "lora", "model"},
    "metrics": {"checkpoint", "config.schema", "cost", "data.loader", "device", "lora", "world"},
    "watch": {"config.schema", "device", "metrics", "model", "norm"},
    "generate": {"model"},
    "sample": {"config.schema", "data.tokenizer", "device", "evaluate", "generate", "model", "quantize", "weights"},
    "run": {"checkpoint", "config.schema", "cost", "data.corpus", "data.loader", "data.prepare", "data.tokenizer",
            "device", "metrics", "model", "optim", "parallel", "sharded", "weights", "world"},
    "train": {"checkpoint", "config.schema", "cost", "data.loader", "data.tokenizer", "device", "evaluate",
              "generate", "lock", "metrics", "model", "optim", "parallel", "run", "sample", "sharded", "watch",
              "world"},
    "report": {"metrics"},
    "compare": {"checkpoint", "config.schema", "device", "lock", "metrics", "model", "norm", "report", "run",
                "train", "watch"},
    "bench_norm": {"config.schema", "device", "model", "norm", "norm_triton"},
    "bench_beside": {"bench_norm", "config.schema", "cost", "data.loader", "data.prepare", "data.tokenizer", "device",
                     "hf", "llama2c", "metrics", "model", "run"},
    "bench_cost": {"bench_beside", "bench_norm", "config.schema", "cost", "data.corpus", "data.loader", "data.prepare",
                   "data.tokenizer", "device", "model", "run", "train"},
    "bench_plan": {"bench_beside", "bench_norm", "config.schema", "cost", "device", "lora", "model", "run"},
    "bench": {"bench_beside", "bench_cost", "bench_norm", "bench_plan", "config.schema", "cost", "device",
              "generate", "model", "run", "sample", "train"},
    "llama2c": {"checkpoint", "data.tokenizer", "model"},
    "hf_tokenizer": {"data.tokenizer", "data.tokenizer_json"},
    "hf": {"checkpoint", "config.schema", "cost", "data.prepare", "data.tokenizer", "device", "hf_tokenizer", "llama2c",
           "lock", "metrics", "model", "weights"},
}
LAB = {"bench.py", "bench_beside.py", "bench_cost.py", "bench_norm.py", "bench_plan.py", "compare.py", "report.py",
       "watch.py", "norm_triton.py"}  # of use beside a run
EXCHANGE = {"hf.py", "hf_tokenizer.py", "llama2c.py", "weights.py", "data/tokenizer_json.py", "lora.py", "quantize.py"}
RANKS = {"world.py", "parallel.py", "sharded.py"}  # several processes
PRESETS = {str(p.relative_to(ROOT)) for p in ROOT.glob("config/*.py")} - {"config/schema.py"}  # no code, but values


def name_of(path):
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def trees():
    return {name_of(p): ast.parse(p.read_text(encoding="utf-8")) for p in SOURCES}


def test_imports_point_one_way():
    modules = {n: t for n, t in trees().items() if not n.startswith("config.") or n == "config.schema"}
    assert modules.keys() == MAY_IMPORT.keys()
    for name, tree in modules.items():
        found = {a.name for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names}
        found |= {n.module for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)}
        assert found & MAY_IMPORT.keys() <= MAY_IMPORT[name], name


def test_the_arrows_have_no_circle():
    done = []
    while len(done) < len(MAY_IMPORT):
        ready = [m for m in MAY_IMPORT if m not in done and MAY_IMPORT[m] <= set(done)]
        assert ready, f"a circle among {MAY_IMPORT.keys() - set(done)}"
        done += ready


def test_model_norm_and_loss_work_copied_out_alone(tmp_path):
    for name in ("model.py", "norm.py", "loss.py"):
        (tmp_path / name).write_text((ROOT / name).read_text())
    (tmp_path / "use.py").write_text("import torch, model\n"
                                     "decoder = model.Decoder(model.ModelConfig(vocab_size=9))\n"
                                     "print(*decoder(torch.zeros(1, 3).long()).shape)\n")
    done = subprocess.run([sys.executable, "use.py"], cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout == "1 3 9\n", done.stderr


def lines_of_code(path):
    """Lines that hold code: neither blank, nor comment, nor docstring."""
    layout = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}
    rows = set()
    for token in tokenize.generate_tokens(io.StringIO(path.read_text(encoding="utf-8")).readline):
        docstring = token.type == tokenize.STRING and token.line.lstrip().startswith('"""')
        if token.type not in layout and not docstring:
            rows |= set(range(token.start[0], token.end[0] + 1))
    return len(rows)


def test_files_are_short():
    lines = {str(p.relative_to(ROOT)): len(p.read_text(encoding="utf-8").splitlines()) for p in SOURCES}
    assert {p: n for p, n in lines.items() if n > 400} == {}
    code = {str(p.relative_to(ROOT)): lines_of_code(p) for p in SOURCES}
    assert sum(n for p, n in code.items() if p not in LAB | EXCHANGE | RANKS | PRESETS) <= 3420
    assert sum(n for p, n in code.items() if p in LAB) <= 1950
    assert sum(n for p, n in code.items() if p in EXCHANGE) <= 1080
    assert sum(n for p, n in code.items() if p in RANKS) <= 550


def test_functions_are_short():
    lengths = sorted(n.end_lineno - n.lineno + 1 for t in trees().values() for n in ast.walk(t)
                     if isinstance(n, ast.FunctionDef))
    assert lengths[len(lengths) // 2] <= 13
    assert lengths[len(lengths) * 9 // 10] <= 30
    assert lengths[-1] <= 60


def test_nothing_runs_code_from_a_file():
    """No exec, eval, pickle and the like; torch.load only with weights_only=True."""
    modules = {"pickle", "marshal", "shelve", "dill", "joblib", "yaml", "runpy", "importlib"}
    for name, tree in trees().items():
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                assert not modules & {a.name.split(".")[0] for a in node.names}, name
            if isinstance(node, ast.ImportFrom):
                assert node.module.split(".")[0] not in modules, name
            if isinstance(node, ast.Call):
                called = ast.unparse(node.func)
                assert called not in ("exec", "eval", "compile", "__import__", "os.system", "np.load"), name
                settings = {k.arg: ast.unparse(k.value) for k in node.keywords}
                assert settings.get("shell") != "True", name
                assert called != "torch.load" or settings.get("weights_only") == "True", name


def test_no_star_and_no_relative_imports():
    for name, tree in trees().items():
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom):
                assert node.level == 0 and node.names[0].name != "*", name


def test_every_module_and_every_public_class_says_what_it_is():
    for name, tree in trees().items():
        assert ast.get_docstring(tree), name
        for node in tree.body:
            if isinstance(node, ast.ClassDef):
                assert ast.get_docstring(node) or node.name.endswith("Tokenizer"), f"{name}.{node.name}"


def test_each_module_has_its_test():
    tests = {p.stem.removeprefix("test_") for p in TESTS}
    wanted = {n.split(".")[-1] for n in MAY_IMPORT} - {"data", "config", "run"}  # run is what test_train starts with
    assert wanted <= tests


def readme():
    return (ROOT / "README.md").read_text(encoding="utf-8")


def test_readme_table_of_files_is_what_ls_shows():
    section = readme().split("\n## The files")[1].split("\n## ")[0]
    cells = re.findall(r"^\| (`.*?) \|", section, re.M)
    told = [name for cell in cells for name in re.findall(r"`([\w./]+)`", cell)]
    assert len(set(told)) == len(told) and all((ROOT / name).exists() for name in told)
    tracked = subprocess.run(["git", "ls-files", "--cached", "--others", "--exclude-standard"], cwd=ROOT,
                             capture_output=True, text=True, check=True).stdout.split()
    there = {f.split("/")[0] + ("/" if "/" in f else "") for f in tracked} - {".ci/", ".gitignore", "README.md"}
    assert {name for name in told if "/" not in name.rstrip("/")} == there
    first = re.findall(r"^\| `([\w./]+)`", section.split("**read these first**")[1].split("| **")[0], re.M)
    lines = sum(len((ROOT / name).read_text(encoding="utf-8").splitlines()) for name in first)
    assert f"about {round(lines, -2):,} lines" in readme()


def readme_commands():
    """(program, arguments) of each line of a code block marked sh that starts one of our programs. Several ranks are
    what test_parallel.py is about; here one stands for them."""
    blocks = re.findall(r"^```sh\n(.*?)^```", readme(), re.M | re.S)
    words = [shlex.split(line, comments=True) for block in blocks for line in block.splitlines()]
    words = [[a for a in w[1:] if not a.startswith(("--standalone", "--nproc"))] for w in words
             if w[:1] in (["python"], ["torchrun"])]
    return [(w[0], w[1:]) for w in words]


FEW = {"n_layer": 1, "n_head": 2, "n_kv_head": 1, "n_embd": 16, "n_hidden": 16, "block_size": 16, "batch_size": 4,
       "micro_batch_size": 2, "max_iters": 2, "warmup_iters": 1, "eval_iters": 2, "sample_tokens": 4, "vocab_size": 0,
       "dataset": "words", "device": "cpu", "dtype": "float32", "compile": "false", "resume": "auto", "steps": 2,
       "seeds": 1}
LEFT_OUT = {"train.py": ("steps", "seeds"), "bench.py": ("seeds",), "compare.py": ("resume", "sample_tokens")}
TUNE = ("batch_size", "micro_batch_size", "max_iters", "warmup_iters", "eval_iters", "sample_tokens", "device", "dtype",
        "compile", "resume")  # of FEW, where the weights decide the rest


def test_readme_commands_run_one_after_the_other(monkeypatch, tmp_path, data_folder, capsys, no_code):
    """On a tiny model, a tiny text and the CPU, but otherwise to the letter and in the order of the page."""
    prepare = data.prepare.prepare
    prepare([str(data_folder / "words.txt")], tmp_path / "data" / "words", vocab_size=300)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "stdin", None)
    for module in ("run", "evaluate"):
        monkeypatch.setattr(f"{module}.DATA", tmp_path / "data")
    monkeypatch.setattr(data.prepare, "prepare", lambda corpus, out, *options: prepare(
        corpus, tmp_path / "data" / out.name, *options))
    (tmp_path / "my_folder").mkdir()
    for name in ("my.txt", *(f"my_folder/{i}.md" for i in range(20))):
        (tmp_path / name).write_text(f"some text of mine, {name}\n" * 200)
    save_hf(tmp_path / "my_llama", "GQA, llama3 scaling")
    prepare([str(tmp_path / "my.txt")], tmp_path / "my_llama" / "data", vocab_size=280)
    (tmp_path / "my_llama" / "data" / "tokenizer.model").rename(tmp_path / "my_llama" / "tokenizer.model")
    monkeypatch.setattr(compare, "launch", launch_here)
    ran = []
    for program, arguments in readme_commands():
        places = [str(ROOT / a) if a.startswith("config/") else a for a in arguments if "=" not in a]
        knobs = dict(a.removeprefix("--").split("=", 1) for a in arguments if "=" in a)
        if places[:1] == ["norm"]:
            knobs |= {"shapes": "8x16", "kinds": "rmsnorm", "impls": "eager", "steps": "2"}
        elif "init_from" in knobs:
            knobs |= {name: FEW[name] for name in TUNE}
        elif program in ("train.py", "bench.py", "compare.py") and places[:1] != ["watch"] and "--list" not in places:
            few = {k: v for k, v in FEW.items() if k in knobs or k not in LEFT_OUT[program]}
            knobs |= few | {name: knobs[name] for name in ("resume", "dataset") if name in knobs and "." in knobs[name]}
        elif program == "sample.py":
            knobs |= {"eval_iters": 2} if "eval" in knobs else {"max_new_tokens": 3}
        main = {"train.py": train.main, "sample.py": sample.main, "bench.py": bench.main, "compare.py": compare.main,
                "data/prepare.py": data.prepare.main, "hf.py": hf.main, "sharded.py": sharded.main}[program]
        assert main([*places, *(f"{k}={v}" for k, v in knobs.items())]) == 0, (program, arguments)
        ran.append(program)
    assert {"train.py", "sample.py", "bench.py", "compare.py", "data/prepare.py", "hf.py", "sharded.py"} == set(ran)
