"""llama2.c beside ours: it gets files of the size that it asks for, and what it says is read."""

import shutil

import pytest
from test_bench import SHAPE

from lab.bench_llama2c import llama2c_rates
from model import ModelConfig

# A stand-in that reads a model's header and says the size of the file, which llama2.c maps whole.
SAYS_SIZE = """
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
int main(int argc, char **argv) {
    int at[9] = {0};
    FILE *file = fopen(argv[1], "rb");
    if (fread(at, 4, 9, file) != 9) return 1;
    fseek(file, 0, SEEK_END);
    int *n = at + SKIP, group = 0;
    if (getenv("OMP_NUM_THREADS")) return 1;
    fprintf(stderr, "dim %d hidden %d layers %d heads %d kv %d vocab %d length %d\\n",
            n[0], n[1], n[2], n[3], n[4], n[5], n[6]);
    if (strcmp(argv[8], "-n") || atoi(argv[9]) != 6) return 1;
    fprintf(stderr, "achieved tok/s: %ld.5\\n", ftell(file));
    return 0;
}
"""


@pytest.fixture
def checkout(tmp_path):
    folder = tmp_path / "llama2.c"
    folder.mkdir()
    (folder / "run.c").write_text(SAYS_SIZE.replace("SKIP", "0"))
    (folder / "runq.c").write_text(SAYS_SIZE.replace("SKIP", "2"))
    (folder / "tokenizer.bin").write_bytes(b"")
    return folder


needs_gcc = pytest.mark.skipif(not shutil.which("gcc"), reason="llama2.c is built with gcc")


@needs_gcc
def test_both_programs_are_built_fed_with_this_shape_and_believed(checkout, tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # ours, not theirs
    shape = dict(n_layer=2, n_head=4, n_kv_head=2, n_embd=16, n_hidden=24, block_size=8)
    config = ModelConfig(**shape, vocab_size=10, tie_embeddings=True)
    rates = llama2c_rates(checkout, config, tmp_path)
    matrices = 10 * 16 + 2 * (2 * 16 * 16 + 2 * 8 * 16 + 3 * 24 * 16)
    norms = 5 * 16
    rope = 8 * 4  # cos and sin of two pairs, which run.c skips
    assert rates["run"](5, 1) == 28 + 4 * (matrices + norms + rope) + 0.5
    assert rates["runq"](5, 1) == 256 + 4 * norms + matrices + 4 * matrices / 16 + 0.5
    with pytest.raises(ValueError, match="one text at once, not 2"):
        rates["run"](5, 2)


@needs_gcc
def test_the_bench_has_a_line_for_each(checkout, measure):
    words = [w for w in SHAPE if not w.startswith("tie_")]
    options = f"tokens=5 steps=1 batches=1,2 dtypes=float32 quantize=none llama2c={checkout}"
    code, out, err = measure("sample", *words, *options.split(), "tie_embeddings=true")
    assert code == 0, err
    assert out.count("\nllama2.c run ") == out.count("\nllama2.c runq ") == 1  # not for two samples


def test_a_folder_without_it_and_a_shape_it_does_not_know_are_refused(checkout, tmp_path):
    config = ModelConfig(vocab_size=10, tie_embeddings=True)
    with pytest.raises(ValueError, match="has no tokenizer.bin: name a checkout of llama2.c"):
        llama2c_rates(tmp_path, config, tmp_path)
    with pytest.raises(ValueError, match="with tie_embeddings=true"):
        llama2c_rates(checkout, ModelConfig(vocab_size=10), tmp_path)
    (checkout / "run.c").write_text("no C")
    with pytest.raises(ValueError, match="llama2.c's run could not be built: "):
        llama2c_rates(checkout, config, tmp_path)
