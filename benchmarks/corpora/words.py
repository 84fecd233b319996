"""Made-up people, and numbers that can be told apart by their first digit."""

import random

from kvjax.benchmarks.corpora.item import halves

FIRST_NAMES = (
    "Farid", "Greta", "Ivo", "Mina", "Otto", "Paula", "Ravi", "Sonja", "Tariq", "Ulla", "Viktor",
    "Wanda", "Anton", "Bela", "Carlos", "Dagmar", "Emil", "Fatima", "Gustav", "Helga", "Ibrahim",
    "Jolanta", "Karim", "Lucia", "Marek", "Nadia", "Oskar", "Petra", "Quentin", "Rosa", "Stefan",
    "Teresa", "Urban", "Vera", "Walter", "Yusuf", "Zelda", "Arne", "Bianca", "Cyril", "Dora",
    "Edgar", "Flora", "Hugo", "Irma", "Jakob", "Klara", "Leopold", "Magda", "Nils",
)  # fmt: skip
LAST_NAMES = (
    "Amsel", "Brandt", "Castell", "Dorn", "Ehrlich", "Falk", "Gruber", "Hollis", "Imber", "Jansen",
    "Keller", "Lindt", "Marsh", "Norden", "Olsen", "Pryce", "Quill", "Roth", "Sand", "Thorne",
    "Ullman", "Varga", "Weller", "Yarrow", "Zander", "Ashby", "Becker", "Croft", "Drake", "Evers",
)  # fmt: skip
TOWNS = (
    "Alderton", "Brunmoor", "Casterby", "Dunfell", "Eastmere", "Fernhill", "Glenrock", "Hartwell",
    "Ilford", "Jessop", "Kingsley", "Langdale", "Merton", "Norwick", "Oakham", "Pennwood",
    "Quarry", "Redcliff", "Stanmore", "Thornbury", "Upwell", "Verdun", "Westbrook", "Yarmouth",
)  # fmt: skip
INSTRUMENTS = (
    "violin", "trumpet", "harp", "piano", "drum", "flute", "guitar", "organ", "banjo", "cello",
    "oboe", "viola", "horn", "lute", "accordion", "clarinet", "zither", "bassoon", "tuba", "lyre",
)  # fmt: skip


def people(rng: random.Random, split: str, groups: int, per_group: int) -> list[list[str]]:
    """Full names, none twice, no first name twice in a group; the splits share no first name."""
    firsts, lasts = FIRST_NAMES[halves(split)], LAST_NAMES[halves(split)]
    if groups > len(lasts) or per_group > len(firsts):
        raise ValueError(
            f"at most {len(lasts)} groups of {len(firsts)} people, got {groups} of {per_group}"
        )
    orders = {first: iter(rng.sample(lasts, len(lasts))) for first in firsts}
    return [
        [f"{first} {next(orders[first])}" for first in rng.sample(firsts, per_group)]
        for _ in range(groups)
    ]


class Numbers:
    """Four-digit numbers, none twice."""

    def __init__(self, rng: random.Random) -> None:
        self._rng, self._used = rng, set[int]()

    def take(self, count: int) -> list[str]:
        """Numbers with distinct first digits, at most 9."""
        found: list[str] = []
        for first in self._rng.sample(range(1, 10), count):
            number = self._rng.randrange(first * 1000, first * 1000 + 1000)
            while number in self._used:
                number = self._rng.randrange(first * 1000, first * 1000 + 1000)
            self._used.add(number)
            found.append(str(number))
        return found
