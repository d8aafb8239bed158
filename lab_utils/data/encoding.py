"""DeepSeek-V4's chat encoding: messages to text in segments that know whether they bear loss.

The format has no Jinja template; its rules are those of the ``encoding/`` folder that ships with the released
checkpoints (their strings are reproduced byte for byte, see the tests). What matters for training:

* Loss is on what the assistant says: reasoning after ``<think>``, answer, tool calls, and the end token. The
  think token that opens a turn (``<think>``, or a lone ``</think>`` for no reasoning) belongs to the prompt.
* ``drop_thinking`` empties the reasoning of turns before the last user turn, and takes earlier developer
  messages out. Tools anywhere turn it off: a tool result counts as a user turn, and the reasoning before the
  call would be lost.
* Tool results have no role of their own: they open, or join, a user turn, in the order of the calls.
* Content is never markup: a user who types ``<｜User｜>`` has typed eight characters (``Segment.markup`` is
  False).
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from lab_utils.data.fixed_texts import FixedTexts
from lab_utils.data.tokenizer import ASSISTANT, BOS, DSML, END_THINK, EOS, LATEST_REMINDER, THINK, USER
from lab_utils.errors import DataError

Message = dict[str, Any]
Mode = Literal["chat", "thinking"]
TASK_TOKENS = {
    name: f"<｜{name}｜>" for name in ("action", "query", "authority", "domain", "title", "read_url")
}
ASKING = ("user", "developer")


@dataclass(frozen=True)
class Segment:
    """A stretch of the encoded text.

    Attributes:
        text: as it stands in the text.
        supervised: bears loss.
        markup: special tokens inside are special; False for anything that a person, a tool or the model
        wrote.
    """

    text: str
    supervised: bool
    markup: bool


@dataclass(frozen=True)
class _Turn:
    """A message, with tool results joined to their user turn as ``blocks``."""

    role: str
    message: Message
    blocks: tuple[tuple[str, bool, str], ...] = ()  # text, is a result, id of its call

    @property
    def task(self) -> str | None:
        return self.message.get("task")


def encode_messages(
    messages: Sequence[Message],
    *,
    tools: Sequence[dict[str, Any]] | None = None,
    mode: Mode = "chat",
    effort: Literal["high", "max"] | None = None,
    drop_thinking: bool = True,
    add_generation_prompt: bool = True,
    texts: FixedTexts | None = None,
) -> list[Segment]:
    """A conversation as segments; their texts joined are the string that the official encoder gives.

    Args:
        messages: ``role`` (system, user, assistant, tool, developer, latest_reminder), ``content``, and
            where they apply ``reasoning_content``, ``tool_calls``, ``tool_call_id``, ``tools``,
            ``response_format``, ``task`` (a quick instruction), ``wo_eos`` (an answer to be continued).
        tools: definitions that the system message shows; one is put in front if there is none.
        mode: ``chat`` answers at once, ``thinking`` reasons first.
        effort: ``max`` puts the text that asks for exhaustive reasoning first (thinking only); ``high`` adds
        nothing.
        drop_thinking: see the module's head.
        add_generation_prompt: end with the assistant's prefix if the last turn asks for an answer.
        texts: the fixed texts; absent: the shipped wording.

    Raises:
        DataError: an unknown role, task or mode, or a conversation that is empty.
    """
    if mode not in ("chat", "thinking") or effort not in (None, "high", "max"):
        raise DataError(
            f"mode={mode!r}, effort={effort!r}: expected chat or thinking, and effort high, max or none."
        )
    if not messages:
        raise DataError("A conversation without messages cannot be encoded: give at least one.")
    turns = _sorted_results(_joined(_with_tools(messages, tools)))
    drop = drop_thinking and not any(turn.message.get("tools") for turn in turns)
    thinking = mode == "thinking"
    if thinking and drop:
        turns = _dropped(turns)
    texts = texts or FixedTexts.shipped()
    pieces = [Segment(BOS, False, True)]
    if thinking and effort == "max":
        pieces.append(Segment(texts.max_effort, False, True))
    last = _last_asking(turns)
    for index, turn in enumerate(turns):
        reasons = thinking and (not drop or index >= last)
        after_task = index > 0 and turns[index - 1].task is not None
        pieces += _turn(turn, reasons and not after_task, texts)
        following = turns[index + 1].role if index + 1 < len(turns) else None
        if following in ("assistant", "latest_reminder") or (following is None and add_generation_prompt):
            pieces += _transition(turn, thinking, reasons)
    return _merged(pieces)


def render(messages: Sequence[Message], **options: Any) -> str:
    """The encoded string; options as for ``encode_messages``. It ends where generation starts."""
    return "".join(segment.text for segment in encode_messages(messages, **options))


# -- turns ---------------------------------------------------------------------------------------------------


def _with_tools(messages: Sequence[Message], tools: Sequence[dict[str, Any]] | None) -> list[Message]:
    """Tools given beside the messages, put where the format has them: on the system message."""
    messages = list(messages)
    if tools:
        if messages[0]["role"] != "system":
            messages.insert(0, {"role": "system", "content": ""})
        messages[0] = {**messages[0], "tools": list(tools)}
    return messages


def _joined(messages: Sequence[Message]) -> list[_Turn]:
    """Tool results and consecutive user messages become one user turn; a turn with a task takes no more text.

    A task on a message that joins an earlier turn is without effect, as in the official encoder.
    """
    turns: list[_Turn] = []
    for message in messages:
        role, content = message["role"], message.get("content")
        if role not in ("user", "tool"):
            turns.append(_Turn(role, message))
            continue
        result = role == "tool"
        block = (_result_text(content) if result else content or "", result, message.get("tool_call_id", ""))
        open_turn = turns and turns[-1].role == "user" and (result or turns[-1].task is None)
        if open_turn:
            turns[-1] = replace(turns[-1], blocks=(*turns[-1].blocks, block))
        else:
            turns.append(_Turn("user", {} if result else message, (block,)))
    return turns


def _result_text(content: Any) -> str:
    if isinstance(content, list):  # content parts, as OpenAI's interface has them
        return "\n\n".join(
            part.get("text", "") if part.get("type") == "text" else f"[Unsupported {part.get('type')}]"
            for part in content
        )
    return content or ""


def _sorted_results(turns: list[_Turn]) -> list[_Turn]:
    """Results of one turn in the order of the calls they answer; text between them stays where it is."""
    order: dict[str, int] = {}
    done = []
    for turn in turns:
        if turn.role == "assistant" and turn.message.get("tool_calls"):
            ids = [
                call.get("id") or call.get("function", {}).get("id") for call in turn.message["tool_calls"]
            ]
            order = {name: index for index, name in enumerate(ids) if name}
        elif order and sum(is_result for _, is_result, _ in turn.blocks) > 1:
            results = iter(sorted((b for b in turn.blocks if b[1]), key=lambda block: order.get(block[2], 0)))
            turn = replace(turn, blocks=tuple(next(results) if b[1] else b for b in turn.blocks))
        done.append(turn)
    return done


def _dropped(turns: list[_Turn]) -> list[_Turn]:
    last = _last_asking(turns)
    return [
        turn for i, turn in enumerate(turns) if i >= last or turn.role != "developer"
    ]  # reasoning goes in _turn


def _last_asking(turns: Sequence[_Turn]) -> int:
    return max((i for i, turn in enumerate(turns) if turn.role in ASKING), default=-1)


# -- text ----------------------------------------------------------------------------------------------------


def _turn(turn: _Turn, reasons: bool, texts: FixedTexts) -> Iterator[Segment]:
    """The text of one turn, without what stands between it and the next."""
    message, content = turn.message, turn.message.get("content") or ""
    if turn.role == "assistant":
        if reasons:
            yield Segment(message.get("reasoning_content") or "", True, False)
            yield Segment(END_THINK, True, True)
        yield Segment(content, True, False)
        if message.get("tool_calls"):
            yield from _calls(message["tool_calls"])
        if not message.get("wo_eos"):
            yield Segment(EOS, True, True)
    elif turn.role == "user":
        yield Segment(USER, False, True)
        for index, (text, is_result, _) in enumerate(turn.blocks):
            gap = "\n\n" if index else ""
            yield Segment(gap + "<tool_result>" if is_result else gap, False, True)
            yield Segment(text, False, False)
            yield Segment("</tool_result>" if is_result else "", False, True)
    elif turn.role in ("system", "developer"):
        yield Segment(USER if turn.role == "developer" else "", False, True)
        yield Segment(content, False, False)
        if message.get("tools"):
            yield Segment("\n\n" + texts.tools_head, False, True)
            yield Segment("\n".join(_schema(tool) for tool in message["tools"]), False, False)
            yield Segment(texts.tools_tail, False, True)
        if message.get("response_format"):
            before, after = texts.response_format
            yield Segment("\n\n" + before, False, True)
            yield Segment(_json(message["response_format"]), False, False)
            yield Segment(after, False, True)
    elif turn.role == "latest_reminder":
        yield Segment(LATEST_REMINDER, False, True)
        yield Segment(content, False, False)
    else:
        raise DataError(
            f"Unknown role {turn.role!r}: expected system, user, assistant, tool, developer or "
            "latest_reminder."
        )


def _transition(turn: _Turn, thinking: bool, reasons: bool) -> Iterator[Segment]:
    """What makes the model speak: a task's token, or the assistant's prefix with its think token."""
    task = turn.task
    if task is not None and task not in TASK_TOKENS:
        raise DataError(f"Unknown task {task!r}: expected one of {', '.join(TASK_TOKENS)}.")
    if task == "action":
        yield Segment(ASSISTANT + (THINK if thinking else END_THINK) + TASK_TOKENS[task], False, True)
    elif task is not None:
        yield Segment(TASK_TOKENS[task], False, True)
    elif turn.role in ASKING:
        yield Segment(ASSISTANT + (THINK if reasons else END_THINK), False, True)


def _calls(calls: Sequence[dict[str, Any]]) -> Iterator[Segment]:
    """``invoke`` blocks: text raw with ``string="true"``, everything else as JSON with ``"false"``."""
    yield Segment(f"\n\n<{DSML}tool_calls>\n", True, True)
    for call in calls:
        function = call.get("function", call)
        yield Segment(f'<{DSML}invoke name="', True, True)
        yield Segment(function["name"], True, False)
        yield Segment('">\n', True, True)
        for number, (key, value) in enumerate(_arguments(function.get("arguments")).items()):
            is_text = isinstance(value, str)
            yield Segment(("\n" if number else "") + f'<{DSML}parameter name="', True, True)
            yield Segment(key, True, False)
            yield Segment(f'" string="{"true" if is_text else "false"}">', True, True)
            yield Segment(value if is_text else _json(value), True, False)
            yield Segment(f"</{DSML}parameter>", True, True)
        yield Segment(f"\n</{DSML}invoke>\n", True, True)
    yield Segment(f"</{DSML}tool_calls>", True, True)


def _arguments(value: Any) -> dict[str, Any]:
    """Arguments as an object; text that is no JSON becomes one argument of the name ``arguments``."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError:
            return {"arguments": value}
    if not isinstance(value, dict):
        raise DataError(f"Arguments of a tool call: expected a JSON object, found {value!r}.")
    return value


def _schema(tool: dict[str, Any]) -> str:
    return _json(tool.get("function", tool))


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def _merged(pieces: Sequence[Segment]) -> list[Segment]:
    """Neighbours of one kind as one segment; empty ones gone."""
    merged: list[Segment] = []
    for piece in pieces:
        if not piece.text:
            continue
        before = merged[-1] if merged else None
        if before and (before.supervised, before.markup) == (piece.supervised, piece.markup):
            merged[-1] = replace(before, text=before.text + piece.text)
        else:
            merged.append(piece)
    return merged
