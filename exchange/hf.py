"""Hugging Face folders in and out. USAGE shows both commands.

Reading order: the commands; import; export, which refuses what Llama cannot be; the files of the
exported folder.
"""

import json
import math
import os
import sys
from collections.abc import Collection, Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

if not __package__:  # run as a file: the imports below would not be found
    command = "python -m exchange.hf"
    print(f"error: run it as a module, from the repository's root: {command}", file=sys.stderr)
    sys.exit(2)

if __name__ == "__main__":  # before the imports that take seconds
    from config.command import start

    start()

import torch
from torch import Tensor

from config.command import counted, run_command, shell_path, split_arguments, user_errors, warn
from config.help import help_text
from config.schema import knobs_of, parse_knobs
from data.files import new_folder, write_atomically
from model import ModelConfig, knob, parameter_count
from run.machine import versions
from run.metrics import METRICS_FILE, read_metrics
from run.optim import stream_dimension
from text.chat import template_learned, turn_ends_learned
from text.tokenizer import Tokenizer, load_tokenizer
from text.tokenizer_export import json_bytes, tokenizer_files
from text.tokenizer_json import ID_NAMES
from weights import checkpoint
from weights.hf_folder import hf_name, is_hf_folder, read_hf, weight_shapes
from weights.lock import Lock
from weights.open import Weights, check_exists, open_weights

USAGE = """\
python -m exchange.hf import DIR out_dir=out/x   a Hugging Face folder becomes a run
python -m exchange.hf export out/small DIR       a run becomes a folder for transformers"""
PROMPT = 'ids = tokenizer("Once", return_tensors="pt").input_ids'
PROMPT_OF_A_CHAT = """\
messages = [{"role": "user", "content": "Hello"}]
text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
ids = tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids"""
LLAMA_NORMS = ("rmsnorm", "rmsnorm1p", "rmsnorm_noparam", "ssnorm", "layernorm_nobias")


@dataclass(frozen=True, kw_only=True)
class ImportOptions:
    """Where the imported model goes."""

    out_dir: str = knob("out/imported", "folder of the run that is made")


@dataclass(frozen=True, kw_only=True)
class ExportOptions:
    """What is exported, and how it is stored."""

    checkpoint: str = knob("latest", "latest, best or a step")
    dtype: Literal["float32", "bfloat16", "float16"] = knob(
        "float32", "of the weights in the files"
    )
    shard_gb: float = knob(5.0, "largest size of one safetensors file, in 10^9 bytes")

    def __post_init__(self):
        if self.shard_gb <= 0:
            raise ValueError(f"shard_gb must be above 0, got {self.shard_gb}")


def main(argv: list[str]) -> int:
    """Returns the exit code: 0 done; the user's errors leave with 2."""
    if {"-h", "--help"} & set(argv):
        about = help_text("import:", ImportOptions), help_text("export:", ExportOptions)
        print(USAGE, *about, sep="\n\n")
        return 0
    with user_errors():
        words, pairs = split_arguments(argv)
        match words:
            case ["import", source]:
                knobs = parse_knobs(pairs, knobs_of(ImportOptions), "command line")
                import_folder(Path(source), ImportOptions(**knobs))
            case ["export", run, out]:
                knobs = parse_knobs(pairs, knobs_of(ExportOptions), "command line")
                export_run(Path(run), Path(out), ExportOptions(**knobs))
            case _:
                raise ValueError(
                    f"got {' '.join(words) or 'no command'}: write python -m exchange.hf import "
                    f"DIR out_dir=out/x, or python -m exchange.hf export RUN DIR"
                )
    return 0


# Import


def import_folder(source: Path, options: ImportOptions) -> None:
    """Makes a run at step 0 of a Hugging Face folder. The run has no knobs but those of its model.
    ValueError or OSError if something is in the way; then nothing is left behind.
    """
    config, weights, tokenizer = read_source(source)
    folder = Path(options.out_dir)
    about = {"versions": versions(), "parameters": parameter_count(config), "source": str(source)}
    files = {
        "config.json": (json.dumps(asdict(config) | about, indent=1) + "\n").encode(),
        tokenizer.file: tokenizer.content(),
    }
    state = {
        "step": 0,
        "model": weights,
        "optimizer": {},
        "scaler": {},
        "config": asdict(config),
        "data": {"tokenizer_sha256": tokenizer.sha256, "source": str(source)},
        "base": {},
        "best_val_loss": math.inf,
        "grad_norms": [],
    }
    with Lock(folder):
        taken = [name for name in files if (folder / name).exists()]
        taken += [path.name for path in folder.glob("*.pt")]
        if taken:
            raise ValueError(
                f"{folder} holds {', '.join(sorted(taken)[:3])} already: name another out_dir"
            )
        try:
            for name, content in files.items():
                write_atomically(folder / name, lambda file, content=content: file.write(content))
            checkpoint.save(checkpoint.path_of(folder, 0), state)
        except BaseException:
            for name in files:
                (folder / name).unlink(missing_ok=True)
            raise
    name = shell_path(folder)
    print(
        f"{folder}: {describe_model(config)}\n"
        f"sample   python sample.py {name} prompt='...'\n"
        f"tune     python train.py config/finetune.py init_from={name} dataset=TEXT "
        f"out_dir=out/tuned"
    )


def read_source(source: Path) -> tuple[ModelConfig, dict[str, Tensor], Tokenizer]:
    """Configuration, weights and tokenizer of a Hugging Face folder. ValueError if it is none, or
    if they do not belong together.
    """
    check_exists(source)
    if checkpoint.all_in(source):
        raise ValueError(f"{source} is a run already: train.py and sample.py take it as it is")
    if not source.is_dir() or not is_hf_folder(source):
        raise ValueError(
            f"{source} is not a Hugging Face folder: its config.json does not say model_type"
        )
    config, weights = read_hf(source)
    tokenizer = load_tokenizer(source)
    if tokenizer.vocab_size > config.vocab_size:
        raise ValueError(
            f"{source}: its tokenizer has {tokenizer.vocab_size} tokens, "
            f"its model {config.vocab_size}"
        )
    return config, weights, tokenizer


# Export


def export_run(run: Path, out: Path, options: ExportOptions) -> None:
    """Makes the whole folder `out` of a checkpoint of a run, or, if that fails, nothing."""
    if out.exists() or out.is_symlink():
        raise ValueError(f"{out} exists already: name another folder, or remove it")
    weights = open_weights(run, options.checkpoint)
    check_llama_can_be(weights.config)
    tokenizer = weights.tokenizer()
    tensors = {hf_name(name): tensor for name, tensor in llama_tensors(weights).items()}
    config = replace(weights.config, block_size=weights.context)
    turn_ends = turn_ends_learned(tokenizer, weights.data)
    with new_folder(out) as folder:
        write_safetensors(folder, tensors, options)
        about = config_to_hf(config, tokenizer, options.dtype, turn_ends)
        generation = generation_config(tokenizer, turn_ends)
        files = tokenizer_files(tokenizer, template_learned(tokenizer, weights.data)) | {
            "config.json": json_bytes(about, indent=2),
            "generation_config.json": json_bytes(generation, indent=2),
            "README.md": model_card(weights, config, tokenizer, options).encode(),
        }
        for name, content in files.items():
            (folder / name).write_bytes(content)
        os.rename(folder, out)
    size = sum(file.stat().st_size for file in out.iterdir()) / 1e6
    print(
        f"{out}: {describe_model(config)}, {options.dtype}, {size:,.1f} MB in "
        f"{', '.join(sorted(os.listdir(out)))}"
    )


def describe_model(config: ModelConfig) -> str:
    return (
        f"{parameter_count(config):,} parameters, {counted(config.n_layer, 'block*')}, "
        f"{config.n_embd} wide, {counted(config.n_head, 'head*')} ({config.kv_heads} kv) of "
        f"{config.head_size}, context {config.block_size:,}"
    )


def check_llama_can_be(config: ModelConfig) -> None:
    """ValueError, with all reasons, if the model computes what no Llama (or, with qk_norm, no Qwen
    3) computes.
    """
    problems = []
    if config.norm not in LLAMA_NORMS:
        problems.append(
            f"norm={config.norm}: Llama's norms are RMSNorm, so train with norm=rmsnorm (or "
            f"{', '.join(LLAMA_NORMS[1:])}, which are exported as RMSNorm exactly)"
        )
    if config.norm == "layernorm_nobias" and config.tie_embeddings:
        problems.append(
            "norm=layernorm_nobias with tie_embeddings=true: as RMSNorm it needs the rows of the "
            "embedding without their means, and the head, which is the same matrix, needs them: "
            "train with tie_embeddings=false"
        )
    if config.norm_pos not in ("pre", "lns"):
        problems.append(
            f"norm_pos={config.norm_pos}: Llama's norms stand before each branch, norm_pos=pre"
        )
    if config.embed_scale == "sqrt" and config.tie_embeddings:
        problems.append(
            "embed_scale=sqrt with tie_embeddings=true: the factor would go into the embedding, "
            "and so into the head, which is the same matrix: train with tie_embeddings=false"
        )
    if config.ffn != "swiglu":
        problems.append(f"ffn={config.ffn}: Llama's feed-forward is ffn=swiglu")
    if problems:
        raise ValueError("no Llama computes what this model does: " + "; ".join(problems))


def llama_tensors(weights: Weights) -> dict[str, Tensor]:
    """The weights by our names, as those of the Llama that computes the same: each norm is RMSNorm
    with a gain, and embed_scale is in the embedding.
    """
    config, tensors = weights.config, {}
    for name, shape in weight_shapes(config).items():
        if name.endswith(".gain"):
            tensors[name] = llama_gain(name, shape, weights)
        else:
            tensors[name] = weights.tensors[name]
    if config.embed_scale == "sqrt":  # the Decoder multiplies in fp32, too: no bit differs
        tensors["embed.weight"] = tensors["embed.weight"] * math.sqrt(config.n_embd)
    if config.norm == "layernorm_nobias":
        tensors = {name: centred(name, tensor, config) for name, tensor in tensors.items()}
    return tensors


def llama_gain(name: str, shape: tuple[int, ...], weights: Weights) -> Tensor:
    """All by which one of our norms multiplies, as a gain for each channel: rmsnorm1p multiplies by
    1 + gain, rmsnorm_noparam by nothing, ssnorm by one number, and lns by a factor of the layer.
    """
    norm = weights.config.norm
    gain = torch.ones(1) if norm == "rmsnorm_noparam" else weights.tensors[name]
    gain = 1 + gain if norm == "rmsnorm1p" else gain
    if weights.config.norm_pos == "lns" and name.endswith(("attn_norm.gain", "ffn_norm.gain")):
        gain = gain * (int(name.split(".")[1]) + 1) ** -0.5
    return gain.expand(shape).contiguous()


def centred(name: str, tensor: Tensor, config: ModelConfig) -> Tensor:
    """A weight of a model with LayerNorm as RMSNorm needs it: without the mean over the channels
    that a norm would subtract from what the weight writes.

    All that adds to the residual stream is centred so: the rows of the embedding, and what `out`
    and `down` write. Then the stream's mean is 0, and LayerNorm is RMSNorm (Jiang et al. 2023,
    arXiv 2305.14858). With qk_norm the same holds of each head's queries and keys.
    """
    over, wide = stream_dimension(name), tensor.double()
    if config.qk_norm and name.endswith((".q.weight", ".k.weight")):
        over, wide = -2, wide.view(-1, config.head_size, config.n_embd)  # [H or K, D, C]
    if over is None:
        return tensor
    return (wide - wide.mean(over, keepdim=True)).view(tensor.shape).to(tensor.dtype)


# The files of the exported folder


def config_to_hf(
    config: ModelConfig, tokenizer: Tokenizer, dtype: str, turn_ends: Collection[int] = ()
) -> dict[str, Any]:
    """config.json, as both transformers 4 and 5 and llama.cpp's converter read it."""
    generation = generation_config(tokenizer, turn_ends)
    family = ("Qwen3ForCausalLM", "qwen3") if config.qk_norm else ("LlamaForCausalLM", "llama")
    scaling = None
    if config.rope_scaling == "llama3":
        scaling = {
            "rope_type": "llama3",
            "factor": config.rope_factor,
            "low_freq_factor": config.rope_low_freq,
            "high_freq_factor": config.rope_high_freq,
            "original_max_position_embeddings": config.rope_original_context,
        }
    return {
        "architectures": [family[0]],
        "model_type": family[1],
        "vocab_size": config.vocab_size,
        "hidden_size": config.n_embd,
        "intermediate_size": config.hidden_size,
        "num_hidden_layers": config.n_layer,
        "num_attention_heads": config.n_head,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_size,
        "hidden_act": "silu",
        "max_position_embeddings": config.block_size,
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,
        "rope_scaling": scaling,
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": config.tie_embeddings,
        "torch_dtype": dtype,
    } | {name: i for name, i in generation.items() if name in ID_NAMES}


def generation_config(tokenizer: Tokenizer, turn_ends: Collection[int] = ()) -> dict[str, Any]:
    """What a Hugging Face folder said with which the run began, so that programs draw and stop as
    they did there; and the ids of bos and eos. With several eos, a text ends at any of them.
    `turn_ends`, with which the model ends an answer, are among the eos, too.

    If there is no bos or eos, the id is null: a file that leaves it out would mean 1 or 2.
    """
    ends = tokenizer.end_ids
    if tokenizer.config or tokenizer.generation:  # there a bos is no end, unless it says so
        ends = ends - {tokenizer.bos_id} or ends
    eos = sorted(ends) if len(ends) > 1 else next(iter(ends), None)
    made = {"bos_token_id": tokenizer.bos_id, "eos_token_id": eos} | tokenizer.generation
    if not ends.issuperset(turn_ends):
        made["eos_token_id"] = sorted(ends.union(turn_ends))
    return made


def write_safetensors(folder: Path, tensors: dict[str, Tensor], options: ExportOptions) -> None:
    """Writes model.safetensors, or several files of at most shard_gb and their index. A tensor that
    is larger than shard_gb gets a file of its own.
    """
    try:
        from safetensors import SafetensorError
        from safetensors.torch import save_file
    except ImportError:
        raise ValueError(
            "exporting needs the package safetensors: pip install -e '.[hf]'"
        ) from None
    dtype = getattr(torch, options.dtype)
    shards = split_by_size(tensors, dtype.itemsize, options.shard_gb * 1e9)
    files = [f"model-{i:05}-of-{len(shards):05}.safetensors" for i in range(1, len(shards) + 1)]
    if len(shards) == 1:
        files = ["model.safetensors"]
    for file, shard in zip(files, shards, strict=True):
        stored = {name: tensors[name].to(dtype).contiguous() for name in shard}
        for name, tensor in stored.items():
            if not torch.isfinite(tensor).all():
                raise ValueError(
                    f"{name} does not fit into {options.dtype}: use dtype=bfloat16 or float32"
                )
        try:
            save_file(stored, folder / file, metadata={"format": "pt"})
        except SafetensorError as error:
            raise OSError(f"{file} could not be written ({error!s:.200})") from error
        (folder / file).chmod(0o644)  # save_file makes it readable for this user only
    if len(shards) > 1:
        size = sum(tensor.numel() for tensor in tensors.values()) * dtype.itemsize
        file_of = {name: file for file, shard in zip(files, shards, strict=True) for name in shard}
        index = {"metadata": {"total_size": size}, "weight_map": file_of}
        (folder / "model.safetensors.index.json").write_bytes(json_bytes(index, indent=2))


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


def model_card(
    weights: Weights, config: ModelConfig, tokenizer: Tokenizer, options: ExportOptions
) -> str:
    """README.md: what the model is, how to use it, how well it did, and all knobs of its run."""
    state, data = weights.state, weights.data
    run, step = state.get("config", {}), state.get("step", 0)
    rows = {
        "shape": describe_model(config),
        "weights": options.dtype,
        "tokenizer": f"{tokenizer.kind}, {tokenizer.vocab_size:,} tokens",
    }
    if "name" in data and "train" in data.get("tokens", {}):
        rows["data"] = f"{code(data['name'])}, {data['tokens']['train']:,} training tokens"
        rows["steps"] = f"{step:,}"
        if math.isfinite(state["best_val_loss"]):  # in the checkpoint, which has a checksum
            rows["best validation loss"] = f"{state['best_val_loss']:.4f} nats per token"
        rows |= last_evaluation(weights.folder, step, state["best_val_loss"])
    if run.get("init_from"):
        lora = f", LoRA of rank {run['lora_rank']}" if run["lora_rank"] else ""
        rows["fine-tuned from"] = code(run["init_from"]) + lora
    if "source" in data:
        rows["from"] = code(data["source"])
    knobs = {code(name): code(value) for name, value in (run or asdict(weights.config)).items()}
    return f"""\
---
library_name: transformers
pipeline_tag: text-generation
tags: [llama, rootllama]
---
# {code(weights.folder.resolve().name)}

A Llama, {"trained" if step else "exported"} with Rootllama.

{two_columns("", "", rows.items())}

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model, tokenizer = (kind.from_pretrained(".") for kind in (AutoModelForCausalLM, AutoTokenizer))
{PROMPT_OF_A_CHAT if data.get("answers") else PROMPT}
print(tokenizer.decode(model.generate(ids, max_new_tokens=50)[0]))
```

## All knobs

{two_columns("knob", "value", knobs.items())}
"""


def last_evaluation(folder: Path, step: int, best: float) -> dict[str, str]:
    """A row of the card: what the run's log says of the last evaluation up to this step. Empty if
    there was none, or if the log contradicts the checkpoint, which has the best loss.
    """
    evaluations = [
        record
        for record in read_metrics(folder)
        if record["step"] <= step and isinstance(record.get("val_loss"), float)
    ]
    if not evaluations:
        return {}
    last = evaluations[-1]
    if last["val_loss"] < best - 1e-6 and math.isfinite(best):  # the log rounds
        warn(
            f"{folder / METRICS_FILE} has a validation loss of {last['val_loss']:.4f} at step "
            f"{last['step']}, below the best one in the checkpoint, {best:.4f}: one of them is not "
            f"of this run, so the model card leaves it out"
        )
        return {}
    perplexity = math.exp(min(last["val_loss"], 700))  # exp overflows above 709
    name = f"validation at step {last['step']:,}, by its {METRICS_FILE}"
    said = f"loss {last['val_loss']:.4f} nats per token, perplexity {perplexity:.2f}"
    if isinstance(last.get("val_bpb"), float):  # left out if the tokenizer loses text
        said += f", {last['val_bpb']:.4f} bits per byte"
    return {name: said}


def code(value: Any) -> str:
    """A value in a code span of a table, where neither Markdown nor HTML means anything. A
    character that would leave the span, or that no screen shows, becomes its number in hexadecimal.
    """
    shown = (c if c.isprintable() and c not in "`|" else f"\\x{ord(c):02x}" for c in str(value))
    return f"`{''.join(shown)}`"


def two_columns(left: str, right: str, rows: Iterable[tuple[str, str]]) -> str:
    """A Markdown table with these two heads."""
    lines = [f"| {left} | {right} |", "|---|---|"]
    return "\n".join(lines + [f"| {name} | {value} |" for name, value in rows])


if __name__ == "__main__":
    sys.exit(run_command(main, sys.argv[1:]))
