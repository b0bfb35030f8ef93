"""Draws the sentences of the built-in corpus: which words, which construction. The grammar spells them out."""

import random
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from typing import TypeVar

from tasks.text.generated import lexicon as lex
from tasks.text.generated.grammar import (
    EMPTY,
    Clause,
    NounPhrase,
    both,
    it,
    name,
    noun_phrase,
    object_relative,
    prepositional,
    pronoun,
    question,
    statement,
    subject_relative,
    subordinate,
)
from tasks.text.generated.lexicon import Pair

MIN_WORDS, MAX_WORDS = 4, 20  # of a sentence, on either side

T = TypeVar("T")

_ANY_TENSE = {"present": 8, "past": 4, "perfect": 3, "can": 1, "must": 1, "should": 1, "want": 1, "will": 1.5}
_CONDITION_TENSE = {"present": 6, "can": 1, "must": 1, "should": 1, "want": 1, "will": 2}
_BESIDE_PRESENT = {"present": 6, "perfect": 3, "can": 1, "must": 1, "want": 1}
_PERSONS = {"pronoun": 5, "name": 4, "noun": 6, "plural": 2, "both": 1.5}


class Draws:
    """Seeded choices made of `Random.random` alone, whose sequence Python promises to keep across versions."""

    def __init__(self, seed: int) -> None:
        self._uniform = random.Random(seed).random

    def chance(self, probability: float) -> bool:
        """True with this probability."""
        return self._uniform() < probability

    def pick(self, options: Sequence[T]) -> T:
        """One of the options, all alike."""
        return options[int(self._uniform() * len(options))]

    def weighted(self, weights: Mapping[T, float]) -> T:
        """One of the keys, in proportion to its weight (multiples of a half, so that sums are exact anywhere)."""
        left = self._uniform() * sum(weights.values())
        for option, weight in weights.items():
            left -= weight
            if left < 0:
                return option
        return option


class Speaker(Draws):
    """Draws phrases, clauses and sentences of the grammar."""

    def noun(
        self, kinds: Collection[str], *, plural: bool = False, negated: bool = False, determiners: str = "the a my"
    ) -> NounPhrase:
        """A common noun of one of the kinds, under a determiner of those allowed (the, a, my, two)."""
        noun = self.pick([noun for noun in lex.NOUNS if noun.kind in kinds])
        fitting = [adjective for adjective in lex.ADJECTIVES if noun.kind in adjective.kinds]
        adjective = self.pick(fitting) if self.chance(0.25) else None
        is_kin = noun.kind == "kin"  # "my sister" rather than "a sister"
        weights = {
            "the": 5.0,
            "a": (7.0 if negated else 3.0) * (not is_kin),
            "my": (2.5 + 15 * is_kin) * bool(noun.owned),
        }
        weights["two"] = 2.0 * (plural and not negated)
        chosen = self.weighted({key: weight for key, weight in weights.items() if key in determiners.split()})
        if chosen == "my":
            determiner = self.pick(lex.POSSESSIVES)
        elif chosen == "two":
            determiner = self.pick(lex.NUMBERS)
        else:
            determiner = lex.THE if chosen == "the" else lex.NO if negated else lex.A
        return noun_phrase(noun, determiner, adjective, plural=plural)

    def person(
        self, exclude: Collection[str] = (), *, definite: bool = False, weights: Mapping[str, float] = _PERSONS
    ) -> NounPhrase:
        """Somebody not in `exclude`: a pronoun, a name, one or several people."""
        while True:
            phrase = self._person(self.weighted(weights), definite=definite)
            if not any(referent in exclude for referent in phrase.referents):
                return phrase

    def _person(self, form: str, *, definite: bool) -> NounPhrase:
        if form == "pronoun":
            return pronoun(self.pick(("I", "I", "you", "you", "he", "she", "we", "they")))
        if form == "name":
            return name(self.pick(tuple(lex.NAMES)))
        if form == "both":
            first = self.person(definite=True, weights={"name": 1, "noun": 2})
            if self.chance(0.25):
                return both(first, pronoun("I"))
            return both(first, self.person(first.referents, definite=True, weights={"name": 1, "noun": 1}))
        plural = form == "plural"
        allowed = "the my" if definite else "the my two" if plural else "the a my"
        return self.noun(lex.PEOPLE, plural=plural, determiners=allowed)

    def object(self, verb: lex.Verb, exclude: Collection[str], *, negated: bool) -> NounPhrase:
        """An accusative object that suits the verb."""
        things = [kind for kind in verb.kinds if kind != "person"]
        if "person" in verb.kinds and (not things or self.chance(0.5)):
            return self.person(exclude, definite=negated)
        plural = self.chance(0.25)
        return self.noun(things, plural=plural, negated=negated, determiners="the a my two")

    def place(self) -> Pair:
        """Where: two-way prepositions with the dative."""
        english, german, kinds = self.pick(
            (
                ("in", "in", ("room", "sight")),
                ("in", "in", ("room", "sight")),
                ("behind", "hinter", ("sight",)),
                ("in front of", "vor", ("sight",)),
            )
        )
        return prepositional(english, german, "dat", self.noun(kinds, determiners="the my"))

    def adjunct(self, verb: lex.Verb, exclude: Collection[str]) -> Pair:
        """One prepositional phrase of those that suit the verb."""
        kind = self.pick(verb.adjuncts)
        if kind == "place":
            return self.place()
        if kind == "for":
            return prepositional("for", "für", "acc", self.person(exclude, definite=True))
        if self.chance(0.3):
            return prepositional("without", "ohne", "acc", self.person(exclude, definite=True))
        return prepositional("with", "mit", "dat", self.person(exclude, definite=True))

    def clause(
        self,
        tense: str,
        subject: NounPhrase | None = None,
        *,
        verbs: Sequence[lex.Verb] = lex.VERBS,
        exclude: Sequence[str] = (),
        timed: bool = True,
        be: float = 0.12,
        negated: float = 0.17,
    ) -> Clause:
        """A clause of one of the verbs, or of to be, negated or not (both by probability).

        `exclude` lists whom its objects, and a subject drawn here, must not name; `timed` allows a time adverbial.
        """
        subject = subject or self.person(exclude)
        if tense in lex.ENGLISH_BE and self.chance(be):
            return self._be(tense, subject, negated=self.chance(negated))
        verb = self.pick([verb for verb in verbs if timed or tense != "past" or verb.past != verb.base])
        others = (*exclude, *subject.referents)
        is_negated = tense != "must" and self.chance(negated)  # "must not" is not "muss nicht"
        clause, named = self._objects(Clause(subject, verb, tense, "nicht" if is_negated else ""), others)
        if verb.adjuncts and self.chance(0.3):
            clause = replace(clause, adjunct=self.adjunct(verb, (*others, *named)))
        return self._adverb(clause, timed=timed)

    def _be(self, tense: str, subject: NounPhrase, *, negated: bool) -> Clause:
        if subject.is_person:
            complement = self.place() if self.chance(0.25) else self.pick(lex.PERSON_PREDICATES)
        else:  # no "old car that is new"
            complement = self.pick(lex.JUDGEMENTS if subject.has_adjective else lex.THING_PREDICATES)
        return Clause(subject, lex.BE, tense, "nicht" if negated else "", complement=complement)

    def _objects(self, clause: Clause, exclude: Sequence[str]) -> tuple[Clause, tuple[str, ...]]:
        """The clause with what its verb asks for, and whom that names."""
        frame, negated = clause.verb.frame, bool(clause.negation)
        if frame == "goal":
            return self._goal(clause, exclude)
        if frame == "auf":
            waited_for = self.person(exclude, definite=True)
            complement = prepositional("", "auf", "acc", waited_for)
            return replace(clause, complement=complement), waited_for.referents
        named: tuple[str, ...] = ()
        if frame.startswith("dat"):
            clause = replace(clause, dative=self.person(exclude, definite=True))
        if frame.endswith("acc"):
            object_ = self.object(clause.verb, exclude, negated=negated)
            is_kein = object_.german["acc"].startswith("kein")
            clause = replace(clause, accusative=object_, negation="kein" if is_kein else clause.negation)
        for phrase in clause.objects:
            named += phrase.referents
        return clause, named

    def _goal(self, clause: Clause, exclude: Sequence[str]) -> tuple[Clause, tuple[str, ...]]:
        """Where to: `in` with the accusative, `zu` with the dative."""
        if self.chance(0.4):
            goal = prepositional("into", "in", "acc", self.noun(("room",), determiners="the my"))
            return replace(clause, complement=goal), ()
        if self.chance(0.6):
            goal = prepositional("to", "zu", "dat", self.noun(("sight",), determiners="the my"))
            return replace(clause, complement=goal), ()
        host = self.person((*exclude, "speaker", "you"), definite=True)  # to us one comes
        return replace(clause, complement=prepositional("to", "zu", "dat", host)), host.referents

    def _adverb(self, clause: Clause, *, timed: bool) -> Clause:
        """The clause with a time or a frequency, or neither."""
        tense = "modal" if clause.tense in lex.MODALS else clause.tense
        # "I read it yesterday": the adverb alone tells the tense
        told_by_adverb = tense == "past" and clause.verb.past == clause.verb.base
        if told_by_adverb or (timed and self.chance(0.35)):
            barred = lex.ON_MONDAY if told_by_adverb else lex.EVERY_DAY if clause.negation else None
            times = [time for time in lex.TIMES[tense] if time is not barred]
            return replace(clause, time=self.pick(times))
        if not clause.negation and self.chance(0.2):
            return replace(clause, frequency=self.pick(_frequencies(clause.tense)))
        return clause

    def statement(self) -> Pair:
        """A main clause, often with an adverbial in front."""
        if self.chance(0.08):
            thing = self.noun(("text", "object", "opening"), plural=self.chance(0.25), determiners="the my")
            return _ended(statement(self.clause("present", thing, be=1)), ".")
        clause = self.clause(self.weighted(_ANY_TENSE))
        front = EMPTY
        if clause.time is not EMPTY and self.chance(0.6):
            front, clause = clause.time, replace(clause, time=EMPTY)
        elif clause.frequency is lex.SOMETIMES and self.chance(0.6):
            front, clause = clause.frequency, replace(clause, frequency=EMPTY)
        elif clause.adjunct.english.startswith(("in ", "behind ")) and self.chance(0.3):
            front, clause = clause.adjunct, replace(clause, adjunct=EMPTY)
        return _ended(statement(clause, front), ".")

    def yes_no_question(self) -> Pair:
        """The finite verb, or an auxiliary, comes first."""
        return _ended(question(self.clause(self.weighted(_ANY_TENSE), negated=0)), "?")

    def wh_question(self) -> Pair:
        """Who, whom, what, where, when or why."""
        tense = self.weighted(_ANY_TENSE)
        asked = self.weighted({lex.WHO: 4, lex.WHAT: 5, lex.WHERE: 2, lex.WHEN: 2, lex.WHY: 2})
        if asked is lex.WHO:
            return _ended(statement(self.clause(tense, pronoun("who"))), "?")
        if asked is lex.WHAT:
            return _ended(self._object_question(tense), "?")
        return _ended(question(self._gapped_clause(asked, tense), asked), "?")

    def _object_question(self, tense: str) -> Pair:
        with_object = [verb for verb in lex.VERBS if verb.frame in ("acc", "dat", "dat+acc")]
        clause = self.clause(tense, verbs=with_object, be=0, negated=0)
        if clause.accusative is None:
            return question(replace(clause, dative=None), lex.TO_WHOM)
        asked = lex.WHO if clause.accusative.is_person else lex.WHAT
        return question(replace(clause, accusative=None), asked)

    def _gapped_clause(self, asked: Pair, tense: str, exclude: Sequence[str] = ()) -> Clause:
        """A clause without the adverbial that a question word asks for."""
        if asked is lex.WHY:
            return self.clause(tense, exclude=exclude)
        if asked is lex.WHEN:
            tense = "past" if tense == "perfect" else tense
            clause = self.clause(tense, exclude=exclude, timed=False, be=0, negated=0)
        else:
            placed = [verb for verb in lex.VERBS if "place" in verb.adjuncts]
            clause = self.clause(tense, verbs=placed, exclude=exclude, be=0, negated=0)
            clause = replace(clause, adjunct=EMPTY)
        return replace(clause, frequency=EMPTY)

    def adverbial_clause(self) -> Pair:
        """Because, although, if or when; before or after the main clause."""
        conjunction = self.pick(lex.CONJUNCTIONS)
        main_tense = self.weighted(_CONDITION_TENSE if conjunction.german == "wenn" else _ANY_TENSE)
        sub_tense = "past" if main_tense == "past" else self.weighted(_BESIDE_PRESENT)
        if self.chance(0.4):
            sub = self.clause(sub_tense, timed=False, be=0.4)
            main = self.clause(main_tense, self._taken_up(sub), exclude=sub.subject.referents)
            # the subordinate clause is the front field of the main clause
            return _ended(_joined(subordinate(sub, conjunction), lex.COMMA, statement(main, inverted=True)), ".")
        main = self.clause(main_tense)
        sub = self._reason(main, sub_tense)
        return _ended(_joined(statement(main), lex.GERMAN_COMMA, subordinate(sub, conjunction)), ".")

    def _taken_up(self, first: Clause) -> NounPhrase | None:
        """The first clause's subject as a pronoun, half of the time."""
        if first.subject.pronoun and self.chance(0.5):
            return pronoun(first.subject.pronoun)
        return None

    def _reason(self, main: Clause, tense: str) -> Clause:
        """What follows the main clause; it may be about the main clause's object ("because it is new")."""
        thing = main.accusative
        is_there = thing is not None and not thing.is_person and main.negation != "kein"
        if thing and is_there and tense in lex.ENGLISH_BE and self.chance(0.5):
            return self.clause(tense, it(thing), be=1)
        subject = self._taken_up(main)
        return self.clause(tense, subject, exclude=main.subject.referents, timed=False, be=0.4)

    def content_clause(self) -> Pair:
        """What somebody says, knows, hopes or does not know."""
        verb = self.pick((lex.SAY, lex.KNOW, lex.KNOW, lex.HOPE))
        is_question = verb is not lex.HOPE and self.chance(0.25)
        somebody = self.person(("speaker",) if is_question else ())
        matrix = Clause(somebody, verb, "past" if verb is lex.SAY and self.chance(0.5) else "present")
        opening = lex.THAT
        if verb is lex.KNOW and (is_question or self.chance(0.5)):
            matrix = replace(matrix, negation="" if is_question else "nicht")
            opening = self.pick((lex.WHERE, lex.WHEN, lex.WHY, lex.THAT))
        content = subordinate(self._content(verb, opening, somebody.referents), opening)
        if is_question:
            return _ended(_joined(question(matrix), lex.GERMAN_COMMA, content), "?")
        return _ended(_joined(statement(matrix), lex.GERMAN_COMMA, content), ".")

    def _content(self, verb: lex.Verb, opening: Pair, exclude: Sequence[str]) -> Clause:
        tense = self.weighted(_ANY_TENSE)
        if opening is not lex.THAT:
            return self._gapped_clause(opening, tense, exclude)
        if verb is lex.HOPE and tense in ("must", "should"):
            tense = "will"
        return self.clause(tense, exclude=exclude, be=0.2)

    def relative_clause(self) -> Pair:
        """A main clause whose subject or object has a relative clause."""
        tense = self.weighted(_ANY_TENSE)
        if self.chance(0.4):
            head = self.noun(lex.PEOPLE, plural=self.chance(0.25), determiners="the a two")
            main = self.clause(tense, self._described(head, tense), be=0)
            return _ended(statement(replace(main, frequency=EMPTY)), ".")  # "who sleeps often works": which?
        main = self.clause(tense, verbs=[verb for verb in lex.VERBS if verb.frame == "acc"], be=0, negated=0)
        kinds = [kind for group in main.verb.kinds for kind in (lex.PEOPLE if group == "person" else (group,))]
        head = self.noun(kinds, plural=self.chance(0.25), determiners="the a two")
        described = self._described(head, tense, main.subject.referents, main.verb)
        front, main = main.time, replace(main, accusative=described, adjunct=EMPTY, time=EMPTY)
        return _ended(statement(main, front), ".")

    def _described(
        self, head: NounPhrase, tense: str, exclude: Sequence[str] = (), used: lex.Verb | None = None
    ) -> NounPhrase:
        """The noun phrase with a relative clause, of another verb than the one used around it."""
        if self.chance(0.3):
            state = self._be("past" if tense == "past" else "present", head, negated=self.chance(0.17))
            return replace(head, relative=subject_relative(head, state))
        tense = "past" if tense == "past" else self.weighted(_BESIDE_PRESENT)
        others = (*exclude, *head.referents)
        verbs = [verb for verb in lex.VERBS if verb is not used]
        if head.is_person and self.chance(0.5):
            clause = self.clause(tense, head, verbs=verbs, exclude=others, timed=False, be=0)
            return replace(head, relative=subject_relative(head, clause))
        kind = "person" if head.is_person else head.kind
        fitting = [verb for verb in verbs if verb.frame in ("acc", "dat") and kind in verb.kinds]
        clause = self.clause(tense, verbs=fitting, exclude=others, timed=False, be=0)
        clause = replace(clause, dative=None, accusative=None, negation="nicht" if clause.negation else "")
        return replace(head, relative=object_relative(head, clause))

    def two_clauses(self) -> Pair:
        """Two main clauses joined by "and" or "but"."""
        tense = self.weighted(_ANY_TENSE)
        first = self.clause(tense)
        second = self.clause(tense, self._taken_up(first), exclude=first.subject.referents, timed=False)
        return _ended(_joined(statement(first), self.pick((lex.AND, lex.BUT)), statement(second)), ".")

    def sentence(self) -> Pair:
        """One sentence of the corpus: capitalised, punctuated, of allowed length."""
        kinds: dict[Callable[[], Pair], float] = {
            self.statement: 30,
            self.yes_no_question: 9,
            self.wh_question: 11,
            self.adverbial_clause: 20,
            self.content_clause: 10,
            self.relative_clause: 13,
            self.two_clauses: 7,
        }
        while True:
            pair = self.weighted(kinds)()
            lengths = len(pair.english.split()), len(pair.german.split())
            if min(lengths) >= MIN_WORDS and max(lengths) <= MAX_WORDS:
                return Pair(capitalised(pair.english), capitalised(pair.german))


def _frequencies(tense: str) -> tuple[Pair, ...]:
    if tense == "perfect":
        return (*lex.FREQUENCIES, lex.ALREADY)
    # "must never" is not "muss nie"
    return tuple(pair for pair in lex.FREQUENCIES if tense != "must" or pair is not lex.NEVER)


def _joined(first: Pair, link: Pair, second: Pair) -> Pair:
    return Pair(f"{first.english}{link.english} {second.english}", f"{first.german}{link.german} {second.german}")


def _ended(sentence: Pair, mark: str) -> Pair:
    return Pair(sentence.english + mark, sentence.german + mark)


def capitalised(sentence: str) -> str:
    """The sentence with a capital first letter, the rest as it is."""
    return sentence[0].upper() + sentence[1:]
