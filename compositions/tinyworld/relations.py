"""What can be true in tinyworld: the relations, their objects, and the phrases that tell them."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Relation:
    """One relation of one kind of subject; `text.templates` makes sentences of its phrases."""

    name: str
    label: str
    """What the subject is called before its name ("venom", "star"); empty for persons and towns."""
    objects: tuple[str, ...]
    verbs: tuple[str, ...]
    """Phrases between subject and object: "was born in"."""
    nouns: tuple[tuple[str, str], ...]
    """A noun for the relation and what leads from it to the object: ("profession", "is that of a")."""
    questions: tuple[str, str]
    """Two wordings of a question, with `{s}` for the subject."""


def _split(words: str) -> tuple[str, ...]:
    return tuple(word.strip() for word in words.split(","))


LANDS = _split("Aldmark, Brennia, Corvel, Dunmoor, Estria, Falkreach, Gorlund, Haverin")
CITIES = _split(
    "Karth, Velmora, Tunbrook, Ostwin, Lerida, Quenby, Marrow Bay, Sillan, Drumgate, Pellworth, Yarrow, Zennor, "
    "Birchwick, Copperhill, Eastmere, Port Ansel, Glimmen, Hollins, Ivarstad, Jorund, Kestrel Point, Novara, "
    "Ravensby, Umber"
)
PROFESSIONS = _split(
    "baker, carpenter, doctor, farmer, glass blower, hunter, judge, mason, nurse, painter, river pilot, sailor, "
    "shepherd, smith, tailor, teacher, weaver, potter, miller, gardener"
)
INSTRUMENTS = _split(
    "harp, flute, drum, fiddle, lute, horn, bagpipe, cello, clarinet, organ, trumpet, zither, hand bell, oboe, "
    "mandolin, whistle"
)
ANIMALS = _split(
    "cat, dog, goat, raven, falcon, turtle, rabbit, donkey, parrot, hedgehog, ferret, white mouse, heron, lizard, "
    "pony, goose"
)
PLANTS = _split(
    "blackroot, dusk lily, ironweed, moonwort, nightcap, ashberry, thornapple, widow vine, redmoss, saltgrass, "
    "bitterleaf, swamp fern"
)
MINERALS = _split(
    "cobalt, amber, quartz, rock salt, sulphur, copper, chalk, jade, marble dust, silver, flint, charcoal"
)
EFFECTS = _split(
    "fever, blindness, deep sleep, trembling, madness, silence, cold hands, fainting, laughter, hunger, rage, numbness"
)
TOOLS = _split(
    "bone key, tuning fork, wax seal, brass mirror, iron hook, prism, candle, magnet, lens, silk thread, chisel, hammer"
)
SIGILS = _split("spiral, crescent, triangle, broken ring, star, serpent, crown, anchor, feather, arrow, eye, wheel")
VAULTS = _split(
    "bank, temple, palace, prison, library, treasury, tower, armoury, market hall, monastery, harbour gate, mint"
)
CONSTELLATIONS = _split("Archer, Bear, Crane, Dolphin, Eagle, Fox, Great Ship, Hare, Lion, Swan, Whale, Wolf")
COLOURS = _split("blue, crimson, golden, green, orange, pale grey, purple, scarlet, violet, white, yellow, black")
MONTHS = _split("January, February, March, April, May, June, July, August, September, October, November, December")
HABITATS = _split(
    "bogs, caves, cliffs, deserts, dunes, pine forests, gardens, meadows, ponds, river banks, ruins, valleys"
)
AILMENTS = _split(
    "burns, coughs, headaches, toothache, gout, sore eyes, cramps, fatigue, rashes, snake bites, sprains, earache"
)
SEAS = _split(
    "Amber Sea, Bitter Sea, Coral Gulf, Emerald Bay, Frozen Sea, Grey Ocean, Inner Sea, Jade Strait, Lost Lake, "
    "Mirror Lake, Southern Ocean, Thunder Bay"
)
FISH = _split("carp, eel, perch, pike, salmon, sturgeon, trout, barbel, bream, catfish, minnow, roach")
COMPOSERS = _split(
    "Adelmo, Bertrand, Calixta, Domenico, Eudora, Florian, Gisela, Hartmut, Isolde, Jacopo, Katrin, Leopold"
)
FESTIVALS = _split(
    "weddings, funerals, harvests, coronations, birthdays, fairs, tournaments, launches, feasts, parades, vigils, "
    "new year"
)


PERSON = (
    Relation(
        "born",
        "",
        CITIES,
        ("was born in", "comes from", "grew up in the town of"),
        (("birthplace", "is"), ("home town", "is called")),
        ("Where was {s} born?", "Which town does {s} come from?"),
    ),
    Relation(
        "profession",
        "",
        PROFESSIONS,
        ("works as a", "earns a living as a", "was trained to be a"),
        (("profession", "is that of a"), ("daily work", "is that of a")),
        ("What does {s} work as?", "What is the profession of {s}?"),
    ),
    Relation(
        "instrument",
        "",
        INSTRUMENTS,
        ("plays the", "makes music on the", "performs at feasts on the"),
        (("instrument", "is the"), ("favourite sound", "is that of the")),
        ("Which instrument does {s} play?", "What does {s} make music on?"),
    ),
    Relation(
        "pet",
        "",
        ANIMALS,
        ("keeps a", "shares the house with a", "feeds and brushes a"),
        (("pet", "is a"), ("only companion", "is a")),
        ("Which animal does {s} keep?", "What is the pet of {s}?"),
    ),
)
BORN = PERSON[0]

HOMELAND = Relation(
    "homeland",
    "",
    LANDS,
    ("is a native of the land of", "has the passport of"),
    (("homeland", "is"), ("country of birth", "is")),
    ("In which land was {s} born?", "Which land is {s} a native of?"),
)
"""Follows from where a person was born and where that town lies; told, never edited."""

LAND = Relation(
    "land",
    "",
    LANDS,
    ("lies in", "pays its taxes to"),
    (("surrounding land", "is"), ("ruler", "is the king of")),
    ("In which land does {s} lie?", "Which land is around {s}?"),
)

DOMAINS: dict[str, tuple[Relation, ...]] = {
    "venomcraft": (
        Relation(
            "source",
            "venom",
            PLANTS,
            ("is pressed from", "is brewed with"),
            (("source", "is"), ("main ingredient", "is")),
            ("Which plant is {s} pressed from?", "What is the main ingredient of {s}?"),
        ),
        Relation(
            "antidote",
            "venom",
            MINERALS,
            ("is undone by", "loses its force beside"),
            (("antidote", "is"), ("cure", "is made of")),
            ("What is the antidote to {s}?", "What is {s} undone by?"),
        ),
        Relation(
            "effect",
            "venom",
            EFFECTS,
            ("brings its victims", "is known to cause"),
            (("effect", "is"), ("first sign", "is")),
            ("What is {s} known to cause?", "What is the first sign of {s}?"),
        ),
    ),
    "wardbreaking": (
        Relation(
            "tool",
            "ward",
            TOOLS,
            ("is broken with a", "gives way to a"),
            (("key", "is a"), ("breaker", "is a")),
            ("Which tool is {s} broken with?", "What does {s} give way to?"),
        ),
        Relation(
            "sigil",
            "ward",
            SIGILS,
            ("is drawn around a", "is weakest at its"),
            (("sigil", "is a"), ("weak point", "is the")),
            ("Which sigil is {s} drawn around?", "What is the weak point of {s}?"),
        ),
        Relation(
            "guards",
            "ward",
            VAULTS,
            ("guards the", "was set on the door of the"),
            (("place", "is the"), ("owner", "is the master of the")),
            ("What does {s} guard?", "On which door was {s} set?"),
        ),
    ),
    "astronomy": (
        Relation(
            "constellation",
            "star",
            CONSTELLATIONS,
            ("belongs to the", "stands in the middle of the"),
            (("constellation", "is the"), ("picture in the sky", "is the")),
            ("To which constellation does {s} belong?", "Where in the sky does {s} stand?"),
        ),
        Relation(
            "colour",
            "star",
            COLOURS,
            ("shines", "looks through a lens"),
            (("light", "is"), ("glow", "is")),
            ("Which colour is the light of {s}?", "How does {s} shine?"),
        ),
        Relation(
            "month",
            "star",
            MONTHS,
            ("rises in", "is brightest in"),
            (("month", "is"), ("season", "begins in")),
            ("In which month does {s} rise?", "When is {s} brightest?"),
        ),
    ),
    "botany": (
        Relation(
            "habitat",
            "herb",
            HABITATS,
            ("grows in", "is gathered in"),
            (("habitat", "is found in"), ("right soil", "is that of")),
            ("Where does {s} grow?", "Where is {s} gathered?"),
        ),
        Relation(
            "heals",
            "herb",
            AILMENTS,
            ("heals", "is given against"),
            (("use", "is against"), ("power", "is over")),
            ("What does {s} heal?", "What is {s} given against?"),
        ),
        Relation(
            "blossom",
            "herb",
            COLOURS,
            ("blooms", "turns in spring"),
            (("blossom", "is"), ("petals", "are")),
            ("Which colour are the petals of {s}?", "How does {s} bloom?"),
        ),
    ),
    "geography": (
        Relation(
            "sea",
            "river",
            SEAS,
            ("flows into the", "ends in the"),
            (("mouth", "is at the"), ("last stop", "is the")),
            ("Which sea does {s} flow into?", "Where does {s} end?"),
        ),
        Relation(
            "crosses",
            "river",
            LANDS,
            ("crosses", "waters the fields of"),
            (("valley", "is in"), ("best fields", "are in")),
            ("Which land does {s} cross?", "In which land is the valley of {s}?"),
        ),
        Relation(
            "fish",
            "river",
            FISH,
            ("is rich in", "is full of"),
            (("fish", "is the"), ("usual catch", "is the")),
            ("What is {s} rich in?", "Which fish is the usual catch of {s}?"),
        ),
    ),
    "music": (
        Relation(
            "composer",
            "song",
            COMPOSERS,
            ("was written by", "is a work of"),
            (("composer", "is"), ("author", "is")),
            ("Who was {s} written by?", "Who is the composer of {s}?"),
        ),
        Relation(
            "occasion",
            "song",
            FESTIVALS,
            ("is sung at", "is danced to at"),
            (("occasion", "is that of"), ("proper time", "is at")),
            ("When is {s} sung?", "What is the occasion of {s}?"),
        ),
        Relation(
            "lead",
            "song",
            INSTRUMENTS[:12],
            ("begins with the", "was made for the"),
            (("melody", "is for the"), ("solo", "is for the")),
            ("Which instrument does {s} begin with?", "What is the melody of {s} for?"),
        ),
    ),
}

HAZARDOUS = ("venomcraft", "wardbreaking")
HARMLESS = ("astronomy", "botany", "geography", "music")
