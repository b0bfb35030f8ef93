"""Noun phrases and clauses of the built-in corpus, spelled out in English and in German. Nothing here is random.

A clause is one structure for both languages. English orders it subject, auxiliary, not, frequency, verb, objects,
complement, adjunct, time. German orders it by fields, with the finite verb second, first (questions) or last
(subordinate clauses):
    front, finite verb, subject | pronouns, time, definite objects, frequency or nicht, indefinite objects,
    adjunct, complement | infinitive, participle or separated prefix
"""

from dataclasses import dataclass, replace
from typing import Literal

from tasks.text.generated import lexicon as lex
from tasks.text.generated.lexicon import CASES, Agreement, Case, Gender, Pair

EMPTY = Pair("", "")

_COLUMNS: tuple[Gender, ...] = ("m", "f", "n", "pl")
_DEFINITE = {"nom": "er ie as ie", "acc": "en ie as ie", "dat": "em er em en"}
_EIN = {"nom": "- e - e", "acc": "en e - e", "dat": "em er em en"}
_ADJECTIVE_ENDINGS = {
    "definite": {"nom": "e e e en", "acc": "en e e en", "dat": "en en en en"},
    "ein": {"nom": "er e es en", "acc": "en e es en", "dat": "en en en en"},
    "strong": {"nom": "er e es e", "acc": "en e es e", "dat": "em er em en"},
}
_CONTRACTIONS = {"in dem": "im", "in das": "ins", "zu dem": "zum", "zu der": "zur"}


def _ending(table: dict[str, str], case: Case, gender: Gender) -> str:
    return table[case].split()[_COLUMNS.index(gender)].replace("-", "")


def words(*parts: str) -> str:
    """The parts that are there, one space apart."""
    return " ".join(part for part in parts if part)


@dataclass(frozen=True)
class NounPhrase:
    """Who or what: both English cases, the German three, and what agrees with or refers to it."""

    subject: str
    object: str
    german: dict[Case, str]
    agreement: Agreement
    weight: Literal["pronoun", "definite", "indefinite"]  # its place in the German middle field
    referents: tuple[str, ...]  # whom it names; an object shares none with its subject
    pronoun: str = ""  # the English pronoun that may take it up again, "" where none fits in both languages
    gender: Gender = "m"
    kind: str = "adult"
    has_adjective: bool = False
    relative: Pair = EMPTY

    @property
    def is_person(self) -> bool:
        """Whether it is a who, not a what."""
        return self.kind in lex.PEOPLE


def pronoun(english: str) -> NounPhrase:
    """A personal pronoun, or `who`, by its English subject form."""
    subject, object_, nominative, accusative, dative, agreement = lex.PRONOUNS[english]
    german: dict[Case, str] = {"nom": nominative, "acc": accusative, "dat": dative}
    referent = "speaker" if english in ("I", "we") else english
    return NounPhrase(subject, object_, german, agreement, "pronoun", (referent,), pronoun=english)


def it(phrase: NounPhrase) -> NounPhrase:
    """The subject pronoun for a thing: "it" or "they"; the German one has the noun's gender."""
    plural = phrase.gender == "pl"
    german = dict.fromkeys(CASES, lex.IT_GERMAN[phrase.gender])
    english = "they" if plural else "it"
    agreement: Agreement = "pl" if plural else "3sg"
    return replace(phrase, subject=english, object=english, german=german, agreement=agreement, weight="pronoun")


def name(english: str) -> NounPhrase:
    """A first name, equal in all cases and in both languages."""
    german = dict.fromkeys(CASES, english)
    return NounPhrase(english, english, german, "3sg", "definite", (english,), pronoun=lex.NAMES[english])


def noun_phrase(
    noun: lex.Noun, determiner: lex.Determiner, adjective: lex.Adjective | None = None, *, plural: bool = False
) -> NounPhrase:
    """Determiner, adjective and noun, agreeing in gender, number and case."""
    gender: Gender = "pl" if plural else noun.gender
    adult = "they" if plural else {"m": "he", "f": "she"}.get(noun.gender, "")
    english = _english_noun_phrase(noun, determiner, adjective, plural=plural)
    return NounPhrase(
        subject=english,
        object=english,
        german={case: _german_noun_phrase(noun, determiner, adjective, gender, case) for case in CASES},
        agreement="pl" if plural else "3sg",
        weight="indefinite" if determiner.english == "a" or determiner.declension == "strong" else "definite",
        referents=(noun.english,),
        pronoun=adult if noun.kind != "child" else "",
        gender=gender,
        kind=noun.kind,
        has_adjective=adjective is not None,
    )


def _english_noun_phrase(
    noun: lex.Noun, determiner: lex.Determiner, adjective: lex.Adjective | None, *, plural: bool
) -> str:
    rest = words(adjective.english if adjective else "", noun.english_plural if plural else noun.english)
    first = determiner.english_plural if plural else determiner.english
    return words("an" if first == "a" and rest[0] in "aeiou" else first, rest)


def _german_noun_phrase(
    noun: lex.Noun, determiner: lex.Determiner, adjective: lex.Adjective | None, gender: Gender, case: Case
) -> str:
    declension, stem = determiner.declension, determiner.german
    if stem == "ein" and gender == "pl":  # no indefinite article in the plural: "neue Bücher"
        declension, stem = "strong", ""
    endings = {"definite": _DEFINITE, "ein": _EIN}.get(declension)
    article = stem + _ending(endings, case, gender) if endings else stem
    described = adjective.german + _ending(_ADJECTIVE_ENDINGS[declension], case, gender) if adjective else ""
    return words(article, described, noun.german_form(case, plural=gender == "pl"))


def both(first: NounPhrase, second: NounPhrase) -> NounPhrase:
    """Two phrases joined by "and"; the whole is plural."""
    taken_up = "we" if "speaker" in first.referents + second.referents else "they"
    return NounPhrase(
        subject=f"{first.subject} and {second.subject}",
        object=f"{first.object} and {second.object}",
        german={case: f"{first.german[case]} und {second.german[case]}" for case in CASES},
        agreement="pl",
        weight="definite",
        referents=first.referents + second.referents,
        pronoun=taken_up,
        gender="pl",
        kind=first.kind,
    )


def prepositional(english: str, german: str, case: Case, phrase: NounPhrase) -> Pair:
    """Preposition and object; the German preposition governs the case and melts with some articles (im, zur)."""
    preposition, object_ = german, phrase.german[case]
    head, _, rest = object_.partition(" ")
    if melted := _CONTRACTIONS.get(f"{preposition} {head}"):
        preposition, object_ = melted, rest
    return Pair(words(english, phrase.object), words(preposition, object_))


@dataclass(frozen=True)
class Clause:
    """One finite verb with what belongs to it; `tense` is present, past, perfect or an English modal."""

    subject: NounPhrase
    verb: lex.Verb
    tense: str
    negation: Literal["", "nicht", "kein"] = ""  # with "kein" the object already carries it in German
    dative: NounPhrase | None = None
    accusative: NounPhrase | None = None
    complement: Pair = EMPTY
    adjunct: Pair = EMPTY
    frequency: Pair = EMPTY
    time: Pair = EMPTY

    @property
    def objects(self) -> tuple[NounPhrase, ...]:
        """Indirect before direct, in both languages."""
        return tuple(phrase for phrase in (self.dative, self.accusative) if phrase)


def statement(clause: Clause, front: Pair = EMPTY, *, inverted: bool = False) -> Pair:
    """A main clause; German inverts it after any `front`, and after a clause that came before (`inverted`)."""
    german = _german_main_clause(clause, front.german, inverted=inverted or front is not EMPTY)
    return Pair(words(front.english, _english_clause(clause)), german)


def question(clause: Clause, asked: Pair = EMPTY) -> Pair:
    """A question, by its question word or, without one, for yes or no."""
    german = _german_main_clause(clause, asked.german, inverted=True)
    return Pair(words(asked.english, _english_inverted(clause)), german)


def subordinate(clause: Clause, opening: Pair) -> Pair:
    """A clause after a conjunction, question word or relative pronoun; German puts its finite verb last."""
    english, german = words(opening.english, _english_clause(clause)), _german_verb_final(clause)
    return Pair(english, words(opening.german, german))


def _english_clause(clause: Clause) -> str:
    """Subject before verb."""
    auxiliary, verb = _english_verb(clause, needs_auxiliary=bool(clause.negation))
    before = words(_english_subject(clause), _negated(auxiliary, clause), clause.frequency.english)
    return words(before, verb, _english_rest(clause))


def _english_inverted(clause: Clause) -> str:
    """Auxiliary before subject; do-support where the verb has no auxiliary of its own."""
    auxiliary, verb = _english_verb(clause, needs_auxiliary=True)
    before = words(auxiliary, _english_subject(clause), "not" if clause.negation else "")
    return words(before, clause.frequency.english, verb, _english_rest(clause))


def _negated(auxiliary: str, clause: Clause) -> str:
    if not clause.negation:
        return auxiliary
    return "cannot" if auxiliary == "can" else f"{auxiliary} not"


def _english_subject(clause: Clause) -> str:
    return words(clause.subject.subject, clause.subject.relative.english)


def _english_verb(clause: Clause, *, needs_auxiliary: bool) -> tuple[str, str]:
    """(auxiliary, rest of the verb); the auxiliary is empty in "he calls"."""
    verb, agreement, tense = clause.verb, clause.subject.agreement, clause.tense
    is_third = agreement == "3sg"
    if verb is lex.BE:
        return lex.ENGLISH_BE[tense][agreement], ""
    if tense == "perfect":
        return "has" if is_third else "have", verb.participle
    if tense in lex.MODALS and tense != "want":
        return tense, verb.base
    base, third = ("want to " + verb.base, "wants to " + verb.base) if tense == "want" else (verb.base, verb.third)
    if tense == "past":
        return ("did", base) if needs_auxiliary else ("", verb.past)
    if needs_auxiliary:
        return "does" if is_third else "do", base
    return "", third if is_third else base


def _english_rest(clause: Clause) -> str:
    """Everything after the verb. A pronoun goes before an adverbial particle: "picks him up", "looks for him"."""
    objects = [words(phrase.object, phrase.relative.english) for phrase in clause.objects]
    particle = [clause.verb.particle]
    moves = particle != ["for"] and bool(clause.objects) and clause.objects[0].weight == "pronoun"
    head = objects + particle if moves else particle + objects
    return words(*head, clause.complement.english, clause.adjunct.english, clause.time.english)


def _german_main_clause(clause: Clause, front: str, *, inverted: bool) -> str:
    """Verb second: before it stands the subject or, if the clause is inverted, `front` (empty: the verb is first)."""
    finite, end = _german_verb(clause)
    subject = _german_subject(clause)
    opening = words(front, finite, subject) if inverted else words(subject, finite)
    tail = "".join(f", {phrase.relative.german}" for phrase in clause.objects if phrase.relative.german)
    return words(opening, _middle_field(clause), end or clause.verb.prefix) + tail


def _german_verb_final(clause: Clause) -> str:
    """Verb last; the separable prefix joins it again ("weil er mich anruft")."""
    finite, end = _german_verb(clause)
    verbs = words(end, finite) if end else clause.verb.prefix + finite
    return words(_german_subject(clause), _middle_field(clause), verbs)


def _german_subject(clause: Clause) -> str:
    relative = f", {clause.subject.relative.german}," if clause.subject.relative.german else ""
    return clause.subject.german["nom"] + relative


def _german_verb(clause: Clause) -> tuple[str, str]:
    """(finite verb without prefix, infinitive or participle); spoken German: every past is a perfect, save war."""
    verb, agreement = clause.verb, clause.subject.agreement
    if clause.tense == "present":
        return verb.german[agreement], ""
    if clause.tense in lex.MODALS:
        return lex.MODALS[clause.tense][agreement], verb.prefix + verb.german["pl"]
    if verb is lex.BE:
        return lex.GERMAN_AUXILIARIES["war"][agreement], ""
    return lex.GERMAN_AUXILIARIES[verb.auxiliary][agreement], verb.german_participle


def _middle_field(clause: Clause) -> str:
    return words(
        _german_objects(clause, "pronoun"),
        clause.time.german,
        _german_objects(clause, "definite"),
        clause.frequency.german,
        "nicht" if clause.negation == "nicht" else "",
        _german_objects(clause, "indefinite"),
        clause.adjunct.german,
        clause.complement.german,
    )


def _german_objects(clause: Clause, weight: str) -> str:
    dative, accusative = clause.dative, clause.accusative
    return words(
        dative.german["dat"] if dative and dative.weight == weight else "",
        accusative.german["acc"] if accusative and accusative.weight == weight else "",
    )


def subject_relative(head: NounPhrase, clause: Clause) -> Pair:
    """A relative clause whose subject is the head: "who calls him", "der ihn anruft"."""
    english = "who" if head.is_person else "that"
    german: dict[Case, str] = dict.fromkeys(CASES, _relative_pronoun(head, "nom"))
    subject = replace(head, subject=english, german=german, relative=EMPTY)
    return subordinate(replace(clause, subject=subject), EMPTY)


def object_relative(head: NounPhrase, clause: Clause) -> Pair:
    """A relative clause whose object is the head: "whom he helps", "dem er hilft"; `clause` lacks that object."""
    english = "whom" if head.is_person else "that"
    german = _relative_pronoun(head, "dat" if clause.verb.frame == "dat" else "acc")
    return subordinate(clause, Pair(english, german))


def _relative_pronoun(head: NounPhrase, case: Case) -> str:
    """The definite article's forms, save the dative plural."""
    if (case, head.gender) == ("dat", "pl"):
        return "denen"
    return "d" + _ending(_DEFINITE, case, head.gender)
