"""The scenes in the middle of a story: each is a small event, which changes the world.

A fact always has the same words, "the key in the blue box", "the kite to Tom", "Now Mia had seven plums",
whatever the sentence around it. Each scene has a condition (may it happen now?) and a teller.
"""

from collections.abc import Callable
from dataclasses import dataclass

from paged_infer.storyteller.stories import lexicon
from paged_infer.storyteller.stories.world import Count, Person, Thing, World

# Moments that add mood but no facts.
INTERLUDES: tuple[str, ...] = (
    "it began to pour. {a} and {b} ran under the nearest roof and told each other ghost stories until it stopped.",
    "a rainbow stood over the hill. {a} ran towards it, but the rainbow ran faster.",
    "{a} made a raft out of bark. It sailed for three seconds and sank. {b} saluted.",
    "the baker gave them warm bread with honey, and for a while nobody said anything at all.",
    "{a} fell into a puddle. {b} looked at {a.him}, thought about it, and jumped in too.",
    "they lay on their backs and looked for animals in the clouds. {a} saw a whale. {b} saw only clouds.",
    "an owl flew over without a sound. {a} and {b} held their breath and felt very small.",
    "{a} was cross, because everything was going wrong. {b} made a silly face, and then it was better.",
    "they got lost in the woods. "
    "{a} wanted to cry, but {b} followed the sound of the stream, and soon they saw the roofs.",
    "{b} taught {a} a song about a bear. It had forty verses, and they sang them all.",
)


# Countables, and how a person gets more of them.
SUMS: tuple[tuple[tuple[str, ...], tuple[str, ...]], ...] = (
    (
        lexicon.FRUITS,
        (
            "{a} picked {x} {n}. {b} shook the tree, and {y} more fell down. Now {a} had {z}.",
            "{a} had {x} {n} in {a.his} pockets. {b} gave {a.him} {y} more. Now {a} had {z}.",
        ),
    ),
    (
        lexicon.GROUND,
        (
            "{a} went looking for treasure and found {x} {n}. {b} found {y} more for {a.him}. Now {a} had {z}.",
            "{a} had {x} {n} in a row. {b} added {y} more. Now {a} had {z}.",
        ),
    ),
    (
        lexicon.BAKED,
        (
            "the kitchen smelled wonderful. {a} was allowed {x} {n}, and {b} slipped {a.him} {y} more. "
            "Now {a} had {z}.",
            "{a} baked {x} {n}. They were so good that {a.he} baked {y} more. Now {a} had {z}.",
        ),
    ),
    (
        lexicon.KEPT,
        (
            "{a} showed {b} {x} {n}. {b} gave {a.him} {y} more. Now {a} had {z}.",
            "{a} had {x} {n} in a tin. Under a chair lay {y} more. Now {a} had {z}.",
        ),
    ),
)


@dataclass(frozen=True)
class Scene:
    """A scene: how often it is chosen among the possible ones, when it is possible, and its text."""

    name: str
    weight: float
    possible: Callable[[World], bool]
    tell: Callable[[World], str]


def find(world: World, finder: Person) -> tuple[str, Thing]:
    """A person finds a new thing and puts it away: three facts (colour, finding place, place)."""
    thing = world.new_thing()
    thing.finder, thing.found_at = finder, world.chooser.pick(lexicon.FINDING_PLACES)
    found = f"{finder} found a {thing.noun} {thing.found_at}. The {thing.noun} was {thing.colour}."
    return f"{found} {world.chooser.pick(lexicon.THINGS[thing.noun])} {put_away(world, finder, thing)}", thing


def put_away(world: World, who: Person, thing: Thing) -> str:
    """A person puts a thing in some place."""
    thing.put(world.new_place())
    return world.say(
        (
            "{a.He} took it home and put the {t.noun} {t.place}.",
            "So that it would not get lost, {a.he} put the {t.noun} {t.place}.",
            "{a.He} told nobody and hid the {t.noun} {t.place}.",
            "To keep it safe, {a} left the {t.noun} {t.place}.",
        ),
        a=who,
        t=thing,
    )


def _find(world: World) -> str:
    return find(world, world.chooser.pick(world.cast))[0]


def _gift(world: World) -> str:
    a, b = world.two_of_the_cast()
    thing = world.new_thing()
    thing.give(b)
    text = world.say(
        (
            "{a} had a surprise, wrapped in leaves. It was a {t.noun}. The {t.noun} was {t.colour}. "
            "{a.He} gave the {t.noun} to {b}, who turned pink.",
            "a pedlar came by, and {a} bought a {t.noun}. The {t.noun} was {t.colour}. "
            "But it was not for {a.him}self. {a.He} gave the {t.noun} to {b}.",
            "{a} came out of the workshop with a {t.noun} that {a.he} had made. The {t.noun} was {t.colour}. "
            "{a.He} gave the {t.noun} to {b}.",
        ),
        a=a,
        b=b,
        t=thing,
    )
    return f"{text} {world.chooser.pick(lexicon.THINGS[thing.noun])}"


def _move(world: World) -> str:
    thing = world.chooser.pick(world.placed())
    who = world.chooser.pick(world.cast)
    thing.put(world.new_place(instead_of=thing.place))
    return world.say(
        (
            "{a} changed {a.his} mind and put the {t.noun} {t.place}.",
            "{a} thought of a better place and hid the {t.noun} {t.place}.",
            "{a} cleaned the whole house. At the end {a.he} put the {t.noun} {t.place}.",
            "{a} played with the {t.noun} for an hour, and afterwards {a.he} left the {t.noun} {t.place}.",
        ),
        a=who,
        t=thing,
    )


def _mischief(world: World) -> str:
    kind, name = world.chooser.pick(list(world.pets.items()))
    thing = world.chooser.pick(world.things)
    thing.put(world.new_place(instead_of=thing.place))
    return world.say(
        (
            "there was a crash. {p} the {k} had been playing again, and had dropped the {t.noun} {t.place}.",
            "{p} the {k} thought it was time for a joke, and hid the {t.noun} {t.place}.",
            "{p} the {k} ran through the kitchen at full speed, and left the {t.noun} {t.place}.",
        ),
        p=name,
        k=kind,
        t=thing,
    )


def _hand_over(world: World) -> str:
    thing = world.chooser.pick(world.things)
    giver = thing.holder or world.chooser.pick(world.cast)
    taker = world.chooser.pick([person for person in world.cast if person is not giver])
    thing.give(taker)
    return world.say(
        (
            '"Look after it for me," said {a}, and gave the {t.noun} to {b}.',
            '"You should have this," said {a}, and gave the {t.noun} to {b}.',
            "{b} was a little sad. {a} saw it, and gave the {t.noun} to {b}.",
            "{a} lost a game of cards and gave the {t.noun} to {b}.",
        ),
        a=giver,
        b=taker,
        t=thing,
    )


def _put_down(world: World) -> str:
    thing = world.chooser.pick(world.held())
    who = thing.holder
    thing.put(world.new_place())
    return world.say(
        (
            "{a} needed both hands to climb a wall, and left the {t.noun} {t.place}.",
            "{a} went to wash {a.his} hands, and first put the {t.noun} {t.place}.",
            "{a} was tired of carrying things about, and put the {t.noun} {t.place}.",
        ),
        a=who,
        t=thing,
    )


def _sum(world: World) -> str:
    owner = world.chooser.pick(world.cast)
    taken = {count.noun for count in world.counts}
    kinds = [([noun for noun in nouns if noun not in taken], templates) for nouns, templates in SUMS]
    nouns, templates = world.chooser.pick([(nouns, templates) for nouns, templates in kinds if nouns])
    noun = world.chooser.pick(nouns)
    first, more = world.chooser.pick((2, 3, 4, 5, 6)), world.chooser.pick((1, 2, 3, 4))
    count = Count(owner, noun, first + more)
    world.counts.append(count)
    words = lexicon.NUMBERS
    text = world.play(templates, a=owner, n=noun, x=words[first], y=words[more], z=words[count.number])
    if not world.chooser.chance(0.4):
        return text
    return f"{text} {_take_away(world, count)}"


def _take_away(world: World, count: Count) -> str:
    less = world.chooser.pick((1, 2))
    count.number -= less
    return world.play(
        ("{a.He} gave {y} to {b}. Now {a} had {z}.", "But {y} rolled into the river. Now {a} had {z}."),
        a=count.owner,
        n=count.noun,
        y=lexicon.NUMBERS[less],
        z=lexicon.NUMBERS[count.number],
    )


def _hide_and_seek(world: World) -> str:
    a, b = world.two_of_the_cast()
    one = world.new_thing(coloured=False)
    one.put(world.new_place())
    two = world.new_thing(coloured=False)
    two.put(world.new_place())
    text = world.say(
        (
            "they played a hiding game. {a} took a {t.noun} and hid the {t.noun} {t.place}. "
            "{b} took a {u.noun} and hid the {u.noun} {u.place}.",
            '"Let us hide something," said {a}. {a.He} put a {t.noun} on {a.his} head, counted to ten, '
            "and hid the {t.noun} {t.place}. {b} had a {u.noun}. {b.He} hid the {u.noun} {u.place}.",
        ),
        a=a,
        b=b,
        t=one,
        u=two,
    )
    return f"{text} " + world.say(
        (
            "They looked and looked, and forgot the time.",
            "It took them so long to guess that they had to stop for tea.",
            "Neither of them would give a hint, but both of them giggled.",
        )
    )


def _pet(world: World) -> str:
    kinds = [kind for kind in lexicon.PETS if kind not in world.pets]
    kind = world.chooser.pick(kinds)
    names = [n for n in lexicon.PET_NAMES if n not in world.pets.values()]
    name = world.pets[kind] = world.chooser.pick(names)
    habit = world.chooser.pick(lexicon.PETS[kind])
    return world.say(
        (
            "they met a {k} named {p}, {h}. {p} came home with them and stayed.",
            "somebody was sitting on the doorstep. It was a {k} named {p}, {h}.",
            "there was a noise in the hedge, and out came a {k} named {p}, {h}.",
        ),
        k=kind,
        p=name,
        h=habit,
    )


def _friend(world: World) -> str:
    friend = world.new_person()
    return world.say(
        (
            'a {b.trait} {b.child} named {b} looked over the fence. "Can I come too?" {b.he} asked. '
            "Of course {b.he} could.",
            "they heard someone humming. It was {b}, a {b.trait} {b.child} who had just moved in next door.",
        ),
        b=friend,
    )


def _interlude(world: World) -> str:
    template = world.chooser.pick([template for template in INTERLUDES if template not in world.told])
    world.told.append(template)
    return world.play((template,))


def _always(world: World) -> bool:
    return True


def _things_left(world: World) -> bool:
    return len(world.things) < 1


SCENES: tuple[Scene, ...] = (
    Scene("find", 2.0, _things_left, _find),
    Scene("gift", 2.0, _things_left, _gift),
    Scene("move", 2.0, lambda world: bool(world.placed()), _move),
    Scene("mischief", 1.5, lambda world: bool(world.pets), _mischief),
    Scene("hand over", 1.5, _always, _hand_over),
    Scene("put down", 1.5, lambda world: bool(world.held()), _put_down),
    Scene("sum", 4.0, lambda world: len(world.counts) < 1, _sum),
    Scene("hide and seek", 1.5, lambda world: len(world.things) < 1, _hide_and_seek),
    Scene("pet", 3.0, lambda world: len(world.pets) < 1, _pet),
    Scene("friend", 1.0, lambda world: len(world.cast) < 4, _friend),
    Scene("interlude", 2.5, lambda world: len(world.told) < len(INTERLUDES), _interlude),
)
