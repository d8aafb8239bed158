"""The closed world of the tasks: short common words, each of which the tokenizer knows whole."""

from __future__ import annotations


def _list(words: str) -> list[str]:
    return words.split()


ANIMALS = _list(
    "cat dog cow pig hen fox owl bee ant bear lion wolf goat duck frog deer fish bird "
    "horse sheep mouse tiger snake zebra"
)
FRUITS = _list("apple pear plum fig lemon peach grape mango melon cherry lime kiwi")
COLOURS = _list("red blue green yellow black white brown pink grey purple")
VEHICLES = _list("car bus train bike boat truck plane ship van tram")
CLOTHES = _list("hat coat shoe sock glove scarf shirt skirt belt boot")
FOODS = _list("bread milk cheese rice soup egg cake tea salt sugar honey butter")
FURNITURE = _list("table chair desk bed lamp shelf sofa stool")
THINGS = _list(
    "cup box bag book pen key door clock bowl plate spoon rope map coin ring ball kite drum bell stone"
)
NATURE = _list("sun moon star rain snow wind tree leaf sand river cloud hill lake road")

# Categories are disjoint: no word answers to two of them.
CATEGORIES = {
    "animal": ANIMALS,
    "fruit": FRUITS,
    "colour": COLOURS,
    "vehicle": VEHICLES,
}
PLURALS = {"animal": "animals", "fruit": "fruits", "colour": "colours", "vehicle": "vehicles"}
WORDS = ANIMALS + FRUITS + COLOURS + VEHICLES + CLOTHES + FOODS + FURNITURE + THINGS + NATURE
SHORT = [w for w in WORDS if len(w) <= 4]

NAMES = _list(
    "Mia Tom Anna Ben Lea Max Nora Paul Ida Leo Emma Finn Zoe Noah Lucy "
    "Omar Eva Jan Ravi Mei Sara Hugo Ines Kofi"
)
CITIES = _list("Oslo Paris Rome Cairo Lima Delhi Tokyo Bern Riga Quito Dublin Seoul")
DAYS = _list("Monday Tuesday Wednesday Thursday Friday Saturday Sunday")
ROOMS = _list("kitchen bedroom office hall garage bathroom")
# Things that people in stories own, give and eat, in the plural.
ITEMS = _list(
    "apples pears plums lemons books pens coins cards eggs cakes cups stones shells stamps balls keys bags "
    "boxes rings kites"
)
OPPOSITES = [
    tuple(pair.split("-"))
    for pair in _list(
        "hot-cold big-small tall-short fast-slow old-new wet-dry day-night up-down left-right open-closed "
        "full-empty hard-soft light-dark rich-poor early-late high-low clean-dirty near-far happy-sad "
        "loud-quiet thick-thin strong-weak true-false first-last"
    )
]
ORDINALS = ("first", "second", "third", "fourth", "fifth")

assert len(set(WORDS)) == len(WORDS)


def a(noun: str) -> str:
    """The noun with its indefinite article."""
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def closed_vocabulary() -> list[str]:
    """Every word that the tokenizer should hold whole."""
    pairs = [w for pair in OPPOSITES for w in pair]
    words = [
        *WORDS,
        *NAMES,
        *CITIES,
        *DAYS,
        *ROOMS,
        *ITEMS,
        *pairs,
        *ORDINALS,
        *CATEGORIES,
        *PLURALS.values(),
    ]
    return list(dict.fromkeys(words))
