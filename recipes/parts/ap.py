"""Ap: average precision, by COCO's own evaluator."""

import contextlib
import io
from pathlib import Path
from typing import Any, Literal

from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval


def average_precision(path: str | Path, results: list[dict[str, Any]], kind: Literal['bbox', 'keypoints']) -> float:
    """Mean over ten thresholds of overlap, 0.5 to 0.95, and over the categories.

    Args:
        path: The json file with the truth, in COCO's format.
        results: What was found, in COCO's format for results.
        kind: What overlaps: boxes, or key points, as measured by their similarity (OKS).

    Returns:
        The precision; 0 if nothing was found, or if there was nothing to find.
    """
    if not results:
        return 0.0
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(str(path))
        evaluator = COCOeval(truth, truth.loadRes(results), kind)
        evaluator.evaluate()
        evaluator.accumulate()
        evaluator.summarize()
    return max(0.0, float(evaluator.stats[0]))
