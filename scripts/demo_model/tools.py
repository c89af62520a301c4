"""Conversations with tools: the model reads which there are, calls one or two, and says what came back."""

import json
from collections.abc import Callable
from random import Random
from typing import Any, NamedTuple

from scripts.demo_model import words


class Use(NamedTuple):
    """One tool, a question that wants it, the arguments that follow from it, the result and the closing words."""

    name: str
    description: str
    parameters: dict[str, str]  # name -> JSON type
    question: str
    arguments: dict[str, Any]
    result: dict[str, Any]
    said: str


VERBS = (
    "get",
    "find",
    "set",
    "open",
    "close",
    "read",
    "start",
    "stop",
    "count",
    "send",
    "move",
    "check",
    "show",
    "clean",
)
NOUNS = (
    "lamp",
    "door",
    "file",
    "task",
    "window",
    "clock",
    "music",
    "photo",
    "letter",
    "car",
    "heater",
    "robot",
    "queue",
    "backup",
)


def known_use(rng: Random) -> Use:
    """One of the tools that people try first."""
    city, node, number = rng.choice(words.CITIES), rng.choice(words.NODES), rng.randint(-5, 35)
    kind = rng.randrange(7)
    if kind <= 1:
        asked = rng.choice(
            (
                "What is the weather in {}?",
                "How is the weather in {}?",
                "Weather in {}?",
                "Is it warm in {}?",
                "How warm is it in {}?",
            )
        )
        return Use(
            "get_weather",
            rng.choice(("Weather of a city", "Get the current weather", "The weather in a place")),
            {rng.choice(("city", "location")): "string"},
            asked.format(city),
            {"city": city},
            {"temperature": number},
            f"It is {number} degrees in {city}.",
        )
    if kind == 2:
        clock = f"{rng.randint(0, 23)}:{rng.randint(10, 59)}"
        asked = rng.choice(("What time is it in {}?", "Which time is it in {}?", "Tell me the time in {}."))
        return Use(
            "get_time",
            "Time in a city",
            {"city": "string"},
            asked.format(city),
            {"city": city},
            {"time": clock},
            f"It is {clock} in {city}.",
        )
    if kind == 3:
        first, second = rng.randint(0, 99), rng.randint(0, 99)
        return Use(
            "add",
            "Add two numbers",
            {"a": "integer", "b": "integer"},
            rng.choice(("Add {} and {}.", "What is {} plus {}?")).format(first, second),
            {"a": first, "b": second},
            {"sum": first + second},
            f"The sum is {first + second}.",
        )
    if kind == 4:
        return Use(
            "list_nodes",
            "Nodes of the mesh",
            {},
            rng.choice(("Which nodes are there?", "List my nodes.", "Show the nodes.")),
            {},
            {"nodes": [node]},
            f"There is one node: {node}.",
        )
    if kind == 5:
        load = rng.randint(0, 100)
        return Use(
            "get_load",
            "Load of a node in percent",
            {"node": "string"},
            rng.choice(("How busy is {}?", "What is the load of {}?")).format(node),
            {"node": node},
            {"load": load},
            f"The load of {node} is {load} percent.",
        )
    thing = rng.choice(words.THINGS)
    return Use(
        "search",
        "Search for words",
        {"query": "string"},
        rng.choice(("Search for {}.", "Find {} please.", "Look up {}.")).format(thing),
        {"query": thing},
        {"found": number},
        f"I found {number} results for {thing}.",
    )


def made_up_use(rng: Random) -> Use:
    """A tool that is put together at random, so that names and arguments must be read and not remembered."""
    verb, noun = rng.choice(VERBS), rng.choice(NOUNS)
    place, count = rng.choice(words.PLACES), rng.randint(1, 50)
    shape = rng.randrange(3)
    name, about = f"{verb}_{noun}", f"{verb.capitalize()} a {noun}"
    ending = rng.choice((True, False))
    result, said = {"ok": ending}, "Done." if ending else "That did not work."
    if shape == 0:
        return Use(name, about, {}, f"{verb.capitalize()} the {noun}.", {}, result, said)
    if shape == 1:
        key = rng.choice(("place", "where", "room", "location"))
        return Use(
            name, about, {key: "string"}, f"{verb.capitalize()} the {noun} in the {place}.", {key: place}, result, said
        )
    key = rng.choice(("count", "number", "level", "amount"))
    return Use(
        name,
        about,
        {"place": "string", key: "integer"},
        f"{verb.capitalize()} {count} {noun}s in the {place}.",
        {"place": place, key: count},
        result,
        said,
    )


def described(use: Use) -> dict[str, Any]:
    """The tool as OpenAI's API names it."""
    parameters: dict[str, Any] = {
        "type": "object",
        "properties": {key: {"type": kind} for key, kind in use.parameters.items()},
    }
    if use.parameters:
        parameters["required"] = list(use.parameters)
    return {
        "type": "function",
        "function": {"name": use.name, "description": use.description, "parameters": parameters},
    }


def call(use: Use) -> dict[str, Any]:
    """The call as chat templates take it; the arguments bear the names that this offer of the tool gave them."""
    arguments = dict(zip(use.parameters, use.arguments.values(), strict=True))
    return {"type": "function", "function": {"name": use.name, "arguments": arguments}}


def conversation(
    rng: Random, plain: Callable[[Random], tuple[str, str]]
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Messages and tools: a call and what follows, two calls at once, or a question that needs no tool."""
    make = known_use if rng.random() < 0.5 else made_up_use
    uses = {use.name: use for use in (make(rng) for _ in range(rng.randint(1, 3)))}
    offered = [described(use) for use in uses.values()]
    messages: list[dict[str, Any]] = (
        [{"role": "system", "content": rng.choice(words.SYSTEM)}] if rng.random() < 0.2 else []
    )
    if rng.random() < 0.2:
        question, answer = plain(rng)
        return [*messages, {"role": "user", "content": question}, {"role": "assistant", "content": answer}], offered
    wanted = rng.sample(list(uses.values()), 2 if len(uses) > 1 and rng.random() < 0.25 else 1)
    messages.append({"role": "user", "content": " ".join(use.question for use in wanted)})
    messages.append({"role": "assistant", "content": "", "tool_calls": [call(use) for use in wanted]})
    if rng.random() < 0.6:
        messages += [{"role": "tool", "content": json.dumps(use.result)} for use in wanted]
        messages.append({"role": "assistant", "content": " ".join(use.said for use in wanted)})
    return messages, offered


def examination() -> list[tuple[Use, list[dict[str, Any]]]]:
    """Calls with draws that the training's Random did not make."""
    rng = Random(11)
    asked = []
    for index in range(40):
        use, other = (known_use if index % 2 else made_up_use)(rng), made_up_use(rng)
        asked.append((use, [described(use), described(other)] if use.name != other.name else [described(use)]))
    return asked
