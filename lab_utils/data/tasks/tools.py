"""Short calls of simple tools in DeepSeek-V4's tool format, and answers from what a tool returned."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from lab_utils.data.tasks import arithmetic
from lab_utils.data.tasks._base import Example, Message, capitalise, exact, normalise
from lab_utils.data.tasks._rng import Rng
from lab_utils.data.tasks._words import CITIES, DAYS, ITEMS, NAMES, ROOMS

WEATHER = ("sunny", "rainy", "windy", "cloudy", "cold", "warm")
MESSAGES = ("dinner is ready", "the bus is late", "call me", "see you soon", "the door is open", "good night")


@dataclass(frozen=True)
class Tool:
    """One tool: its parameters by name and JSON type, how it is asked for, how prose speaks of it."""

    name: str
    description: str
    parameters: dict[str, str]
    draw: Callable[[Rng], dict[str, Any]]
    asks: tuple[str, ...]
    tells: tuple[str, ...]
    result: Callable[[Rng], str] | None = None
    says: str = ""

    def definition(self) -> dict[str, Any]:
        """The tool as a chat request carries it."""
        properties = {name: {"type": kind} for name, kind in self.parameters.items()}
        schema = {"type": "object", "properties": properties, "required": list(properties)}
        function = {"name": self.name, "description": self.description, "parameters": schema}
        return {"type": "function", "function": function}


def _clock_result(rng: Rng) -> str:
    return f"{rng.between(10, 23)}:{rng.between(10, 59)}"


TOOLS = (
    Tool(
        "clock",
        "Local time of a city",
        {"city": "string"},
        lambda rng: {"city": rng.pick(CITIES)},
        (
            "What time is it in {city}?",
            "Tell me the time in {city}.",
            "How late is it in {city}?",
            "I want to know the time in {city}.",
            "Please look up the local time of {city}.",
            "Which time does the clock show in {city}?",
            "Time in {city}?",
            "Can you check the time in {city}?",
        ),
        ("The clock knows the local time of {city}.", "She looked up the time in {city} with the clock."),
        _clock_result,
        "It is {r} in {city}.",
    ),
    Tool(
        "weather",
        "Weather of a city on a day",
        {"city": "string", "day": "string"},
        lambda rng: {"city": rng.pick(CITIES), "day": rng.pick(DAYS)},
        (
            "What is the weather in {city} on {day}?",
            "How will the weather be in {city} on {day}?",
            "Tell me the weather of {city} for {day}.",
            "I travel to {city} on {day}. How is the weather?",
            "Please look up the weather in {city} on {day}.",
            "On {day} I am in {city}. What weather is it?",
            "Weather in {city} on {day}?",
            "Can you check the weather for {day} in {city}?",
        ),
        (
            "The weather in {city} on {day} was {r}.",
            "On {day} it is {r} in {city}.",
            "He asked about the weather in {city} on {day}.",
        ),
        lambda rng: rng.pick(WEATHER),
        "It is {r} in {city} on {day}.",
    ),
    Tool(
        "timer",
        "Start a timer",
        {"minutes": "integer"},
        lambda rng: {"minutes": rng.between(2, 60)},
        (
            "Set a timer for {minutes} minutes.",
            "Start a timer of {minutes} minutes.",
            "Wake me in {minutes} minutes.",
            "I need a timer for {minutes} minutes.",
            "Please start a {minutes} minutes timer.",
            "Tell me when {minutes} minutes are over.",
            "Timer, {minutes} minutes.",
            "Can you set the timer to {minutes} minutes?",
        ),
        ("The timer rings after {minutes} minutes.", "She set a timer for {minutes} minutes."),
    ),
    Tool(
        "light",
        "Switch a light on or off",
        {"room": "string", "on": "boolean"},
        lambda rng: {"room": rng.pick(ROOMS), "on": rng.chance(0.5)},
        (
            "Turn {state} the light in the {room}.",
            "Switch {state} the {room} light.",
            "Please turn the {room} light {state}.",
            "Light {state} in the {room}, please.",
            "Can you switch the light in the {room} {state}?",
            "I want the light in the {room} to be {state}.",
            "Make sure that the {room} light is {state}.",
            "The {room} light should be {state}.",
        ),
        ("The light in the {room} is {state}.", "He turned {state} the light in the {room}."),
    ),
    Tool(
        "buy",
        "Order some items",
        {"item": "string", "count": "integer"},
        lambda rng: {"item": rng.pick(ITEMS), "count": rng.between(2, 40)},
        (
            "Buy {count} {item}.",
            "Order {count} {item} for me.",
            "I need {count} {item}. Please order them.",
            "Get me {count} {item}.",
            "Please buy {count} {item}.",
            "Can you order {count} {item}?",
            "Put in an order of {count} {item}.",
            "We are out of {item}. Order {count}.",
        ),
        (
            "{name} ordered {count} {item}.",
            "The shop sends {count} {item}.",
            "We are out of {item}, so buy {count}.",
        ),
    ),
    Tool(
        "send",
        "Send a message to a person",
        {"to": "string", "text": "string"},
        lambda rng: {"to": rng.pick(NAMES), "text": rng.pick(MESSAGES)},
        (
            "Send {to} the message: {text}",
            "Tell {to}: {text}",
            "Write to {to}: {text}",
            "Please send this to {to}: {text}",
            "Message for {to}: {text}",
            "Let {to} know: {text}",
            "Can you send {to} this text: {text}",
            "Send a text to {to}. It says: {text}",
        ),
        (
            "The message to {to} says: {text}.",
            "{name} wrote to {to}: {text}.",
            "Somebody told {to} that {text}.",
        ),
    ),
)
_BY_NAME = {tool.name: tool for tool in TOOLS}
_CALL = re.compile(r"^<｜DSML｜invoke name=\"([^\"]*)\">\n(.*?)</｜DSML｜invoke>\n", re.S)
_PARAMETER = re.compile(
    r"^<｜DSML｜parameter name=\"([^\"]*)\" string=\"(true|false)\">(.*?)</｜DSML｜parameter>\n", re.S
)


def parse_calls(answer: str) -> list[tuple[str, dict[str, Any]]] | None:
    """Names and arguments of a completion that is one block of tool calls; None where it is anything else."""
    block = re.fullmatch(r"<｜DSML｜tool_calls>\n(.*)</｜DSML｜tool_calls>", answer.strip(), re.S)
    if not block:
        return None
    rest, calls = block[1], []
    while rest:
        call = _CALL.match(rest)
        if not call:
            return None
        rest, body, arguments = rest[call.end() :], call[2], {}
        while body:
            parameter = _PARAMETER.match(body)
            if not parameter or parameter[1] in arguments:
                return None
            body = body[parameter.end() :]
            try:
                arguments[parameter[1]] = parameter[3] if parameter[2] == "true" else json.loads(parameter[3])
            except ValueError:
                return None
        calls.append((call[1], arguments))
    return calls or None


def render_call(name: str, arguments: dict[str, Any]) -> str:
    """One call as the chat encoding writes it after the think token."""
    lines = []
    for key, value in arguments.items():
        is_text = isinstance(value, str)
        shown = value if is_text else json.dumps(value)
        flag = "true" if is_text else "false"
        lines.append(f'<｜DSML｜parameter name="{key}" string="{flag}">{shown}</｜DSML｜parameter>\n')
    inner = f'<｜DSML｜invoke name="{name}">\n{"".join(lines)}</｜DSML｜invoke>\n'
    return f"\n\n<｜DSML｜tool_calls>\n{inner}</｜DSML｜tool_calls>"


def verify(example: Example, answer: str) -> bool:
    """A call: exactly the expected name and arguments (values, types), nothing else. Else to the letter."""
    if example.spec["kind"] != "call":
        return exact(example, answer)
    # Compared as JSON text: true is not 1 there.
    expected = json.loads(example.spec["expected"])
    calls = parse_calls(answer)
    return calls is not None and len(calls) == 1 and _canonical(*calls[0]) == _canonical(**expected)


def _canonical(name: str, arguments: dict[str, Any]) -> str:
    return json.dumps({"name": name, "arguments": arguments}, sort_keys=True)


def _call(name: str, arguments: dict[str, Any]) -> Message:
    function = {"name": name, "arguments": json.dumps(arguments)}
    return {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": function}]}


def _shown(arguments: dict[str, Any]) -> dict[str, Any]:
    return {**arguments, "state": "on" if arguments.get("on") else "off"}


def generate(rng: Rng) -> Example:
    tool = rng.pick(TOOLS)
    offered = [tool]
    if rng.chance(0.3):
        offered = rng.sample([tool, rng.pick([t for t in TOOLS if t is not tool])], 2)
    tools = tuple(t.definition() for t in offered)
    if rng.chance(0.1):  # a question that needs no tool
        plain = arithmetic.generate(rng)
        return Example(
            "tools", plain.messages, plain.answer, {**plain.spec, "family": "tools"}, plain.key, tools
        )
    arguments = tool.draw(rng)
    question = capitalise(rng.pick(tool.asks).format_map(_shown(arguments)))
    user, call = {"role": "user", "content": question}, _call(tool.name, arguments)
    key = f"tools:{normalise(question)}"
    if tool.result and rng.chance(0.4):
        result = tool.result(rng)
        said = tool.says.format_map({**arguments, "r": result})
        messages = (user, call, {"role": "tool", "content": result})
        spec = {"family": "tools", "kind": "exact", "expected": said}
        return Example("tools", messages, {"role": "assistant", "content": said}, spec, key, tools)
    expected = json.dumps({"name": tool.name, "arguments": arguments})
    return Example(
        "tools", (user,), call, {"family": "tools", "kind": "call", "expected": expected}, key, tools
    )


def reject(example: Example, rng: Rng) -> Message:
    """A call with another argument, or of another tool, or talk in place of a call."""
    spec = example.spec
    if spec["kind"] != "call":
        return {
            "role": "assistant",
            "content": f"I think {clean_start(spec['expected'])}, but I am not sure.",
        }
    expected = json.loads(spec["expected"])
    tool = _BY_NAME[expected["name"]]
    style = rng.below(3)
    if style == 0:
        return {"role": "assistant", "content": "I am sorry, I have no way to do that."}
    if style == 1:
        other = rng.pick([t for t in TOOLS if t is not tool])
        return _call(other.name, other.draw(rng))
    while True:
        arguments = tool.draw(rng)
        if arguments != expected["arguments"]:
            return _call(tool.name, arguments)


def clean_start(text: str) -> str:
    return text[:1].lower() + text[1:].rstrip(".")


def text(rng: Rng) -> str:
    tool = rng.pick(TOOLS)
    arguments = tool.draw(rng)
    style = rng.below(5)
    if style == 0:
        names = " and ".join(f"{n}, {k}" for n, k in tool.parameters.items())
        return f"The tool {tool.name} takes {names}. {tool.description}: that is what {tool.name} is for."
    if style == 1:
        return f"A call of {tool.name} looks like this: {json.dumps(arguments)}"
    if style == 2 and tool.result:
        result = tool.result(rng)
        return f"The {tool.name} said {result}. " + tool.says.format_map({**arguments, "r": result})
    values = {**_shown(arguments), "name": rng.pick(NAMES), "r": tool.result(rng) if tool.result else ""}
    told = capitalise(rng.pick(tool.tells).format_map(values))
    if style == 3:
        shown = ", ".join(f"{n} {json.dumps(v)}" for n, v in arguments.items())
        return f"{told} The tool is {tool.name}, with {shown}."
    return told
