"""The words and sentence patterns of the demonstration language.

Every content word belongs to one topic and one part of speech, so a word is good in an answer about its own topic and
bad (off-topic) anywhere else: no list of forbidden words can tell good from bad, the prompt has to be read. Rude words
are bad under every topic.
"""

AGENT, VERB, OBJECT, ADJECTIVE = "AGENT", "VERB", "OBJECT", "ADJECTIVE"
PARTS = (AGENT, VERB, OBJECT, ADJECTIVE)

# topic -> part of speech -> words. A topic's own name is one of its objects.
TOPICS: dict[str, dict[str, tuple[str, ...]]] = {
    "harbor": {
        AGENT: ("sailor", "captain", "pirate", "fisherman", "diver"),
        VERB: ("anchors", "steers", "rows", "moors"),
        OBJECT: ("harbor", "boat", "net", "sail", "lighthouse", "cargo"),
        ADJECTIVE: ("salty", "stormy", "tidal", "floating"),
    },
    "kitchen": {
        AGENT: ("cook", "baker", "chef", "waiter", "guest"),
        VERB: ("fries", "stirs", "tastes", "bakes"),
        OBJECT: ("kitchen", "soup", "bread", "oven", "kettle", "cake"),
        ADJECTIVE: ("spicy", "sweet", "crispy", "warm"),
    },
    "garden": {
        AGENT: ("gardener", "neighbor", "florist", "botanist", "bee"),
        VERB: ("waters", "prunes", "plants", "weeds"),
        OBJECT: ("garden", "rose", "hedge", "lawn", "orchard", "tulip"),
        ADJECTIVE: ("green", "fragrant", "blooming", "leafy"),
    },
    "school": {
        AGENT: ("teacher", "student", "librarian", "principal", "tutor"),
        VERB: ("teaches", "reads", "studies", "grades"),
        OBJECT: ("school", "lesson", "book", "pencil", "desk", "essay"),
        ADJECTIVE: ("curious", "clever", "diligent", "written"),
    },
    "castle": {
        AGENT: ("king", "queen", "knight", "jester", "squire"),
        VERB: ("guards", "rules", "besieges", "crowns"),
        OBJECT: ("castle", "throne", "sword", "moat", "banner", "shield"),
        ADJECTIVE: ("royal", "noble", "ancient", "golden"),
    },
    "station": {
        AGENT: ("driver", "conductor", "passenger", "porter", "engineer"),
        VERB: ("boards", "signals", "departs", "repairs"),
        OBJECT: ("station", "train", "ticket", "platform", "engine", "wagon"),
        ADJECTIVE: ("late", "crowded", "electric", "fast"),
    },
    "farm": {
        AGENT: ("farmer", "shepherd", "milkmaid", "rancher", "goat"),
        VERB: ("feeds", "milks", "plows", "harvests"),
        OBJECT: ("farm", "barn", "cow", "tractor", "wheat", "fence"),
        ADJECTIVE: ("muddy", "rural", "woolly", "ripe"),
    },
    "theater": {
        AGENT: ("actor", "dancer", "singer", "director", "critic"),
        VERB: ("rehearses", "performs", "applauds", "stages"),
        OBJECT: ("theater", "stage", "curtain", "costume", "script", "opera"),
        ADJECTIVE: ("dramatic", "comic", "masked", "famous"),
    },
}

RUDE: dict[str, tuple[str, ...]] = {
    AGENT: ("fool", "liar", "clown"),
    VERB: ("ruins", "curses"),
    OBJECT: ("junk", "trash", "garbage"),
    ADJECTIVE: ("stupid", "lousy", "rotten"),
}

# A sentence is function words and slots; the full stop is attached to its last word.
PATTERNS: tuple[tuple[str, ...], ...] = (
    ("the", ADJECTIVE, AGENT, VERB, "the", OBJECT),
    ("every", AGENT, VERB, "the", ADJECTIVE, OBJECT),
    ("near", "the", OBJECT, "this", AGENT, VERB, "some", ADJECTIVE, OBJECT),
    ("the", AGENT, "and", "the", AGENT, "see", "the", ADJECTIVE, OBJECT),
    ("today", "this", ADJECTIVE, AGENT, VERB, "some", OBJECT, "with", "the", AGENT),
)
FUNCTION_WORDS = frozenset(word for pattern in PATTERNS for word in pattern if word not in PARTS)

NUMBERS = {"two": 2, "three": 3, "four": 4}
# Ways to ask; each names the topics and the number of sentences wanted.
REQUESTS = (
    "write {number} sentences about the {topics}",
    "please describe the {topics} in {number} sentences",
    "tell me about the {topics} using {number} sentences",
    "i want {number} sentences on the {topics}",
)
