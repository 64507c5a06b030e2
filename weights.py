"""Weights to begin with: of one of our runs, or of a Hugging Face folder (Llama and what is built like it).

A Hugging Face folder is config.json, safetensors (one file, or shards and an index) and a tokenizer. Its weights are
ours under other names: both have the same layout, RoPE's included, so nothing is computed on the way.
"""

import dataclasses
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import checkpoint
from config.schema import Config, knobs_of, read_json, typed
from data.tokenizer import Tokenizer, load_tokenizer, tokenizer_sha256
from evaluate import LONGEST
from lora import merged
from model import Decoder, ModelConfig

FAMILIES: dict[str, dict[str, Any]] = {  # model_type -> what it means where config.json is silent
    "llama": {},
    "mistral": {"num_key_value_heads": 8, "max_position_embeddings": 131072, "sliding_window": 4096},
    "qwen3": {"num_key_value_heads": 32, "max_position_embeddings": 32768, "head_dim": 128,
              "use_sliding_window": False},
}
SILENT = {"max_position_embeddings": 2048, "rms_norm_eps": 1e-6, "tie_word_embeddings": False, "hidden_act": "silu",
          "num_key_value_heads": None, "head_dim": None, "use_sliding_window": True}
REFUSED = {  # key of a config.json -> (what it may say, what anything else would be)
    "hidden_act": (("silu",), "another activation than SwiGLU's"),
    "attention_bias": ((None, False), "biases in attention"),
    "mlp_bias": ((None, False), "biases in the feed-forward"),
    "num_local_experts": ((None, 0), "a mixture of experts"),
    "num_experts": ((None, 0), "a mixture of experts"),
    "partial_rotary_factor": ((None, 1), "RoPE on a part of each head"),
    "quantization_config": ((None,), "quantised weights"),
    "auto_map": ((None,), "code of its own"),
}
BLOCK_NAMES = {
    "attn_norm.gain": "input_layernorm.weight", "attn.q.weight": "self_attn.q_proj.weight",
    "attn.k.weight": "self_attn.k_proj.weight", "attn.v.weight": "self_attn.v_proj.weight",
    "attn.q_norm.gain": "self_attn.q_norm.weight", "attn.k_norm.gain": "self_attn.k_norm.weight",
    "attn.out.weight": "self_attn.o_proj.weight", "ffn_norm.gain": "post_attention_layernorm.weight",
    "ffn.gate.weight": "mlp.gate_proj.weight", "ffn.up.weight": "mlp.up_proj.weight",
    "ffn.down.weight": "mlp.down_proj.weight"}
OUTER_NAMES = {"embed.weight": "model.embed_tokens.weight", "norm.gain": "model.norm.weight",
               "head.weight": "lm_head.weight"}


def hf_name(name: str) -> str:
    """Hugging Face's name of one of our weights."""
    if name in OUTER_NAMES:
        return OUTER_NAMES[name]
    _, layer, part = name.split(".", 2)
    return f"model.layers.{layer}.{BLOCK_NAMES[part]}"


def shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of every weight of a model as Llama or Qwen 3 has it: plain gains, SwiGLU, norms before."""
    C, F, D, V = config.n_embd, config.hidden_size, config.head_size, config.vocab_size
    Q, K = config.n_head * D, config.kv_heads * D
    block = {"attn_norm.gain": (C,), "attn.q.weight": (Q, C), "attn.k.weight": (K, C), "attn.v.weight": (K, C),
             "attn.out.weight": (C, Q), "ffn_norm.gain": (C,), "ffn.gate.weight": (F, C), "ffn.up.weight": (F, C),
             "ffn.down.weight": (C, F)}
    if config.qk_norm:
        block |= {"attn.q_norm.gain": (D,), "attn.k_norm.gain": (D,)}
    outer = {"embed.weight": (V, C), "norm.gain": (C,)} | ({} if config.tie_embeddings else {"head.weight": (V, C)})
    return outer | {f"blocks.{i}.{name}": shape for i in range(config.n_layer) for name, shape in block.items()}


def from_hf(theirs: dict[str, Any], where: str) -> ModelConfig:
    """The model that a config.json describes. ValueError names all in it that this model cannot be."""
    family = theirs.get("model_type")
    if not isinstance(family, str) or family not in FAMILIES:
        raise ValueError(f"{where}: model_type {family!r:.80} is not one that this model can be: "
                         f"{', '.join(FAMILIES)}")
    theirs = SILENT | FAMILIES[family] | theirs
    needed = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    missing = [key for key in needed if theirs.get(key) is None]
    if missing:
        raise ValueError(f"{where}: lacks {', '.join(missing)}")
    rope = rope_knobs(theirs, where)
    problems = [f"{key} = {theirs[key]!r:.80} ({meaning})" for key, (allowed, meaning) in REFUSED.items()
                if theirs.get(key) not in allowed]
    if theirs["use_sliding_window"] and theirs.get("sliding_window") is not None:
        problems.append(f"sliding_window = {theirs['sliding_window']!r:.80} (each token sees only so far back)")
    if problems:
        raise ValueError(f"{where}: this model cannot have {'; '.join(problems)}")
    knobs = {"n_layer": theirs["num_hidden_layers"], "n_head": theirs["num_attention_heads"],
             "n_kv_head": theirs["num_key_value_heads"] or 0, "n_embd": theirs["hidden_size"],
             "head_dim": theirs["head_dim"] or 0, "n_hidden": theirs["intermediate_size"],
             "block_size": theirs["max_position_embeddings"], "vocab_size": theirs["vocab_size"],
             "tie_embeddings": theirs["tie_word_embeddings"], "norm_eps": theirs["rms_norm_eps"],
             "qk_norm": family == "qwen3"} | rope
    knobs = typed(knobs, knobs_of(ModelConfig), where)
    if knobs["head_dim"] * knobs["n_head"] == knobs["n_embd"]:
        knobs["head_dim"] = 0  # as a run has it whose heads are of the usual size
    if knobs["n_kv_head"] == knobs["n_head"]:
        knobs["n_kv_head"] = 0
    try:
        return ModelConfig(**knobs)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None


def rope_knobs(theirs: dict[str, Any], where: str) -> dict[str, Any]:
    """RoPE's knobs from rope_parameters (transformers 5), or from rope_theta and rope_scaling (before)."""
    rope = theirs.get("rope_scaling") or theirs.get("rope_parameters") or {}  # in the order of transformers
    if not isinstance(rope, dict) or any(isinstance(value, (dict, list)) for value in rope.values()):
        raise ValueError(f"{where}: rope_parameters must be an object with one number or text for each name, got "
                         f"{rope!r:.80}")
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ("default", "llama3"):
        raise ValueError(f"{where}: this model cannot have RoPE scaled as {kind!r:.80}, only default or llama3")
    knobs = {"rope_theta": rope.get("rope_theta", theirs.get("rope_theta", 10000.0))}
    if kind == "llama3":
        missing = [key for key in ("factor", "low_freq_factor", "high_freq_factor") if key not in rope]
        if missing:
            raise ValueError(f"{where}: the llama3 scaling of RoPE lacks {', '.join(missing)}")
        original = rope.get("original_max_position_embeddings", theirs["max_position_embeddings"])
        knobs |= {"rope_scaling": "llama3", "rope_factor": rope["factor"], "rope_low_freq": rope["low_freq_factor"],
                  "rope_high_freq": rope["high_freq_factor"], "rope_original_context": original}
    return knobs


def weight_files(folder: Path) -> tuple[list[Path], set[str] | None]:
    """The safetensors files of a folder, and the names that its index says are in them (None: it needs no index)."""
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.is_file():
        return [single], None
    if not index.is_file():
        raise FileNotFoundError(f"{folder} has neither {single.name} nor {index.name}: weights in other formats can be "
                                f"saved as safetensors with transformers' save_pretrained")
    mapping = read_json(index).get("weight_map")
    if not isinstance(mapping, dict) or not mapping or not all(isinstance(file, str) for file in mapping.values()):
        raise ValueError(f"{index}: weight_map must say for each weight which file it is in")
    files = sorted(set(mapping.values()))
    for file in files:
        if Path(file).name != file or "\\" in file or not file.endswith(".safetensors"):
            raise ValueError(f"{index}: {file!r:.80} is not the name of a .safetensors file in the same folder")
        if not (folder / file).is_file():
            raise FileNotFoundError(f"{folder / file} is missing: the index names it")
    return [folder / file for file in files], set(mapping)


@contextmanager
def opened(path: Path) -> Iterator[Any]:
    """A safetensors file, from which tensors can be read one by one."""
    try:
        from safetensors import SafetensorError, safe_open
    except ImportError:
        raise ValueError("Hugging Face weights need the package safetensors: pip install -e '.[hf]'") from None
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged or no safetensors file ({error!s:.200})") from None


def read_hf(folder: Path) -> tuple[ModelConfig, dict[str, Tensor]]:
    """Configuration and fp32 weights, by our names, of a Hugging Face folder. All is checked before any is read."""
    config = from_hf(read_json(folder / "config.json"), str(folder / "config.json"))
    files, indexed = weight_files(folder)
    wanted = {hf_name(name): (name, shape) for name, shape in shapes(config).items()}
    place: dict[str, Path] = {}
    for path in files:
        with opened(path) as file:
            for name in file.keys():
                if name in place:
                    raise ValueError(f"{name} is both in {place[name]} and in {path}")
                place[name] = path
                if name in wanted:
                    check_header(f"{path}: {name}", file.get_slice(name), wanted[name][1])
    if indexed is not None and indexed != place.keys():
        name = min(indexed ^ place.keys())
        raise ValueError(f"{folder}: {name} is {'only in the index' if name in indexed else 'not in the index'}")
    surplus = {name for name in place.keys() - wanted.keys() if not name.endswith(".rotary_emb.inv_freq")}
    if config.tie_embeddings:
        surplus.discard("lm_head.weight")  # it may be stored, if it is the embedding
    for name in sorted(surplus | (wanted.keys() - place.keys())):
        raise ValueError(f"{folder}: {'surplus' if name in surplus else 'lacks'} {name}, going by its config.json")
    weights: dict[str, Tensor] = {}
    for path in files:
        with opened(path) as file:
            for name in file.keys():
                if name in wanted:
                    weights[wanted[name][0]] = finite(f"{path}: {name}", file.get_tensor(name).float())
    if config.tie_embeddings and "lm_head.weight" in place:
        with opened(place["lm_head.weight"]) as file:
            if not torch.equal(file.get_tensor("lm_head.weight").float(), weights["embed.weight"]):
                raise ValueError(f"{folder}: config.json ties the embeddings, but lm_head.weight is another matrix")
    return config, weights


def check_header(what: str, header: Any, shape: tuple[int, ...]) -> None:
    if tuple(header.get_shape()) != shape:
        raise ValueError(f"{what} is {header.get_shape()}, config.json wants {list(shape)}")
    if header.get_dtype() not in ("F32", "F16", "BF16"):
        raise ValueError(f"{what} is {header.get_dtype()}: only F32, F16 and BF16 can be read")


def finite(what: str, tensor: Tensor) -> Tensor:
    if not torch.isfinite(tensor).all():
        raise ValueError(f"{what} holds NaN or Inf")
    return tensor


@dataclass(frozen=True)
class Weights:
    """A model, all but built: fp32 tensors by our names, adapters merged in."""

    config: ModelConfig
    tensors: dict[str, Tensor]
    place: Path  # the checkpoint's file, or the Hugging Face folder
    state: dict[str, Any] = field(default_factory=dict)  # what else the checkpoint holds
    adapters: dict[str, Tensor] = field(default_factory=dict)  # those that are in `tensors` now

    @property
    def context(self) -> int:
        """Tokens that the model can read: those it was trained on here, or more before that."""
        return max(self.config.block_size, self.state.get("base", {}).get("context", 0))

    @property
    def folder(self) -> Path:
        """Where its tokenizer is."""
        return self.place if self.place.is_dir() else self.place.parent

    def tokenizer(self) -> Tokenizer:
        """The tokenizer that these weights were trained with. ValueError if that is not the one in the folder."""
        tokenizer = load_tokenizer(self.folder)
        wanted, found = self.state.get("data", {}).get("tokenizer_sha256"), tokenizer.sha256
        if wanted not in (None, found):
            raise ValueError(f"the tokenizer in {self.folder} is not the one this model was trained with (SHA-256 "
                             f"{found[:12]} instead of {wanted!s:.12}): copy that of the data set there")
        if tokenizer.vocab_size > self.config.vocab_size:
            raise ValueError(f"the tokenizer in {self.folder} has {tokenizer.vocab_size} tokens, the model knows only "
                             f"{self.config.vocab_size}: it is not the one of this model")
        return tokenizer

    @property
    def data(self) -> dict[str, Any]:
        """What is known of the data it was trained on: at least the SHA-256 of the tokenizer."""
        known = self.state.get("data", {})
        return known if "tokenizer_sha256" in known else known | {"tokenizer_sha256": tokenizer_sha256(self.folder)}

    def checksum(self) -> int:
        """CRC-32 of the weights as they are stored, of adapters and what they are for; sums depend on the machine."""
        stored, crc = (self.adapters, self.state["base"]["checksum"]) if self.adapters else (self.tensors, 0)
        for name in sorted(stored):
            crc = zlib.crc32(stored[name].numpy(), crc)
        return crc


def check_there(place: Path) -> None:
    if not place.exists():
        raise ValueError(f"{place} does not exist: name a folder of a run, or one of Hugging Face weights on this disk "
                         f"(hf download NAME --local-dir FOLDER makes one)")


def is_hf(place: Path) -> bool:
    return (place / "config.json").is_file() and "model_type" in read_json(place / "config.json")


def architecture(place: Path) -> ModelConfig:
    """What a run (its folder, or a checkpoint in it) or a Hugging Face folder says its model is; reads no weights."""
    check_there(place)
    path = (place.parent if place.is_file() else place) / "config.json"
    said = read_json(path)
    if "model_type" in said:
        return from_hf(said, str(path))
    knobs = knobs_of(ModelConfig)
    missing = [name for name in knobs if name not in said]
    if missing:
        raise ValueError(f"{path} is neither Hugging Face's nor of a run: it lacks {', '.join(missing[:3])}")
    return ModelConfig(**typed({name: said[name] for name in knobs}, knobs, str(path)))


def inherited(knobs: dict[str, Any]) -> dict[str, Any]:
    """The model knobs that are decided elsewhere: by the run that is resumed, which may have outlived the weights that
    it began with, or by those weights; where they could read 100,000 tokens, few machines can train on as many."""
    if not knobs.get("init_from"):
        return {}
    out = Path(knobs.get("out_dir", Config.out_dir))
    if knobs.get("resume", Config.resume) != "no" and checkpoint.all_in(out):
        return dataclasses.asdict(architecture(out))
    decided = architecture(Path(knobs["init_from"]))
    return dataclasses.asdict(decided) | {"block_size": min(decided.block_size, LONGEST)}


def open_weights(place: Path, which: str = "latest", above: tuple[Path, ...] = ()) -> Weights:
    """The weights of a run (its checkpoint `which`: latest, best or a step), of a checkpoint's file, or of a Hugging
    Face folder. Adapters are merged into the weights that they were trained for, which must still be where they were.
    """
    check_there(place)
    if which != "latest" and (is_hf(place) or place.is_file()):
        raise ValueError(f"{place} has no checkpoints to choose from, a run's folder has: leave checkpoint={which} out")
    if is_hf(place):
        return Weights(*read_hf(place), place)
    if place.is_file():
        state, file = checkpoint.load(place), place
    else:
        state = checkpoint.load_named(place, which)
        file = place / "best.pt" if which == "best" else checkpoint.path_of(place, state["step"])
    config, stored, rank = checkpoint.model_config(state), state.pop("model"), state["config"].get("lora_rank", 0)
    if not rank:
        return Weights(config, stored, file, state)
    base = open_base(state["base"], file, above)
    return Weights(config, merged(base.tensors, stored, state["config"]["lora_alpha"] / rank), file, state, stored)


def open_base(base: dict[str, Any], file: Path, above: tuple[Path, ...] = (), moved: Path | None = None) -> Weights:
    """The weights that the checkpoint `file` was fine-tuned from, by what it knows of them; `moved`: or they are there.
    """
    if "path" not in base:
        raise ValueError(f"{file} is damaged: it has adapters, but does not say for which weights")
    place = file.parent / base["path"]
    if moved is not None and not place.exists():
        place = moved
    if not place.exists():
        raise ValueError(f"{file} has adapters for the weights in {place.resolve()}, which is gone: put it back, or "
                         f"resume this run once with init_from=where it is now")
    if file in above:
        raise ValueError(f"{file} is damaged: it has adapters for itself")
    weights = open_weights(place, above=(*above, file))
    if weights.checksum() != base.get("checksum"):
        raise ValueError(f"{place} no longer holds the weights that {file} was fine-tuned from: put those back")
    return weights


def load_model(place: Path, which: str = "latest", device: str = "cpu") -> tuple[Decoder, Tokenizer, dict[str, Any]]:
    """The model of open_weights(place, which) on `device`, its tokenizer, and what is known of its training data."""
    weights = open_weights(place, which)
    tokenizer = weights.tokenizer()
    return checkpoint.build_model(weights.config, weights.tensors, device), tokenizer, weights.data
