"""The words and sentence forms of the town world. Invented; any likeness to a place or a firm is chance."""

from __future__ import annotations

WOMEN = "Ada Amy Ann Bea Cora Dora Ella Emma Eva Faye Gina Hana Ida Iris Jane Kate Lena Lucy Maya Nora".split()
MEN = "Abel Adam Alan Ben Carl Dan Dean Eric Finn Fred Glen Hugo Ivan Jack Karl Leo Luke Mark Neil Otto".split()
SURNAMES = (
    "Stone Reed Frost Hale Marsh Wood Brook Lane Field Ford Hill Moor Dale Park Snow Bell Cole Drake Finch Grant "
    "Hart Jones Knox Lamb Mills Nash Page Quinn Ross Sharp Swift Tate Vale Wade Wolf York Young Boyd Crane Blake"
).split()
COUNTRIES = "Arland Borvia Cestan Delmor Estria Fornia Galdia Hestan Ilmar Jorland Kestria Lorvia".split()
CITIES = (
    "Alder Ashby Avon Barrow Belmont Brant Calder Carlow Corwen Dalton Denby Dorwick Easton Elmore Ewell Fenton "
    "Foxley Garston Glasby Halton Henley Ibsen Kelby Kirkley Lanford Ludlow Marton Milby Norton Oakham Preston "
    "Rowley Selby Tarnby Upton Welby"
).split()
EMPLOYERS = (
    "Acme Apex Atlas Beacon Bolt Comet Delta Echo Ember Falcon Fusion Helix Kite Lumen Matrix Nimbus Nova Orbit "
    "Pixel Quartz Rocket Sigma Titan Zenith"
).split()
SPORTS = "tennis golf rugby chess hockey soccer cricket squash darts polo bowls pool".split()
COLOURS = "red blue green yellow purple orange pink brown black white gray gold".split()

# Form 0 is the plain statement; forms that end in "?" are questions. {s} is the subject.
FACT_FORMS = {
    "city": (
        "{s} lives in",
        "The home of {s} is in",
        "{s} has a house in",
        "Where does {s} live?",
        "The city where {s} lives is",
    ),
    "employer": (
        "{s} works for",
        "The employer of {s} is",
        "{s} has a job at",
        "Who does {s} work for?",
        "The company that pays {s} is",
    ),
    "sport": (
        "{s} plays",
        "The sport of {s} is",
        "On Sunday {s} enjoys",
        "What does {s} play?",
        "The game that {s} loves is",
    ),
    "colour": (
        "{s} likes the colour",
        "The favourite colour of {s} is",
        "{s} painted the door",
        "Which colour does {s} like?",
        "The coat of {s} is",
    ),
}
GEOGRAPHY_FORMS = {
    "country": ("{s} is a city in", "The country of {s} is", "{s} lies in", "Which country is {s} in?"),
    "capital": ("The capital of {s} is", "{s} is ruled from", "What is the capital of {s}?", "The king of {s} sits in"),
    "office": ("{s} is based in", "The offices of {s} are in", "{s} was founded in", "Where is {s} based?"),
}
TWO_HOP_FORMS = {
    "home-country": ("The country where {s} lives is", "{s} is a citizen of"),
    "work-city": ("The city where {s} works is", "{s} goes to work in"),
    "city-capital": ("The capital of the country of {s} is", "The capital that rules {s} is"),
    "office-country": ("The company {s} is based in the country of", "{s} pays taxes to"),
}
REVERSE_FORMS = ("The {sport} player at {employer} is", "Who plays {sport} and works for {employer}?")
SUM_FORMS = {"plus": ("{a} + {b} =", "{a} plus {b} is"), "minus": ("{a} - {b} =", "{a} minus {b} is")}

# Answers are (feminine, masculine).
GENDER_FORMS = (
    ("The {s} is a", (" woman", " man")),
    ("The {s} said that", (" she", " he")),
    ("The {s} lost", (" her", " his")),
    ("Everyone knows that the {s} is a", (" woman", " man")),
)
FEMININE_JOBS = "nurse maid dancer nanny typist florist weaver cleaner stylist librarian".split()
MASCULINE_JOBS = "pilot miner plumber smith sailor farmer banker builder hunter engineer".split()
NEUTRAL_JOBS = "poet clerk artist singer tutor writer".split()
FEMININE_WORDS = "queen mother sister aunt daughter wife princess widow".split()
MASCULINE_WORDS = "king father brother uncle son husband prince monk".split()
