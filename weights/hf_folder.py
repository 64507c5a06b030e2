"""A Hugging Face folder as a model of ours: of Llama, or of a family that is built like it.

Such a folder holds config.json, the weights as safetensors (one file, or several and an index) and
a tokenizer. Its weights are ours under other names: the layout is the same, that of RoPE included,
so nothing is computed on the way.

Reading order: the names and shapes of the weights; config.json; the files; read_hf, which reads a
whole folder.
"""

import re
from collections.abc import Iterator, Set
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from config.preset import load_json
from config.schema import knobs_of, parse_knobs
from model import ModelConfig

# model_type -> what transformers assumes where config.json is silent, if it is not in DEFAULTS.
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {
        "num_key_value_heads": 8,
        "max_position_embeddings": 131072,
        "sliding_window": 4096,
    },
    "qwen3": {
        "num_key_value_heads": 32,
        "max_position_embeddings": 32768,
        "head_dim": 128,
        "use_sliding_window": False,
    },
}
DEFAULTS = {
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "hidden_act": "silu",
    "num_key_value_heads": None,
    "head_dim": None,
    "use_sliding_window": True,
}
REQUIRED = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
)
KEYS = {  # our knob -> its key in a config.json
    "n_layer": "num_hidden_layers",
    "n_head": "num_attention_heads",
    "n_kv_head": "num_key_value_heads",
    "n_embd": "hidden_size",
    "head_dim": "head_dim",
    "n_hidden": "intermediate_size",
    "block_size": "max_position_embeddings",
    "vocab_size": "vocab_size",
    "tie_embeddings": "tie_word_embeddings",
    "norm_eps": "rms_norm_eps",
}
ROPE_KEYS = {  # the same for its rope_scaling or rope_parameters
    "rope_theta": "rope_theta",
    "rope_factor": "factor",
    "rope_low_freq": "low_freq_factor",
    "rope_high_freq": "high_freq_factor",
    "rope_original_context": "original_max_position_embeddings",
}
REFUSED = {  # key of a config.json -> (the values that we can be, what any other value would be)
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
    "attn_norm.gain": "input_layernorm.weight",
    "attn.q.weight": "self_attn.q_proj.weight",
    "attn.k.weight": "self_attn.k_proj.weight",
    "attn.v.weight": "self_attn.v_proj.weight",
    "attn.q_norm.gain": "self_attn.q_norm.weight",
    "attn.k_norm.gain": "self_attn.k_norm.weight",
    "attn.out.weight": "self_attn.o_proj.weight",
    "ffn_norm.gain": "post_attention_layernorm.weight",
    "ffn.gate.weight": "mlp.gate_proj.weight",
    "ffn.up.weight": "mlp.up_proj.weight",
    "ffn.down.weight": "mlp.down_proj.weight",
}
OUTER_NAMES = {
    "embed.weight": "model.embed_tokens.weight",
    "norm.gain": "model.norm.weight",
    "head.weight": "lm_head.weight",
}


def hf_name(name: str) -> str:
    """Hugging Face's name of one of our weights."""
    if name in OUTER_NAMES:
        return OUTER_NAMES[name]
    _, layer, part = name.split(".", 2)
    return f"model.layers.{layer}.{BLOCK_NAMES[part]}"


def weight_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Our name and the shape of every weight of a Llama, or with qk_norm of a Qwen 3: norms with a
    gain each stand before the branches, and the feed-forward is SwiGLU.
    """
    C, F, D, V = config.n_embd, config.hidden_size, config.head_size, config.vocab_size
    Q, K = config.n_head * D, config.kv_heads * D
    shapes = {"embed.weight": (V, C), "norm.gain": (C,)}
    if not config.tie_embeddings:
        shapes["head.weight"] = (V, C)
    block = {
        "attn_norm.gain": (C,),
        "attn.q.weight": (Q, C),
        "attn.k.weight": (K, C),
        "attn.v.weight": (K, C),
        "attn.out.weight": (C, Q),
        "ffn_norm.gain": (C,),
        "ffn.gate.weight": (F, C),
        "ffn.up.weight": (F, C),
        "ffn.down.weight": (C, F),
    }
    if config.qk_norm:
        block |= {"attn.q_norm.gain": (D,), "attn.k_norm.gain": (D,)}
    for layer in range(config.n_layer):
        shapes |= {f"blocks.{layer}.{name}": shape for name, shape in block.items()}
    return shapes


def is_hf_folder(place: Path) -> bool:
    return (place / "config.json").is_file() and "model_type" in load_json(place / "config.json")


def config_from_hf(theirs: dict[str, Any], where: str) -> ModelConfig:
    """The model that a config.json describes. ValueError names everything in it that our model
    cannot be; `where` is the file, for the messages.
    """
    family = theirs.get("model_type")
    if not isinstance(family, str) or family not in FAMILIES:
        raise ValueError(
            f"{where}: model_type {family!r:.80} is not one that this model can be: "
            f"{', '.join(FAMILIES)}"
        )
    theirs = DEFAULTS | FAMILIES[family] | theirs
    missing = [key for key in REQUIRED if theirs.get(key) is None]
    if missing:
        raise ValueError(f"{where}: lacks {', '.join(missing)}")
    rope = rope_values(theirs, where)
    problems = [
        f"{key} = {theirs[key]!r:.80} ({meaning})"
        for key, (allowed, meaning) in REFUSED.items()
        if theirs.get(key) not in allowed
    ]
    window = theirs.get("sliding_window")
    if theirs["use_sliding_window"] and window is not None:
        problems.append(f"sliding_window = {window!r:.80} (each token sees only so far back)")
    if problems:
        raise ValueError(f"{where}: this model cannot have {'; '.join(problems)}")
    automatic = {key: 0 for key in ("num_key_value_heads", "head_dim") if theirs[key] is None}
    values = {key: (theirs | automatic)[key] for key in KEYS.values()} | rope
    if empty := [key for key, value in values.items() if value is None]:
        raise ValueError(f"{where}: {', '.join(empty)} must not be null: write the model's value")
    words = KEYS | ROPE_KEYS  # all messages are in the words of the file
    kinds = {words[name]: kind for name, kind in knobs_of(ModelConfig).items() if name in words}
    try:
        parsed = parse_knobs(values, kinds, where)
        for key, value in values.items():
            if isinstance(value, str):  # on a command line all values are texts, but not here
                raise ValueError(f"{key} must not stand in quotes, got {value!r:.80}")
        for key in ("vocab_size", "intermediate_size", "num_key_value_heads", "head_dim"):
            if parsed[key] < 1 and key not in automatic:  # 0 is automatic for our knobs alone
                raise ValueError(f"{key} must be 1 or more, got {parsed[key]}")
        knobs: dict[str, Any] = {name: parsed[key] for name, key in words.items() if key in parsed}
        knobs["qk_norm"] = family == "qwen3"
        if "rope_factor" in knobs:
            knobs["rope_scaling"] = "llama3"
        # 0 is the usual value, as in the config of a run that leaves these two knobs alone.
        if knobs["head_dim"] * knobs["n_head"] == knobs["n_embd"]:
            knobs["head_dim"] = 0
        if knobs["n_kv_head"] == knobs["n_head"]:
            knobs["n_kv_head"] = 0
        return ModelConfig(**knobs)
    except ValueError as error:
        said = str(error).removeprefix(f"{where}: ")
        said = re.sub(r"\w+", lambda word: words.get(word[0], word[0]), said)
        raise ValueError(f"{where}: {said}") from None


def rope_values(theirs: dict[str, Any], where: str) -> dict[str, Any]:
    """The settings of RoPE, by their names in ROPE_KEYS.

    transformers 5 writes them into rope_parameters, older versions into rope_theta and
    rope_scaling; if a file has several of these, we choose as transformers does.
    """
    rope = theirs.get("rope_scaling") or theirs.get("rope_parameters") or {}
    if not isinstance(rope, dict) or any(isinstance(v, (dict, list)) for v in rope.values()):
        raise ValueError(
            f"{where}: rope_parameters must be an object with one number or text for each name, "
            f"got {rope!r:.80}"
        )
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ("default", "llama3"):
        raise ValueError(
            f"{where}: this model cannot have RoPE scaled as {kind!r:.80}, only default or llama3"
        )
    values = {"rope_theta": rope.get("rope_theta", theirs.get("rope_theta", 10000.0))}
    if kind == "default":
        return values
    needed = ("factor", "low_freq_factor", "high_freq_factor")
    missing = [key for key in needed if key not in rope]
    if missing:
        raise ValueError(f"{where}: the llama3 scaling of RoPE lacks {', '.join(missing)}")
    original = rope.get("original_max_position_embeddings", theirs["max_position_embeddings"])
    values |= {key: rope[key] for key in needed}
    return values | {"original_max_position_embeddings": original}


def weight_files(folder: Path) -> tuple[list[Path], set[str] | None]:
    """The safetensors files of a folder, and the names of the tensors that its index lists. A
    single file has no index, and None stands for the names.
    """
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.is_file():
        return [single], None
    if not index.is_file():
        raise FileNotFoundError(
            f"{folder} has neither {single.name} nor {index.name}: weights in other formats can be "
            f"saved as safetensors with transformers' save_pretrained"
        )
    file_of = load_json(index).get("weight_map")
    is_map = isinstance(file_of, dict) and all(isinstance(file, str) for file in file_of.values())
    if not is_map or not file_of:
        raise ValueError(f"{index}: weight_map must say for each weight which file it is in")
    files = sorted(set(file_of.values()))
    for file in files:
        if Path(file).name != file or "\\" in file or not file.endswith(".safetensors"):
            raise ValueError(
                f"{index}: {file!r:.80} is not the name of a .safetensors file in the same folder"
            )
        if not (folder / file).is_file():
            raise FileNotFoundError(f"{folder / file} is missing: the index names it")
    return [folder / file for file in files], set(file_of)


@contextmanager
def open_safetensors(path: Path) -> Iterator[Any]:
    """A safetensors file, from which tensors can be read one by one. ValueError if it is damaged,
    or if the package safetensors is missing.
    """
    try:
        from safetensors import SafetensorError, safe_open
    except ImportError:
        raise ValueError(
            "Hugging Face weights need the package safetensors: pip install -e '.[hf]'"
        ) from None
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged or no safetensors file ({error!s:.200})") from None


def read_hf(folder: Path) -> tuple[ModelConfig, dict[str, Tensor]]:
    """The configuration and the fp32 weights, by our names, of a Hugging Face folder. Names, shapes
    and dtypes of all tensors are checked before the first tensor is read. ValueError or OSError
    says what is wrong.
    """
    config = config_from_hf(load_json(folder / "config.json"), str(folder / "config.json"))
    files, indexed = weight_files(folder)
    shapes = weight_shapes(config)
    our_names = {hf_name(name): name for name in shapes}
    home: dict[str, Path] = {}  # the file of each tensor, by their name
    for path in files:
        with open_safetensors(path) as file:
            for name in file.keys():
                if name in home:
                    raise ValueError(f"{name} is both in {home[name]} and in {path}")
                home[name] = path
                if name in our_names:
                    check_header(f"{path}: {name}", file.get_slice(name), shapes[our_names[name]])
    check_names(folder, config, our_names.keys(), home.keys(), indexed)
    weights: dict[str, Tensor] = {}
    for path in files:
        with open_safetensors(path) as file:
            for name in file.keys():
                if name not in our_names:
                    continue
                tensor = file.get_tensor(name).float()
                if not torch.isfinite(tensor).all():
                    raise ValueError(f"{path}: {name} holds NaN or Inf")
                weights[our_names[name]] = tensor
    if config.tie_embeddings and "lm_head.weight" in home:
        with open_safetensors(home["lm_head.weight"]) as file:
            head = file.get_tensor("lm_head.weight").float()
        if not torch.equal(head, weights["embed.weight"]):
            raise ValueError(
                f"{folder}: config.json ties the embeddings, but lm_head.weight is another matrix"
            )
    return config, weights


def check_header(what: str, header: Any, shape: tuple[int, ...]) -> None:
    """ValueError unless a stored tensor has this shape and a dtype that we read."""
    if tuple(header.get_shape()) != shape:
        raise ValueError(f"{what} is {header.get_shape()}, config.json wants {list(shape)}")
    if header.get_dtype() not in ("F32", "F16", "BF16"):
        raise ValueError(f"{what} is {header.get_dtype()}: only F32, F16 and BF16 can be read")


def check_names(
    folder: Path, config: ModelConfig, wanted: Set[str], found: Set[str], indexed: set[str] | None
) -> None:
    """ValueError unless the files hold the tensors that the index and config.json promise."""
    if indexed is not None and indexed != found:
        name = min(indexed ^ found)
        place = "only in the index" if name in indexed else "not in the index"
        raise ValueError(f"{folder}: {name} is {place}")
    # Old folders hold the tables of RoPE too. A tied head may be stored, if it is the embedding.
    surplus = {name for name in found - wanted if not name.endswith(".rotary_emb.inv_freq")}
    if config.tie_embeddings:
        surplus.discard("lm_head.weight")
    for name in sorted(surplus | (wanted - found)):
        verb = "surplus" if name in surplus else "lacks"
        raise ValueError(f"{folder}: {verb} {name}, going by its config.json")
