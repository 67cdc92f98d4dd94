"""The words the stories are made of. Every list is a tuple, so that a seed always gives the same story.

Three rules keep the stories learnable and their facts exact: no word needs the article "an"; no noun is two of
thing, container, countable and animal; and where things are kept (`CONTAINERS`, `SPOTS`) is never where things
are found (`FINDING_PLACES`).
"""

GIRLS = ("Mia", "Lily", "Anna", "Ella", "Ruby", "Clara", "Nora", "Zoe", "Ivy", "Rosa", "Lucy", "Greta")
BOYS = ("Tom", "Ben", "Sam", "Leo", "Max", "Finn", "Jack", "Oscar", "Theo", "Hugo", "Noah", "Felix")
TRAITS = ("kind", "curious", "brave", "quiet", "cheerful", "clever", "gentle", "shy", "patient", "merry")

COLOURS = ("red", "blue", "green", "yellow", "white", "black", "brown", "pink", "purple", "golden", "silver", "grey")
# A noun has one colour in all stories, so that the colour identifies it.
CONTAINERS = (
    "in the blue box", "in the green basket", "in the yellow drawer", "in the red chest", "in the white jar",
    "in the black bag", "in the silver bucket", "in the purple trunk", "in the pink cupboard", "in the brown barrel",
    "in the golden pot", "in the grey sack",
)  # fmt: skip
SPOTS = (
    "on the shelf", "under the bed", "behind the stove", "on the windowsill", "under the stairs", "in the shed",
    "behind the door", "on the piano", "under the rug", "in the attic", "by the fireplace", "on the table",
)  # fmt: skip
FINDING_PLACES = (
    "under the old bridge", "in the long grass", "beside the river", "behind the mill", "near the well",
    "at the edge of the pond", "between two rocks", "under the oak tree", "on a fallen log", "beside the road",
)  # fmt: skip

# What a thing is like, in two ways; mentioned once, when it enters the story.
THINGS: dict[str, tuple[str, str]] = {
    "key": ("It was small and heavy, and it fitted no lock in the house.", "It was as cold as a little fish."),
    "kite": ("Its tail was longer than a garden path.", "It pulled at the string as if it were alive."),
    "lamp": ("It still smelled of oil and long journeys.", "Even without a flame, it seemed to glow."),
    "drum": ("One tap, and every bird in the tree looked up.", "It sounded like faraway thunder."),
    "ball": ("It bounced higher than the fence.", "It was just the right size for two hands."),
    "boat": ("It had a paper sail and a crew of two ants.", "It could float in a teacup."),
    "bell": ("Its voice was as clear as water.", "When it rang, all the dogs sat down."),
    "book": ("The last page was missing.", "There were pressed flowers between the pages."),
    "hat": ("It was much too big, and that was the best thing about it.", "A mouse had once lived in it."),
    "scarf": ("It was soft enough for a king.", "It was so long that two could wear it."),
    "cup": ("It had a crack in the shape of a smile.", "There was a tiny ship painted inside."),
    "spoon": (
        "It was bent, as if someone had tried to dig to the moon.",
        "You could see your face in it, upside down.",
    ),
    "ring": ("It was too large for any finger.", "There was a star carved on the inside."),
    "mirror": ("It made everyone look a little happier.", "It was no bigger than a plum stone."),
    "whistle": ("It could be heard across three fields.", "It only knew one note, but it was a good one."),
    "parasol": ("It opened with a sound like wings.", "It had a wooden duck for a handle."),
    "map": ("Half of the names on it had been washed away.", "A dotted line went straight through the pond."),
    "clock": ("It was always seven minutes late.", "It ticked like somebody walking in new shoes."),
    "doll": ("Somebody had sewn her a tiny coat.", "She had the face of someone with a secret."),
    "lantern": ("It threw little stars on the wall.", "It had been made for dark and stormy nights."),
    "flute": ("It sounded like the wind when the wind is in a good mood.", "It was carved from a single branch."),
    "blanket": ("It was big enough to make a tent.", "It was as warm as a loaf of bread."),
    "feather": ("It must have come from a very large bird.", "It was lighter than a word."),
    "crown": ("It was only made of tin, but it shone.", "It was fit for a very small queen."),
}

PETS: dict[str, tuple[str, str]] = {
    "dog": ("who barked at clouds", "who was afraid of butterflies"),
    "cat": ("who slept all day and sang all night", "who never came when called"),
    "rabbit": ("who had one ear up and one ear down", "who knew every hole in the fence"),
    "goat": ("who ate socks", "who thought that the roof was a mountain"),
    "duck": ("who followed everyone everywhere", "who did not like to get wet"),
    "pony": ("who was as round as a barrel", "who could open any gate"),
    "hedgehog": ("who snored like a tiny saw", "who only came out for pears"),
    "crow": ("who collected shiny things", "who could say good morning"),
}
PET_NAMES = ("Pip", "Biscuit", "Pepper", "Button", "Socks", "Clover", "Bramble", "Mittens", "Poppy", "Walnut")

SETTINGS = (
    "a small village by the sea", "a little house at the edge of the forest", "a town with crooked chimneys",
    "a valley full of sheep", "a cottage with a round door", "a hut on top of a hill", "a house beside a windmill",
    "a street where everyone knew everyone", "a village between two mountains", "a tall house with a green roof",
)  # fmt: skip
HOBBIES = (
    "loved to climb trees", "could whistle like a blackbird", "asked ten questions before breakfast",
    "talked to snails", "wanted to be a sailor one day", "never wore two socks that matched",
    "knew the names of all the stars", "collected sounds the way others collect stamps",
    "drew pictures on every stone", "told jokes to the chickens", "could run faster than the postman",
    "liked rain better than sunshine",
)  # fmt: skip

# Weather: how the day begins.
WEATHERS = (
    "the sun was already warm on the doorstep", "the rain was drumming on the roof",
    "the wind was rattling the shutters",
    "fog lay over the fields like milk", "the first frost sparkled on the grass", "the air smelled of apples and smoke",
    "not one cloud was in the sky", "thunder was grumbling behind the hills",
)  # fmt: skip
DAYTIMES = (
    "Later that morning", "At noon", "After lunch", "In the afternoon", "Before supper", "The next morning",
)  # fmt: skip
CONNECTIVES = ("A little later", "Soon after that", "Before long", "Then")

# Countables, by how a person gets them.
FRUITS = ("apples", "plums", "pears", "cherries")
GROUND = ("shells", "pebbles", "acorns", "chestnuts")
BAKED = ("cookies", "buns", "pancakes", "cakes")
KEPT = ("marbles", "buttons", "coins", "stamps")
NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve")
