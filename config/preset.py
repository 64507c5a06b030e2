"""From a command line to the Config of a run.

A preset is a file of `name = literal` lines, which is parsed and never executed, or the folder of a
run. Its knobs and those of the command line are gathered first and then checked all at once, so
their order never matters. Reading order: read_knobs and make_config, then how a preset is read.
"""

import ast
import json
import operator
import warnings
from collections.abc import Callable
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from config.command import shell_path
from config.schema import (
    NEEDS,
    Config,
    knobs_of,
    parse_knobs,
    read_arguments,
    refuse_without_effect,
    without_effect,
)
from model import ModelConfig

FOLDER = Path(__file__).parent
DEFAULT_PRESET = FOLDER / "small.py"
NO_PRESETS = ("__init__", "command", "help", "preset", "schema")  # the other files of this folder
PRESETS = sorted(path.stem for path in FOLDER.glob("*.py") if path.stem not in NO_PRESETS)
LARGEST_PRESET = 100_000  # bytes
LARGEST_JSON = 2**24  # bytes; the config.json or index of the largest models has a tenth of that
KNOBS = knobs_of(Config, ModelConfig)
NOT_DECIDED_BY_WEIGHTS = ("block_size", "dropout", "norm_impl")  # the model's other knobs are


def read_knobs(argv: list[str], launched: bool = False) -> dict[str, Any]:
    """The knobs of a command line: those of its preset (config/small.py if it names none), and the
    key=value pairs, which override the preset. `launched`: whether torchrun or its like has started
    this process.

    Raises ValueError, also for a knob that counts only beside another one which is not set.
    """
    place, preset, own = read_layers(argv)
    useless = without_effect_of(own, preset | own | {"launched": launched})
    refuse_without_effect(useless, own, "command line")
    if not place.is_dir():  # a run's folder has every knob
        # A preset may be meant for several ranks. And what one of its knobs needs may stand on the
        # command line, or be overridden there.
        by_itself = without_effect_of(preset, preset | {"launched": True})
        together = without_effect_of(preset, preset | own | {"launched": True})
        useless = {name: need for name, need in together.items() if name in by_itself}
        refuse_without_effect(useless, preset, str(place))
    return preset | own


def without_effect_of(given: dict[str, Any], values: dict[str, Any]) -> dict[str, str]:
    """Those of the knobs `given` to train.py that do not count beside the others, and what they
    need. With init_from the weights decide the model's knobs, so nothing is said of these here.
    """
    names = given.keys() - (knobs_of(ModelConfig).keys() if values.get("init_from") else set())
    return without_effect(names, values, KNOBS, NEEDS)


def read_layers(argv: list[str]) -> tuple[Path, dict[str, Any], dict[str, Any]]:
    """Where the preset of a command line is, its knobs, and the knobs of the command line itself.
    Raises ValueError.
    """
    words, own = read_arguments(argv, KNOBS)
    if len(words) > 1:
        raise ValueError(f"one preset at most, got {' '.join(words)}; knobs are written key=value")
    place = Path(words[0]) if words else DEFAULT_PRESET
    preset = read_preset(place)
    if place.is_dir() and "out_dir" in own:
        # This begins a run like that one elsewhere. It must not go on with what is there.
        preset.pop("resume", None)
    return place, parse_knobs(preset, KNOBS, str(place)), own


def make_config(knobs: dict[str, Any], inherited: dict[str, Any] | None = None) -> Config:
    """The checked Config of these knobs; all others have their defaults.

    `inherited` holds the knobs of the model that the weights of init_from decide. Raises ValueError
    if one of `knobs` differs from them, unless it is in NOT_DECIDED_BY_WEIGHTS.
    """
    inherited = inherited or {}
    different = [
        f"{name}={knobs[name]} ({value} there)"
        for name, value in inherited.items()
        if name not in NOT_DECIDED_BY_WEIGHTS and knobs.get(name, value) != value
    ]
    if different:
        raise ValueError(
            f"init_from={knobs['init_from']} decides the architecture: leave out "
            f"{', '.join(different)}; config/finetune.py is a preset without it"
        )
    of_model = {name: knobs[name] for name in knobs_of(ModelConfig) if name in knobs}
    of_run = {name: knobs[name] for name in knobs_of(Config) if name in knobs}
    return Config(model=ModelConfig(**inherited | of_model), **of_run)


def read_preset(path: Path) -> dict[str, Any]:
    """The knobs that a preset sets, as they are written there. Raises ValueError."""
    if (path / "config.json").is_file():
        return read_run(path)
    return parse_preset(find_preset(path))


def find_preset(path: Path) -> Path:
    """The file itself, or, if there is none, our preset of that name: tiny, tiny.py and
    config/tiny.py are found from any folder.
    """
    name = path.name.removesuffix(".py")
    if path.is_file():
        return path
    if name in PRESETS and str(path.parent) in (".", "config"):
        return FOLDER / f"{name}.py"
    near = ["finetune"] if name.startswith("finetune_") else []  # nanoGPT's names
    near += get_close_matches(name.removeprefix("train_"), PRESETS, 1)
    known = f"presets of config/ are {', '.join(PRESETS)}"
    hint = f"did you mean config/{near[0]}.py?" if near else known
    raise ValueError(f"{path} is neither a file nor a run's folder; {hint}")


def read_run(folder: Path) -> dict[str, Any]:
    """All knobs of a run, as a preset that goes on with it, or that begins a run like it if another
    out_dir is given. Raises ValueError.

    If vocab_size is that of the run's data, it is left out: other data may have another one.
    """
    saved = load_json(folder / "config.json")
    data = saved.get("data")
    if not isinstance(data, dict) or not {"out_dir", "device"} <= saved.keys():
        raise ValueError(
            f"{folder} is not a run's folder, going by its config.json; to begin with weights "
            f"there, write init_from={shell_path(folder)}"
        )
    knobs = {k: v for k, v in saved.items() if k not in ("versions", "parameters", "data")}
    try:
        make_config(parse_knobs(knobs, KNOBS, "its knobs"))
    except ValueError as error:
        raise ValueError(
            f"{folder / 'config.json'}: {error} (use the version of the program that wrote it)"
        ) from None
    if "vocab_size" in data and data["vocab_size"] == knobs.get("vocab_size"):
        del knobs["vocab_size"]
    device = str(saved["device"]).partition(":")[0]  # cuda:3 may be taken, or not exist here
    return knobs | {"out_dir": str(folder), "resume": "auto", "device": device}


def load_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises ValueError or OSError, whose text is one line."""
    if not path.is_file():  # to open a FIFO would wait for ever
        raise FileNotFoundError(f"{path} is missing, or not a regular file")
    if path.stat().st_size > LARGEST_JSON:
        raise ValueError(f"{path} is larger than {LARGEST_JSON:,} bytes: no such file is")
    try:
        content = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON ({error!s:.200})") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold a JSON object, got {type(content).__name__}")
    return content


def parse_preset(path: Path) -> dict[str, Any]:
    """name -> value of the `name = literal` lines of a file. Raises ValueError with the place."""
    values = {}
    for line in syntax_tree(path).body:
        where = f"{path}:{line.lineno}:{line.col_offset + 1}"
        match line:
            case ast.Expr(value=ast.Constant(value=str())):  # a docstring
                continue
            case ast.Assign(targets=[ast.Name(id=name)], value=expression):
                if name in values:
                    raise ValueError(f"{where}: {name} is given twice")
                try:
                    values[name] = literal_value(expression, path)
                except RecursionError as error:
                    raise ValueError(f"{where}: {name} is nested too deeply") from error
            case _:
                raise ValueError(
                    f"{where}: a preset holds only lines of the form name = literal; "
                    f"nothing of it was run"
                )
    return values


def syntax_tree(path: Path) -> ast.Module:
    """The file, parsed as Python but not executed. Raises ValueError."""
    if path.stat().st_size > LARGEST_PRESET:
        raise ValueError(f"{path} is larger than {LARGEST_PRESET:,} bytes: no preset is")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Python warns of spelling such as `1is 1`
            text = path.read_text(encoding="utf-8-sig")
            if "\0" in text:
                raise ValueError("it has a NUL byte")
            return ast.parse(text, filename=str(path))
    except SyntaxError as error:
        raise ValueError(f"{path}:{error.lineno}:{error.offset}: {error.msg}") from error
    except ValueError as error:  # UnicodeDecodeError is one, too
        raise ValueError(f"{path} is not a UTF-8 text file: {error}") from error
    except (RecursionError, MemoryError) as error:  # so says Python's parser
        raise ValueError(f"{path} is nested too deeply") from error


ARITHMETIC: dict[type, Callable] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Pow: operator.pow,
}
LARGEST_OPERAND = 1e18  # arithmetic on huge numbers could take for ever, as 10**10**10 would
LARGEST_POWER = 64


def literal_value(node: ast.expr, path: Path) -> int | float | str | bool:
    """The value of a number, a text or a boolean, or of arithmetic on numbers (+ - * / // **).

    Raises ValueError, with the place in the file, for everything else.
    """
    where = f"{path}:{node.lineno}:{node.col_offset + 1}"
    match node:
        case ast.Constant(value=int() as value) if value < 2**63:
            return value
        case ast.Constant(value=float() | str() as value):
            return value
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            value = literal_value(operand, path)
            if isinstance(value, (int, float)):
                return -value
        case ast.BinOp(left=left, op=op, right=right) if type(op) in ARITHMETIC:
            a, b = literal_value(left, path), literal_value(right, path)
            takes_long = isinstance(op, ast.Pow) and _is_small(b) and abs(b) > LARGEST_POWER
            if _is_small(a) and _is_small(b) and not takes_long:
                try:
                    return ARITHMETIC[type(op)](a, b)
                except ArithmeticError as error:
                    raise ValueError(f"{where}: {error}") from error
    raise ValueError(
        f"{where}: only numbers, strings, booleans and arithmetic of numbers (below 2**63) are "
        f"allowed; nothing was run"
    )


def _is_small(value: Any) -> bool:
    return isinstance(value, (int, float)) and abs(value) < LARGEST_OPERAND
