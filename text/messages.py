"""What a conversation is: the messages in a row of a file, each with a role and a content."""

from typing import Any

Messages = list[dict[str, Any]]


def is_conversation(row: dict[str, Any]) -> bool:
    """Whether a row has `messages`, or `prompt` and `completion`, whatever they hold."""
    return "messages" in row or {"prompt", "completion"} <= row.keys()


def conversation_in(row: dict[str, Any]) -> Messages:
    """The messages of a row. A prompt and its completion are a message of the user and the answer.
    ValueError says what is wrong with them."""
    if "messages" in row:
        messages = row["messages"]
    elif is_conversation(row):
        messages = [*turn("user", row["prompt"]), *turn("assistant", row["completion"])]
    else:
        raise ValueError(
            f"it has {', '.join(map(repr, row)):.200}, but no 'messages', nor 'prompt' and "
            f"'completion'"
        )
    if not isinstance(messages, list) or not messages:
        raise ValueError(f"its messages are {messages!r:.60}, not a list of messages")
    for number, message in enumerate(messages, 1):
        check_message(message, number)
    roles = [message["role"] for message in messages]
    if "assistant" not in roles:
        found = ", ".join(map(repr, dict.fromkeys(roles)))
        raise ValueError(
            f"its roles are {found:.60}, and none is 'assistant', whose words alone are learned"
        )
    if roles[0] == "assistant":
        raise ValueError("its first message is the assistant's: an answer follows a message")
    return messages


def turn(role: str, said: Any) -> Messages:
    """A prompt or a completion is a text, or a list of messages."""
    return said if isinstance(said, list) else [{"role": role, "content": said}]


def check_message(message: Any, number: int) -> None:
    where = f"message {number}"
    if not isinstance(message, dict) or not message:
        raise ValueError(f"{where} is {message!r:.60}, not an object with role and content")
    for name in ("role", "content"):
        if name not in message:
            found = ", ".join(map(repr, message))
            raise ValueError(f"{where} has {found:.200}, but no {name!r}")
        if not isinstance(message[name], str):
            raise ValueError(f"{where}: its {name} is {message[name]!r:.60}, not a text")
    try:
        message["content"].encode()
    except UnicodeEncodeError:
        raise ValueError(f"{where} spells half a surrogate pair") from None
