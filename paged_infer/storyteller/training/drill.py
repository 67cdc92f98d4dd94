"""Memory games: short lists of facts, then questions about all of them. Training starts with these, since all that
they can teach is to look back and copy; the stories then use what was learned."""

from dataclasses import dataclass

from paged_infer.storyteller.stories import lexicon
from paged_infer.storyteller.stories.chooser import Chooser
from paged_infer.storyteller.stories.grammar import ask
from paged_infer.storyteller.stories.world import Count, Question, World

TITLE = "A memory game."


@dataclass(frozen=True)
class Game:
    """One memory game. Unlike a story it has no log-probability: different draws may end in the same text."""

    text: str
    questions: tuple[Question, ...]


def drill(seed: int, most_facts: int = 5) -> Game:
    """The memory game of this seed: two to `most_facts` facts in plain sentences, then every question about them."""
    chooser = Chooser.from_seed(seed)
    world = World(chooser)
    for _ in range(2):
        world.new_person()
    sentences = [_fact(world) for _ in range(chooser.pick(range(2, most_facts + 1)))]
    left = world.questions()
    asked = []
    while left:
        asked.append(chooser.pick(left))
        left.remove(asked[-1])
    text = f"{TITLE}\nOnce " + " Then ".join(sentences) + "\n" + "".join(ask(question) for question in asked)
    return Game(text, tuple(asked))


def _fact(world: World) -> str:
    chooser = world.chooser
    kind = chooser.pick(["put", "give", "find", "count", *(["move", "hand"] if world.things else [])])
    who, other = world.two_of_the_cast()
    if kind == "count" and not world.counts:
        nouns = lexicon.FRUITS + lexicon.GROUND + lexicon.BAKED + lexicon.KEPT
        count = Count(who, chooser.pick(nouns), chooser.pick(range(3, 11)))
        world.counts.append(count)
        words = lexicon.NUMBERS
        told = f"{who} counted {who.his} {count.noun}. Now {who} had {words[count.number]}."
        if chooser.chance(0.5):
            less = chooser.pick((1, 2))
            count.number -= less
            told += f" {who.He} gave {words[less]} to {other}. Now {who} had {words[count.number]}."
        return told
    if world.things:
        kind = kind if kind in ("move", "hand") else chooser.pick(["move", "hand"])
        thing = chooser.pick(world.things)
        begin = who.name
    else:
        thing = world.new_thing()
        begin = f"{who} had a {thing.noun}. The {thing.noun} was {thing.colour}. {who.He}"
    if kind == "find":
        thing.finder, thing.found_at = who, chooser.pick(lexicon.FINDING_PLACES)
        begin = f"{who} found a {thing.noun} {thing.found_at}. The {thing.noun} was {thing.colour}. {who.He}"
    if kind in ("give", "hand"):
        thing.give(other)
        return f"{begin} gave the {thing.noun} to {other}."
    thing.put(world.new_place(instead_of=thing.place))
    return f"{begin} put the {thing.noun} {thing.place}."
