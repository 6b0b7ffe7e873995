"""Attention, transformers with an eval fast path, recurrent layers and embeddings."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from ..entry import Entry, args, floats, ids
from .common import hazard, rows


class Attention(nn.Module):
    """nn.MultiheadAttention on its own or across two sequences."""

    def __init__(self, cross: bool = False, weights: bool = False, **options: Any) -> None:
        super().__init__()
        self.cross, self.weights = cross, weights
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True, **options)
        self.fc = nn.Linear(8, 3)

    def forward(self, x: Tensor, memory: Tensor | None = None) -> Tensor:
        other = memory if self.cross and memory is not None else x
        return self.fc(self.attention(x, other, other, need_weights=self.weights)[0])


def _encoder(nested: bool, **options: Any) -> nn.Module:
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, **options)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=nested)


class MaskedEncoder(nn.Module):
    """The nested-tensor fast path: padding is dropped in inference."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = _encoder(nested=True)

    def forward(self, x: Tensor, padding: Tensor) -> Tensor:
        return self.encoder(x, src_key_padding_mask=padding).masked_fill(padding[..., None], 0.0)


class Translation(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.model = nn.Transformer(8, 2, 1, 1, 16, batch_first=True)

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(target.shape[1]).to(target)
        return self.model(source, target, tgt_mask=mask)


class Recurrent(nn.Module):
    def __init__(self, kind: type[nn.RNNBase], packed: bool = False, **options: Any) -> None:
        super().__init__()
        self.packed = packed
        self.rnn = kind(6, 5, batch_first=True, **options)

    def forward(self, x: Tensor) -> Tensor:
        if not self.packed:
            return self.rnn(x)[0]
        sequence = pack_padded_sequence(x, torch.tensor([4, 3]), batch_first=True)
        return pad_packed_sequence(self.rnn(sequence)[0], batch_first=True)[0]


class Cells(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.gru, self.rnn = nn.LSTMCell(6, 6), nn.GRUCell(6, 6), nn.RNNCell(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        hidden, cell = torch.zeros_like(x[:, 0]), torch.zeros_like(x[:, 0])
        for step in x.unbind(1):
            hidden, cell = self.lstm(step, (hidden, cell))
            hidden = self.rnn(step, self.gru(step, hidden))
        return hidden


class Embeddings(nn.Module):
    """Padding, frequency-scaled gradients, and rows read in one call."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(24, 8, **options), nn.Embedding(16, 8)
        self.fc = nn.Linear(8, 3)

    def forward(self, ids: Tensor) -> Tensor:
        places = torch.arange(ids.shape[1])
        return self.fc((self.words(ids) + self.places(places)).tanh())


class Bags(nn.Module):
    def __init__(self, mode: str, weighted: bool = False) -> None:
        super().__init__()
        self.weighted = weighted
        self.bag = nn.EmbeddingBag(24, 8, mode=mode, padding_idx=0)

    def forward(self, ids: Tensor) -> Tensor:
        weights = torch.linspace(0.5, 1.5, ids.numel()).reshape(ids.shape).to(self.bag.weight.dtype)
        return self.bag(ids, per_sample_weights=weights if self.weighted else None)


def _two(length: int = 4) -> Any:
    return lambda: args(floats(2, 5, 8), floats(2, length, 8))


def _tokens() -> Any:
    tokens = ids(2, 6)
    tokens[1, 4:] = 0
    return args(tokens)


def _attention() -> list[Entry]:
    kinds: dict[str, dict[str, Any]] = {
        "plain": {},
        "weights": {"weights": True},
        "no_bias": {"bias": False},
        "bias_kv": {"add_bias_kv": True, "add_zero_attn": True},
    }
    found = []
    for name, options in kinds.items():
        found += hazard(f"attention_{name}", lambda o=options: Attention(**o), rows(2, 5, 8))
    found += hazard("attention_cross", lambda: Attention(cross=True), _two())
    separate = {"cross": True, "kdim": 6, "vdim": 4}
    found += hazard("attention_separate", lambda: SeparateAttention(**separate), lambda: args(floats(2, 5, 8)))
    return found


class SeparateAttention(nn.Module):
    """Keys and values of other widths: three projections in the packed one's place."""

    def __init__(self, cross: bool, kdim: int, vdim: int) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, kdim=kdim, vdim=vdim, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x[..., :6], x[..., :4])[0]


def _transformers() -> list[Entry]:
    def padded() -> Any:
        padding = torch.zeros(2, 5, dtype=torch.bool)
        padding[1, 3:] = True
        return args(floats(2, 5, 8), padding)

    decoder = lambda: nn.TransformerDecoder(nn.TransformerDecoderLayer(8, 2, 16, batch_first=True), 2)  # noqa: E731
    layer = lambda: nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)  # noqa: E731
    return [
        *hazard("fast_path_encoder", lambda: _encoder(nested=False), rows(2, 5, 8)),
        *hazard("fast_path_encoder_gelu", lambda: _encoder(nested=False, activation="gelu"), rows(2, 5, 8)),
        *hazard("fast_path_norm_first", lambda: _encoder(nested=False, norm_first=True), rows(2, 5, 8)),
        *hazard("fast_path_nested", MaskedEncoder, padded),
        *hazard("fast_path_layer", layer, rows(2, 5, 8)),
        *hazard("transformer_decoder", decoder, _two()),
        *hazard("transformer_both", Translation, _two()),
    ]


def _recurrent() -> list[Entry]:
    kinds: dict[str, Any] = {
        "lstm": lambda: Recurrent(nn.LSTM),
        "lstm_deep": lambda: Recurrent(nn.LSTM, num_layers=2, bidirectional=True),
        "lstm_projected": lambda: Recurrent(nn.LSTM, proj_size=3),
        "lstm_packed": lambda: Recurrent(nn.LSTM, packed=True),
        "gru": lambda: Recurrent(nn.GRU, num_layers=2),
        "rnn": lambda: Recurrent(nn.RNN, bias=False),
        "cells": Cells,
    }
    return [e for name, make in kinds.items() for e in hazard(f"recurrent_{name}", make, rows(2, 4, 6))]


def _embeddings() -> list[Entry]:
    kinds: dict[str, Any] = {
        "plain": Embeddings,
        "padding": lambda: Embeddings(padding_idx=0),
        "frequency": lambda: Embeddings(scale_grad_by_freq=True),
        "sparse": lambda: Embeddings(sparse=True),
        "bag_mean": lambda: Bags("mean"),
        "bag_sum": lambda: Bags("sum", weighted=True),
        "bag_max": lambda: Bags("max"),
    }
    found = [e for name, make in kinds.items() for e in hazard(f"embedding_{name}", make, _tokens)]
    return found + hazard("embedding_max_norm", lambda: Embeddings(max_norm=1.0), _tokens)


def entries() -> list[Entry]:
    return [*_attention(), *_transformers(), *_recurrent(), *_embeddings()]
