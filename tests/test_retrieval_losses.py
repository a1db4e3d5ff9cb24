"""What an encoder learns from: values derived by hand, and those of sentence-transformers."""

from __future__ import annotations

import math
from importlib.util import find_spec
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from alignkit.core.retriever_config import Distill, TaskConfig

pytestmark = pytest.mark.skipif(find_spec("sentence_transformers") is None, reason="alignkit[retrieval]")

NONE_OUT = torch.zeros(2, 4, dtype=torch.bool)


def module(task: TaskConfig, temperature: float = 0.05, **others: Any) -> Any:
    from alignkit.training.retrieval_losses import RetrievalLoss

    encoder = torch.nn.Sequential(torch.nn.Identity())
    return RetrievalLoss(encoder, {"qa": task}, temperature=temperature, **others)


def batch(passages: list[list[int]], teacher: Tensor | None = None, positives: Any = None) -> dict[str, Any]:
    numbers = torch.tensor(passages)
    found = {"task": "qa", "passages": numbers, "positives": numbers[:, :1] if positives is None else positives}
    return found | ({} if teacher is None else {"teacher": teacher})


def embeddings(queries: int, group: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    return torch.randn(queries, 6, generator=generator), torch.randn(queries * group, 6, generator=generator)


def test_contrastive_by_hand() -> None:
    """Query 0 scores its positive 2 and the others 0, 1, 0; query 1 its positive 1 and the others 1."""
    from alignkit.training.retrieval_losses import contrastive_loss

    scores = torch.tensor([[2.0, 0.0, 1.0, 0.0], [1.0, 1.0, 1.0, 1.0]])
    expected = (math.log(math.e**2 + 2 + math.e) - 2 + math.log(4)) / 2
    assert float(contrastive_loss(scores, torch.tensor([0, 2]), NONE_OUT)) == pytest.approx(expected, abs=1e-6)


def test_another_rows_copy_of_a_positive_is_no_negative() -> None:
    """Both queries have the positive 5: what is left against each is one negative of its own and one of the other."""
    loss = module(TaskConfig(), temperature=1.0)
    queries, passages = embeddings(2, 2)
    q, p = torch.nn.functional.normalize(queries), torch.nn.functional.normalize(passages)
    scores = (q @ p.T).tolist()
    expected = 0.0
    for row, own in ((0, 0), (1, 2)):
        against = [scores[row][own], scores[row][1], scores[row][3]]
        expected += (math.log(sum(map(math.exp, against))) - scores[row][own]) / 2
    assert float(loss.loss(queries, passages, batch([[5, 6], [5, 7]]))) == pytest.approx(expected, abs=1e-6)


def test_contrastive_is_that_of_sentence_transformers() -> None:
    from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss

    queries, passages = embeddings(5, 3)
    columns = list(passages.view(5, 3, 6).unbind(1))
    theirs = MultipleNegativesRankingLoss(SimpleNamespace(), scale=20.0)  # type: ignore[arg-type]
    expected = theirs.compute_loss_from_embeddings([queries, *columns], torch.empty(0))
    found = module(TaskConfig()).loss(queries, passages, batch(torch.arange(15).view(5, 3).tolist()))
    assert float(found) == pytest.approx(float(expected), abs=1e-6)


def test_kl_by_hand_and_by_sentence_transformers() -> None:
    from sentence_transformers.sentence_transformer.losses import DistillKLDivLoss

    queries, passages = embeddings(2, 2)
    teacher = torch.tensor([[1.0, 3.0], [0.5, 0.0]])
    task = TaskConfig(contrastive_weight=0.0, distill_weight=2.0, teacher_temperature=0.5)
    found = module(task, temperature=0.1).loss(queries, passages, batch([[0, 1], [2, 3]], teacher))
    q, p = torch.nn.functional.normalize(queries), torch.nn.functional.normalize(passages)
    expected = 0.0
    for row in range(2):
        wanted = [math.exp(float(score) / 0.5) for score in teacher[row]]
        given = [math.exp(float(q[row] @ p[2 * row + place]) / 0.1) for place in range(2)]
        for want, give in zip(wanted, given, strict=True):
            expected += want / sum(wanted) * math.log(want / sum(wanted) * sum(given) / give)
    assert float(found) == pytest.approx(2 * expected / 2, abs=1e-5)
    theirs = DistillKLDivLoss(
        SimpleNamespace(),  # type: ignore[arg-type]
        similarity_fct=lambda a, b: torch.nn.functional.cosine_similarity(a, b) / 0.1,
        student_temperature=1.0,
        teacher_temperature=0.5,
    )
    columns = list(passages.view(2, 2, 6).unbind(1))
    assert float(found) / 2 == pytest.approx(
        float(theirs.compute_loss_from_embeddings([queries, *columns], teacher)), abs=1e-6
    )


def test_stable_distillation_by_hand() -> None:
    """Rank 0 stands against all, rank 1 against the other row's passages alone; each is weighted by the teacher."""
    from alignkit.training.retrieval_losses import stable_distill_loss

    scores = torch.tensor([[1.0, 2.0, 0.0, -1.0], [0.0, 3.0, 1.0, 0.5]])
    teacher = torch.tensor([[0.0, math.log(3)], [math.log(4), 0.0]])
    own = torch.tensor([[0, 1], [2, 3]])
    e = math.exp
    first = 0.25 * (math.log(e(1) + e(2) + e(0) + e(-1)) - 1) + 0.75 * (math.log(e(2) + e(0) + e(-1)) - 2)
    second = 0.8 * (math.log(e(0) + e(3) + e(1) + e(0.5)) - 1) + 0.2 * (math.log(e(0) + e(3) + e(0.5)) - 0.5)
    found = stable_distill_loss(scores, own, teacher, NONE_OUT, 1.0)
    assert float(found) == pytest.approx((first + second) / 2, abs=1e-6)


@pytest.mark.parametrize("distill", [Distill.kl, Distill.stable])
def test_a_single_row_has_a_gradient_without_any_other(distill: Distill) -> None:
    task = TaskConfig(distill_weight=1.0, distill=distill)
    queries, passages = (part.requires_grad_() for part in embeddings(1, 2))
    module(task).loss(queries, passages, batch([[0, 1]], torch.tensor([[1.0, 0.0]]))).backward()
    assert queries.grad is not None
    assert torch.isfinite(queries.grad).all()
    assert queries.grad.abs().sum() > 0


def test_the_sum_is_weighted() -> None:
    queries, passages = embeddings(2, 2)
    rows = batch([[0, 1], [2, 3]], torch.tensor([[2.0, 1.0], [0.0, 1.0]]))

    def value(contrastive: float, distill: float) -> float:
        task = TaskConfig(contrastive_weight=contrastive, distill_weight=distill, distill=Distill.stable)
        return float(module(task).loss(queries, passages, rows))

    assert value(0.2, 1.0) == pytest.approx(0.2 * value(1.0, 0.0) + value(0.0, 1.0), abs=1e-5)
