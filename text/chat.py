"""Conversations as text and as token ids, by the chat template of the weights or by a plain one.

Reading order: ChatTemplate, which has a conversation rendered; the template of a tokenizer;
conversations as token ids; Chat, a conversation with a model.
"""

import json
import subprocess
import sys
import threading
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from text.messages import Messages
from text.prompt import refuse_other_encodings
from text.tokenizer import Tokenizer

SECONDS = 20.0  # that a template may take for one conversation
LARGEST_TEMPLATE = 1_000_000  # characters
# ChatML, but for the end of a turn: that is the end token of the tokenizer, whatever it is called.
PLAIN = (
    "{{ BOS }}{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + EOS + '\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)

# The template


class ChatTemplate:
    """A chat template at work, in a process of its own (text/render.py) while the context lasts.

    ValueError if the template cannot be used at all; later, if it cannot render a conversation.
    """

    def __init__(self, source: str, variables: dict[str, Any], special: list[str]):
        if len(source) > LARGEST_TEMPLATE:
            raise ValueError(f"the chat template has more than {LARGEST_TEMPLATE:,} characters")
        self.about = {"template": source, "variables": variables, "special": special}
        self.about["seconds"] = SECONDS
        self.process: subprocess.Popen | None = None
        self.turn = threading.Lock()  # one request at a time, whichever thread has it

    def __enter__(self) -> "ChatTemplate":
        program = str(Path(__file__).with_name("render.py"))
        # -I: nothing is imported from the current folder, which can be a stranger's.
        self.process = subprocess.Popen(
            [sys.executable, "-I", program],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
        try:
            self._ask(self.about)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: Any) -> None:
        self.process.kill()
        self.process.communicate()

    def _ask(self, request: dict[str, Any]) -> dict[str, Any]:
        answer = b""
        with self.turn, suppress(BrokenPipeError):
            self.process.stdin.write(json.dumps(request).encode() + b"\n")
            self.process.stdin.flush()
            answer = self.process.stdout.readline()
        if not answer:  # it has ended itself
            raise ValueError(
                f"the chat template was stopped, for it takes more than {SECONDS:g} s or too much "
                f"memory"
            )
        told = json.loads(answer)
        if "error" in told:
            raise ValueError(f"the chat template fails: {told['error']}")
        return told

    def prompt(self, messages: Messages) -> str:
        """The conversation as text, up to where the model's next answer begins."""
        return self._ask({"messages": messages, "reply": True})["text"]

    def render(self, messages: Messages) -> tuple[str, list[tuple[int, int]]]:
        """The conversation as text, and where in it the answers begin and end."""
        told = self._ask({"messages": messages, "reply": False})
        return told["text"], [(start, end) for start, end in told["answers"]]


def template_of(tokenizer: Tokenizer) -> ChatTemplate:
    """The chat template in the files of the tokenizer; a plain one if there is none."""
    said = {
        name: value.get("content") if isinstance(value, dict) else value
        for name, value in tokenizer.config.items()
        if name.endswith("_token")
    }
    variables = {name: value for name, value in said.items() if isinstance(value, str)}
    source = template_source(tokenizer) or plain_template(tokenizer)
    return ChatTemplate(source, variables, list(tokenizer.special))


def plain_template(tokenizer: Tokenizer) -> str:
    """PLAIN with the special tokens of this tokenizer. ValueError if it has no end token."""
    names = {i: name for name, i in tokenizer.special.items()}
    ends = sorted(tokenizer.end_ids - {tokenizer.bos_id}) or sorted(tokenizer.end_ids)
    if not ends or ends[0] not in names:
        raise ValueError(
            f"this {tokenizer.kind} tokenizer has no end token, by which an answer could end: take "
            f"tokenizer=sentencepiece or byte, or weights with a chat template"
        )
    bos = names.get(tokenizer.bos_id, "") if tokenizer.before else ""
    return PLAIN.replace("BOS", json.dumps(bos)).replace("EOS", json.dumps(names[ends[0]]))


def template_learned(tokenizer: Tokenizer, data: dict[str, Any]) -> str | None:
    """The chat template that an export takes along: that of the tokenizer, or the plain one if the
    model was trained on conversations. `data` is what is known of its training data."""
    own = template_source(tokenizer)
    return plain_template(tokenizer) if data.get("answers") and not own else own


def turn_ends_learned(tokenizer: Tokenizer, data: dict[str, Any]) -> set[int]:
    """The ids by which the model ends an answer, if it was trained on conversations. An export
    names them, because the tokenizer's files may name only what ends a text, and then a program
    that reads these files would let the model speak on. `data` as in template_learned."""
    if not data.get("answers"):
        return set()
    with template_of(tokenizer) as template:
        return end_of_turn(tokenizer, template)


def template_source(tokenizer: Tokenizer) -> str | None:
    """The chat template that came with a tokenizer: the only one, or that of the name default."""
    said = tokenizer.config.get("chat_template")
    if isinstance(said, list):  # as transformers 4 wrote several
        named = {t.get("name"): t.get("template") for t in said if isinstance(t, dict)}
        said = named.get("default")
    return said if isinstance(said, str) and said else None


# Token ids


@dataclass(frozen=True)
class Conversation:
    """The ids of a conversation, and the places in them of the first token of each answer and
    behind its last."""

    ids: list[int]
    answers: list[tuple[int, int]]
    text: str


def encode_conversation(
    tokenizer: Tokenizer, template: ChatTemplate, messages: Messages
) -> Conversation:
    """ValueError if the template cannot render it, or the tokenizer not encode it."""
    text, answers = template.render(messages)
    return Conversation(*tokenizer.encode_spans(text, answers), text)


class Chat:
    """A conversation with a model, while the context lasts."""

    def __init__(self, tokenizer: Tokenizer, system: str = ""):
        self.tokenizer, self.template = tokenizer, template_of(tokenizer)
        self.messages: Messages = [{"role": "system", "content": system}] if system else []
        self.ends: frozenset[int] = tokenizer.end_ids

    def __enter__(self) -> "Chat":
        self.template.__enter__()
        try:
            self.ends |= end_of_turn(self.tokenizer, self.template)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: Any) -> None:
        self.template.__exit__()

    def ask(self, text: str) -> list[int]:
        """Adds a message of the user. Returns the ids of all that has been said, up to where the
        answer begins. ValueError, and nothing is added, if the template cannot render it."""
        refuse_other_encodings(text)
        asked = [*self.messages, {"role": "user", "content": text}]
        ids = self.tokenizer.encode_special(self.template.prompt(asked))
        self.messages = asked
        return ids

    def answered(self, text: str) -> None:
        self.messages.append({"role": "assistant", "content": text})


def end_of_turn(tokenizer: Tokenizer, template: ChatTemplate) -> set[int]:
    """The special token, if there is one, that the template puts behind an answer."""
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    made = encode_conversation(tokenizer, template, messages)
    return {made.ids[end - 1] for _, end in made.answers} & set(tokenizer.special.values())
