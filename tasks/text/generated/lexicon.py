"""The words of the built-in English-German corpus: every form that its grammar needs.

Rows are read left to right, `-` is an empty field. English nouns and verbs list their irregular forms; German
nouns list plural and gender, verbs list infinitive, ich, du, er/sie/es and past participle.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, get_args

Case = Literal["nom", "acc", "dat"]
Gender = Literal["m", "f", "n", "pl"]  # German articles have one paradigm for all plurals
Agreement = Literal["1sg", "2sg", "3sg", "pl"]  # "we" and "they" share one German verb form

PEOPLE = ("adult", "job", "kin", "child")  # the kinds of nouns that name somebody
CASES: tuple[Case, ...] = get_args(Case)


@dataclass(frozen=True)
class Noun:
    """A countable noun; `kind` says which verbs and adjectives suit it, `owned` whether "my ..." does."""

    english: str
    english_plural: str
    german: str
    german_plural: str
    gender: Gender
    kind: str
    owned: bool

    def german_form(self, case: Case, *, plural: bool) -> str:
        """The inflected noun; only the dative plural has an ending of its own."""
        if not plural:
            return self.german
        takes_n = case == "dat" and self.german_plural[-1] not in "ns"
        return self.german_plural + "n" * takes_n


@dataclass(frozen=True)
class Adjective:
    """An adjective before a noun of the given kinds."""

    english: str
    german: str
    kinds: tuple[str, ...]


@dataclass(frozen=True)
class Determiner:
    """What opens a noun phrase; `german` is the stem that the endings of its declension follow."""

    english: str
    english_plural: str
    german: str
    declension: Literal["definite", "ein", "strong"]


@dataclass(frozen=True)
class Verb:
    """A verb of both languages with the objects and adjuncts that it takes.

    `particle` follows the English verb (pick *up*, look *for*); `prefix` is the German separable one (*an*rufen).
    German forms are without the prefix, save the participle (angerufen).
    """

    base: str
    third: str
    past: str
    participle: str
    particle: str
    prefix: str
    german: dict[Agreement, str]
    german_participle: str
    auxiliary: str  # of the perfect: haben or sein
    frame: str  # the complements: none, acc, dat, dat+acc, auf (+ acc), goal, clause or predicate
    kinds: tuple[str, ...]
    adjuncts: tuple[str, ...]


@dataclass(frozen=True)
class Pair:
    """A phrase in both languages."""

    english: str
    german: str


def _rows(table: str) -> Iterator[list[list[str]]]:
    """Rows of `|`-separated groups of words, `-` read as empty."""
    for line in table.strip().splitlines():
        yield [["" if word == "-" else word for word in group.split()] for group in line.split("|")]


def _noun(words: list[str], gender: Gender) -> Noun:
    english, english_plural, german, german_plural, kind, owned = words
    return Noun(english, english_plural, german, german_plural, gender, kind, owned == "my")


_MASCULINE = """
man        men         Mann       Männer      adult    -
teacher    teachers    Lehrer     Lehrer      job      my
doctor     doctors     Arzt       Ärzte       job      my
friend     friends     Freund     Freunde     job      my
brother    brothers    Bruder     Brüder      kin      my
dog        dogs        Hund       Hunde       pet   my
letter     letters     Brief      Briefe      text     my
apple      apples      Apfel      Äpfel       food     -
key        keys        Schlüssel  Schlüssel   object   my
suitcase   suitcases   Koffer     Koffer      opening  my
garden     gardens     Garten     Gärten      room     my
station    stations    Bahnhof    Bahnhöfe    sight    -
"""
_FEMININE = """
woman      women       Frau       Frauen      adult    -
sister     sisters     Schwester  Schwestern  kin      my
aunt       aunts       Tante      Tanten      kin      my
cat        cats        Katze      Katzen      pet   my
newspaper  newspapers  Zeitung    Zeitungen   text     my
tomato     tomatoes    Tomate     Tomaten     food     -
bag        bags        Tasche     Taschen     object   my
lamp       lamps       Lampe      Lampen      object   my
door       doors       Tür        Türen       opening  my
kitchen    kitchens    Küche      Küchen      room     my
school     schools     Schule     Schulen     sight    my
"""
_NEUTER = """
child      children    Kind       Kinder      child    my
girl       girls       Mädchen    Mädchen     child    -
book       books       Buch       Bücher      text     my
egg        eggs        Ei         Eier        food     -
car        cars        Auto       Autos       object   my
bicycle    bicycles    Fahrrad    Fahrräder   object   my
window     windows     Fenster    Fenster     opening  my
office     offices     Büro       Büros       room     my
house      houses      Haus       Häuser      sight    my
"""
NOUNS = (
    *(_noun(words, "m") for (words,) in _rows(_MASCULINE)),
    *(_noun(words, "f") for (words,) in _rows(_FEMININE)),
    *(_noun(words, "n") for (words,) in _rows(_NEUTER)),
)

_ADJECTIVES = """
good   gut    | job child text food
new    neu    | job text object opening room sight
old    alt    | adult job kin pet text object opening room sight
young  jung   | adult job kin pet
small  klein  | child pet food object opening room sight
big    groß   | pet food object opening room sight
nice   nett   | adult job kin child
"""
ADJECTIVES = tuple(Adjective(words[0], words[1], tuple(kinds)) for words, kinds in _rows(_ADJECTIVES))

THE = Determiner("the", "the", "d", "definite")
A = Determiner("a", "", "ein", "ein")
NO = Determiner("a", "", "kein", "ein")  # an indefinite object under negation: "does not buy a" -> "kauft kein"
POSSESSIVES = tuple(
    Determiner(english, english, german, "ein")
    for english, german in (
        ("my", "mein"),
        ("your", "dein"),
        ("his", "sein"),
        ("her", "ihr"),
        ("our", "unser"),
        ("their", "ihr"),
    )
)
NUMBERS = tuple(
    Determiner(english, english, german, "strong") for english, german in (("two", "zwei"), ("three", "drei"))
)

NAMES: dict[str, Literal["he", "she"]] = {
    "Anna": "she",
    "Maria": "she",
    "Laura": "she",
    "Peter": "he",
    "Paul": "he",
    "Thomas": "he",
}

# subject, object, German nominative, accusative, dative; "you" is always the informal singular
PRONOUNS: dict[str, tuple[str, str, str, str, str, Agreement]] = {
    "I": ("I", "me", "ich", "mich", "mir", "1sg"),
    "you": ("you", "you", "du", "dich", "dir", "2sg"),
    "he": ("he", "him", "er", "ihn", "ihm", "3sg"),
    "she": ("she", "her", "sie", "sie", "ihr", "3sg"),
    "we": ("we", "us", "wir", "uns", "uns", "pl"),
    "they": ("they", "them", "sie", "sie", "ihnen", "pl"),
    "who": ("who", "who", "wer", "wen", "wem", "3sg"),
}
IT_GERMAN: dict[Gender, str] = {"m": "er", "f": "sie", "n": "es", "pl": "sie"}


def _verb(groups: list[list[str]]) -> Verb:
    (base, third, past, participle, particle), german, (frame,), kinds, adjuncts = groups
    prefix, infinitive, first, second, he, german_participle, auxiliary = german
    forms: dict[Agreement, str] = {"1sg": first, "2sg": second, "3sg": he, "pl": infinitive}
    return Verb(
        *(base, third, past, participle, particle),
        *(prefix, forms, german_participle, auxiliary),
        *(frame, tuple(kinds), tuple(adjuncts)),
    )


# English forms and particle | prefix, German forms, auxiliary | frame | kinds of object | adjuncts
_VERBS = """
see sees saw seen - | - sehen sehe siehst sieht gesehen haben | acc | person pet text object opening | place
look looks looked looked for | - suchen suche suchst sucht gesucht haben | acc | person pet text object opening | place
buy buys bought bought - | - kaufen kaufe kaufst kauft gekauft haben | acc | pet text food object | for
read reads read read - | - lesen lese liest liest gelesen haben | acc | text | place
eat eats ate eaten - | - essen esse isst isst gegessen haben | acc | food | place with
visit visits visited visited - | - besuchen besuche besuchst besucht besucht haben | acc | person | with
call calls called called - | an rufen rufe rufst ruft angerufen haben | acc | person |
pick picks picked picked up | ab holen hole holst holt abgeholt haben | acc | person | with
invite invites invited invited - | ein laden lade lädst lädt eingeladen haben | acc | person |
open opens opened opened - | auf machen mache machst macht aufgemacht haben | acc | opening | for
bring brings brought brought back | zurück bringen bringe bringst bringt zurückgebracht haben | acc | text object |
help helps helped helped - | - helfen helfe hilfst hilft geholfen haben | dat | person | place
thank thanks thanked thanked - | - danken danke dankst dankt gedankt haben | dat | person |
give gives gave given - | - geben gebe gibst gibt gegeben haben | dat+acc | text food object |
show shows showed shown - | - zeigen zeige zeigst zeigt gezeigt haben | dat+acc | pet text object |
wait waits waited waited for | - warten warte wartest wartet gewartet haben | auf | person |
work works worked worked - | - arbeiten arbeite arbeitest arbeitet gearbeitet haben | none | | place with for
sleep sleeps slept slept - | - schlafen schlafe schläfst schläft geschlafen haben | none | | place
play plays played played - | - spielen spiele spielst spielt gespielt haben | none | | place with
fall falls fell fallen asleep | ein schlafen schlafe schläfst schläft eingeschlafen sein | none | | place
get gets got got up | auf stehen stehe stehst steht aufgestanden sein | none | |
come comes came come back | zurück kommen komme kommst kommt zurückgekommen sein | none | | with
go goes went gone - | - gehen gehe gehst geht gegangen sein | goal | | with
"""
_CLAUSE_VERBS = """
say says said said - | - sagen sage sagst sagt gesagt haben | clause | |
know knows knew known - | - wissen weiß weißt weiß gewusst haben | clause | |
hope hopes hoped hoped - | - hoffen hoffe hoffst hofft gehofft haben | clause | |
"""
VERBS = tuple(_verb(groups) for groups in _rows(_VERBS))
SAY, KNOW, HOPE = (_verb(groups) for groups in _rows(_CLAUSE_VERBS))
(BE,) = (_verb(groups) for groups in _rows("be is was been - | - sind bin bist ist gewesen sein | predicate | | place"))

# finite forms that the tenses share: English (present: base and third person), German
ENGLISH_BE: dict[str, dict[Agreement, str]] = {
    "present": {"1sg": "am", "2sg": "are", "3sg": "is", "pl": "are"},
    "past": {"1sg": "was", "2sg": "were", "3sg": "was", "pl": "were"},
}
GERMAN_AUXILIARIES: dict[str, dict[Agreement, str]] = {
    "haben": {"1sg": "habe", "2sg": "hast", "3sg": "hat", "pl": "haben"},
    "sein": {"1sg": "bin", "2sg": "bist", "3sg": "ist", "pl": "sind"},
    "war": {"1sg": "war", "2sg": "warst", "3sg": "war", "pl": "waren"},
}
MODALS: dict[str, dict[Agreement, str]] = {
    "can": {"1sg": "kann", "2sg": "kannst", "3sg": "kann", "pl": "können"},
    "must": {"1sg": "muss", "2sg": "musst", "3sg": "muss", "pl": "müssen"},
    "should": {"1sg": "sollte", "2sg": "solltest", "3sg": "sollte", "pl": "sollten"},
    "want": {"1sg": "will", "2sg": "willst", "3sg": "will", "pl": "wollen"},
    "will": {"1sg": "werde", "2sg": "wirst", "3sg": "wird", "pl": "werden"},
}

PERSON_PREDICATES = (
    Pair("tired", "müde"),
    Pair("ill", "krank"),
    Pair("hungry", "hungrig"),
    Pair("happy", "glücklich"),
)
JUDGEMENTS = (Pair("expensive", "teuer"), Pair("beautiful", "schön"))  # these contradict no adjective
THING_PREDICATES = (
    Pair("new", "neu"),
    Pair("old", "alt"),
    Pair("small", "klein"),
    Pair("big", "groß"),
    *JUDGEMENTS,
)

WHERE, WHEN, WHY, THAT = Pair("where", "wo"), Pair("when", "wann"), Pair("why", "warum"), Pair("that", "dass")
WHO, TO_WHOM, WHAT = Pair("who", "wen"), Pair("who", "wem"), Pair("what", "was")  # the object asked for
AND, BUT = Pair(", and", " und"), Pair(", but", ", aber")
COMMA, GERMAN_COMMA = Pair(",", ","), Pair("", ",")  # German sets off every subordinate clause
IF = Pair("if", "wenn")
CONJUNCTIONS = (Pair("because", "weil"), Pair("because", "weil"), Pair("although", "obwohl"), IF, Pair("when", "wenn"))

TODAY, TOMORROW, YESTERDAY = Pair("today", "heute"), Pair("tomorrow", "morgen"), Pair("yesterday", "gestern")
NOW, EVERY_DAY = Pair("now", "jetzt"), Pair("every day", "jeden Tag")
ON_MONDAY, EVENING = Pair("on Monday", "am Montag"), Pair("in the evening", "am Abend")
LAST_WEEK, NEXT_WEEK = Pair("last week", "letzte Woche"), Pair("next week", "nächste Woche")
TIMES: dict[str, tuple[Pair, ...]] = {
    "present": (TODAY, NOW, EVERY_DAY, ON_MONDAY, EVENING),
    "past": (YESTERDAY, LAST_WEEK, ON_MONDAY),
    "perfect": (TODAY,),
    "modal": (TODAY, TOMORROW, NEXT_WEEK, ON_MONDAY, EVENING),
}
SOMETIMES, NEVER, ALREADY = Pair("sometimes", "manchmal"), Pair("never", "nie"), Pair("already", "schon")
FREQUENCIES = (Pair("often", "oft"), Pair("always", "immer"), SOMETIMES, NEVER)
