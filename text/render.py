"""Renders conversations with a chat template. A process of its own, started by text/chat.py.

A chat template is a program of whoever made the model. So it runs in jinja2's sandbox, which keeps
it from Python's attributes, and here, where too much memory or time ends this process alone.

The first line of the input is {"template", "variables", "special", "seconds"}. Each line after it
is a request {"messages", "reply"}, and gets a line for an answer: {"text", "answers"} or {"error"}.
"""

import faulthandler
import json
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from os.path import commonprefix
from typing import Any

import jinja2
from jinja2.ext import Extension
from jinja2.sandbox import ImmutableSandboxedEnvironment

MEMORY = 2**30  # bytes that this process may have in all
LARGEST_TEXT = 2**24  # characters of a rendered conversation

Messages = list[dict[str, Any]]


class Generation(Extension):
    """{% generation %}...{% endgeneration %}, by which a template marks what the model says."""

    tags = {"generation"}

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method("mark"), [], [], body).set_lineno(line)

    def mark(self, caller: Callable[[], str]) -> str:
        text, start = caller(), sum(map(len, self.environment.written))
        self.environment.marked.append((start, start + len(text)))
        return text


def environment() -> ImmutableSandboxedEnvironment:
    """What a template finds around it in transformers, too."""
    made = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols]
    )
    made.written, made.marked = [], []  # what is rendered so far; where marked parts are in it

    def refuse(reason: str) -> None:
        raise jinja2.TemplateError(reason)

    def to_json(value: Any, ensure_ascii: bool = False, **how: Any) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, **how)  # jinja2's is for HTML

    made.globals |= {
        "raise_exception": refuse,
        "strftime_now": lambda form: datetime.now().strftime(form),
    }
    made.filters["tojson"] = to_json
    return made


class Renderer:
    """One chat template. `variables` are what it knows beside the messages, such as bos_token;
    `special` are the special tokens, one of which ends an answer. This process ends if a
    conversation takes more than so many seconds."""

    def __init__(
        self, template: str, variables: dict[str, Any], special: list[str], seconds: float
    ):
        self.environment, self.seconds = environment(), seconds
        self.template, self.variables = self.environment.from_string(template), variables
        names = sorted(special, key=len, reverse=True)
        self.end = re.compile(rf"\s*(?:{'|'.join(map(re.escape, names))})" if names else r"(?!)")

    def render(self, messages: Messages, reply: bool) -> str:
        """The conversation as text; with `reply` it ends where the model's answer begins."""
        written, marked = self.environment.written, self.environment.marked
        written.clear()
        marked.clear()
        about = self.variables | {"messages": messages, "add_generation_prompt": reply}
        for part in self.template.generate(**about):
            written.append(part)
            if sum(map(len, written)) > LARGEST_TEXT:
                raise ValueError(f"it makes more than {LARGEST_TEXT:,} characters")
        return "".join(written)

    def answers(self, messages: Messages, text: str) -> list[tuple[int, int]]:
        """Where in the rendered text the answers are. Each one goes from where the model begins to
        speak to behind the special token that ends its turn.

        If the template does not mark them, they are found by rendering the beginnings of the
        conversation: up to the answer, and with it.
        """
        if self.environment.marked:
            return list(self.environment.marked)
        found = []
        for i, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            asked, silent = (self.render(messages[:i], reply) for reply in (True, False))
            if not text.startswith(commonprefix((asked, silent))):
                raise ValueError("what it makes of a message depends on the messages after it")
            before = commonprefix((asked, text))
            content = message["content"].strip()
            last = self.render(messages[: i + 1], reply=False)  # where nothing follows its turn
            at = last.rfind(content) if content else len(before)
            closing = self.end.match(last, at + len(content))
            said = content + (closing[0] if closing else "")
            start = text.find(said, len(before))
            if start < 0:
                raise ValueError("it does not keep the text of an answer as it is")
            found.append((len(before), start + len(said)))
        return found

    def respond(self, request: dict[str, Any]) -> dict[str, Any]:
        try:
            with at_most(self.seconds):
                text = self.render(request["messages"], request["reply"])
                answers = [] if request["reply"] else self.answers(request["messages"], text)
            return {"text": text, "answers": answers}
        except MemoryError:
            return {"error": "it takes too much memory"}
        except Exception as error:  # a template can fail like any program
            return {"error": f"{error!s:.200}" or type(error).__name__}


@contextmanager
def at_most(seconds: float) -> Iterator[None]:
    """Ends this process if what is done meanwhile takes longer. The parent could not be trusted
    with that: if it is killed, a template that never ends would go on for ever."""
    faulthandler.dump_traceback_later(seconds, exit=True)
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()


def main() -> None:
    with suppress(ImportError, ValueError):  # Windows has no such limit
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    try:
        about = json.loads(sys.stdin.readline())
        with at_most(about["seconds"]):
            renderer = Renderer(**about)
        print(json.dumps({}), flush=True)
    except Exception as error:
        print(json.dumps({"error": f"{error!s:.200}"}), flush=True)
        return
    for line in sys.stdin:
        print(json.dumps(renderer.respond(json.loads(line))), flush=True)


if __name__ == "__main__":
    main()
