"""What a story is about: a wish or a worry near the beginning that its end comes back to.

Each theme is (setups, endings). Templates know `{a}`, the hero, and `{b}`, the hero's friend.
"""

Theme = tuple[tuple[str, ...], tuple[str, ...]]

THEMES: tuple[Theme, ...] = (
    (
        ("{a} had one wish: to stay awake until the stars came out.",
         "More than anything, {a} wanted to stay up late and count the stars."),
        ("That night {a} lay on the cool grass and counted stars. "
         "{a.He} got as far as forty, and then {a.he} was asleep.",
         "That night the stars came out, one after the other, and {a} was awake for all of them."),
    ),
    (
        ("Tomorrow was {a.his} birthday, and {a} could hardly sit still.",
         "It was the day before {a.his} birthday, which is the longest day of the year."),
        ("And when {a} woke up the next day, {a.he} was a whole year older, and there was cake for "
         "breakfast.",
         "The next day there were candles and songs, and {a} made a wish that {a.he} never told anyone."),
    ),
    (
        ("{a} was a little afraid of the dark, but nobody knew it.",
         "There was only one thing {a} was afraid of, and that was the dark."),
        ("That evening the light went out, and it was dark. But {a} only laughed. "
         "The dark, {a.he} found, was quite soft.",
         "That night {a} blew out the candle all by {a.him}self, and the dark turned out to be friendly."),
    ),
    (
        ("{a.His} grandmother was coming to visit, and the whole house had to shine.",
         "Everyone was waiting for {a.his} grandmother, who was coming all the way over the mountains."),
        ("At sunset there was a knock at the door. It was Grandmother, and she had brought her famous soup.",
         "When the sun went down, a cart stopped at the gate, and Grandmother climbed out with her "
         "arms wide open."),
    ),
    (
        ("The day before, {a} and {b} had quarrelled, and now neither knew how to say sorry.",
         "{a} and {b} had not spoken since their silly quarrel about a frog."),
        ("In the evening {a} and {b} said sorry at exactly the same moment, and then they laughed "
         "until it hurt.",
         "In the evening {b} held out a hand, and {a} took it. "
         "Neither could remember what the quarrel had been about."),
    ),
    (
        ("{a} was learning to swim, but so far {a.he} could only sink.",
         "All summer {a} had tried to learn to swim, and all summer {a.he} had swallowed pond water."),
        ("That evening {a} let go of the bank, kicked three times, and swam. "
         "The frogs were the first to cheer.",
         "That evening {a} swam right across the pond, and {b} had to run around it to keep up."),
    ),
    (
        ("It had not rained for weeks, and the garden was thirsty.",
         "Everyone was waiting for rain, and the beans were waiting most of all."),
        ("That night it began to rain at last, and {a} danced in the garden in {a.his} nightshirt.",
         "In the night the first drops fell. "
         "{a} listened to them from {a.his} bed and thought it the best song in the world."),
    ),
    (
        ("{a} and {b} were building a house in the big chestnut tree, and it still had no roof.",
         "High up in the chestnut tree, {a} and {b} were building a house of their own."),
        ("When the last nail was in, {a} and {b} sat in their house in the tree and watched the sun go down.",
         "At sunset the house in the tree was finished. "
         "It leaned a little, and {a} and {b} loved it all the more."),
    ),
    (
        ("There was a play at school that week, and {a} was to be the moon.",
         "{a} had to sing in front of the whole school, and {a.his} knees knew it."),
        ("In the evening {a} stood on the stage, looked at {b} in the front row, and forgot to be afraid.",
         "And when the curtain rose that evening, {a} was so good that even the teacher cried a little."),
    ),
    (
        ("{a} wanted to find out where the river ended.",
         "One question would not leave {a} alone: where does the river go?"),
        ("In the evening {a} stood where the river met the sea. "
         "So that, {a.he} thought, is where it goes: everywhere.",
         "At sunset {a} reached the sea, took off {a.his} shoes, and told the river that it had done well."),
    ),
)  # fmt: skip

# The very last sentence.
LAST_WORDS: tuple[str, ...] = (
    "It had been a good day.",
    "And that is how it was.",
    "Nobody in the whole world slept better that night.",
    "If you pass by, you may still hear them laugh.",
    "The moon saw everything and said nothing.",
    "And they were friends for ever.",
)
