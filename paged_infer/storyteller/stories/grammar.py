"""An endless source of stories: `tell(seed)` writes one, with questions, answers and its exact log-probability.

Every decision is a draw of one `Chooser`, and different draws end in different texts, so a story has exactly one
derivation and its log-probability is the sum of its draws. No model, however good, can do better than
exp(-logprob / num_tokens) in perplexity on text from this grammar: that is the bound for the trained model.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from paged_infer.storyteller.stories import lexicon
from paged_infer.storyteller.stories.chooser import Chooser
from paged_infer.storyteller.stories.scenes import SCENES, find
from paged_infer.storyteller.stories.themes import LAST_WORDS, THEMES
from paged_infer.storyteller.stories.world import Person, Question, Thing, World

END = "<|endoftext|>"  # before and after a document, never inside
# Training uses smaller seeds; evaluation begins here.
FIRST_EVALUATION_SEED = 1_000_000_000

# Kind of story -> (its share, fewest scenes in its middle, most, chance of another one after the fewest).
KINDS: dict[str, tuple[float, int, int, float]] = {
    "short story": (0.25, 0, 0, 0.5),
    "story": (0.67, 0, 8, 0.55),
    "long story": (0.08, 4, 18, 0.9),
}
MOST_QUESTIONS = 8


@dataclass(frozen=True)
class Story:
    """One document of the language: a title line, the story, and questions with their answers."""

    text: str
    questions: tuple[Question, ...]
    logprob: float  # nats, of the whole text and its end


def ask(question: Question) -> str:
    """The two lines of a question and its answer in a document."""
    return f"Q: {question.question}\nA: {question.answer}\n"


def tell(seed: int) -> Story:
    """The story of this seed."""
    return write(Chooser.from_seed(seed))


def write(chooser: Chooser) -> Story:
    """A story made of the chooser's draws."""
    world = World(chooser)
    text = "".join(pieces(world))
    return Story(text, tuple(world.asked), chooser.logprob)


def pieces(world: World) -> Iterator[str]:
    """The document, piece by piece: its title, its paragraphs, and each question with its answer.

    All that a piece says has been drawn when it is yielded.
    """
    kind = world.chooser.weigh({name: weight for name, (weight, *_) in KINDS.items()})
    _, least, most, more = KINDS[kind]
    hero = world.new_person()
    discovery, thing = find(world, hero)
    yield f"A {kind} about {hero} and a {thing.colour} {thing.noun}.\n"
    opening = _opening(world, hero)
    if kind == "short story":
        yield f"{opening}\n"
        yield f"One morning {discovery}\n"
        yield f"{_short_ending(world, hero, thing)}\n"
    else:
        friend = world.new_person()
        setups, endings = world.chooser.pick(THEMES)
        yield f"{opening} {_friend(world, hero, friend)} {world.say(setups, a=hero, b=friend)}\n"
        yield f"One morning, when {world.chooser.pick(lexicon.WEATHERS)}, {discovery}\n"
        scene = None
        for number in range(most):
            if number >= least and not world.chooser.chance(more):
                break
            possible = [s for s in SCENES if s is not scene and s.possible(world)]
            scene = world.chooser.weigh({s: s.weight for s in possible})
            yield f"{_connective(world)}, {scene.tell(world)}\n"
        yield f"{world.say(endings, a=hero, b=friend)} {world.chooser.pick(LAST_WORDS)}\n"
    yield from map(ask, _questions(world))


def _opening(world: World, hero: Person) -> str:
    setting, hobby = world.chooser.pick(lexicon.SETTINGS), world.chooser.pick(lexicon.HOBBIES)
    return world.say(
        (
            "Once upon a time, in {s}, there lived a {a.trait} {a.child} named {a}, who {h}.",
            "In {s} lived a {a.trait} {a.child} named {a}, who {h}.",
            "There was once a {a.trait} {a.child} named {a}. {a.He} lived in {s}, and {a.he} {h}.",
        ),
        a=hero,
        s=setting,
        h=hobby,
    )


def _friend(world: World, hero: Person, friend: Person) -> str:
    return world.say(
        (
            "{a.His} best friend was {b}, a {b.trait} {b.child}.",
            "Next door lived {b}, a {b.trait} {b.child}, and the two were always together.",
        ),
        a=hero,
        b=friend,
    )


def _short_ending(world: World, hero: Person, thing: Thing) -> str:
    return world.say(
        (
            "That night {a} dreamed about the {t.noun}, and it was a happy dream.",
            "And whenever {a} was sad, {a.he} thought of the {t.noun} and felt better.",
            "That evening {a} told {a.his} mother everything, and they both had to laugh.",
            "From that day on, {a} looked at the world as if it were full of presents.",
            "And the next morning {a} went out to see what else the world had lost.",
        ),
        a=hero,
        t=thing,
    )


def _connective(world: World) -> str:
    """When a scene happens: soon after the last one, or at the next time of the day."""
    if world.chooser.chance(0.5):
        return world.chooser.pick(lexicon.CONNECTIVES)
    world.daytime = (world.daytime + 1) % len(lexicon.DAYTIMES)
    return lexicon.DAYTIMES[world.daytime]


def _questions(world: World) -> Iterator[Question]:
    """Two or more of the world's questions in random order."""
    left = world.questions()
    while left and len(world.asked) < MOST_QUESTIONS:
        if len(world.asked) >= 2 and not world.chooser.chance(0.6):
            break
        question = world.chooser.pick(left)
        world.asked.append(question)
        left.remove(question)
        yield question
