"""Rows of every origin in our columns.

Our columns by format; a manifest's ``columns`` says which of theirs they are::

    messages     messages, or conversations (from/value), or user and assistant (and input, system, reasoning,
                 calls); tools
    preference   prompt, chosen, rejected: text or messages, without the prompt inside chosen; tools
    prompt       messages, or user (and system); tools
    text         text

A message: ``{"role", "content", "reasoning_content"?, "tool_calls"?, "tool_call_id"?}``. A tool call:
``{"type": "function", "id"?, "function": {"name", "arguments": JSON text}}``. A tool:
``{"type": "function", "function": {"name", "description", "parameters"}}``. What isn't mapped stays.
"""

from __future__ import annotations

import json
from typing import Any

from lab_utils.errors import DataError

Row = dict[str, Any]
Message = dict[str, Any]

COLUMNS: dict[str, tuple[str, ...]] = {
    "messages": (
        "messages",
        "tools",
        "conversations",
        "system",
        "user",
        "input",
        "assistant",
        "reasoning",
        "calls",
    ),
    "preference": ("prompt", "chosen", "rejected", "tools"),
    "prompt": ("messages", "tools", "user", "system"),
    "text": ("text",),
}
# The ShareGPT names of the roles, and the variations seen in the wild.
SPEAKERS = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "model": "assistant",
    "chatgpt": "assistant",
    "bard": "assistant",
    "system": "system",
    "tool": "tool",
    "function_response": "tool",
    "observation": "tool",
}
# Tool sets of Python origin name their types after Python.
JSON_TYPES = {
    "str": "string",
    "int": "integer",
    "float": "number",
    "bool": "boolean",
    "list": "array",
    "tuple": "array",
    "dict": "object",
    "set": "array",
}


def to_ours(row: Row, format: str, columns: dict[str, str]) -> Row:
    """A row with its columns renamed and brought into the shape above; what isn't mapped is kept.

    Raises:
        DataError: a mapped column is missing, or its content cannot be brought into shape; the text names no
        place.
    """
    rest = {key: value for key, value in row.items() if key not in columns.values()}
    given = {}
    for ours, theirs in columns.items():
        if theirs not in row:
            raise DataError(f"column '{theirs}' is missing, found {sorted(row)}")
        given[ours] = row[theirs]
    if not columns:
        given = {key: rest.pop(key) for key in COLUMNS[format] if key in rest}
    if format in ("messages", "prompt"):
        tools = as_tools(given.pop("tools", None))
        messages = _messages(given)
        return {**rest, "messages": messages, **({"tools": tools} if tools else {})}
    if format == "preference":
        tools = as_tools(given.get("tools"))
        ours = _preference(given)
        return {**rest, **ours, **({"tools": tools} if tools else {})}
    return {**rest, **given}


def _messages(given: Row) -> Any:
    if "conversations" in given:
        return from_sharegpt(given["conversations"])
    if "user" not in given:
        messages = given.get("messages")
        if isinstance(messages, list):  # Parquet fills absent keys of a struct with null
            return [without_nulls(m) if isinstance(m, dict) else m for m in messages]
        return messages
    question = given["user"]
    if given.get("input"):
        question = f"{question}\n\n{given['input']}"
    messages = [{"role": "system", "content": given["system"]}] if given.get("system") else []
    messages.append({"role": "user", "content": question})
    if "assistant" in given or "calls" in given:
        answer: Message = {"role": "assistant", "content": given.get("assistant", "")}
        if given.get("reasoning"):
            answer["reasoning_content"] = given["reasoning"]
        if given.get("calls"):
            answer["tool_calls"] = as_calls(given["calls"])
        messages.append(answer)
    return messages


def _preference(given: Row) -> Row:
    prompt = _as_messages(given.get("prompt"), "user")
    chosen, rejected = (_as_messages(given.get(side), "assistant") for side in ("chosen", "rejected"))
    if isinstance(prompt, list) and isinstance(chosen, list) and isinstance(rejected, list):
        chosen, rejected = (
            side[len(prompt) :] if side[: len(prompt)] == prompt else side for side in (chosen, rejected)
        )
    elif prompt is None and isinstance(chosen, list) and isinstance(rejected, list):
        shared = 0  # whole conversations that part at the end
        while shared < min(len(chosen), len(rejected)) - 1 and chosen[shared] == rejected[shared]:
            shared += 1
        prompt, chosen, rejected = chosen[:shared], chosen[shared:], rejected[shared:]
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


def _as_messages(value: Any, role: str) -> Any:
    if isinstance(value, str):
        return [{"role": role, "content": value}]
    if isinstance(value, dict):
        value = [value]
    if isinstance(value, list):
        return [without_nulls(m) if isinstance(m, dict) else m for m in value]
    return value


def without_nulls(message: Message) -> Message:
    return {k: v for k, v in message.items() if v is not None or k == "content"}


def from_sharegpt(turns: Any) -> Any:
    """``[{"from": "human", "value": …}, …]`` as messages; the check names an unknown speaker."""
    if not isinstance(turns, list):
        return turns
    return [
        {"role": SPEAKERS.get(str(t.get("from")).lower(), t.get("from")), "content": t.get("value")}
        if isinstance(t, dict) and "from" in t
        else t
        for t in turns
    ]


def as_tools(value: Any) -> Any:
    """Tool definitions from a list or JSON text, wrapped in ``function`` or not; Python's types as JSON's."""
    tools = _parsed(value, "tools")
    if not isinstance(tools, list):
        return tools
    return [
        t
        if isinstance(t, dict) and "function" in t
        else {"type": "function", "function": _as_function(t)}
        if isinstance(t, dict)
        else t
        for t in tools
    ]


def _as_function(tool: Row) -> Row:
    parameters = tool.get("parameters")
    if not isinstance(parameters, dict) or "properties" in parameters or "$ref" in parameters:
        return tool
    properties, required = {}, []
    for name, about in parameters.items():
        about = dict(about) if isinstance(about, dict) else {}
        kind, _, extra = str(about.get("type", "string")).partition(",")
        about["type"] = JSON_TYPES.get(kind.split("[")[0].strip().lower(), kind.strip())
        properties[name] = about
        if "optional" not in extra and "default" not in about:
            required.append(name)
    return {**tool, "parameters": {"type": "object", "properties": properties, "required": required}}


def family_of(row: Row) -> str:
    """The task family that a row, in our columns, belongs to; empty where it names none."""
    return str((row.get("verify") or {}).get("family") or row.get("family") or "")


def as_calls(value: Any) -> Any:
    """Tool calls: a list or JSON text of ``{"name", "arguments"}``."""
    calls = _parsed(value, "calls")
    if not isinstance(calls, list):
        return calls
    made = []
    for call in calls:
        if isinstance(call, dict) and "function" not in call:
            arguments = call.get("arguments", {})
            arguments = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
            call = {"type": "function", "function": {"name": call.get("name"), "arguments": arguments}}
        made.append(call)
    return made


def _parsed(value: Any, column: str) -> Any:
    if not isinstance(value, str):
        return value
    if not value.strip():
        return None
    try:
        return json.loads(value)
    except ValueError:
        raise DataError(f"column of {column}: expected a list as JSON, found {value[:40]!r}") from None
