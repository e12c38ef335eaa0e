"""GLUE as the paper runs it: Table 6's hyperparameters, the metrics of Table 2, and Table 2's own figures."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy
from torch import Tensor

from .. import data

HUB = "hub"
Score = Callable[[Sequence[float], Sequence[float]], float]


def matthews(labels: Sequence[float], found: Sequence[float]) -> float:
    from sklearn.metrics import matthews_corrcoef

    return float(matthews_corrcoef(labels, found))


def accuracy(labels: Sequence[float], found: Sequence[float]) -> float:
    from sklearn.metrics import accuracy_score

    return float(accuracy_score(labels, found))


def f1(labels: Sequence[float], found: Sequence[float]) -> float:
    from sklearn.metrics import f1_score

    return float(f1_score(labels, found))


def pearson(labels: Sequence[float], found: Sequence[float]) -> float:
    """0 for constant predictions, for which it is not defined."""
    from scipy.stats import pearsonr

    return float(pearsonr(labels, found).statistic) if numpy.std(found) > 0 else 0.0


def spearman(labels: Sequence[float], found: Sequence[float]) -> float:
    """0 for constant predictions, for which it is not defined."""
    from scipy.stats import spearmanr

    return float(spearmanr(labels, found).statistic) if numpy.std(found) > 0 else 0.0


@dataclass(frozen=True)
class GlueTask:
    """folders: of a data root, the first that is there. lr_warmup: steps.

    The score, of which averages are made, is the first metric, as in the paper; of a regression the mean of both.
    """

    folders: tuple[str, ...]
    metrics: dict[str, Score]
    epochs: int
    lr_warmup: int
    length: int
    dropout: float
    weight_decay: float
    regression: bool = False

    def load(self, root: Path | str) -> data.Task:
        """From a folder, or the hub where `root` is "hub". Raises FileNotFoundError where it is not there."""
        if str(root) == HUB:
            return data.from_hub(f"nyu-mll/glue:{self.folders[0]}", self.regression)
        root = Path(root)
        for folder in self.folders:
            if (root / folder).is_dir():
                return data.from_path(root / folder, self.regression)
        raise FileNotFoundError(f"--data: expected a folder {' or '.join(self.folders)} in {root}, found none.")

    def score(self, scores: Mapping[str, float]) -> float:
        values = list(scores.values())
        return sum(values) / len(values) if self.regression else values[0]

    def scores(self, logits: Tensor, labels: Sequence[float]) -> dict[str, float]:
        """Every metric, in per cent."""
        found = logits.squeeze(-1).tolist() if self.regression else logits.argmax(-1).tolist()
        return {name: 100 * metric(labels, found) for name, metric in self.metrics.items()}


TASKS = {
    "cola": GlueTask(("cola",), {"Matthews": matthews}, 5, 100, 64, 0.15, 0.0),
    "sst2": GlueTask(("sst2",), {"accuracy": accuracy}, 2, 500, 128, 0.0, 0.01),
    "mrpc": GlueTask(("mrpc",), {"accuracy": accuracy}, 10, 50, 128, 0.0, 0.01),
    "stsb": GlueTask(("stsb",), {"Pearson": pearson, "Spearman": spearman}, 10, 100, 128, 0.1, 0.1, True),
    "qqp": GlueTask(("qqp", "qqp_subset"), {"accuracy": accuracy, "F1": f1}, 5, 1000, 320, 0.2, 0.01),
    "mnli": GlueTask(("mnli", "mnli_subset"), {"accuracy": accuracy}, 5, 1000, 256, 0.15, 0.0),
    "qnli": GlueTask(("qnli",), {"accuracy": accuracy}, 5, 500, 512, 0.1, 0.01),
    "rte": GlueTask(("rte",), {"accuracy": accuracy}, 10, 50, 320, 0.2, 0.01),
}

# Table 2 (DeBERTaV3-base, r = 8), in the order of its columns: of QQP the accuracy, of MNLI the matched set, which its
# averages are made of; the last figure is its average
COLUMNS = ("cola", "sst2", "mrpc", "stsb", "qqp", "mnli", "qnli", "rte")
_TABLE_2 = {
    "full": (69.19, 95.63, 89.46, 91.60, 92.40, 89.90, 94.03, 83.75, 88.25),
    "bitfit": (66.96, 94.84, 87.75, 91.35, 88.41, 89.37, 92.24, 78.70, 86.20),
    "lora": (69.82, 94.95, 89.95, 91.60, 91.99, 90.65, 93.87, 85.20, 88.50),
    "dora": (70.85, 95.79, 90.93, 91.79, 92.07, 90.29, 94.10, 86.04, 88.98),
    "adalora": (71.45, 96.10, 90.69, 91.84, 92.23, 90.76, 94.55, 88.09, 89.46),
    "lora-pro": (71.36, 95.76, 90.20, 91.92, 92.19, 90.23, 94.29, 85.56, 88.94),
    "lora-rite": (69.55, 95.41, 90.93, 91.79, 92.02, 90.22, 94.42, 85.20, 88.69),
    "reflora": (71.73, 95.99, 91.42, 92.03, 92.28, 90.23, 94.40, 88.09, 89.52),
    "reflora-s": (70.66, 95.76, 90.44, 92.21, 92.43, 90.13, 94.16, 87.73, 89.19),
}
PAPER = {method: dict(zip(COLUMNS, figures)) for method, figures in _TABLE_2.items()}
AVERAGES = {method: figures[-1] for method, figures in _TABLE_2.items()}
