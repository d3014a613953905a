"""The key words of planted facts, split once between training and validation.

A needle test is only evidence if the model never trained on its keys, so the split is made here and nowhere else: a
word whose CRC-32 is even belongs to training, odd to validation. The two sides can therefore never share a word,
whichever words are added later. Words are common English, so that a key costs one or two tokens in any vocabulary.
"""

from __future__ import annotations

import zlib
from functools import cache
from typing import Literal

Split = Literal["train", "valid"]

_ADJECTIVES = """
able agile airy amber ample ancient arid azure bald bitter blank bleak blunt bold brave brief bright brisk broad
bronze busy calm candid careful cheap chilly civil clean clever cloudy clumsy coarse cold common cool copper costly
crisp crude curious curly damp dark dear deep dense dim distant dizzy double dry dull dusty eager early easy elder
empty equal even exact faint fair fancy fast fierce final firm flat fluffy fond formal frail free fresh frosty full
funny gentle giant glad gloomy golden good grand grave gray great green grim guilty happy hard harsh hasty heavy
hidden hollow honest huge humble icy ideal idle inner ivory jolly keen kind large late lazy lean light limp little
lively local lonely long loose loud lovely loyal lucky mad major marble mellow mild minor misty modern modest moist
muddy narrow nasty neat new nimble noble noisy northern novel odd old open orange outer pale patient plain polite poor
proud pure purple quick quiet rapid rare raw ready red rich rigid ripe robust rocky rough round royal rude rural rusty
sad safe salty scarlet secret sharp shiny short shy silent silver simple slim slow small smart smooth snowy sober soft
solid sour spare steady steep stiff strange strict strong subtle sudden sunny super sweet swift tall tame tender thick
thin tidy tiny tired tough urban useful vague vast violet vital vivid warm wary weak wealthy weary wet white wide wild
windy wise wooden yellow young
"""
_NOUNS = """
acorn actor album anchor ankle apple apron arch arrow attic autumn badge baker banner barn barrel basin basket beach
beacon beard beaver bell bench berry blanket blossom boat bonnet boot bottle bowl branch brick bridge broom brush
bucket button cabin cable cactus camel camera candle canoe canyon carpet castle cellar chain chair chalk chapel cherry
chest chimney circle cliff clock cloud clover coach coast cobbler coffee collar comet compass copy coral cottage
cotton cradle crane creek cricket crown cupboard curtain cushion dagger dancer desert diamond doctor dolphin donkey
dragon drawer driver drum eagle ember engine fabric falcon farmer feather fence ferry fiddle field finger flag flame
flute forest fossil fountain fox galaxy garden gate glacier glass glove goat grape guitar hammer harbor harvest hat
hawk hedge helmet heron hill hinge honey horn horse house hunter island jacket jewel judge kettle kitchen kite knight
ladder lagoon lake lamp lantern lawyer leaf lemon letter library lily lion lizard locket magnet maple market mask
meadow melon mirror mitten monkey moon mountain needle nest nurse oak ocean olive orchard otter oven owl oyster paddle
painter palace panther parcel parrot path peach pearl pebble pencil pepper piano pigeon pillow pilot pirate planet
plate plum pocket poet pond poppy potter prairie puppet puzzle quarry queen quilt rabbit raft rail rain ranch raven
ribbon ring river road robin rocket roof rope rose rudder saddle sailor salmon sandal scarf school scout shadow sheep
shell shepherd shield ship shovel singer sister sleeve slope snail soldier sparrow spider spoon spring spruce squirrel
stable stairs statue stone stork storm stream street summit swan table tailor teacher temple tent thimble thistle
throne thunder tiger timber toast torch tower trail train trumpet tulip tunnel turtle valley vase velvet village
violin wagon walnut wanderer water weaver whale wheel whistle willow window winter wizard wolf wrench zebra
"""


def _side(text: str, split: Split) -> tuple[str, ...]:
    parity = {"train": 0, "valid": 1}[split]
    return tuple(word for word in sorted(set(text.split())) if zlib.crc32(word.encode()) % 2 == parity)


@cache
def key_words(split: Split) -> tuple[str, ...]:
    """The adjectives and nouns of one side, sorted; `key_words("train")` and `key_words("valid")` share no word."""
    return tuple(sorted({*_side(_ADJECTIVES, split), *_side(_NOUNS, split)}))


@cache
def key_names(split: Split) -> tuple[str, ...]:
    """All two-word keys of one side, such as `amber lantern` (over ten thousand): enough for the longest haystack."""
    return tuple(f"{adjective} {noun}" for adjective in _side(_ADJECTIVES, split) for noun in _side(_NOUNS, split))
