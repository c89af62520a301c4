"""The words of the shipped model's training text: what it knows by heart (intents.txt), what fills its sentences."""

from pathlib import Path
from typing import Final

Intent = tuple[str, tuple[str, ...]]  # the answer, and the ways to ask for it


def _intents() -> dict[str, tuple[Intent, ...]]:
    groups: dict[str, tuple[Intent, ...]] = {}
    name = ""
    for block in (Path(__file__).parent / "intents.txt").read_text().split("\n\n"):
        lines = [line for line in block.splitlines() if not line.startswith("#")]
        if len(lines) == 1 and lines[0].startswith("= "):
            name = lines[0].removeprefix("= ")
            groups[name] = ()
        elif lines:
            groups[name] += ((lines[0], tuple(lines[1:])),)
    return groups


INTENTS: Final = _intents()
MESHNODE: Final = INTENTS["meshnode"]
MYSELF: Final = INTENTS["myself"]
TALK: Final = INTENTS["talk"]
FACTS: Final = INTENTS["facts"]

CAPITALS: Final = {
    "France": "Paris", "Germany": "Berlin", "Italy": "Rome", "Spain": "Madrid", "Portugal": "Lisbon",
    "England": "London",
    "Ireland": "Dublin", "Austria": "Vienna", "Poland": "Warsaw", "Greece": "Athens", "Sweden": "Stockholm",
    "Norway": "Oslo",
    "Denmark": "Copenhagen", "Finland": "Helsinki", "Russia": "Moscow", "Japan": "Tokyo", "China": "Beijing",
    "India": "New Delhi",
    "Egypt": "Cairo", "Kenya": "Nairobi", "Canada": "Ottawa", "Mexico": "Mexico City", "Cuba": "Havana", "Peru": "Lima",
    "Chile": "Santiago", "Belgium": "Brussels", "Hungary": "Budapest", "Turkey": "Ankara", "Iran": "Tehran",
    "Switzerland": "Bern",
}  # fmt: skip
CAPITAL_ASKED: Final = (
    "What is the capital of {}?", "Name the capital of {}.", "Which city is the capital of {}?", "Capital of {}?",
    "Do you know the capital of {}?", "What is {}'s capital?", "Tell me the capital of {}.",
)  # fmt: skip

OPPOSITES: Final = {
    "hot": "cold", "big": "small", "up": "down", "left": "right", "day": "night", "good": "bad", "old": "new",
    "fast": "slow",
    "high": "low", "open": "closed", "full": "empty", "light": "dark", "happy": "sad", "rich": "poor", "wet": "dry",
    "black": "white", "early": "late", "long": "short", "strong": "weak", "soft": "hard", "yes": "no", "first": "last",
}  # fmt: skip
OPPOSITE_ASKED: Final = (
    "What is the opposite of {}?",
    "Opposite of {}?",
    "Tell me the opposite of {}.",
    "Which word is the opposite of {}?",
    "Name the opposite of {}.",
)

SOUNDS: Final = {
    "dog": "woof", "cat": "meow", "cow": "moo", "duck": "quack", "sheep": "baa", "pig": "oink", "horse": "neigh",
    "bee": "buzz",
    "lion": "roar", "mouse": "squeak",
}  # fmt: skip
SOUND_ASKED: Final = (
    "What does a {} say?",
    "Which sound does a {} make?",
    "How does a {} sound?",
    "What sound does a {} make?",
)

UNKNOWN_ANSWER: Final = "I do not know that. I am a very small demo model; pull a larger one for real questions."
UNKNOWN: Final = (
    "Who won the world cup in {year}?", "Who was the king of {country} in {year}?", "Write a poem about {thing}.",
    "Explain quantum physics.", "How do I cook {thing}?", "What happened in {year}?", "Who wrote {title}?",
    "What is the meaning of life?",
    "Translate {thing} into {language}.", "Write a program in {language}.", "What is the weather like?",
    "What is the news today?",
    "Who is the president of {country}?", "How far is it from {city} to {city2}?", "How many people live in {city}?",
    "How tall is {name}?", "When was {name} born?", "Why is {thing} so expensive?", "What do you think about politics?",
    "Which film did {name} like in {year}?", "Solve this equation for x.", "Summarise this article.",
    "What is a {thing} made of?",
    "Give me a recipe for {thing}.", "Prove that there are many primes.", "Where can I buy a {thing}?", "What is love?",
    "How do I fix my car?", "Write an essay on {country}.", "Who discovered {thing}?", "Can you draw a {thing}?",
    "What is the price of gold?", "How do I learn {language}?", "Which book should I read?",
)  # fmt: skip
UNKNOWN_HELD_OUT: Final = (
    "Who won the match in {year}?", "Write a song about {thing}.", "How do I bake {thing}?", "Who painted {title}?",
    "How many people live in {country}?", "Explain the history of {country}.",
)  # fmt: skip

NAMES: Final = (
    "Anna", "Ben", "Clara", "David", "Emma", "Felix", "Grace", "Henry", "Ida", "Jack", "Kate", "Leo", "Maria", "Nina",
    "Oscar",
    "Paul", "Rosa", "Sam", "Tom", "Vera", "Will", "Zoe", "Alice", "Bob", "Lucy", "Max", "Mia", "Noah", "Olga", "Peter",
)  # fmt: skip
ANIMALS: Final = (
    "fox",
    "bear",
    "rabbit",
    "bird",
    "cat",
    "dog",
    "mouse",
    "horse",
    "owl",
    "frog",
    "duck",
    "wolf",
    "hen",
    "goat",
    "turtle",
)
PLACES: Final = (
    "forest",
    "garden",
    "river",
    "hill",
    "village",
    "farm",
    "lake",
    "field",
    "house",
    "beach",
    "mountain",
    "market",
)
THINGS: Final = (
    "ball", "book", "lamp", "key", "boat", "kite", "apple", "hat", "bell", "box", "cake", "coin", "drum", "flower",
    "ring", "stone",
    "cup", "chair", "clock", "map", "bread", "tea", "soup", "car", "train", "pen",
)  # fmt: skip
COLOURS: Final = ("red", "blue", "green", "yellow", "white", "black", "brown", "golden", "pink", "grey")
FEELINGS: Final = ("happy", "sad", "tired", "hungry", "brave", "lonely", "curious", "proud")
CITIES: Final = (
    *tuple(sorted(set(CAPITALS.values()))),
    "Milan",
    "Hamburg",
    "Boston",
    "Seattle",
    "Sydney",
    "Kyoto",
    "Porto",
    "Bergen",
)
LANGUAGES: Final = ("French", "German", "Spanish", "Latin", "Python", "Rust", "Italian", "Greek")
TITLES: Final = ("Hamlet", "the Bible", "the Odyssey", "Faust", "Emma", "the Iliad", "Moby Dick")
NODES: Final = ("atlas", "laptop", "desktop", "old PC", "server", "nas", "pi", "tower", "studio", "attic")

PLOTS: Final = (
    "One day {name} found a {colour} {thing}. A {friend} came and asked for it. {name} gave the {thing} to the "
    "{friend}, "
    "and they became friends.",
    "{name} was looking for a {colour} {thing}. It was not in the {place}. Then a {friend} came and showed {name} "
    "where it "
    "was. {name} was very happy.",
    "It was cold and dark, and {name} was lonely. A {friend} saw {name} and brought a {colour} {thing}. They "
    "played until "
    "the sun went down.",
    "There {name} met a {friend}. The {friend} had lost a {colour} {thing}. They looked for it together, and in "
    "the end "
    "{name} found it.",
)

SYSTEM: Final = (
    "You are a helpful assistant.", "You are the demo model of meshnode.", "Answer briefly.",
    "You are a friendly assistant.",
    "Be kind and short.", "You are an assistant. Help the user.", "Answer in one sentence.",
    "You help people with their mesh.",
)  # fmt: skip


def split(intent: Intent) -> tuple[tuple[str, ...], str]:
    """The phrasings that are trained on, and the one that is kept out."""
    return intent[1][:-1], intent[1][-1]
