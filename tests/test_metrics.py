"""Metrics: equal to the libraries and definitions they are named for, on many pairs and at every edge."""

from __future__ import annotations

import math
import random
import shutil
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest

from tunesmith.core.errors import ConfigError, DataError
from tunesmith.evaluate.metrics import E2E, METRICS, ptb
from tunesmith.evaluate.metrics.coco import common_subsequence
from tunesmith.evaluate.metrics.metric import check_rows
from tunesmith.evaluate.metrics.mteval import tokenize
from tunesmith.evaluate.section import EvaluateSection

# a sentence more than a library: accents, other scripts, signs, contractions, numbers
TEXT = "the a cat dog sat on mat, near The Eagle (cheap) \u00a320-25. caf\u00e9 \u65e5\u672c\u8a9e 3.5 isn't it's --"
WORDS = [*TEXT.split(), "\U0001f600", "family-friendly", "5", "out", "of"]
WITHHELD = ("meteor", "execution")  # they need Java, and a table with each row
SPOKEN = [name for name in METRICS.names() if METRICS.load(name).needs == "completions" and name not in WITHHELD]


def pairs(rows: int = 500, seed: int = 0) -> tuple[list[str], list[list[str]]]:
    """Random completions, empty ones among them, with one to four references each, some of them nearly equal."""
    draw = random.Random(seed)

    def text(least: int = 0) -> list[str]:
        return [draw.choice(WORDS) for _ in range(draw.randint(least, 14))]

    completions, references = [], []
    for _ in range(rows):
        refs = [text(1) for _ in range(draw.randint(1, 4))]
        ours = text() if draw.random() < 0.4 else [word for word in refs[0] if draw.random() < 0.8]
        completions.append(" ".join(ours))
        references.append([" ".join(ref) for ref in refs])
    return completions, references


COMPLETIONS, REFERENCES = pairs()


def score(name: str, completions: list[str], references: list[list[str]]) -> float:
    return METRICS.load(name)().score(completions, references).value


def each(name: str) -> list[float]:
    """The metric of every row alone."""
    metric = METRICS.load(name)()
    return [metric.score([text], [refs]).value for text, refs in zip(COMPLETIONS, REFERENCES, strict=True)]


@pytest.mark.parametrize("name", ["bleu", "chrf"])
def test_bleu_and_chrf_equal_sacrebleu(name):
    """Kills: statistics in another order; references that are cut to the shortest list."""
    from sacrebleu.metrics import BLEU, CHRF

    theirs = BLEU() if name == "bleu" else CHRF()
    alone = [
        theirs.corpus_score([text], [[ref] for ref in refs]).score
        for text, refs in zip(COMPLETIONS, REFERENCES, strict=True)
    ]
    assert each(name) == pytest.approx(alone, abs=1e-6)
    two = [refs for refs in REFERENCES if len(refs) >= 2]
    texts = [text for text, refs in zip(COMPLETIONS, REFERENCES, strict=True) if len(refs) >= 2]
    streams = [[refs[0] for refs in two], [refs[1] for refs in two]]
    assert score(name, texts, [refs[:2] for refs in two]) == pytest.approx(theirs.corpus_score(texts, streams).score)


@pytest.mark.parametrize("name", ["rouge1", "rouge2", "rougeL", "rougeLsum"])
def test_rouge_equals_rouge_score(name):
    """Kills: recall instead of the F-measure; the mean over references instead of the best."""
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer([name], use_stemmer=False)
    theirs = [
        max(100 * scorer.score(ref, text)[name].fmeasure for ref in refs)
        for text, refs in zip(COMPLETIONS, REFERENCES, strict=True)
    ]
    assert each(name) == pytest.approx(theirs, abs=1e-6)
    assert score(name, COMPLETIONS, REFERENCES) == pytest.approx(sum(theirs) / len(theirs))


def test_rouge_lsum_takes_lines_as_sentences_and_rouge_l_does_not():
    """Kills: one name for both."""
    text, ref = "the cat sat\nthe dog ran", "the dog ran\nthe cat sat"
    assert score("rougeLsum", [text], [[ref]]) == pytest.approx(100)
    assert score("rougeL", [text], [[ref]]) == pytest.approx(50)


def test_mteval_bleu_equals_sacrebleu_in_lower_case():
    """Kills: clipping by the sum of references; the shortest reference for the brevity penalty; another tokeniser."""
    from sacrebleu.metrics import BLEU

    theirs = BLEU(lowercase=True, smooth_method="none")
    streams = [[(refs + [None] * 4)[place] for refs in REFERENCES] for place in range(4)]
    expected = theirs.corpus_score(COMPLETIONS, streams).score
    assert score("bleu_mteval", COMPLETIONS, REFERENCES) == pytest.approx(expected, abs=1e-6)
    for text, refs in zip(COMPLETIONS, REFERENCES, strict=True):
        alone = theirs.corpus_score([text], [[ref] for ref in refs]).score
        assert score("bleu_mteval", [text], [refs]) == pytest.approx(alone, abs=1e-6)


def test_mteval_tokens():
    """Kills: a full stop cut from a number; a dash cut from a word."""
    assert tokenize("It's 3.5, (family-friendly) &amp; 20-25.") == [
        *("it's", "3.5", ",", "(", "family-friendly", ")", "&", "20", "-", "25", ".")
    ]
    assert tokenize("") == []


def test_nist_by_hand():
    """Kills: information from completions; a brevity penalty with the wrong base; totals of the wrong order."""
    # references: "a b" and "a c": of 4 words a occurs twice, b and c once; "a b" once after a, which occurs twice
    told_a, told_b, told_ab = math.log2(4 / 2), math.log2(4 / 1), math.log2(2 / 1)
    assert score("nist", ["a b"], [["a b", "a c"]]) == pytest.approx((told_a + told_b) / 2 + told_ab / 1)
    beta = math.log(2) / math.log(1.5) ** 2
    assert score("nist", ["a"], [["a b", "a c"]]) == pytest.approx(math.exp(-beta * math.log(0.5) ** 2) * told_a)
    # two thirds of the length are worth half
    assert score("nist", ["a a"], [["a a b"]]) == pytest.approx(0.5 * (math.log2(3 / 2) + math.log2(2 / 1)))


def test_nist_equals_its_definition():
    """Kills: hits beyond the reference that has most of them; information of one row instead of all."""
    told: Counter[tuple[str, ...]] = Counter()
    lines = [[tokenize(ref) for ref in refs] for refs in REFERENCES]
    for ref in (ref for refs in lines for ref in refs):
        told[()] += len(ref)
        for order in range(1, 6):
            told.update(tuple(ref[at : at + order]) for at in range(len(ref) - order + 1))
    value, ours = 0.0, [tokenize(text) for text in COMPLETIONS]
    for order in range(1, 6):
        hits, total = 0.0, 0
        for text, refs in zip(ours, lines, strict=True):
            grams = Counter(tuple(text[at : at + order]) for at in range(len(text) - order + 1))
            total += sum(grams.values())
            for gram, count in grams.items():
                most = max(sum(tuple(ref[at : at + order]) == gram for at in range(len(ref))) for ref in refs)
                hits += min(count, most) * (math.log2(told[gram[:-1]] / told[gram]) if most else 0.0)
        value += hits / total
    ratio = sum(map(len, ours)) / sum(sum(map(len, refs)) / len(refs) for refs in lines)
    penalty = math.exp(math.log(0.5) / math.log(1.5) ** 2 * math.log(min(1.0, ratio)) ** 2)
    assert score("nist", COMPLETIONS, REFERENCES) == pytest.approx(penalty * value, abs=1e-9)


def test_common_subsequences_equal_the_table():
    """Kills: a carry lost between rows of the bit-parallel form."""
    draw = random.Random(1)
    for _ in range(300):
        one, other = ([draw.choice("abcd") for _ in range(draw.randint(0, 90))] for _ in range(2))
        table = np.zeros((len(one) + 1, len(other) + 1), int)
        for i, left in enumerate(one):
            for j, right in enumerate(other):
                table[i + 1, j + 1] = table[i, j] + 1 if left == right else max(table[i, j + 1], table[i + 1, j])
        assert common_subsequence(one, other) == table[-1, -1]


def test_coco_rouge_by_hand():
    """Kills: precision and recall of the same reference; beta on the other side."""
    # precision 2/3 from the first, recall 1 from the second
    precision, recall = 2 / 3, 1.0
    expected = (1 + 1.44) * precision * recall / (recall + 1.44 * precision)
    assert score("rougeL_coco", ["The cat sat."], [["the cat ran away", "cat"]]) == pytest.approx(100 * expected)


def test_cider_by_hand():
    """Kills: frequencies that count a row twice; no clipping; no penalty on length; a scale other than 10."""
    # of 1- to 4-grams there are only words, and these agree; a word that every row has weighs nothing
    assert score("cider", ["b", "a"], [["b"], ["a"]]) == pytest.approx(10 / 4)
    assert score("cider", ["b", "a"], [["b", "a"], ["a", "a"]]) == pytest.approx((10 / 4 / 2 + 0) / 2)
    # "b b" against "b": the vector is clipped at the reference, norms are not; lengths in pairs differ by 1
    weight = math.log(2)
    similar = weight * weight / (2 * weight * weight) * math.exp(-1 / 72)
    assert score("cider", ["b b", "a"], [["b"], ["a"]]) == pytest.approx((10 * similar / 4 + 10 / 4) / 2)


def test_the_scorers_of_coco_agree_where_they_are_installed():
    """Kills: any difference from the reference implementation in CIDEr and ROUGE-L, tokens given."""
    cider = pytest.importorskip("pycocoevalcap.cider.cider").Cider()
    rouge = pytest.importorskip("pycocoevalcap.rouge.rouge").Rouge()
    refs = {row: [" ".join(ptb.tokenize(ref)) for ref in several] for row, several in enumerate(REFERENCES)}
    texts = {row: [" ".join(ptb.tokenize(text))] for row, text in enumerate(COMPLETIONS)}
    assert score("cider", COMPLETIONS, REFERENCES) == pytest.approx(cider.compute_score(refs, texts)[0], abs=1e-6)
    expected = 100 * rouge.compute_score(refs, texts)[0]
    assert score("rougeL_coco", COMPLETIONS, REFERENCES) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        ("The Eagle's a cheap coffee-shop (\u00a320-25)!", "the eagle 's a cheap coffee-shop -lrb- # 20-25 -rrb-"),
        ("It can't be bad: 5 out of 5.It is.", "it ca n't be bad 5 out of 5 it is"),
        ("I cannot; they've, we'll \u201cwait\u201d \u2026 and/or", "i can not they 've we 'll wait and/or"),
        ("Mr. Smith left the U.S. at 10:30, e.g. for $5.00.", "mr. smith left the u.s. at 10:30 e.g. for $ 5.00"),
        ("5pm, 1,000 caf\u00e9s in the city center., near", "5pm 1,000 caf\u00e9s in the city center. near"),
        ("", ""),
    ],
)  # fmt: skip
def test_treebank_tokens(text, tokens):
    """Kills: contractions left whole; brackets dropped; punctuation kept. The tokens are those of CoreNLP 3.4.1."""
    assert ptb.tokenize(text) == tokens.split()


def test_tokens_equal_those_of_the_java_tokeniser_where_it_is_installed():
    """Kills: a pattern that drifts from the reference tokeniser."""
    module = pytest.importorskip("pycocoevalcap.tokenizer.ptbtokenizer")
    if shutil.which("java") is None:
        pytest.skip("no Java here")
    texts = [ref for refs in REFERENCES for ref in refs]
    lines = [text for text in texts if "\U0001f600" not in text and "\u65e5" not in text]
    theirs = module.PTBTokenizer().tokenize({0: [{"caption": line} for line in lines]})[0]
    assert [" ".join(ptb.tokenize(line)) for line in lines] == theirs


METEOR_ROWS = (
    ["the eagle is a nice coffee house", "children are welcome near the river", "", "it is cheap.", "x"],
    [
        ["the eagle is a coffee shop", "a coffee shop"],
        ["kids welcome by the river side"],
        ["a"],
        ["It is cheap."],
        ["y z"],
    ],
)


@pytest.mark.slow
def test_meteor_equals_its_program_where_it_is_installed():
    """Kills: parameters of another task; chunks of perfect rows counted; sides of the matches swapped."""
    module = pytest.importorskip("pycocoevalcap.meteor.meteor")
    if shutil.which("java") is None:
        pytest.skip("no Java here")
    texts = {row: [" ".join(ptb.tokenize(text))] for row, text in enumerate(METEOR_ROWS[0])}
    refs = {row: [" ".join(ptb.tokenize(ref)) for ref in several] for row, several in enumerate(METEOR_ROWS[1])}
    whole, rows = module.Meteor().compute_score(refs, texts)
    metric = METRICS.load("meteor")()
    counts = metric.statistics(*METEOR_ROWS)
    assert metric.value(counts.sum(0)) == pytest.approx(100 * whole, abs=1e-6)
    assert metric.value(counts) == pytest.approx([100 * row for row in rows], abs=1e-6)


def test_meteor_by_hand():
    """Kills: weights of content and function words swapped; the penalty added instead of taken away."""
    metric = METRICS.load("meteor")()
    counts = np.zeros(23)
    # 4 words, 1 a function word, against 5 and 2; two content words and the function word match exactly, in 2 chunks
    counts[:4] = 4, 5, 1, 2
    counts[4:8] = 2, 2, 1, 1
    counts[20:] = 2, 3, 3
    matched = 0.75 * 2 + 0.25 * 1
    precision, recall = matched / (0.75 * 3 + 0.25 * 1), matched / (0.75 * 3 + 0.25 * 2)
    mean = precision * recall / (0.85 * precision + 0.15 * recall)
    assert metric.value(counts) == pytest.approx(100 * mean * (1 - 0.6 * (2 / 3) ** 0.2))


@pytest.mark.parametrize("lacking", ["java", "jar"])
def test_meteor_says_what_it_lacks_before_any_model_runs(lacking, monkeypatch):
    """Kills: a traceback from a missing program, after the answers have been written."""
    module = sys.modules[METRICS.load("meteor").__module__]
    monkeypatch.setattr(module.shutil, "which", lambda name: None if lacking == "java" else "/usr/bin/java")
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="Java" if lacking == "java" else "pycocoevalcap"):
        METRICS.load("meteor")().require()


@pytest.mark.parametrize(
    ("text", "refs", "same"),
    [
        (" a  b\n", ["a b"], True),
        ("A b", ["a b"], False),
        ("x", ["a", "x"], True),
        ('{"b": [1, 2], "a": null}', ['{"a":null,"b":[1.0,2]}'], True),
        ('{"a": true}', ['{"a": 1}'], False),
        ('{"a": [1, 2]}', ['{"a": [2, 1]}'], False),
        ("NaN", ["nan"], False),
        ('{"a": 1', ['{"a": 1'], True),
        ("[" * 900 + "]" * 900, ["[]"], False),
        ("", [""], True),
        ("", ["a"], False),
    ],
)
def test_exact_match(text, refs, same):
    """Kills: JSON compared as text; true taken for 1; only the first reference read."""
    assert score("exact_match", [text], [refs]) == 100.0 * same


def test_token_f1_by_hand():
    """Kills: words counted once; articles kept; the mean over references."""
    assert score("f1", ["The cat, the cat!"], [["a cat"]]) == pytest.approx(100 * 2 / 3)
    assert score("f1", ["red red blue"], [["red red"]]) == pytest.approx(100 * 4 / 5)
    assert score("f1", ["red blue"], [["green", "blue"]]) == pytest.approx(100 * 2 / 3)
    assert score("f1", ["", "the"], [[""], ["an"]]) == 100.0


def test_accuracy_and_valid_json_by_hand():
    """Kills: a label that must match in case; NaN taken for JSON; a prefix that parses."""
    assert score("accuracy", [" Yes\n", "no", "STRASSE"], [["yes"], ["yes"], ["stra\u00dfe"]]) == pytest.approx(200 / 3)
    assert score("valid_json", ['{"a": 1}', "NaN", '{"a": 1} and', "3"], [["x"]] * 4) == 50.0


@pytest.mark.parametrize("name", SPOKEN)
def test_the_best_answer_is_the_best_and_an_empty_one_the_worst(name):
    """Kills: a crash for an empty completion; a metric that prefers something else to a reference."""
    metric = METRICS.load(name)()
    texts = ["the cat sat on the mat near me", "a dog barked at nine quick brown foxes", '{"all": [1, 2, 3, 4, 5]}']
    refs = [[text, "something else"] for text in texts]
    if name == "valid_json":
        texts = ["1", "2", "3"]
    best, rotated, empty = (metric.score(some, refs).value for some in (texts, texts[1:] + texts[:1], [""] * 3))
    assert best >= rotated >= empty == 0.0
    assert best > empty
    if name not in ("nist", "cider"):
        assert best == pytest.approx(100)


@pytest.mark.parametrize("name", SPOKEN)
def test_statistics_add_up_to_the_score_whatever_the_order_of_rows(name):
    """Kills: statistics of a row that depend on where it stands."""
    metric = METRICS.load(name)()
    counts = metric.statistics(COMPLETIONS[:60], REFERENCES[:60])
    assert counts.shape[0] == 60
    assert counts.dtype == np.float64
    whole = metric.score(COMPLETIONS[:60], REFERENCES[:60]).value
    assert metric.value(counts[::-1].sum(0)) == pytest.approx(whole, rel=1e-12)
    assert metric.value(np.stack([counts.sum(0), counts[:7].sum(0)]))[0] == pytest.approx(whole, rel=1e-12)
    assert metric.score(COMPLETIONS[:60][::-1], REFERENCES[:60][::-1]).value == pytest.approx(whole, rel=1e-9)
    assert metric.signature
    assert METRICS.summary(name)


def test_loss_and_perplexity_are_by_token():
    """Kills: the mean of row means (bug class: perplexity averaged over batches)."""
    totals, tokens = [2.0, 30.0], [1, 9]
    loss, perplexity = METRICS.load("loss")(), METRICS.load("perplexity")()
    assert loss.value(loss.from_losses(totals, tokens).sum(0)) == pytest.approx(3.2)
    assert perplexity.value(perplexity.from_losses(totals, tokens).sum(0)) == pytest.approx(math.exp(3.2))
    with pytest.raises(DataError, match="no row has a supervised token"):
        loss.from_losses([0.0], [0])


@pytest.mark.parametrize(
    ("texts", "refs", "says"),
    [(["a"], [], "references for 0 rows"), ([], [], "no rows"), (["a", "b"], [["a"], []], "row 2 has no reference")],
)
def test_rows_that_cannot_be_scored_are_named(texts, refs, says):
    """Kills: a division by zero instead of a message."""
    with pytest.raises(DataError, match=says):
        check_rows(texts, refs)


def test_names_are_checked_without_the_libraries():
    """Kills: a metric module, torch or sacrebleu imported to list names."""
    code = (
        "import sys; from tunesmith.evaluate.metrics import METRICS; from tunesmith.evaluate.section import "
        "EvaluateSection as E; E(metrics='bleu'); METRICS.names(); "
        "heavy = {'torch', 'numpy', 'sacrebleu', 'rouge_score', 'nltk', 'transformers'} & set(sys.modules); "
        "sys.exit(str(heavy) if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_section_knows_names_and_groups():
    """Kills: an unknown metric found only after training."""
    assert EvaluateSection(metrics=["e2e", "nist", "bleu"]).metrics == (*E2E, "bleu")
    with pytest.raises(ValueError, match=r"'rouge' is no metric.*did you mean rouge"):
        EvaluateSection(metrics=["rouge"])
