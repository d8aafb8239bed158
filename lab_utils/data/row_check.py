"""The check that every row passes before anything sees it: what is wrong with it, in words for its author."""

from __future__ import annotations

import json
from typing import Any

Row = dict[str, Any]
Message = dict[str, Any]

ROLES = ("system", "user", "assistant", "tool", "developer", "latest_reminder")
TASKS = ("action", "query", "authority", "domain", "read_url", "title")


def check_row(row: Row, format: str) -> str | None:
    """What is wrong with a row in our columns, in words; None where nothing is."""
    if format == "text":
        text = row.get("text")
        return (
            None
            if isinstance(text, str) and text.strip()
            else f"expected text in 'text', found {_show(text)}"
        )
    if problem := check_tools(row.get("tools")):
        return problem
    if format == "preference":
        if problem := check_messages(row.get("prompt"), "prompt", ends=("user", "tool", "developer")):
            return problem
        for side in ("chosen", "rejected"):
            if problem := check_messages(row.get(side), side, ends=("assistant",), before=row["prompt"][-1]):
                return problem
        return "chosen and rejected are the same" if row["chosen"] == row["rejected"] else None
    messages = row.get("messages")
    if format == "prompt":
        return check_messages(messages, "messages", ends=("user", "tool", "developer"))
    if problem := check_messages(messages, "messages"):
        return problem
    if not any(m["role"] == "assistant" for m in messages):
        return "no message has the role assistant, so there is nothing to learn from"
    return None


def check_messages(
    messages: Any, where: str, ends: tuple[str, ...] = (), before: Message | None = None
) -> str | None:
    """What is wrong with a list of messages.

    Args:
        messages: the list.
        where: its name, for the words.
        ends: roles that the last message may have; empty: any.
        before: the message that the first one follows.
    """
    if not isinstance(messages, list) or not messages:
        return f"expected a list of messages in '{where}', found {_show(messages)}"
    for number, message in enumerate(messages, 1):
        if problem := _check_message(message, before):
            return f"{where}, message {number}: {problem}"
        before = message
    if ends and messages[-1]["role"] not in ends:
        return f"'{where}' ends with role {messages[-1]['role']}, expected {' or '.join(ends)}"
    return None


def _check_message(message: Any, before: Message | None) -> str | None:
    if not isinstance(message, dict):
        return f"expected an object with role and content, found {_show(message)}"
    role, content, calls = message.get("role"), message.get("content"), message.get("tool_calls")
    if role not in ROLES:
        return f"unknown role {_show(role)}, expected one of {', '.join(ROLES)}"
    if not isinstance(content, str) and not (content is None and role == "assistant" and calls):
        return f"expected text in 'content', found {_show(content)}"
    if message.get("task") is not None and message["task"] not in TASKS:
        return f"unknown task {_show(message['task'])}, expected one of {', '.join(TASKS)}"
    if role == "developer" and not content:
        return "a developer message without content"
    if role != "assistant":
        return "tool_calls on a message that isn't the assistant's" if calls else None
    if before is None or (before["role"] not in ("user", "tool", "developer") and before.get("task") is None):
        return "the assistant speaks without a user, developer or tool message just before"
    if not isinstance(message.get("reasoning_content") or "", str):
        return "expected text in 'reasoning_content'"
    if calls:
        return check_calls(calls)
    return None if content or message.get("reasoning_content") else "the assistant says nothing"


def check_calls(calls: Any) -> str | None:
    if not isinstance(calls, list):
        return f"expected a list in 'tool_calls', found {_show(calls)}"
    for call in calls:
        function = call.get("function") if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            return "expected tool calls of the form {type: function, function: {name, arguments}}"
        arguments = function.get("arguments")
        try:
            arguments = json.loads(arguments) if isinstance(arguments, str) else arguments
        except ValueError:
            arguments = None
        if not isinstance(arguments, dict):
            found = _show(function.get("arguments"))
            return f"arguments of {function['name']}: expected a JSON object, found {found}"
    return None


def check_tools(tools: Any) -> str | None:
    if tools is None:
        return None
    good = isinstance(tools, list) and all(
        isinstance(t, dict)
        and isinstance(t.get("function"), dict)
        and isinstance(t["function"].get("name"), str)
        for t in tools
    )
    return None if good else "expected 'tools' as a list of {type: function, function: {name, …}}"


def _show(value: Any) -> str:
    if value is None:
        return "nothing"
    text = repr(value)
    return text if len(text) <= 60 else f"{type(value).__name__} {text[:50]}…"
