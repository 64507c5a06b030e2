"""--help: every knob with its default, its meaning and its choices."""

import textwrap
from typing import Any, Literal, get_args, get_origin

from config.schema import FIRST_KNOBS, GROUPS, knobs_of

WIDTH = 100  # columns of a line
INDENT = 34  # the column at which the meaning of a knob begins


def training_help(usage: str) -> str:
    """--help of a command that trains: `usage`, and every knob of a run in its group."""
    about = (
        f"These are all knobs, with the values that they have where the preset does not set them. "
        f"To begin with, you need only {', '.join(FIRST_KNOBS[:-1])} and {FIRST_KNOBS[-1]}."
    )
    groups = [help_text(f"{group}:", knobs) for group, knobs in GROUPS.items()]
    return "\n\n".join([usage, textwrap.fill(about, WIDTH), *groups])


def help_text(title: str, knobs: type) -> str:
    """`title`, and below it each knob of the dataclass `knobs`: default, meaning and choices."""
    lines = [title]
    for name, (kind, knob_field) in knobs_of(knobs).items():
        start = f"  {name}={_typed_by_user(knob_field.default)}".ljust(INDENT - 1)
        line = f"{start} {knob_field.metadata['help']} ({_choices(kind)})"
        lines += textwrap.wrap(line, WIDTH, subsequent_indent=INDENT * " ", break_on_hyphens=False)
    return "\n".join(lines)


def _choices(kind: Any) -> str:
    """'a | b' for a choice of two, 'int' for any whole number, and so on."""
    choices = get_args(kind) if get_origin(kind) is Literal else ()
    if kind is bool:
        choices = (True, False)
    return " | ".join(map(_typed_by_user, choices)) or kind.__name__


def _typed_by_user(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return "''" if value == "" else str(value)
