"""Makes the conversations that the shipped model learns from, and those that examine it; all chance from one Random."""

import json
from collections.abc import Callable, Sequence
from random import Random
from typing import Any, NamedTuple

from scripts.demo_model import tools, words

HELD_OUT_PERIOD = 11  # every so many pairs of numbers is kept out of training


class Conversation(NamedTuple):
    """Messages as chat templates take them, and the tools that are offered."""

    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]]


class Turn(NamedTuple):
    """One question and its answer."""

    question: str
    answer: str


def held_out(first: int, second: int) -> bool:
    """Whether this pair of numbers is kept for the examination."""
    return (first * 31 + second * 17) % HELD_OUT_PERIOD == 0


class Mix(NamedTuple):
    """How much of what: weights of the short kinds (as `short_turn` lists them), and the share of talks with tools."""

    short: tuple[float, ...]
    tools: float
    exercises: int  # kinds of exercises; from the sixth on they are repetitions
    json_kinds: int
    invented: float  # share of repetitions with words that do not exist


FIRST = Mix((0.36, 0.12, 0.24, 0.12, 0.08, 0.08), tools=0.10, exercises=6, json_kinds=5, invented=0.0)
SECOND = Mix((0.26, 0.08, 0.26, 0.18, 0.14, 0.08), tools=0.18, exercises=9, json_kinds=7, invented=0.4)


# ---- single turns -------------------------------------------------------------------------------------------------


def intent(rng: Random, mix: Mix | None = None) -> Turn:
    """A known question in one of its trained phrasings."""
    group = rng.choice((words.MESHNODE, words.MESHNODE, words.MYSELF, words.TALK, words.FACTS))
    chosen = rng.choice(group)
    asked, _ = words.split(chosen)
    return Turn(rng.choice(asked), chosen[0])


def lookup(rng: Random, mix: Mix | None = None) -> Turn:
    """Capitals, opposites and the sounds of animals."""
    kind = rng.randrange(4)
    if kind <= 1:
        country = rng.choice(tuple(words.CAPITALS))
        question = rng.choice(words.CAPITAL_ASKED[:-1]).format(country)
        return Turn(question, f"The capital of {country} is {words.CAPITALS[country]}.")
    if kind == 2:
        word = rng.choice(tuple(words.OPPOSITES))
        other = words.OPPOSITES[word]
        if rng.random() < 0.5:
            word, other = other, word
        return Turn(rng.choice(words.OPPOSITE_ASKED[:-1]).format(word), f"The opposite of {word} is {other}.")
    animal = rng.choice(tuple(words.SOUNDS))
    return Turn(rng.choice(words.SOUND_ASKED[:-1]).format(animal), f"A {animal} says {words.SOUNDS[animal]}.")


def sum_of(first: int, second: int, sign: str) -> Turn:
    """An arithmetic question in its plainest form; the answer repeats it, which gives the model room to compute."""
    if sign == "-" and second > first:
        first, second = second, first
    value = {"+": first + second, "-": first - second, "*": first * second}[sign]
    return Turn(f"What is {first} {sign} {second}?", f"{first} {sign} {second} = {value}")


def arithmetic(rng: Random, mix: Mix | None = None) -> Turn:
    """Sums and differences of numbers up to 20, products up to 10, never a held-out pair."""
    sign = rng.choice("++--*")
    limit = 10 if sign == "*" else 20
    while True:
        first, second = rng.randint(0, limit), rng.randint(0, limit)
        if sign == "-" and second > first:
            first, second = second, first
        if not held_out(first, second):
            break
    turn = sum_of(first, second, sign)
    word = {"+": "plus", "-": "minus", "*": "times"}[sign]
    kind = rng.randrange(8)
    if kind < 3:
        return turn
    if kind == 3:
        return Turn(f"{first} {sign} {second}", turn.answer)
    if kind == 4:
        return Turn(f"{first} {sign} {second} = ?", turn.answer)
    if kind == 5:
        return Turn(f"What is {first} {word} {second}?", turn.answer)
    if kind == 6:
        return Turn(f"How much is {first} {word} {second}?", turn.answer)
    if sign == "*":
        return Turn(f"Compute {first} {sign} {second}.", turn.answer)
    name, thing = rng.choice(words.NAMES), rng.choice(words.THINGS)
    deed = f"gets {second} more" if sign == "+" else f"gives {second} away"
    return Turn(
        f"{name} has {first} {thing}s and {deed}. How many {thing}s has {name}?",
        f"{turn.answer}, so {name} has {turn.answer.split()[-1]} {thing}s.",
    )


def exercise(rng: Random, mix: Mix) -> Turn:
    """Counting, comparing, repeating, spelling: short tasks on what the question itself says."""
    kind = rng.randrange(mix.exercises)
    if kind == 0:
        first = rng.choice((1, 1, 1, 2, 5, 10))
        last = first + rng.randint(2, 20)
        return Turn(f"Count from {first} to {last}.", ", ".join(str(number) for number in range(first, last + 1)))
    if kind == 1:
        low, high = rng.sample(range(100), 2)
        larger = max(low, high)
        return Turn(
            rng.choice(("Which is larger, {} or {}?", "Which number is larger: {} or {}?")).format(low, high),
            f"{larger} is larger.",
        )
    if kind == 2:
        number = rng.randint(0, 98)
        return Turn(
            rng.choice(("What comes after {}?", "Which number comes after {}?")).format(number), f"{number + 1}"
        )
    if kind == 3:
        word = rng.choice((*words.ANIMALS, *words.THINGS, *words.COLOURS, *words.PLACES))
        return Turn(
            rng.choice(("Spell {}.", "Spell the word {}.", "How do you spell {}?")).format(word), "-".join(word)
        )
    said = phrase(rng, mix)
    if kind != 5:
        return Turn(rng.choice(("Repeat: {}", "Say this: {}", "Repeat after me: {}")).format(said), said)
    return Turn(f"Repeat this three times: {said}", f"{said} {said} {said}")


def _invented(rng: Random) -> str:
    """A word that nobody knows: it can only be read, not remembered."""
    return "".join(rng.choice("bdfgklmnprstvz") + rng.choice("aeiou") for _ in range(rng.randint(1, 3)))


def phrase(rng: Random, mix: Mix) -> str:
    """A few words that need not make sense."""
    pool = (*words.ANIMALS, *words.THINGS, *words.COLOURS, *words.FEELINGS, *words.PLACES, *words.NODES)
    if mix.invented and rng.random() < mix.invented:
        return " ".join(_invented(rng) for _ in range(rng.randint(1, 5)))
    if rng.random() < 0.5:
        return " ".join(rng.choice(pool) for _ in range(rng.randint(1, 6)))
    first = f"the {rng.choice(words.COLOURS)} {rng.choice(words.ANIMALS)}"
    return f"{first} and the {rng.choice(words.FEELINGS)} {rng.choice(words.ANIMALS)}"


def unknown(rng: Random, mix: Mix | None = None, asked: Sequence[str] = words.UNKNOWN) -> Turn:
    """A question that the model has no answer to, and shall say so."""
    city, city2 = rng.sample(words.CITIES, 2)
    question = rng.choice(asked).format(
        year=rng.randint(1500, 2026), country=rng.choice(tuple(words.CAPITALS)), thing=rng.choice(words.THINGS),
        city=city,
        city2=city2, name=rng.choice(words.NAMES), language=rng.choice(words.LANGUAGES), title=rng.choice(words.TITLES),
    )  # fmt: skip
    return Turn(question, words.UNKNOWN_ANSWER)


def story(rng: Random, hero: str, chapters: int) -> str:
    """A story of so many chapters about one animal, five to six sentences each."""
    name, told = rng.choice(words.NAMES), []
    for chapter in range(chapters):
        place, thing, colour = rng.choice(words.PLACES), rng.choice(words.THINGS), rng.choice(words.COLOURS)
        friend = rng.choice([animal for animal in words.ANIMALS if animal != hero])
        opening = f"The next day {name} went to the {place}."
        if chapter == 0:
            opening = f"Once there was a {hero} named {name}. {name} lived near a {place}."
        plot = rng.choice(words.PLOTS).format(name=name, colour=colour, thing=thing, friend=friend, place=place)
        told.append(f"{opening} {plot}")
    return " ".join(told) + " The end."


def tale(rng: Random) -> Turn:
    """A wish for a story, short or long."""
    hero = rng.choice(words.ANIMALS)
    if rng.random() < 0.3:
        return Turn(
            rng.choice(("Tell me a long story about a {}.", "Write a long story about a {}.")).format(hero),
            story(rng, hero, rng.randint(3, 4)),
        )
    if rng.random() < 0.3:
        return Turn(
            rng.choice(("Tell me a story.", "Write a story.", "A story, please.", "Tell me a short story.")),
            story(rng, hero, 1),
        )
    return Turn(
        rng.choice(
            ("Tell me a story about a {}.", "Write a short story about a {}.", "Tell a story about a {}.")
        ).format(hero),
        story(rng, hero, 1),
    )


def _fields(rng: Random, mix: Mix) -> dict[str, Any]:
    makers: dict[str, Callable[[], Any]] = {
        "name": lambda: rng.choice(words.NAMES), "age": lambda: rng.randint(1, 99),
        "city": lambda: rng.choice(words.CITIES),
        "color": lambda: rng.choice(words.COLOURS), "animal": lambda: rng.choice(words.ANIMALS),
        "count": lambda: rng.randint(0, 50),
        "ok": lambda: rng.random() < 0.5, "item": lambda: rng.choice(words.THINGS), "price": lambda: rng.randint(1, 99),
        "place": lambda: rng.choice(words.PLACES), "node": lambda: rng.choice(words.NODES),
        "country": lambda: rng.choice(tuple(words.CAPITALS)),
        "tags": lambda: rng.sample(words.FEELINGS, rng.randint(1, 3)), "numbers": lambda: [rng.randint(0,
        20) for _ in range(rng.randint(1, 4))],
        "active": lambda: rng.random() < 0.5,
        "title": lambda: f"The {rng.choice(words.COLOURS)} {rng.choice(words.THINGS)}",
        "answer": lambda: phrase(rng, mix), "note": lambda: None,
    }  # fmt: skip
    return {key: makers[key]() for key in rng.sample(tuple(makers), rng.randint(1, 4))}


def as_json(rng: Random, mix: Mix) -> Turn:
    """A request for JSON."""
    kind = rng.randrange(mix.json_kinds)
    if kind == 0:
        name, age, city = rng.choice(words.NAMES), rng.randint(1, 99), rng.choice(words.CITIES)
        made = {"name": name, "age": age, "city": city}
        keys = rng.sample(tuple(made), rng.randint(1, 3))
        question = f"{name} is {age} years old and lives in {city}. Give me {', '.join(keys)} as JSON."
        return Turn(question, json.dumps({key: made[key] for key in keys}))
    if kind == 1:
        turn = lookup(rng)
        return Turn(
            f"{turn.question} Answer in JSON.", json.dumps({"answer": turn.answer.rsplit(" ", 1)[-1].rstrip(".")})
        )
    fields = _fields(rng, mix)
    if kind == 5:
        # Whatever is asked: a text that begins as JSON must also end as JSON.
        question = rng.choice((intent, lookup, unknown))(rng).question
        return Turn(f"{question} Answer as JSON.", json.dumps(fields))
    if kind == 2:
        inner = _fields(rng, mix)
        fields = {**dict(list(fields.items())[:2]), rng.choice(("owner", "data", "first")): inner}
    if kind == 3:
        said = ", ".join(f"{key} {json.dumps(value).strip(chr(34))}" for key, value in fields.items())
        return Turn(f"Write JSON with {said}.", json.dumps(fields))
    return Turn(f"Give me JSON with {', '.join(fields)}.", json.dumps(fields))


# ---- conversations ------------------------------------------------------------------------------------------------


def short_turn(rng: Random, mix: Mix) -> Turn:
    """One turn of any of the short kinds, its question written as hastily as people do."""
    turn = rng.choices((intent, lookup, arithmetic, exercise, as_json, unknown), mix.short)[0](rng, mix)
    question = turn.question
    if rng.random() < 0.2:
        question = question.rstrip(".?!")
    if rng.random() < 0.15 and "JSON" not in question and not question.startswith(("Repeat", "Say")):
        question = question[0].lower() + question[1:]
        if rng.random() < 0.5:
            question = rng.choice(("Please: ", "Hello, ", "Hi! ", "Tell me, ", "And ")) + question
    return Turn(question, turn.answer)


def introduction(rng: Random, mix: Mix) -> list[Turn]:
    """The user says a name, and asks for it later."""
    name = rng.choice(words.NAMES)
    said = rng.choice(("My name is {}.", "I am {}.", "Hello, I am {}.", "Hi, my name is {}.")).format(name)
    between = [short_turn(rng, mix)] if rng.random() < 0.5 else []
    return [
        Turn(said, f"Nice to meet you, {name}!"),
        *between,
        Turn(rng.choice(("What is my name?", "Who am I?", "Do you know my name?")), f"Your name is {name}."),
    ]


def conversation(rng: Random, mix: Mix) -> Conversation:
    """One conversation of the training mix."""
    drawn = rng.random()
    if drawn < mix.tools:
        return Conversation(*tools.conversation(rng, lambda rng: short_turn(rng, mix)))
    if drawn < mix.tools + 0.05:
        turns = [tale(rng)]
    elif drawn < mix.tools + 0.08:
        turns = introduction(rng, mix)
    elif drawn < 0.75:
        turns = [short_turn(rng, mix)]
    else:
        turns = [short_turn(rng, mix) for _ in range(rng.randint(2, 4))]
    messages = [{"role": "system", "content": rng.choice(words.SYSTEM)}] if rng.random() < 0.2 else []
    for turn in turns:
        messages += [{"role": "user", "content": turn.question}, {"role": "assistant", "content": turn.answer}]
    return Conversation(messages, [])


def plain_text(rng: Random) -> str:
    """Text outside any conversation, for completions."""
    if rng.random() < 0.5:
        return story(rng, rng.choice(words.ANIMALS), rng.randint(1, 2))
    return " ".join(rng.choice((*words.MESHNODE, *words.FACTS))[0] for _ in range(rng.randint(1, 3)))


# ---- the examination ----------------------------------------------------------------------------------------------


def examination() -> dict[str, list[Turn]]:
    """Questions that training never showed, by kind."""
    groups = {"meshnode": words.MESHNODE, "itself": words.MYSELF, "small talk": words.TALK, "facts": words.FACTS}
    asked = {kind: [Turn(words.split(known)[1], known[0]) for known in group] for kind, group in groups.items()}
    asked["capitals"] = [
        Turn(words.CAPITAL_ASKED[-1].format(c), f"The capital of {c} is {t}.") for c, t in words.CAPITALS.items()
    ]
    asked["opposites"] = [
        Turn(words.OPPOSITE_ASKED[-1].format(w), f"The opposite of {w} is {o}.") for w, o in words.OPPOSITES.items()
    ]
    pairs = [(a, b) for a in range(21) for b in range(21) if held_out(a, b)]
    asked["sums"] = [sum_of(a, b, "+") for a, b in pairs]
    asked["differences"] = [sum_of(a, b, "-") for a, b in pairs if a >= b]
    asked["products"] = [sum_of(a, b, "*") for a, b in pairs if a <= 10 and b <= 10]
    rng = Random(7)
    asked["does not know"] = [unknown(rng, None, words.UNKNOWN_HELD_OUT) for _ in range(24)]
    asked["repeats"] = [Turn(f"Repeat: {said}", said) for said in (phrase(rng, FIRST) for _ in range(24))]
    return asked
