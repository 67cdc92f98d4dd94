"""What is true in a story: which people are in it, which things there are, and where each of them is right now."""

from collections.abc import Sequence as ReadOnlyList
from dataclasses import dataclass, field

from paged_infer.storyteller.stories import lexicon
from paged_infer.storyteller.stories.chooser import Chooser


@dataclass(frozen=True)
class Question:
    """A question about a story and the one true answer, as written after `Q: ` and `A: `."""

    question: str
    answer: str


@dataclass(frozen=True)
class Person:
    """A child in the story, with the pronouns that templates ask for: `{a.he}`, `{a.His}`."""

    name: str
    girl: bool
    trait: str

    def __str__(self) -> str:
        return self.name

    @property
    def he(self) -> str:
        return "she" if self.girl else "he"

    @property
    def He(self) -> str:
        return self.he.capitalize()

    @property
    def him(self) -> str:
        return "her" if self.girl else "him"

    @property
    def his(self) -> str:
        return "her" if self.girl else "his"

    @property
    def His(self) -> str:
        return self.his.capitalize()

    @property
    def child(self) -> str:
        return "girl" if self.girl else "boy"


@dataclass
class Thing:
    """One object. It is either somewhere (`place`) or held by a person (`holder`), never both."""

    noun: str
    colour: str | None = None
    finder: Person | None = None
    found_at: str | None = None
    place: str | None = None
    holder: Person | None = None

    def put(self, place: str) -> None:
        self.place, self.holder = place, None

    def give(self, holder: Person) -> None:
        self.place, self.holder = None, holder


@dataclass
class Count:
    """How many countables (`plums`) one person has."""

    owner: Person
    noun: str
    number: int


@dataclass
class World:
    """The state of one story while it is written, and the chooser that every decision goes through."""

    chooser: Chooser
    cast: list[Person] = field(default_factory=list)
    things: list[Thing] = field(default_factory=list)
    counts: list[Count] = field(default_factory=list)
    pets: dict[str, str] = field(default_factory=dict)  # kind -> name
    told: list[str] = field(default_factory=list)  # interludes that have happened, each at most once
    asked: list[Question] = field(default_factory=list)  # at the end of the document
    daytime: int = -1  # index into lexicon.DAYTIMES; -1 is the early morning

    def say(self, templates: ReadOnlyList[str], **roles: object) -> str:
        """One of `templates`, each equally likely, with its `{roles}` filled in."""
        return self.chooser.pick(templates).format(**roles)

    def play(self, templates: ReadOnlyList[str], **roles: object) -> str:
        """Like `say`, but people for `{a}` and `{b}` that `roles` lacks are drawn if the template names them.

        Drawing a person that is not named would give one text two derivations, and a wrong log-probability.
        """
        template = self.chooser.pick(templates)
        for role in ("a", "b"):
            if role not in roles and "{" + role in template:
                roles[role] = self.chooser.pick([p for p in self.cast if p not in roles.values()])
        return template.format(**roles)

    def new_person(self) -> Person:
        """A person with a name that is new in the story; joins the cast."""
        taken = {person.name for person in self.cast}
        girl = self.chooser.chance(0.5)
        name = self.chooser.pick([n for n in (lexicon.GIRLS if girl else lexicon.BOYS) if n not in taken])
        person = Person(name, girl, self.chooser.pick(lexicon.TRAITS))
        self.cast.append(person)
        return person

    def new_thing(self, coloured: bool = True) -> Thing:
        """A thing that is not in the story yet, in some colour or without a named one."""
        taken = {thing.noun for thing in self.things}
        noun = self.chooser.pick([n for n in lexicon.THINGS if n not in taken])
        thing = Thing(noun, self.chooser.pick(lexicon.COLOURS) if coloured else None)
        self.things.append(thing)
        return thing

    def new_place(self, instead_of: str | None = None) -> str:
        """Somewhere to keep a thing; not `instead_of`, the place where it already is."""
        places = lexicon.CONTAINERS + lexicon.SPOTS
        return self.chooser.pick([place for place in places if place != instead_of])

    def two_of_the_cast(self) -> tuple[Person, Person]:
        """Two different people, in either order."""
        first = self.chooser.pick(self.cast)
        return first, self.chooser.pick([person for person in self.cast if person is not first])

    def placed(self) -> list[Thing]:
        return [thing for thing in self.things if thing.place is not None]

    def held(self) -> list[Thing]:
        return [thing for thing in self.things if thing.holder is not None]

    def questions(self) -> list[Question]:
        """Every question that the world can answer now, in the order of its facts."""
        found: list[Question] = []
        for thing in self.things:
            if thing.colour is not None:
                found.append(Question(f"What colour is the {thing.noun}?", f"It is {thing.colour}."))
            if thing.found_at is not None:
                found.append(Question(f"Where did {thing.finder} find the {thing.noun}?", _sentence(thing.found_at)))
            if thing.place is not None:
                found.append(Question(f"Where is the {thing.noun}?", _sentence(thing.place)))
            if thing.holder is not None:
                found.append(Question(f"Who has the {thing.noun}?", f"{thing.holder}."))
        for count in self.counts:
            number = lexicon.NUMBERS[count.number]
            found.append(Question(f"How many {count.noun} does {count.owner} have?", f"{count.owner.He} has {number}."))
        return found


def _sentence(phrase: str) -> str:
    return phrase[0].upper() + phrase[1:] + "."
