"""
More kinds of prompts for SmolLM2: everyday questions, topics, lists, short texts, rewriting, summaries, languages.

Most come from the lists of words below. The summaries are of docstrings in Python's standard library
(`benchmarks/stdlib_prompts.py`), so they differ a little between versions of Python.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator
from functools import cache

from ..stdlib_prompts import functions


Source = Callable[[random.Random], Iterator[tuple[str, str]]]


def words(text: str) -> list[str]:
    """The items of a list that is separated by semicolons."""
    return [item.strip() for item in text.replace("\n", " ").split(";")]


# Subjects of questions, and their wordings. The subject decides on which side of the split a prompt lies.
QUESTIONS: dict[str, tuple[list[str], tuple[str, ...]]] = {
    "countries": (
        words("""
        Spain; Italy; Germany; Portugal; Poland; Greece; Turkey; Egypt; Kenya; Nigeria; Morocco; South Africa; India;
        China; Japan; South Korea; Thailand; Vietnam; Indonesia; Australia; New Zealand; Canada; Mexico; Brazil;
        Chile; Peru; Argentina; Colombia; Cuba; Norway; Sweden; Finland; Denmark; Iceland; Ireland; Austria; Hungary;
        Romania; Ukraine; Iran; Israel; Nepal; Mongolia; Ethiopia; Ghana
        """),
        (
            "What is the capital of {}, and what is it known for?",
            "What should I see on a first visit to {}?",
            "Name three dishes that people eat in {}.",
            "Which languages are spoken in {}?",
            "Describe the climate of {} in two sentences.",
            "Plan a weekend in {} for two people.",
        ),
    ),
    "household": (
        words("""
        clean a frying pan; remove a coffee stain; sharpen a knife; fold a shirt; repair a flat bicycle tire; make an
        omelet; bake bread; cook pasta; grow tomatoes; paint a wall; hang a picture; unclog a sink; water houseplants;
        wash a wool sweater; peel garlic; brew tea; choose a ripe melon; store potatoes; light a campfire; tie a tie;
        iron a shirt; pack a suitcase; train a puppy; clean a window; save electricity; fix a squeaky door; make soup;
        plan a birthday party; write a shopping list; wrap a present; set up a tent; organize a bookshelf; back up a
        computer; choose a strong password; take a good photo; stay focused; remember names; wake up early; drink more
        water; start a conversation; prepare for a long flight
        """),
        (
            "How do I {}?",
            "What is the easiest way to {}?",
            "Give me step-by-step instructions to {}.",
            "I have never done this before: how can I {}?",
            "What mistakes should I avoid when I {}?",
        ),
    ),
    "differences": (
        words("""
        a frog and a toad; a crocodile and an alligator; weather and climate; a virus and a bacterium; an atom and a
        molecule; speed and velocity; a comet and an asteroid; jam and marmalade; latte and cappuccino; a lake and a
        pond; a novel and a short story; a violin and a viola; a debit card and a credit card; a set and a dict in
        Python; a process and a thread; RAM and disk space; a compiler and an interpreter; TCP and UDP; HTTP and
        HTTPS; a stack and a queue; a class and an object; an igneous and a sedimentary rock; a simile and a metaphor;
        butter and margarine; a hurricane and a tornado; a loan and a mortgage; mass and weight; heat and temperature;
        a butterfly and a moth; an island and a continent
        """),
        (
            "What is the difference between {}?",
            "Explain the difference between {} to a child.",
            "Compare {} in a short paragraph.",
            "How can I tell {} apart?",
        ),
    ),
    "lists": (
        words("""
        fruits that grow on trees; birds that cannot fly; musical instruments; European rivers; programming languages;
        kinds of pasta; board games; chemical elements; famous painters; sports played with a ball; spices; planets;
        breeds of dogs; kitchen tools; vegetables that are green; famous scientists; kinds of clouds; ways to travel;
        things to do on a rainy day; jobs in a hospital; parts of a bicycle; parts of a computer; shapes in geometry;
        kinds of dance; famous bridges; trees of the forest; insects; flowers; breakfast foods; school subjects;
        hobbies that cost little; names for a cat; ideas for a science project; questions for an interview
        """),
        (
            "List ten {}.",
            "Name five {} and say one thing about each.",
            "Give me a numbered list of {}.",
            "Write a bulleted list of six {} with a short description of each.",
        ),
    ),
    "writing": (
        words("""
        a lost umbrella; the first snow; a lighthouse keeper; a robot who learns to paint; a talking tree; the old
        clock; a rainy Sunday; a dragon who is afraid of fire; two friends on a train; a letter in a bottle; an empty
        house; the last cookie; a mouse in a library; the sea at night; a busy market; a broken guitar; holidays; a
        new job; a delayed delivery; a meeting that must be moved; a birthday invitation; an apology to a customer; a
        broken heater; a refund; moving to a new city; a recommendation for a colleague; a missed deadline; the school
        play; a neighbor's noisy dog; a garden party; a reading club; the opening of a bakery
        """),
        (
            "Write a short story about {}.",
            "Write a poem of eight lines about {}.",
            "Write a polite email about {}.",
            "Write a short dialogue about {}.",
            "Write a paragraph that describes {}.",
            "Write three possible titles for a text about {}, and explain the best one.",
        ),
    ),
    "languages": (
        words("""
        adds two numbers; finds the maximum of an array; reverses an array; checks if a string is a palindrome; counts
        the vowels in a string; prints the numbers from 1 to 10; computes a factorial; sorts an array of numbers;
        removes spaces from a string; checks if a number is prime; converts Celsius to Fahrenheit; joins strings with
        commas; finds the length of the longest word; sums the elements of an array; multiplies two matrices; computes
        the Fibonacci numbers; searches a sorted array; swaps two variables; counts how often each letter occurs;
        checks if a year is a leap year; validates an email address; reads a file line by line; parses a date;
        generates a random number; capitalizes each word
        """),
        (
            "Write a JavaScript function that {}.",
            "Write a C function that {}.",
            "Write a Java method that {}.",
            "Write a Go function that {}, with a comment.",
            "Write a shell script that {}.",
            "Explain how a program {}, then show it in JavaScript.",
        ),
    ),
    "topics": (
        words("""
        the Roman Empire; the Great Wall of China; the French Revolution; the Industrial Revolution; the Silk Road; the
        printing press; the moon landing; the Olympic Games; the Renaissance; the Vikings; ancient Egypt; the
        Mongol Empire; the Black Death; the steam engine; the telephone; the light bulb; penicillin; the compass;
        antibiotics; the immune system; the digestive system; the brain; the lungs; the liver; blood; bones; muscles;
        skin; teeth; memory; dreams; stress; anxiety; allergies; diabetes; the common cold; vitamins; protein; fiber;
        caffeine; dehydration; fever; genes; cells; enzymes; hormones; neurons; stem cells; fossils; dinosaurs; sharks;
        dolphins; octopuses; bats; owls; eagles; wolves; bears; camels; giraffes; snakes; turtles; frogs; salmon;
        butterflies; earthworms; bacteria; algae; cactus plants; roses; bamboo; wheat; corn; potatoes; bananas; olives;
        wine; beer; vinegar; yeast; pepper; cinnamon; vanilla; sushi; pizza; curry; tacos; noodles; soap; plastic;
        steel; aluminum; gold; diamonds; petroleum; coal; natural gas; nuclear power; wind turbines; hydroelectric
        dams; batteries; lasers; microscopes; telescopes; X-rays; radar; sonar; satellites; rockets; the Mars rovers;
        space stations; stars; galaxies; planets beyond the solar system; meteors; eclipses; seasons; time zones; the
        equator; the ozone layer; acid rain; deforestation; plate tectonics; tsunamis; hurricanes; droughts; floods;
        soil; groundwater; oceans; ocean currents; salt lakes; islands; mountains; caves; sand dunes; sound waves;
        friction; momentum; energy; pressure; density; atoms; molecules; acids and bases; oxidation; crystals;
        fractions; percentages; probability; statistics; geometry; algebra; calculus; the Pythagorean theorem; the
        number pi; Roman numerals; binary numbers; algorithms; recursion; sorting; linked lists; hash tables; variables
        in Python; loops in Python; dictionaries in Python; version control; unit tests; web browsers; cookies on
        websites; HTTP; email; spam; viruses of computers; firewalls; cloud computing; virtual machines; neural
        networks; speech recognition; image compression; video games; cryptocurrency; credit scores; budgets;
        retirement plans; mortgages; interest rates; unemployment; trade; globalization; monopolies; advertising;
        startups; constitutions; elections; human rights; the United Nations; the European Union; courts; juries;
        copyright; patents; contracts; privacy; journalism; propaganda; satire; fables; myths; fairy tales; haiku;
        sonnets; metaphors; grammar; spelling; the alphabet; sign language; Latin; translation; jazz; opera; the piano;
        drums; ballet; sculpture; cartoons; film editing; basketball; tennis; skiing; surfing; cycling; marathons; golf
        """),
        (
            "What is the story of {}?",
            "Tell me about {}.",
            "What should everyone know about {}?",
            "Describe {} in simple words.",
            "How would you explain {} to a friend?",
            "Answer in one paragraph: what do people get wrong about {}?",
            "Write a short introduction to {}.",
            "Give me a list of key points about {}.",
        ),
    ),
    "tables": (
        words("""
        customers; orders; products; employees; students; books; flights; songs; movies; invoices; cities; patients;
        courses; players; recipes; tickets; sensors; messages; suppliers; rooms
        """),
        (
            "Write a SQL query that selects the ten newest rows of a table named {}.",
            "Write a SQL statement that creates a table named {} with five suitable columns.",
            "Write a JSON document with three made-up {}.",
            "Write an HTML table that shows three {}.",
            "Write a Python class for {} with an initializer and a method that prints them.",
            "Write a CSV file with a header and four made-up {}.",
            "Write a SQL query that counts {} by month.",
        ),
    ),
}

PEOPLE = words("The manager; My sister; Our teacher; The doctor; A farmer; The children; His uncle; The new student")
DEEDS = words("""
    forgot the keys; wrote a long letter; is fixing the roof; will open a shop; broke the old vase; has lost the map;
    planted an apple tree; called the police; was late for dinner; found a small cat; painted the kitchen; sold the
    car; missed the bus; baked a cake; cannot come tomorrow; wants to learn French; never eats fish; bought too much
    milk
    """)
SETTINGS = words("""
    in the morning; because it was raining; before the guests arrived; at the station; after a long day; without any
    help; in a small village; on the way home; when the music stopped; for the third time
    """)
REWRITES = (
    'Rewrite this sentence in a formal style: "{}"',
    'Rewrite this sentence so that it is shorter: "{}"',
    'Turn this sentence into a question: "{}"',
    'Translate this sentence into Spanish: "{}"',
    'Translate this sentence into French: "{}"',
    'Continue this story with three sentences: "{}"',
    'Write this sentence in the future tense: "{}"',
    'Which words of this sentence are nouns, and which are verbs? "{}"',
)
SUMMARIES = (
    "Summarize this documentation in one sentence:\n\n{}",
    "Explain this documentation to a beginner:\n\n{}",
    "Rewrite this documentation as a list of short points:\n\n{}",
    "Answer briefly: what is this documentation about?\n\n{}",
)


def questions(kind: str) -> Source:
    """Draws questions of a kind without end."""
    subjects, forms = QUESTIONS[kind]

    def source(draw: random.Random) -> Iterator[tuple[str, str]]:
        while True:
            subject = draw.choice(subjects)
            yield subject, draw.choice(forms).format(subject)

    return source


def rewriting(draw: random.Random) -> Iterator[tuple[str, str]]:
    """`(subject, prompt)` without end: a sentence to rewrite; the subject is the sentence."""
    sentences = [f"{who} {deed} {where}." for who, deed, where in itertools.product(PEOPLE, DEEDS, SETTINGS)]
    while True:
        sentence = draw.choice(sentences)
        yield sentence, draw.choice(REWRITES).format(sentence)


@cache
def documentation() -> list[str]:
    """Docstrings of the standard library of 150 to 600 characters."""
    return sorted(document for *_, document in functions() if len(document) >= 150)


def summaries(draw: random.Random) -> Iterator[tuple[str, str]]:
    """`(subject, prompt)` without end: a docstring to summarize; the subject is the docstring."""
    while True:
        document = draw.choice(documentation())
        yield document, draw.choice(SUMMARIES).format(document)


KINDS: dict[str, Source] = {kind: questions(kind) for kind in QUESTIONS} | {
    "rewriting": rewriting,
    "summaries": summaries,
}
