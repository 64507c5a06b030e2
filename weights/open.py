"""Open a trained model: the folder of a run, one of its checkpoints, or a Hugging Face folder.

From Python, these two are the way in:

    model, tokenizer, data = load_model("out/small")  # ready for sample.generate
    weights = open_weights("out/small", "best")  # the tensors, without a model

Reading order: Weights, open_weights and open_base, load_model; then what can be known of a model
without reading its weights.
"""

import dataclasses
import os
import zlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from config.preset import load_json
from config.schema import Config, knobs_of, parse_knobs
from model import Decoder, ModelConfig
from norm import fading_norms, gate_at
from text.tokenizer import Tokenizer, load_tokenizer, tokenizer_sha256
from weights import checkpoint
from weights.hf_folder import config_from_hf, is_hf_folder, read_hf
from weights.lora import merge_adapters

# Tokens of a window, unless the user asks for more. Some models read 100,000 tokens at once, but
# few machines can train or evaluate them on so many.
LONGEST_WINDOW = 2048
LONGEST_CHAIN = 16  # of adapters for weights that have adapters themselves, and so on


@dataclass(frozen=True)
class Weights:
    """All that a model is built of: its configuration and fp32 tensors by our names. Adapters are
    merged into the tensors.
    """

    config: ModelConfig
    tensors: dict[str, Tensor]
    place: Path  # the file of the checkpoint, or the Hugging Face folder
    state: dict[str, Any] = field(default_factory=dict)  # the other fields of the checkpoint
    adapters: dict[str, Tensor] = field(default_factory=dict)  # those merged into `tensors`

    @property
    def context(self) -> int:
        """Tokens that the model can read. After a fine-tuning on shorter windows it still reads as
        many as the model that it began with.
        """
        return max(self.config.block_size, self.state.get("base", {}).get("context", 0))

    @property
    def folder(self) -> Path:
        """The folder that also holds the tokenizer."""
        return self.place if self.place.is_dir() else self.place.parent

    def tokenizer(self) -> Tokenizer:
        """The tokenizer in the folder. ValueError if these weights were trained with another one,
        or if it has more tokens than the model.
        """
        tokenizer = load_tokenizer(self.folder)
        wanted, found = self.state.get("data", {}).get("tokenizer_sha256"), tokenizer.sha256
        if wanted not in (None, found):
            raise ValueError(
                f"the tokenizer in {self.folder} is not the one this model was trained with "
                f"(SHA-256 {found[:12]} instead of {wanted!s:.12}): copy that of the data set there"
            )
        if tokenizer.vocab_size > self.config.vocab_size:
            raise ValueError(
                f"the tokenizer in {self.folder} has {tokenizer.vocab_size} tokens, the model "
                f"knows only {self.config.vocab_size}: it is not the one of this model"
            )
        return tokenizer

    @property
    def data(self) -> dict[str, Any]:
        """What is known of the training data: at least the SHA-256 of the tokenizer; and doc_mask,
        if attention stayed within a document."""
        known = self.state.get("data", {})
        if self.state.get("config", {}).get("doc_mask") is True:
            known = known | {"doc_mask": True}
        if "tokenizer_sha256" not in known:
            known = known | {"tokenizer_sha256": tokenizer_sha256(self.folder)}
        return known

    def checksum(self) -> int:
        """CRC-32 of the weights as they are stored. Those with adapters are not summed after the
        merge, whose last digits depend on the machine, but as the adapters and their base.
        """
        stored, crc = self.tensors, 0
        if self.adapters:
            stored, crc = self.adapters, self.state["base"]["checksum"]
        for name in sorted(stored):
            crc = zlib.crc32(stored[name].numpy(), crc)
        return crc


def open_weights(place: str | Path, which: str = "latest", chain: tuple[Path, ...] = ()) -> Weights:
    """The weights of a run (its checkpoint `which`: latest, best or a step), of the file of a
    checkpoint, or of a Hugging Face folder. ValueError or OSError says what is wrong.

    Adapters are merged into the weights that they were trained for, which must still be where they
    were. `chain` has the checkpoints with adapters that led from the first one to this place.
    """
    place = Path(place)
    check_exists(place)
    from_hf = is_hf_folder(place)
    if which != "latest" and (from_hf or place.is_file()):
        raise ValueError(
            f"{place} has no checkpoints to choose from, a run's folder has: leave "
            f"checkpoint={which} out"
        )
    if from_hf:
        return Weights(*read_hf(place), place)
    if place.is_file():
        state, file = checkpoint.load(place), place
    else:
        state = checkpoint.load_named(place, which)
        file = place / "best.pt" if which == "best" else checkpoint.path_of(place, state["step"])
        check_belongs(state, file)
    stored, adapters = state.pop("model"), {}
    rank = state["config"].get("lora_rank", 0)
    base = open_base(state["base"], file, chain) if rank else None
    try:
        config, tensors = checkpoint.model_config(state), stored
        if base is None:
            checkpoint.check_fit(config, tensors)
        else:
            alpha = state["config"].get("lora_alpha", Config.lora_alpha)
            tensors, adapters = merge_adapters(base.tensors, stored, alpha / rank), stored
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from None
    return Weights(config, tensors, file, state, adapters)


def check_belongs(state: dict[str, Any], file: Path) -> None:
    """ValueError if a checkpoint is of another run than the config.json beside it. A run that goes
    on refuses the same differences."""
    path = file.with_name("config.json")
    if not path.exists():
        return
    said = load_json(path)
    data = said.get("data", {})
    fixed = {name: said[name] for name in checkpoint.FIXED if name in said}
    refused, _ = checkpoint.differences(state, fixed, data if isinstance(data, dict) else {})
    if refused:
        raise ValueError(f"{file} is not of the run that {path} describes: {'; '.join(refused)}")


def open_base(
    base: dict[str, Any], file: Path, chain: tuple[Path, ...] = (), moved: Path | None = None
) -> Weights:
    """The weights for which the checkpoint `file` has adapters; `base` is what the checkpoint says
    of them. If they are not where they were, they are looked for in `moved`. ValueError if they are
    gone or have changed.
    """
    if "path" not in base:
        raise ValueError(f"{file} is damaged: it has adapters, but does not say for which weights")
    file = Path(os.path.realpath(file))  # there are many ways to write a path
    wanted = place = Path(os.path.realpath(file.parent / base["path"]))
    if moved is not None and not place.exists():
        place = moved
    if not place.exists():
        raise base_is_gone(file, wanted)
    if file in chain:
        raise ValueError(f"{file} is damaged: it has adapters for itself")
    if len(chain) == LONGEST_CHAIN:
        raise ValueError(
            f"{file} has adapters for weights with adapters, and so on, more than {LONGEST_CHAIN} "
            f"times: this is too deep"
        )
    weights = open_weights(place, chain=(*chain, file))
    if weights.checksum() != base.get("checksum"):
        if not wanted.exists() and newer_step(wanted):
            raise base_is_gone(file, wanted)
        raise ValueError(
            f"{place} no longer holds the weights that {file} was fine-tuned from: put those back"
        )
    return weights


def base_is_gone(file: Path, place: Path) -> ValueError:
    """The error for the adapters in `file` whose weights are not in `place` any more."""
    why = "is gone: put it back"
    if step := newer_step(place):
        why = f"that run has removed: it is at step {step} now. Put a copy of the file back"
    return ValueError(
        f"{file} has adapters for the weights in {place}, which {why}, or once resume the run "
        f"of the adapters with init_from=where those weights are now"
    )


def newer_step(place: Path) -> int | None:
    """The newest step in the folder of a numbered checkpoint, if it is a later one."""
    step = checkpoint.step_in_name(place)
    newest = max((at for at, _ in checkpoint.all_in(place.parent)), default=0)
    return newest if step is not None and newest > step else None


def load_model(
    place: str | Path, which: str = "latest", device: str = "cpu", block_size: int = 0
) -> tuple[Decoder, Tokenizer, dict[str, Any]]:
    """The model of open_weights(place, which) on `device` and in eval mode, its tokenizer, and what
    is known of its training data.

    A model that was fine-tuned on shorter windows than its context reads as many tokens as they
    had, unless `block_size` asks for more. ValueError if that is more than the context.
    """
    weights = open_weights(place, which)
    refuse_longer_than_context(block_size, weights.context)
    tokenizer = weights.tokenizer()
    config = dataclasses.replace(
        weights.config, block_size=max(weights.config.block_size, block_size)
    )
    model = checkpoint.build_model(config, weights.tensors, device)
    for norm in fading_norms(model):
        taper = (weights.state["config"].get(name, 0) for name in ("taper_start", "taper_end"))
        norm.gate.fill_(gate_at(weights.state["step"], *taper))
    return model.eval(), tokenizer, weights.data


def check_exists(place: Path) -> None:
    if not place.exists():
        # Three words of nanoGPT.
        if str(place) == "scratch":
            raise ValueError("init_from=scratch: leave init_from out to begin from scratch")
        if str(place) == "resume":
            raise ValueError("init_from=resume: python train.py FOLDER goes on with a run")
        if str(place).startswith("gpt2"):
            raise ValueError(
                f"{place} is GPT-2, which is no Llama, so its weights cannot be used: "
                f"docs/huggingface.md says which can"
            )
        raise ValueError(
            f"{place} does not exist: name a folder of a run, or one of Hugging Face weights on "
            f"this disk (hf download NAME --local-dir FOLDER makes one)"
        )


def refuse_longer_than_context(block_size: int, context: int) -> None:
    """ValueError if a window has more tokens than the context of a trained model: it has never seen
    such positions. The same counts for its evaluation and its fine-tuning."""
    if block_size > context:
        raise ValueError(
            f"block_size={block_size:,} is more than the {context:,} tokens of this model's "
            f"context: choose at most {context}"
        )


def read_architecture(place: Path) -> ModelConfig:
    """The model that a run (its folder, or a checkpoint in it) or a Hugging Face folder describes
    in its config.json. No weights are read.
    """
    check_exists(place)
    path = (place.parent if place.is_file() else place) / "config.json"
    said = load_json(path)
    if "model_type" in said:
        return config_from_hf(said, str(path))
    knobs = knobs_of(ModelConfig)
    missing = [name for name in knobs if name not in said]
    if missing:
        raise ValueError(
            f"{path} is neither Hugging Face's nor of a run: it lacks {', '.join(missing[:3])}"
        )
    parsed = parse_knobs({name: said[name] for name in knobs}, knobs, str(path))
    try:
        return ModelConfig(**parsed)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def knobs_of_base(knobs: dict[str, Any]) -> dict[str, Any]:
    """The knobs of the model that init_from decides, given all knobs of the user; empty without
    init_from. A run that is resumed has them in its own folder, for it may have outlived the
    weights that it began with. A fresh run takes the context of those weights, but at most
    LONGEST_WINDOW.
    """
    if not knobs.get("init_from"):
        return {}
    out = Path(knobs.get("out_dir", Config.out_dir))
    if knobs.get("resume", Config.resume) != "no" and checkpoint.all_in(out):
        return dataclasses.asdict(read_architecture(out))
    base = read_architecture(Path(knobs["init_from"]))
    return dataclasses.asdict(base) | {"block_size": min(base.block_size, LONGEST_WINDOW)}
