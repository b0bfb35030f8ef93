import math
import os
from collections import Counter

import numpy as np
import pytest
import sacrebleu

from tasks.cli.errors import UserError
from tasks.finetuning.config import FinetuningConfig
from tasks.scoring.bleu import bleu_tokenizer, paired_bootstrap, score_all, score_bleu
from tasks.scoring.tokenized_bleu import CompoundTokenizer, tokenized_bleu
from tasks.translation.config import parse_config
from word_tokenizer import sentences

SOURCES = sentences(9, longest=8)
REFERENCES = ["w3 w4 w5 w6", *SOURCES[1:]]


def multi_bleu(hypotheses, references):
    """BLEU of tokens, without smoothing, case-sensitive: the definition of Papineni et al. 2002, slowly."""
    matches, totals, lengths = [0] * 4, [0] * 4, [0, 0]
    for hypothesis, reference in zip(hypotheses, references, strict=True):
        h, r = hypothesis.split(), reference.split()
        lengths = [lengths[0] + len(h), lengths[1] + len(r)]
        for n in range(1, 5):
            mine, theirs = (Counter(tuple(x[i : i + n]) for i in range(len(x) - n + 1)) for x in (h, r))
            matches[n - 1] += sum((mine & theirs).values())
            totals[n - 1] += sum(mine.values())
    precision = math.exp(sum(math.log(m / t) for m, t in zip(matches, totals, strict=True)) / 4)
    return 100 * precision * min(1.0, math.exp(1 - lengths[1] / lengths[0]))


def test_tokenised_bleu_is_multi_bleu_of_split_compounds():
    hypotheses = ["Das E-Mail-Konto ist z.B. neu, oder?", "Ein Mann mit rot-weißem Hut läuft im Park herum.", "Ja."]
    references = [
        "Das E-Mail-Konto ist z.B. alt, nicht wahr?",
        "Ein Mann mit rot-weißem Hut steht im Park herum.",
        "Nein.",
    ]
    split = CompoundTokenizer("de")
    want = multi_bleu([split(x) for x in hypotheses], [split(x) for x in references])
    assert tokenized_bleu(hypotheses, references, "de") == pytest.approx(want)
    assert tokenized_bleu(hypotheses, references, "de") > score_all(hypotheses, references, "de")[0].value
    assert tokenized_bleu(["ein Mann läuft nicht"], ["ein Mann läuft gern"], "de") == 0.0  # no 4-gram, not smoothed


@pytest.mark.parametrize(
    ("sentence", "tokens"),  # as Moses' tokenizer.perl -l de and the compound rule write them
    [
        ("Das E-Mail-Konto.", "Das E ##AT##-##AT## Mail ##AT##-##AT## Konto ."),
        ("Er sagte: “Ja, z.B. 3,5 %”", "Er sagte : &quot; Ja , z.B. 3,5 % &quot;"),
        ("der Nummer - 10", "der Nummer - 10"),
        ("Müller & Söhne (2014)", "Müller &amp; Söhne ( 2014 )"),
    ],
)
def test_compounds_are_split_as_the_papers_script_does(sentence, tokens):
    assert CompoundTokenizer("de")(sentence) == tokens


def test_the_paired_bootstrap_is_the_one_of_koehn():
    num_samples, seed = 25, 3
    systems = {
        "good": [*SOURCES[:6], *reversed(SOURCES[6:])], "bad": [" ".join(x.split()[:4]) + " w9" for x in SOURCES]
    }  # fmt: skip
    compared = [
        s for s in paired_bootstrap(systems, REFERENCES, num_samples=num_samples, seed=seed) if s.metric == "BLEU"
    ]
    draws = np.random.default_rng(seed).choice(len(REFERENCES), size=(num_samples, len(REFERENCES)), replace=True)

    def bleu(lines, numbers):
        return sacrebleu.corpus_bleu([lines[n] for n in numbers], [[REFERENCES[n] for n in numbers]]).score

    scores = {name: np.array([bleu(lines, numbers) for numbers in draws]) for name, lines in systems.items()}
    for score in compared:
        assert score.value == pytest.approx(bleu(systems[score.system], range(len(REFERENCES))))
        assert score.mean == pytest.approx(scores[score.system].mean(), rel=1e-4)
    differences = np.abs(scores["bad"] - scores["good"])
    observed = abs(compared[0].value - compared[1].value)
    p_value = (np.sum(differences - differences.mean() > observed) + 1) / (num_samples + 1)
    assert (compared[0].p_value, compared[1].p_value) == (None, pytest.approx(p_value))


@pytest.mark.trap(36)
def test_the_bootstrap_is_of_the_bleu_of_the_table_which_tells_capitals_apart():
    references = ["Das ist ein Haus und ein Baum .", "Die Katze schläft im Garten ."]
    systems = {"a": ["Das ist ein Haus und kein Baum .", references[1]], "b": [line.lower() for line in references]}
    compared = paired_bootstrap(systems, references, num_samples=5, seed=1)
    for score in compared:
        lines = systems[score.system]
        table = {one.metric: one for one in score_all(lines, references, "de")}
        assert score.value == pytest.approx(table[score.metric].value)
    bleu = sacrebleu.metrics.BLEU()
    assert [one.value for one in compared[:2]] == [
        pytest.approx(bleu.corpus_score(lines, [references]).score) for lines in systems.values()
    ]
    assert compared[1].value < compared[0].value < 100  # "b" is right but for its capitals
    assert all("case:mixed" in one.signature for one in compared)


def test_equal_systems_do_not_differ_and_the_seed_is_given_back(monkeypatch):
    monkeypatch.setenv("SACREBLEU_SEED", "99")
    first = paired_bootstrap({"a": SOURCES, "b": SOURCES}, REFERENCES, num_samples=30, seed=5)
    assert [score.p_value for score in first] == [None, 1.0, None, 1.0]
    assert "seed:5" in first[0].signature
    assert os.environ["SACREBLEU_SEED"] == "99"
    other = paired_bootstrap({"a": SOURCES, "b": SOURCES}, REFERENCES, num_samples=30, seed=6)
    assert first[0].mean != other[0].mean
    assert first == paired_bootstrap({"a": SOURCES, "b": SOURCES}, REFERENCES, num_samples=30, seed=5)


@pytest.mark.trap(58)
@pytest.mark.parametrize(
    ("lang", "tokenizer"),
    [("de", "13a"), (None, "13a"), ("zh", "zh"), ("zh_CN", "zh"), ("zho_Hans", "zh"), ("th", "char"), ("ron", "13a")],
)
def test_bleu_is_tokenised_by_the_target_language(lang, tokenizer):
    assert bleu_tokenizer(lang) == tokenizer
    assert bleu_tokenizer(lang, "char") == "char"
    assert bleu_tokenizer("ja") in ("ja-mecab", "char")  # the first where MeCab is installed


@pytest.mark.trap(58)
def test_text_without_spaces_has_a_bleu_and_its_signature_says_the_tokeniser():
    references = ["我喜欢在公园里读书，因为那里很安静。", "他昨天买了一辆新的自行车。"]
    hypotheses = ["我喜欢在公园里看书，因为那里很安静。", "他昨天买了一辆新自行车。"]
    assert score_bleu(hypotheses, references, "greedy").bleu < 1  # each sentence is one word
    score = score_bleu(hypotheses, references, "greedy", bleu_tokenizer("zh"))
    assert score.bleu > 50
    assert "tok:zh" in score.signature
    assert "tok:zh" in score_all(hypotheses, references, "de", "zh")[0].signature
    systems = {"a": hypotheses, "b": references}
    compared = paired_bootstrap(systems, references, num_samples=5, seed=1, tokenizer="zh")
    assert compared[0].value == pytest.approx(score.bleu)
    assert "tok:zh" in compared[0].signature


@pytest.mark.parametrize("asked", ["13b", "ja-mecab"])
def test_a_tokeniser_that_cannot_be_had_is_refused_with_the_options(asked):
    if asked == "ja-mecab" and bleu_tokenizer("ja") == asked:
        pytest.skip("MeCab is installed")
    for made in (lambda: parse_config(["--bleu-tokenize", asked]), lambda: FinetuningConfig(bleu_tokenize=asked)):
        with pytest.raises(UserError, match=f"the BLEU tokeniser .*{asked}"):
            made()
