"""What an encoder learns from queries with passages: contrastive, KL distillation, and distillation rank by rank."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from sentence_transformers.base.losses.gradcache import CachedLossMixin, has_static_embedding_input
from sentence_transformers.sentence_transformer.losses import DistillKLDivLoss
from sentence_transformers.util import all_gather, all_gather_with_grad
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize

from alignkit.core.ranks import rank, world_size
from alignkit.core.retriever_config import Distill, TaskConfig

MASKED = -1e9
"""The score of a passage that is left out of a softmax. Finite: a row in which all others are left out has a gradient,
too."""


def contrastive_loss(scores: Tensor, target: Tensor, left_out: Tensor) -> Tensor:
    """Mean over queries of -log softmax(scores)[target] (InfoNCE; van den Oord et al., 2018, arXiv 1807.03748).

    `scores` [queries, passages] are similarities divided by the temperature, `target` [queries] says which passage is
    the positive, and `left_out` [queries, passages] which passages do not count: a query's other positives, in whatever
    row they stand. Without those it is sentence-transformers' MultipleNegativesRankingLoss.
    """
    return cross_entropy(scores.masked_fill(left_out, MASKED), target)


def stable_distill_loss(scores: Tensor, own: Tensor, teacher: Tensor, left_out: Tensor, temperature: float) -> Tensor:
    """Each passage of a row before those below it and before all other rows' passages, weighted by the teacher.

    With w = softmax(teacher / temperature) and s the scores of a query, mean over queries of
    sum_i w_i -log(exp s_i / (sum_{j >= i} exp s_j + sum over other rows' passages of exp s)) (Zhang et al., 2023, arXiv
    2310.07554, stabilized distillation). `scores` and `left_out` [queries, passages] are those of `contrastive_loss`;
    `own` [queries, ranks] says where the row's own passages stand, its positive first and its negatives by falling
    teacher score, and `teacher` [queries, ranks] holds their teacher scores. A list that is ranked wrongly costs as
    much as it would under ListMLE, and good passages still have all of the batch against them.
    """
    weights = torch.softmax(teacher / temperature, dim=1)
    own_scores = scores.gather(1, own)
    from_here_on = own_scores.flip(1).logcumsumexp(1).flip(1)
    others = scores.masked_fill(left_out, MASKED).scatter(1, own, MASKED).logsumexp(1, keepdim=True)
    return (weights * (torch.logaddexp(from_here_on, others) - own_scores)).sum(1).mean()


class RetrievalLoss(CachedLossMixin, torch.nn.Module):
    """The loss of a batch of one task: `contrastive_weight` and `distill_weight` times what the task asks for.

    A batch has `task`; `passages` [queries, group], a number for each passage's text; `positives` [queries, most], the
    numbers of all the query's positives; and `teacher` [queries, group], where there are teacher scores. All processes'
    passages compete where `across_processes`, and gradients flow back to all of them. A batch goes through the encoder
    `rows_at_once` rows at a time, by gradient caching (Gao et al., 2021, arXiv 2101.06983), which changes its loss and
    its gradient by nothing.
    """

    def __init__(
        self,
        encoder: Any,
        tasks: Mapping[str, TaskConfig],
        *,
        temperature: float,
        cosine: bool = True,
        rows_at_once: int | None = None,
        group: int = 1,
        across_processes: bool = True,
    ) -> None:
        super().__init__()
        self.model = encoder
        self.tasks = tasks
        self.temperature = temperature
        self.cosine = cosine
        self.across_processes = across_processes and world_size() > 1
        self.cached = rows_at_once is not None and not has_static_embedding_input(encoder)
        self.mini_batch_size = (rows_at_once or 1) * group
        self.kl = {
            name: DistillKLDivLoss(
                encoder,
                similarity_fct=self._paired,
                teacher_temperature=task.teacher_temperature,
                student_temperature=task.student_temperature,
            )
            for name, task in tasks.items()
        }
        self.on_top = self.queries = 0
        """Queries of the last batch whose positive had the highest score, and all its queries."""

    def forward(self, columns: Sequence[dict[str, Tensor]], batch: dict[str, Any]) -> Tensor:
        """The loss; `columns` are the tokens of the queries, and those of the passages, row by row."""
        if self.cached:
            cached: Tensor = self.forward_cached(columns, batch)  # type: ignore[arg-type]
            return cached
        queries, passages = (self.model(column)["sentence_embedding"] for column in columns)
        return self.loss(queries, passages, batch)

    def calculate_loss(self, reps: list[list[Tensor]], labels: Any = None, *, with_backward: bool = False) -> Tensor:
        """The loss of embeddings that came in parts (called by gradient caching)."""
        queries, passages = (torch.cat(parts) for parts in reps)
        loss = self.loss(queries, passages, labels)
        if with_backward:
            loss.backward()
            loss = loss.detach()
        return loss

    def loss(self, queries: Tensor, passages: Tensor, batch: dict[str, Any]) -> Tensor:
        """The loss of embeddings: `queries` [queries, dimensions], `passages` [queries * group, dimensions]."""
        task = self.tasks[batch["task"]]
        count, group = batch["passages"].shape
        queries, own_passages = queries.float(), passages.float()
        if self.cosine:
            queries, own_passages = normalize(queries, dim=-1), normalize(own_passages, dim=-1)
        passages, numbers, first = own_passages, batch["passages"].flatten(), 0
        if self.across_processes:
            passages, numbers, first = all_gather_with_grad(passages), all_gather(numbers), rank() * count
        scores = queries @ passages.T / self.temperature
        places = torch.arange(first * group, (first + count) * group, device=scores.device).view(count, group)
        target = places[:, 0]
        left_out = (numbers[None, :, None] == batch["positives"][:, None, :]).any(-1)
        left_out.scatter_(1, target[:, None], False)
        self.queries = count
        self.on_top = int((scores.masked_fill(left_out, MASKED).argmax(1) == target).sum())
        total = scores.new_zeros(())
        if task.contrastive_weight:
            total = total + task.contrastive_weight * contrastive_loss(scores, target, left_out)
        if not task.distill_weight:
            return total
        if task.distill is Distill.stable:
            distill = stable_distill_loss(scores, places, batch["teacher"], left_out, task.teacher_temperature)
        else:
            columns = own_passages.view(count, group, -1).unbind(1)
            distill = self.kl[batch["task"]].compute_loss_from_embeddings([queries, *columns], batch["teacher"])
        return total + task.distill_weight * distill

    def _paired(self, queries: Tensor, passages: Tensor) -> Tensor:
        return (queries * passages).sum(-1) / self.temperature
