"""Facts whose question shares no word with them, after NoLiMa (arXiv 2502.05167), with facts of our own.

"Who could walk to work in Rome?" is answered by a sentence about somebody's flat beside the Colosseum. Finding it by
matching words is impossible; one step of common knowledge leads there. Small models fail at any length, which the short
twin of every sample shows.
"""

from __future__ import annotations

from collections.abc import Callable

from lcconvert.convert.ruler import plant, text_units
from lcconvert.convert.tasks import Ask, Case, Draft, Task

_HEAD = "Read the following text. A question about one of the people in it comes afterwards.\n\n"
_QUESTION = "\n\nWhich person in the text above {asked}?"
_PREFIX = "The person who {asked} is"
# what the text says, and what the question says instead
FACTS = (
    ("{name} rents a flat beside the Colosseum.", "could walk to work in Rome"),
    ("From the balcony {name} looks straight at the Eiffel Tower.", "must be living in Paris"),
    ("{name} sells postcards under Big Ben.", "has a job in London"),
    ("Every dawn {name} jogs around the Brandenburg Gate.", "exercises in Berlin"),
    ("{name} sweeps the steps of the Parthenon.", "earns a wage in Athens"),
    ("{name} repairs gondolas for a living.", "most likely stays in Venice"),
    ("Last winter {name} milked reindeer at sixty-nine degrees north.", "has been inside the Arctic Circle"),
    ("{name} never touches anything with gluten in it.", "would have to turn down ordinary bread"),
    ("{name} gave up meat, fish, eggs and milk.", "follows a vegan diet"),
    ("{name} tunes the instruments before every concert at the Bolshoi.", "is employed in Moscow"),
    ("{name} guides strangers through the pyramids of Giza.", "speaks to tourists in Egypt"),
    ("{name} photographs kangaroos from the kitchen window.", "probably lives in Australia"),
    ("{name} was born on the last day of February in a leap year.", "has a birthday once in four years"),
    ("{name} cannot tell red from green.", "would struggle with traffic lights because of colour blindness"),
    ("{name} fills teeth from nine to five.", "works as a dentist"),
    ("{name} keeps forty hives behind the barn.", "produces honey"),
)
_NAMES = (  # so many that no constant answer scores
    "Marta", "Jonas", "Yuki", "Priya", "Omar", "Ingrid", "Tomas", "Leila", "Kofi", "Anouk", "Bruno", "Sanja", "Mateo",
    "Freya", "Dmitri", "Nadia", "Hugo", "Aisha", "Pavel", "Rosa", "Anselm", "Beatriz", "Caspar", "Delphine", "Emeka",
    "Farida", "Gunnar", "Hanneke", "Ibrahim", "Jadwiga", "Kenji", "Ludmila", "Malik", "Noor", "Oksana", "Pedro",
    "Quentin", "Ragnhild", "Stefan", "Tamara", "Umberto", "Vesna", "Wanda", "Xavier", "Yolanda", "Zoltan", "Adaeze",
    "Birgit", "Cosima", "Dragan", "Eluned", "Fabrice", "Gisela", "Haruto", "Ines", "Jarmila", "Kwame", "Lorenzo",
    "Mirela", "Nikolai", "Ottilie", "Paloma", "Radek", "Signe", "Thandi", "Ulrike", "Viggo", "Wiebke", "Yara",
    "Zainab", "Aurelio", "Bodil", "Chidi", "Dagmar", "Esteban", "Fatou", "Gregor", "Hedda", "Ismail", "Joaquin",
    "Katya", "Liesel", "Mehmet", "Nerys", "Osvaldo", "Petra", "Rashid", "Solveig", "Takumi", "Ursula", "Valentin",
    "Wojtek", "Ximena", "Yannick", "Zdenka", "Agnieszka", "Bogdan", "Clemens", "Dunja", "Eskil", "Fiorella",
    "Giacomo", "Hilde", "Isidor", "Jorunn", "Kaspian", "Ludovic", "Milena", "Nenad", "Orsolya", "Piotr", "Rania",
    "Sibylle", "Tiago", "Veronika",
)  # fmt: skip


def _hop(case: Case) -> Callable[[int], Draft]:
    rng = case.rng()
    name, (fact, *others) = rng.choice(_NAMES), rng.sample(FACTS, len(FACTS))
    place = rng.randrange(40) / 39

    def ask(asked: str, answers: tuple[str, ...]) -> Ask:
        return Ask(_QUESTION.format(asked=asked), _PREFIX.format(asked=asked), answers)

    absent = tuple(ask(asked, ()) for _, asked in others)

    def draft(n: int) -> Draft:
        body, spare, repetition = text_units(case, n, noise=False)
        units = plant(body, [(place, f" {fact[0].format(name=name)}")])
        return Draft(_HEAD, units, ask(fact[1], (name,)), absent, (place,), spare, repetition)

    return draft


HOPS = {"nolima": Task(_hop, "person", 24)}
