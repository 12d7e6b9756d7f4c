"""The table of metrics. Names and their lines cost nothing; a metric's libraries load when it is used."""

from tunesmith.core.registry import Registry

METRICS = Registry(
    "metric",
    {
        "loss": (
            "tunesmith.evaluate.metrics.losses:Loss",
            "mean negative log-likelihood of a supervised token, nats",
        ),
        "perplexity": (
            "tunesmith.evaluate.metrics.losses:Perplexity",
            "exp of the loss, by token over all rows",
        ),
        "divergence": (
            "tunesmith.evaluate.metrics.losses:Divergence",
            "mean distance from the teacher of a run of objective: distill, nats a token",
        ),
        "bleu": ("tunesmith.evaluate.metrics.bleu:Bleu", "BLEU as sacrebleu computes it, 0-100"),
        "chrf": (
            "tunesmith.evaluate.metrics.bleu:ChrF",
            "character n-gram F-score as sacrebleu computes it, 0-100",
        ),
        "rouge1": (
            "tunesmith.evaluate.metrics.rouge:Rouge1",
            "shared words, F-measure of rouge-score, 0-100",
        ),
        "rouge2": (
            "tunesmith.evaluate.metrics.rouge:Rouge2",
            "shared word pairs, F-measure of rouge-score, 0-100",
        ),
        "rougeL": (
            "tunesmith.evaluate.metrics.rouge:RougeL",
            "longest common subsequence, rouge-score, 0-100",
        ),
        "rougeLsum": (
            "tunesmith.evaluate.metrics.rouge:RougeLsum",
            "the same line by line, rouge-score, 0-100",
        ),
        "bleu_mteval": (
            "tunesmith.evaluate.metrics.mteval:BleuMteval",
            "BLEU of the E2E challenge (mteval), 0-100",
        ),
        "nist": ("tunesmith.evaluate.metrics.mteval:Nist", "NIST of the E2E challenge (mteval), from 0"),
        "meteor": (
            "tunesmith.evaluate.metrics.meteor:Meteor",
            "METEOR 1.5, needs Java and the extra meteor, 0-100",
        ),
        "rougeL_coco": (
            "tunesmith.evaluate.metrics.coco:RougeLCoco",
            "ROUGE-L of the E2E challenge (COCO), 0-100",
        ),
        "cider": ("tunesmith.evaluate.metrics.coco:Cider", "CIDEr-D of the E2E challenge (COCO), 0-10"),
        "exact_match": (
            "tunesmith.evaluate.metrics.match:ExactMatch",
            "share equal to a reference, per cent",
        ),
        "f1": ("tunesmith.evaluate.metrics.match:TokenF1", "shared words with the best reference, per cent"),
        "accuracy": ("tunesmith.evaluate.metrics.match:Accuracy", "share of right labels, per cent"),
        "logical_form": (
            "tunesmith.evaluate.metrics.wikisql:LogicalForm",
            "share of queries that are the reference's, as WikiSQL compares them, per cent",
        ),
        "execution": (
            "tunesmith.evaluate.metrics.execution:Execution",
            "share of queries with the reference's result on the row's table, per cent",
        ),
        "matthews": ("tunesmith.evaluate.metrics.labels:Matthews", "Matthews correlation of labels, -100 to 100"),
        "pearson": ("tunesmith.evaluate.metrics.labels:Pearson", "correlation of scores, -100 to 100"),
        "spearman": ("tunesmith.evaluate.metrics.labels:Spearman", "correlation of the ranks of scores, -100 to 100"),
        "valid_json": ("tunesmith.evaluate.metrics.match:ValidJson", "share that parses as JSON, per cent"),
    },
)

PREDICTED = Registry(
    "metric of predictions",
    {
        "loss": ("tunesmith.evaluate.metrics.labels:HeadLoss", "mean loss of a label or a score"),
        "accuracy": ("tunesmith.evaluate.metrics.labels:LabelAccuracy", "share of right labels, per cent"),
        "f1": ("tunesmith.evaluate.metrics.labels:LabelF1", "F1 of the second of two labels, or mean F1, per cent"),
        **{name: METRICS.table[name] for name in ("matthews", "pearson", "spearman")},
    },
)
"""What a prediction head is judged by; `f1` and `loss` mean something else for a model that writes."""

COMPARED = Registry(
    "metric of compared answers",
    {
        "loss": ("tunesmith.evaluate.metrics.pairs:PairLoss", "mean loss of a row's order"),
        "accuracy": ("tunesmith.evaluate.metrics.pairs:PairAccuracy", "share of pairs whose better answer is ahead"),
    },
)
"""What scores of compared answers are judged by."""

OF_PROBLEM = {
    "classification": ("loss", "accuracy", "f1", "matthews"),
    "regression": ("loss", "pearson", "spearman"),
    "tokens": ("loss", "accuracy", "f1", "matthews"),
    "reward": ("loss", "accuracy"),
}
"""The metrics of each problem."""

E2E = ("bleu_mteval", "nist", "meteor", "rougeL_coco", "cider")
"""The five of the E2E challenge, equal to its reference implementation; `e2e` in a list of metrics means these."""
