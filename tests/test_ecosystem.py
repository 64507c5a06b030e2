"""Other people's programs on an exported folder. Slow, and they need those programs, so not part of
`make test`:

pip install llama-cpp-python gguf "lm-eval[hf]"
LLAMA_CPP=PATH-OF-ITS-SOURCES python -m pytest -m slow
"""

import itertools
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_hf import LLAMA3, model_of, run_hf, save_run

from sample import generate
from text.tokenizer import train_sentencepiece
from weights.open import load_model

TEXT = Path(json.__file__).read_text(encoding="utf-8")
TASK = """task: own_text
dataset_path: json
dataset_kwargs: {data_files: {validation: %s}}
validation_split: validation
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list: [{metric: bits_per_byte}]
"""


@pytest.fixture(
    params=[{}, {"n_kv_head": 2, "tie_embeddings": True, "head_dim": 24, **LLAMA3}],
    ids=["plain", "GQA"],
)
def exported(tmp_path, request):
    """A run with random weights and a SentencePiece tokenizer, and what exchange.hf made of it."""
    tokenizer = train_sentencepiece([TEXT], 500)
    model = model_of(vocab_size=tokenizer.vocab_size, **request.param)
    run = save_run(tmp_path / "run", model, tokenizer)
    assert run_hf("export", run, tmp_path / "out") == 0
    return run, tmp_path / "out"


@pytest.mark.slow
def test_llama_cpp_converts_it_and_computes_the_same(exported, tmp_path):
    llama_cpp = pytest.importorskip("llama_cpp")
    sources = Path(os.environ.get("LLAMA_CPP", "LLAMA_CPP is not set"))
    if not (sources / "convert_hf_to_gguf.py").exists():
        pytest.skip(f"no converter in {sources}")
    run, folder = exported
    converter = [sys.executable, sources / "convert_hf_to_gguf.py", folder]
    subprocess.run(
        [*converter, "--outfile", tmp_path / "x.gguf", "--outtype", "f32"],
        check=True,
        env=os.environ | {"PYTHONPATH": str(sources / "gguf-py")},
    )
    theirs = llama_cpp.Llama(
        str(tmp_path / "x.gguf"),
        n_ctx=256,
        logits_all=True,
        verbose=False,
        flash_attn=False,
        type_k=llama_cpp.GGML_TYPE_F32,
        type_v=llama_cpp.GGML_TYPE_F32,
    )
    model, tokenizer, _ = load_model(run)
    ids = [tokenizer.bos_id, *tokenizer.encode(TEXT)]
    assert theirs.tokenize(TEXT.encode(), add_bos=True, special=False) == ids
    theirs.eval(ids[:200])
    with torch.inference_mode():
        wanted = model(torch.tensor([ids[:200]]))[0]
    assert (torch.from_numpy(theirs.scores[:200]) - wanted).abs().max() <= 5e-5
    theirs.reset()
    theirs.eval(ids[:8])
    found = []
    for _ in range(200):
        found.append(int(theirs.scores[theirs.n_tokens - 1].argmax()))
        theirs.eval(found[-1:])
    assert found == [i for (i,) in generate(model, ids[:8], 200, temperature=0)]


@pytest.mark.slow
def test_lm_evaluation_harness_finds_our_bits_per_byte(exported, tmp_path):
    """On windows that both cut alike: a text of as many tokens as fill them, and bos in front."""
    pytest.importorskip("lm_eval")
    run, folder = exported
    model, tokenizer, _ = load_model(run)
    text, block = TEXT, model.config.block_size
    while len(tokenizer.encode(text)) % block:
        text = text[:-1]
    (tmp_path / "task").mkdir()
    (tmp_path / "text.jsonl").write_text(json.dumps({"text": text}) + "\n")
    (tmp_path / "task" / "own_text.yaml").write_text(TASK % (tmp_path / "text.jsonl"))
    options = {
        "--model": "hf",
        "--model_args": f"pretrained={folder},add_bos_token=False",
        "--include_path": tmp_path / "task",
        "--tasks": "own_text",
        "--device": "cpu",
        "--output_path": tmp_path / "found",
    }
    subprocess.run(
        [sys.executable, "-m", "lm_eval", *itertools.chain(*options.items())],
        check=True,
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
    )
    (report,) = (tmp_path / "found").rglob("results_*.json")
    found = json.loads(report.read_text())["results"]["own_text"]["bits_per_byte,none"]
    with torch.inference_mode():
        ids = torch.tensor([tokenizer.bos_id, *tokenizer.encode(text)])
        x, y = ids[:-1].view(-1, block), ids[1:].view(-1, block)
        bits = model(x, y).item() * y.numel() / math.log(2)
    assert found == pytest.approx(bits / len(text.encode()), rel=1e-5)
