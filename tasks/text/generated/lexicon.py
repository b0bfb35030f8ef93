"""The words of the built-in English-German corpus: every form that its grammar needs.

Rows are read left to right, `-` is an empty field. English nouns and verbs list their irregular forms; German
nouns list their plural, verbs list infinitive, ich, du, er/sie/es and past participle.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, get_args

Case = Literal["nom", "acc", "dat"]
Gender = Literal["m", "f", "n", "pl"]  # German articles have one paradigm for all plurals
Agreement = Literal["1sg", "2sg", "3sg", "pl"]  # "we" and "they" share one German verb form

PEOPLE = ("adult", "job", "kin", "child")  # the kinds of nouns that name somebody
CASES: tuple[Case, ...] = get_args(Case)


@dataclass(frozen=True)
class Noun:
    """A countable noun; `kind` says which verbs and adjectives suit it."""

    english: str
    english_plural: str
    german: str
    german_plural: str
    gender: Gender
    kind: str
    owned: str  # "my" where possessives suit it

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


def _pairs(text: str) -> list[Pair]:
    """Pairs that are written `english = german`, with commas between them."""
    return [Pair(*pair.split(" = ")) for pair in text.split(", ")]


def _rows(table: str) -> Iterator[list[list[Any]]]:
    """Rows of `|`-separated groups of words, `-` read as empty."""
    for line in table.strip().splitlines():
        yield [["" if word == "-" else word for word in group.split()] for group in line.split("|")]


# English, German, gender, kind, whether "my" suits it
_NOUNS = """
man        men         Mann       Männer      m  adult    -
teacher    teachers    Lehrer     Lehrer      m  job      my
doctor     doctors     Arzt       Ärzte       m  job      my
friend     friends     Freund     Freunde     m  job      my
brother    brothers    Bruder     Brüder      m  kin      my
dog        dogs        Hund       Hunde       m  pet      my
letter     letters     Brief      Briefe      m  text     my
apple      apples      Apfel      Äpfel       m  food     -
key        keys        Schlüssel  Schlüssel   m  object   my
suitcase   suitcases   Koffer     Koffer      m  opening  my
garden     gardens     Garten     Gärten      m  room     my
station    stations    Bahnhof    Bahnhöfe    m  sight    -
woman      women       Frau       Frauen      f  adult    -
sister     sisters     Schwester  Schwestern  f  kin      my
aunt       aunts       Tante      Tanten      f  kin      my
cat        cats        Katze      Katzen      f  pet      my
newspaper  newspapers  Zeitung    Zeitungen   f  text     my
tomato     tomatoes    Tomate     Tomaten     f  food     -
bag        bags        Tasche     Taschen     f  object   my
lamp       lamps       Lampe      Lampen      f  object   my
door       doors       Tür        Türen       f  opening  my
kitchen    kitchens    Küche      Küchen      f  room     my
school     schools     Schule     Schulen     f  sight    my
child      children    Kind       Kinder      n  child    my
girl       girls       Mädchen    Mädchen     n  child    -
book       books       Buch       Bücher      n  text     my
egg        eggs        Ei         Eier        n  food     -
car        cars        Auto       Autos       n  object   my
bicycle    bicycles    Fahrrad    Fahrräder   n  object   my
window     windows     Fenster    Fenster     n  opening  my
office     offices     Büro       Büros       n  room     my
house      houses      Haus       Häuser      n  sight    my
"""
NOUNS = tuple(Noun(*words) for (words,) in _rows(_NOUNS))

_ADJECTIVES = """
good   gut    | job child text food
new    neu    | job text object opening room sight
old    alt    | adult job kin pet text object opening room sight
young  jung   | adult job kin pet
small  klein  | child pet food object opening room sight
big    groß   | pet food object opening room sight
nice   nett   | adult job kin child
"""
ADJECTIVES = tuple(Adjective(english, german, tuple(kinds)) for (english, german), kinds in _rows(_ADJECTIVES))

THE = Determiner("the", "the", "d", "definite")
A = Determiner("a", "", "ein", "ein")
NO = Determiner("a", "", "kein", "ein")  # an indefinite object under negation: "does not buy a" -> "kauft kein"
POSSESSIVES = tuple(
    Determiner(pair.english, pair.english, pair.german, "ein")
    for pair in _pairs("my = mein, your = dein, his = sein, her = ihr, our = unser, their = ihr")
)
NUMBERS = (Determiner("two", "two", "zwei", "strong"), Determiner("three", "three", "drei", "strong"))

NAMES = {"Anna": "she", "Maria": "she", "Laura": "she", "Peter": "he", "Paul": "he", "Thomas": "he"}

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


def _forms(*forms: str) -> dict[Agreement, str]:
    return dict(zip(get_args(Agreement), forms, strict=True))


def _verb(groups: list[list[Any]]) -> Verb:
    english, (prefix, infinitive, *present, participle, auxiliary), (frame,), kinds, adjuncts = groups
    german = [prefix, _forms(*present, infinitive), participle, auxiliary]
    return Verb(*[*english, *german, frame, tuple(kinds), tuple(adjuncts)])


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
ENGLISH_BE = {"present": _forms("am", "are", "is", "are"), "past": _forms("was", "were", "was", "were")}
GERMAN_AUXILIARIES = {
    "haben": _forms("habe", "hast", "hat", "haben"),
    "sein": _forms("bin", "bist", "ist", "sind"),
    "war": _forms("war", "warst", "war", "waren"),
}
MODALS = {
    "can": _forms("kann", "kannst", "kann", "können"),
    "must": _forms("muss", "musst", "muss", "müssen"),
    "should": _forms("sollte", "solltest", "sollte", "sollten"),
    "want": _forms("will", "willst", "will", "wollen"),
    "will": _forms("werde", "wirst", "wird", "werden"),
}

PERSON_PREDICATES = _pairs("tired = müde, ill = krank, hungry = hungrig, happy = glücklich")
JUDGEMENTS = _pairs("expensive = teuer, beautiful = schön")  # these contradict no adjective
THING_PREDICATES = [*_pairs("new = neu, old = alt, small = klein, big = groß"), *JUDGEMENTS]

WHERE, WHEN, WHY, THAT = _pairs("where = wo, when = wann, why = warum, that = dass")
WHO, TO_WHOM, WHAT = _pairs("who = wen, who = wem, what = was")  # the object asked for
AND, BUT = Pair(", and", " und"), Pair(", but", ", aber")
COMMA, GERMAN_COMMA = Pair(",", ","), Pair("", ",")  # German sets off every subordinate clause
CONJUNCTIONS = _pairs("because = weil, because = weil, although = obwohl, if = wenn, when = wenn")

TODAY, TOMORROW, YESTERDAY, NOW = _pairs("today = heute, tomorrow = morgen, yesterday = gestern, now = jetzt")
EVERY_DAY, ON_MONDAY, EVENING = _pairs("every day = jeden Tag, on Monday = am Montag, in the evening = am Abend")
LAST_WEEK, NEXT_WEEK = _pairs("last week = letzte Woche, next week = nächste Woche")
TIMES = {
    "present": (TODAY, NOW, EVERY_DAY, ON_MONDAY, EVENING),
    "past": (YESTERDAY, LAST_WEEK, ON_MONDAY),
    "perfect": (TODAY,),
    "modal": (TODAY, TOMORROW, NEXT_WEEK, ON_MONDAY, EVENING),
}
FREQUENCIES = _pairs("often = oft, always = immer, sometimes = manchmal, never = nie")
SOMETIMES, NEVER = FREQUENCIES[2:]
ALREADY = Pair("already", "schon")
