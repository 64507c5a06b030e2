"""Real Llama weights in and out: USAGE has the two ways.

Reading order: the command; import; export, which refuses what Llama cannot be; the files of the exported folder.
"""

import json
import math
import os
import shlex
import sys
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

import checkpoint
from config.schema import help_text, knobs_of, print_help, split_arguments, typed, user_errors
from cost import parameter_count
from data.prepare import workshop
from data.tokenizer import Tokenizer, load_tokenizer
from device import versions
from hf_tokenizer import tokenizer_files
from llama2c import read_bin, read_tokenizer_bin, tokenizer_bin, write_bin
from lock import Lock
from metrics import read_metrics
from model import ModelConfig, knob
from weights import Weights, check_there, hf_name, is_hf, open_weights, read_hf, shapes

USAGE = """python hf.py import DIR out_dir=out/x   a Hugging Face folder, or llama2.c's model.bin, becomes a run
python hf.py export out/small DIR       a run becomes a folder that transformers and llama.cpp load"""
PLAIN_GAINS = {"rmsnorm": lambda gain: gain, "rmsnorm1p": lambda gain: 1 + gain}  # rmsnorm_noparam: all 1


@dataclass(frozen=True, kw_only=True)
class ImportOptions:
    """Where the imported model goes."""

    out_dir: str = knob("out/imported", "folder of the run that is made")


@dataclass(frozen=True, kw_only=True)
class ExportOptions:
    """What is exported, and how it is stored."""

    checkpoint: str = knob("latest", "latest, best or a step")
    format: Literal["hf", "llama2c"] = knob("hf", "hf = Hugging Face; llama2c = llama2.c's model.bin and tokenizer.bin")
    dtype: Literal["float32", "bfloat16", "float16"] = knob("float32", "of the weights in the files (hf)")
    shard_gb: float = knob(5.0, "largest size of one safetensors file, in 10^9 bytes (hf)")

    def __post_init__(self):
        if self.shard_gb <= 0:
            raise ValueError(f"shard_gb must be above 0, got {self.shard_gb}")
        if self.format == "llama2c" and self.dtype != "float32":
            raise ValueError(f"format=llama2c holds float32 alone: leave dtype={self.dtype} out")


def main(argv: list[str]) -> int:
    """Returns the exit code: 0 done; the user's errors leave with 2."""
    if {"-h", "--help"} & set(argv):
        print_help(help_text(f"{USAGE}\n\nimport:", ImportOptions), help_text("export:", ExportOptions))
        return 0
    with user_errors():
        words, pairs = split_arguments(argv)
        match words:
            case ["import", source]:
                import_run(Path(source), ImportOptions(**typed(pairs, knobs_of(ImportOptions), "command line")))
            case ["export", run, out]:
                options = ExportOptions(**typed(pairs, knobs_of(ExportOptions), "command line"))
                export(Path(run), Path(out), options)
            case _:
                raise ValueError(f"got {' '.join(words) or 'no command'}: write python hf.py import DIR out_dir=out/x, "
                                 f"or python hf.py export RUN DIR")
    return 0


def import_run(source: Path, options: ImportOptions) -> None:
    """Makes a run, at step 0, of a Hugging Face folder or of llama2.c's .bin file with tokenizer.bin beside it. It has
    no knobs but those of its model."""
    config, weights, tokenizer = read_source(source)
    folder = Path(options.out_dir)
    about = {"versions": versions(), "parameters": parameter_count(config), "source": str(source)}
    files = {"config.json": (json.dumps(asdict(config) | about, indent=1) + "\n").encode(),
             tokenizer.file: tokenizer.content()}
    with Lock(folder):
        taken = [path.name for path in (*(folder / name for name in files), *folder.glob("*.pt")) if path.exists()]
        if taken:
            raise ValueError(f"{folder} holds {', '.join(sorted(taken)[:3])} already: name another out_dir")
        state = {"step": 0, "model": weights, "optimizer": {}, "scaler": {}, "config": asdict(config),
                 "data": {"tokenizer_sha256": tokenizer.sha256, "source": str(source)}, "base": {},
                 "best_val_loss": math.inf, "grad_norms": []}
        try:
            for name, content in files.items():
                checkpoint.write_atomically(folder / name, lambda file, content=content: file.write(content))
            checkpoint.save(checkpoint.path_of(folder, 0), state)
        except BaseException:
            for name in files:
                (folder / name).unlink(missing_ok=True)
            raise
    name = shlex.quote(str(folder))
    print(f"{folder}: {describe(config)}\n"
          f"sample   python sample.py {name} prompt='...'\n"
          f"tune     python train.py config/finetune.py init_from={name} dataset=TEXT out_dir=out/tuned")


def read_source(source: Path) -> tuple[ModelConfig, dict[str, Tensor], Tokenizer]:
    """Configuration, weights and tokenizer of what is to be imported."""
    if source.is_dir() and (source / "model.bin").is_file() and not (source / "config.json").exists():
        source /= "model.bin"
    if source.is_file() and source.suffix == ".bin":
        config, weights = read_bin(source)
        return config, weights, read_tokenizer_bin(source.with_name("tokenizer.bin"), config.vocab_size)
    check_there(source)
    if checkpoint.all_in(source):
        raise ValueError(f"{source} is a run already: train.py and sample.py take it as it is")
    if not source.is_dir() or not is_hf(source):
        raise ValueError(f"{source} is neither a Hugging Face folder (its config.json says model_type) nor a .bin of "
                         f"llama2.c")
    config, weights = read_hf(source)
    tokenizer = load_tokenizer(source)
    if tokenizer.vocab_size > config.vocab_size:
        raise ValueError(f"{source}: its tokenizer has {tokenizer.vocab_size} tokens, its model {config.vocab_size}")
    return config, weights, tokenizer


def export(run: Path, out: Path, options: ExportOptions) -> None:
    """Makes the folder `out` of a run's checkpoint: all of it, or none."""
    if out.exists() or out.is_symlink():
        raise ValueError(f"{out} exists already: name another folder, or remove it")
    weights = open_weights(run, options.checkpoint)
    refuse_what_is_no_llama(weights.config)
    tokenizer, tensors = weights.tokenizer(), plain(weights)
    with workshop(out, stream=False) as folder:
        if options.format == "llama2c":
            files = {"tokenizer.bin": tokenizer_bin(tokenizer)}
            write_llama2c(folder / "model.bin", weights.config, tensors, tokenizer)
        else:
            write_safetensors(folder, {hf_name(name): tensor for name, tensor in tensors.items()}, options)
            whole = replace(weights.config, block_size=weights.context)
            files = tokenizer_files(tokenizer) | {
                "config.json": as_json(to_hf(whole, tokenizer, options.dtype)),
                "generation_config.json": as_json(token_ids(tokenizer)),
                "README.md": card(weights, tokenizer, options).encode()}
        for name, content in files.items():
            (folder / name).write_bytes(content)
        os.rename(folder, out)
    print(f"{out}: {describe(weights.config)}, {options.dtype}, "
          f"{sum(file.stat().st_size for file in out.iterdir()) / 1e6:,.1f} MB in {', '.join(sorted(os.listdir(out)))}")


def describe(config: ModelConfig) -> str:
    return (f"{parameter_count(config):,} parameters, {config.n_layer} blocks, {config.n_embd} wide, {config.n_head} "
            f"heads ({config.kv_heads} kv) of {config.head_size}, context {config.block_size:,}")


def refuse_what_is_no_llama(config: ModelConfig) -> None:
    """ValueError with the reasons, if the model computes what Llama (with qk_norm: Qwen 3) does not."""
    problems = []
    if config.norm not in (*PLAIN_GAINS, "rmsnorm_noparam"):
        problems.append(f"norm={config.norm}: Llama's norms are RMSNorm, so train with norm=rmsnorm (or rmsnorm1p or "
                        f"rmsnorm_noparam, which are exported as RMSNorm exactly)")
    if config.norm_pos != "pre":
        problems.append(f"norm_pos={config.norm_pos}: Llama's norms stand before each branch, norm_pos=pre")
    if config.ffn != "swiglu":
        problems.append(f"ffn={config.ffn}: Llama's feed-forward is ffn=swiglu")
    if problems:
        raise ValueError("no Llama computes what this model does: " + "; ".join(problems))


def plain(weights: Weights) -> dict[str, Tensor]:
    """The weights with the gains as Llama has them: one for each norm, and 1 where nothing is to be done."""
    result = {}
    for name, shape in shapes(weights.config).items():
        tensor = weights.tensors.get(name)
        if name.endswith(".gain"):
            tensor = torch.ones(shape) if tensor is None else PLAIN_GAINS[weights.config.norm](tensor)
        result[name] = tensor
    return result


def to_hf(config: ModelConfig, tokenizer: Tokenizer, dtype: str) -> dict[str, Any]:
    """config.json, as both transformers 4 and 5 and llama.cpp's converter read it."""
    family = ("Qwen3ForCausalLM", "qwen3") if config.qk_norm else ("LlamaForCausalLM", "llama")
    scaling = None if config.rope_scaling == "none" else {
        "rope_type": "llama3", "factor": config.rope_factor, "low_freq_factor": config.rope_low_freq,
        "high_freq_factor": config.rope_high_freq, "original_max_position_embeddings": config.rope_original_context}
    return {"architectures": [family[0]], "model_type": family[1], "vocab_size": config.vocab_size,
            "hidden_size": config.n_embd, "intermediate_size": config.hidden_size,
            "num_hidden_layers": config.n_layer, "num_attention_heads": config.n_head,
            "num_key_value_heads": config.kv_heads, "head_dim": config.head_size, "hidden_act": "silu",
            "max_position_embeddings": config.block_size, "rms_norm_eps": config.norm_eps,
            "rope_theta": config.rope_theta, "rope_scaling": scaling, "attention_bias": False, "mlp_bias": False,
            "tie_word_embeddings": config.tie_embeddings, "torch_dtype": dtype} | token_ids(tokenizer)


def token_ids(tokenizer: Tokenizer) -> dict[str, Any]:
    """bos and eos, null where there is none (silence would mean 1 and 2); a text ends at any of the eos."""
    ends = sorted(tokenizer.end_ids)
    return {"bos_token_id": tokenizer.bos_id, "eos_token_id": ends if len(ends) > 1 else next(iter(ends), None)}


def as_json(content: dict[str, Any]) -> bytes:
    return (json.dumps(content, indent=2) + "\n").encode()


def write_safetensors(folder: Path, tensors: dict[str, Tensor], options: ExportOptions) -> None:
    """model.safetensors, or shards of at most shard_gb (a larger tensor gets one of its own) and their index."""
    try:
        from safetensors import SafetensorError
        from safetensors.torch import save_file
    except ImportError:
        raise ValueError("exporting needs the package safetensors: pip install -e '.[hf]'") from None
    dtype = getattr(torch, options.dtype)
    shards = split_by_size(tensors, dtype.itemsize, options.shard_gb * 1e9)
    names = [f"model-{i:05}-of-{len(shards):05}.safetensors" for i in range(1, len(shards) + 1)]
    for file, shard in zip(names if len(shards) > 1 else ["model.safetensors"], shards, strict=True):
        stored = {name: tensors[name].to(dtype).contiguous() for name in shard}
        for name, tensor in stored.items():
            if not torch.isfinite(tensor).all():
                raise ValueError(f"{name} does not fit into {options.dtype}: use dtype=bfloat16 or float32")
        try:
            save_file(stored, folder / file, metadata={"format": "pt"})
        except SafetensorError as error:
            raise OSError(f"{file} could not be written ({error!s:.200})") from error
        (folder / file).chmod(0o644)  # as the others; it makes them readable for this user only
    if len(shards) > 1:
        index = {name: file for file, shard in zip(names, shards, strict=True) for name in shard}
        size = sum(tensor.numel() for tensor in tensors.values()) * dtype.itemsize
        (folder / "model.safetensors.index.json").write_bytes(
            as_json({"metadata": {"total_size": size}, "weight_map": index}))


def split_by_size(tensors: dict[str, Tensor], itemsize: int, most: float) -> list[list[str]]:
    """The names in groups, in order, each of at most `most` bytes or of one tensor."""
    groups: list[list[str]] = []
    room = 0.0
    for name, tensor in tensors.items():
        size = tensor.numel() * itemsize
        if not groups or size > room:
            groups.append([])
            room = most
        groups[-1].append(name)
        room -= size
    return groups


def write_llama2c(path: Path, config: ModelConfig, tensors: dict[str, Tensor], tokenizer: Tokenizer) -> None:
    """model.bin, of exactly as many ids as the tokenizer has: what pads the vocabulary of a run is left out."""
    V = tokenizer.vocab_size
    write_bin(path, replace(config, norm="rmsnorm", vocab_size=V),
              tensors | {name: tensors[name][:V] for name in ("embed.weight", "head.weight") if name in tensors})
    if not tokenizer.dummy_prefix:
        print("note: llama2.c's run puts a space before each prompt, which the tokenizer of this run does not")


def card(weights: Weights, tokenizer: Tokenizer, options: ExportOptions) -> str:
    """README.md: what the model is, how to use it, what came of the run, and all of the run's knobs."""
    state, config, data = weights.state, weights.config, weights.data
    run, step = state.get("config", {}), state.get("step", 0)
    rows = {"shape": describe(config), "weights": options.dtype, "tokenizer": f"{tokenizer.kind}, "
            f"{tokenizer.vocab_size:,} tokens"}
    if "name" in data:
        rows |= {"data": f"{data['name']}, {data['tokens']['train']:,} training tokens", "steps": f"{step:,}"}
        rows |= results(weights.folder, step)
    if run.get("init_from"):
        rows["fine-tuned from"] = run["init_from"] + (f", LoRA of rank {run['lora_rank']}" if run["lora_rank"] else "")
    if "source" in data:
        rows["from"] = data["source"]
    return "\n".join((
        "---", "library_name: transformers", "pipeline_tag: text-generation", "tags: [llama, rootllama]", "---",
        f"# {weights.folder.resolve().name}", "", f"A Llama, {'trained' if step else 'exported'} with Rootllama.", "",
        *table(("", ""), rows.items()), "", "```python", "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "", 'model, tokenizer = (kind.from_pretrained(".") for kind in (AutoModelForCausalLM, AutoTokenizer))',
        'ids = tokenizer("Once", return_tensors="pt").input_ids',
        "print(tokenizer.decode(model.generate(ids, max_new_tokens=50)[0]))", "```", "", "## All knobs", "",
        *table(("knob", "value"), [(f"`{name}`", f"`{value}`") for name, value in (run or asdict(config)).items()]),
        ""))


def results(folder: Path, step: int) -> dict[str, str]:
    """What the run's log says of the last evaluation up to this step, if there was one."""
    known = [record for record in read_metrics(folder) if record["step"] <= step and all(
        isinstance(record.get(name), float) for name in ("val_loss", "val_bpb"))]
    if not known:
        return {}
    last = known[-1]
    return {f"validation at step {last['step']:,}": f"loss {last['val_loss']:.4f} nats per token, perplexity "
            f"{math.exp(min(last['val_loss'], 700)):.2f}, {last['val_bpb']:.4f} bits per byte"}


def table(head: tuple[str, str], rows: Iterable[tuple[str, str]]) -> list[str]:
    return [f"| {head[0]} | {head[1]} |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows)]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
