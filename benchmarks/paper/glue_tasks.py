"""GLUE as the paper runs it: Table 6's hyperparameters, the metrics of Table 2, and Table 2's own figures."""

from __future__ import annotations

from collections.abc import Callable, Sequence
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
    """folders: of a data root, the first that is there. lr_warmup: steps. A score of several metrics is their mean."""

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

# Table 2 (DeBERTaV3-base, r = 8), in the order of its columns; of QQP and MNLI the mean of the two figures it has
COLUMNS = ("cola", "sst2", "mrpc", "stsb", "qqp", "mnli", "qnli", "rte")
_TABLE_2 = {
    "full": (69.19, 95.63, 89.46, 91.60, 91.10, 90.01, 94.03, 83.75),
    "bitfit": (66.96, 94.84, 87.75, 91.35, 86.63, 89.64, 92.24, 78.70),
    "lora": (69.82, 94.95, 89.95, 91.60, 90.69, 90.67, 93.87, 85.20),
    "dora": (70.85, 95.79, 90.93, 91.79, 92.07, 90.29, 94.10, 86.04),
    "adalora": (71.45, 96.10, 90.69, 91.84, 90.99, 90.78, 94.55, 88.09),
    "lora-pro": (71.36, 95.76, 90.20, 91.92, 90.90, 90.21, 94.29, 85.56),
    "lora-rite": (69.55, 95.41, 90.93, 91.79, 90.72, 90.28, 94.42, 85.20),
    "reflora": (71.73, 95.99, 91.42, 92.03, 90.99, 90.32, 94.40, 88.09),
    "reflora-s": (70.66, 95.76, 90.44, 92.21, 91.16, 90.15, 94.16, 87.73),
}
PAPER = {method: dict(zip(COLUMNS, figures)) for method, figures in _TABLE_2.items()}
