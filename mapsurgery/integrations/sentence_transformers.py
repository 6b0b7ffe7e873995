"""sentence-transformers' trainers for patched models.

    from mapsurgery.integrations.sentence_transformers import SentenceTransformerTrainer  # in place of theirs

    trainer = SentenceTransformerTrainer(model, arguments, train_dataset=data, loss=loss)  # a patched model

See docs/tools.md.
"""

from __future__ import annotations

from typing import Any

import sentence_transformers as theirs
from torch import nn
from transformers import Trainer

from .transformers import AdapterTrainer, takes_groups


class _OfSentenceTransformers(AdapterTrainer):
    """What a loss trains beside the model has groups of its own, as sentence-transformers decays it.

    Raises:
        ValueError: what `AdapterTrainer` refuses, and `learning_rate_mapping`.
    """

    loss: Any

    def get_optimizer_cls_and_kwargs(self, args: Any, model: Any = None) -> tuple[Any, Any]:  # type: ignore[override]
        own = Trainer.get_optimizer_cls_and_kwargs(args, model)
        if not takes_groups(*own):  # it makes its groups itself
            return super().get_optimizer_cls_and_kwargs(args, model)
        if args.learning_rate_mapping:
            raise ValueError(
                f"learning_rate_mapping={args.learning_rate_mapping} makes groups that decay magnitudes: pass "
                'param_groups={"layer_lr_factors": {glob: factor}} to the trainer'
            )
        return own

    def _groups_beside_the_model(self) -> list[dict[str, Any]]:
        losses = nn.ModuleDict(self.loss) if isinstance(self.loss, dict) else self.loss
        of_model, decayed = set(self.model.parameters()), set(self.get_decay_parameter_names(losses))
        beside = {n: p for n, p in losses.named_parameters() if p.requires_grad and p not in of_model}
        halves = [[p for n, p in beside.items() if (n in decayed) is decays] for decays in (True, False)]
        rate, decays = self.args.learning_rate, (self.args.weight_decay, 0.0)
        return [
            {"params": half, "lr": rate, "weight_decay": decay, "name": "loss"}
            for half, decay in zip(halves, decays, strict=True)
            if half
        ]


class SentenceTransformerTrainer(_OfSentenceTransformers, theirs.SentenceTransformerTrainer):  # type: ignore[misc]
    """`sentence_transformers.SentenceTransformerTrainer` with what `AdapterTrainer` does."""


class CrossEncoderTrainer(_OfSentenceTransformers, theirs.CrossEncoderTrainer):  # type: ignore[misc]
    """`sentence_transformers.CrossEncoderTrainer` with what `AdapterTrainer` does."""


class SparseEncoderTrainer(_OfSentenceTransformers, theirs.SparseEncoderTrainer):  # type: ignore[misc]
    """`sentence_transformers.SparseEncoderTrainer` with what `AdapterTrainer` does."""
