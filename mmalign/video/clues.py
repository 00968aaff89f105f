"""CAT's clue aggregator: embeddings made from question, video and audio."""

from __future__ import annotations

import json
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mmalign.config import ClueSpec
from mmalign.errors import CheckpointError, ConfigError

SETTINGS = "clues.json"
WEIGHTS = "clues.safetensors"
HEAD = 64  # width of a head of the query transformer, as in BERT


class ClueAggregator(nn.Module):
    """Looks for what a question asks in the features of video and audio.

    For each modality, with weights of its own and F its features [N, D]:

        X = LN_text(up(SelfAttention(F)))                           [N, Dt]
        G = tanh(Attention(question, X))                            [Lq, Dt]
        Y = LN_feature(down(tanh(Attention(X, G))))                 [N, D]
        clues = out(QFormer(queries, widen(Y)))                     [Q, Dt]
        global = project(mean over N of F)                          [1, Dt]

    The two norms are shared. The query transformer is BLIP-2's, with cross-attention in layers 0,
    `cross_every`, and so on. With `residual` each of the three attentions adds its query.

    Without that an untrained one hardly sees what differs: attention that is still almost uniform
    gives every frame nearly the same Y. At widths of 1024 and 2048 the frames of Y differ by 3e-7
    of its norm and another question moves the clues by 1e-5 of theirs; with `residual`, by 0.7 and
    2e-3. Prefer it for one that does not start from trained weights.

    Source: CAT, Ye et al. 2024, arXiv:2403.04640; sizes and the absent residual connections as in
        the released code.
    Departs: rows in batches, with masks; a row may lack a modality. Dropout is 0, not 0.1, since
        policy and reference must not differ by chance. Weights start from Xavier's distribution
        (0.02 at the released sizes); the release starts its query transformer from BLIP-2
        FlanT5-XXL, which is not shipped here.
    """

    def __init__(
        self,
        feature_dim_v: int,
        feature_dim_a: int | None,
        text_dim: int,
        *,
        num_queries: int = 32,
        width: int = 768,
        num_layers: int = 4,
        cross_every: int = 2,
        num_heads: int = 4,
        encoder_dim: int = 1408,
        dropout: float = 0.0,
        use_global: bool = True,
        residual: bool = False,
    ) -> None:
        """Make an untrained one; the defaults are the released sizes.

        Args:
            feature_dim_v: Width of visual features, and of Y for both modalities.
            feature_dim_a: Width of sound features; None for a model that does not hear.
            text_dim: Width of the language model.
            num_queries: Clues a modality, Q.
            width: Of the query transformer, a multiple of 64 where it is above.
            num_layers: Of the query transformer.
            cross_every: Its layers from one cross-attention to the next.
            num_heads: Of the attentions outside of it.
            encoder_dim: Width of what it attends to.
            dropout: Share of values dropped while training.
            use_global: Add one clue a modality, made from the mean of its features.
            residual: False has no residual connections.

        Raises:
            ConfigError: Heads do not divide a width.
        """
        settings = {k: v for k, v in locals().items() if k not in ("self", "__class__")}
        super().__init__()
        self.settings: dict[str, Any] = settings
        for dim in (feature_dim_v, feature_dim_a or feature_dim_v, text_dim):
            if dim % num_heads:
                raise ConfigError(
                    f"video.clues.num_heads is {num_heads}, which does not divide {dim}; features "
                    f"are {feature_dim_v} and {feature_dim_a} wide, the language model {text_dim}"
                )
        if width % max(1, width // HEAD):
            raise ConfigError(
                f"video.clues.width is {width}; above {HEAD} it must be a multiple of {HEAD}"
            )
        self.num_queries, self.use_global, self.residual = num_queries, use_global, residual
        self.norm_text = nn.LayerNorm(text_dim)
        self.norm_feature = nn.LayerNorm(feature_dim_v)
        self.video = _Branch(feature_dim_v, self.settings)
        self.audio = None if feature_dim_a is None else _Branch(feature_dim_a, self.settings)

    def forward(
        self,
        question: Tensor,
        video: Tensor | None = None,
        audio: Tensor | None = None,
        question_mask: Tensor | None = None,
        video_mask: Tensor | None = None,
        audio_mask: Tensor | None = None,
    ) -> Tensor:  # [B, K, Dt]
        """Clues of the video, then of the audio, then the global ones in that order.

        Args:
            question: [B, Lq, Dt], embeddings of its tokens.
            video: [B, Nv, Dv]; None when no row is seen.
            audio: [B, Na, Da]; None when no row is heard.
            question_mask: [B, Lq], True where a token is; None for everywhere.
            video_mask: [B, Nv]; a row without any gets zeros for its clues, see `clue_mask`.
            audio_mask: [B, Na], likewise.

        Raises:
            ConfigError: Sound for an aggregator without, or neither video nor audio.
        """
        dtype = self.norm_text.weight.dtype
        question = question.to(dtype)
        clues: list[Tensor] = []
        means: list[Tensor] = []
        branches = (self.video, video, video_mask), (self.audio, audio, audio_mask)
        for branch, features, mask in branches:
            if features is None:
                continue
            if branch is None:
                raise ConfigError("sound for clues, but the aggregator was made without a sound's")
            seen, mean = branch(self, features.to(dtype), mask, question, question_mask)
            clues.append(seen)
            means += [] if mean is None else [mean]
        if not clues:
            raise ConfigError("clues need the features of an image or of a sound")
        return torch.cat([*clues, *means], 1)

    def num_clue_tokens(self, has_video: bool, has_audio: bool) -> int:
        """Clues of a row with these modalities."""
        if has_audio and self.audio is None:
            raise ConfigError("clues of sound, but the aggregator was made without a sound's")
        return (has_video + has_audio) * (self.num_queries + self.use_global)

    def clue_mask(self, video_mask: Tensor | None, audio_mask: Tensor | None) -> Tensor:
        """Which clues of a batch its rows have; `clues[mask]` is what a `ClueHook` takes.

        Args:
            video_mask: [B, Nv], as for the clues; None when no row is seen.
            audio_mask: [B, Na]; None when no row is heard.

        Returns:
            [B, K] bool.
        """
        masks = [m.any(1, keepdim=True) for m in (video_mask, audio_mask) if m is not None]
        means = masks if self.use_global else []
        return torch.cat([*(m.expand(-1, self.num_queries) for m in masks), *means], 1)

    def save(self, folder: str | Path) -> None:
        """Write weights and sizes into a folder."""
        from mmalign.models.files import save_tensors

        Path(folder).mkdir(parents=True, exist_ok=True)
        text = json.dumps(self.settings, indent=2) + "\n"
        (Path(folder) / SETTINGS).write_text(text, encoding="utf-8")
        save_tensors(self.state_dict(), Path(folder) / WEIGHTS)

    @classmethod
    def load(cls, folder: str | Path) -> ClueAggregator:
        """Read what `save` wrote, in the precision it was saved in.

        Raises:
            CheckpointError: Files are missing or do not fit each other.
        """
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            settings = json.loads((Path(folder) / SETTINGS).read_text(encoding="utf-8"))
            state = load_file(Path(folder) / WEIGHTS)
            with torch.device("meta"):  # no memory for weights that are replaced
                aggregator = cls(**settings)
            aggregator.load_state_dict(state, assign=True)
        except (OSError, ValueError, TypeError, RuntimeError, SafetensorError) as error:
            raise CheckpointError(
                f"{folder} holds no clue aggregator ({SETTINGS} and {WEIGHTS}): {error}"
            ) from error
        return aggregator


class _Branch(nn.Module):
    """One modality's part."""

    def __init__(self, feature_dim: int, settings: dict[str, Any]) -> None:
        super().__init__()
        from transformers import Blip2QFormerConfig, Blip2QFormerModel

        text_dim, heads = settings["text_dim"], settings["num_heads"]
        inner, width = settings["feature_dim_v"], settings["width"]
        dropout = settings["dropout"]

        def attention(dim: int) -> nn.MultiheadAttention:
            return nn.MultiheadAttention(dim, heads, dropout, batch_first=True)

        self.mix = attention(feature_dim)
        self.up = _linear(feature_dim, text_dim)
        self.ask = attention(text_dim)
        self.answer = attention(text_dim)
        self.down = _linear(text_dim, inner)
        self.dropout = nn.Dropout(dropout)
        self.widen = _linear(inner, settings["encoder_dim"])
        self.queries = nn.Parameter(torch.empty(settings["num_queries"], width).normal_(std=0.02))
        self.qformer = Blip2QFormerModel(
            Blip2QFormerConfig(
                hidden_size=width,
                num_hidden_layers=settings["num_layers"],
                num_attention_heads=max(1, width // HEAD),
                intermediate_size=4 * width,
                cross_attention_frequency=settings["cross_every"],
                encoder_hidden_size=settings["encoder_dim"],
                hidden_dropout_prob=dropout,
                attention_probs_dropout_prob=dropout,
            )
        )
        self.out = _linear(width, text_dim)
        self.project = _linear(feature_dim, text_dim) if settings["use_global"] else None

    def forward(
        self,
        shared: ClueAggregator,
        features: Tensor,  # [B, N, D]
        mask: Tensor | None,  # [B, N]
        question: Tensor,  # [B, Lq, Dt]
        question_mask: Tensor | None,  # [B, Lq]
    ) -> tuple[Tensor, Tensor | None]:  # [B, Q, Dt], [B, 1, Dt]
        frames, words = _attended(mask), _attended(question_mask)

        def attend(layer: nn.Module, query: Tensor, keys: Tensor, known: Tensor | None) -> Tensor:
            hidden = None if known is None else ~known
            keys = keys.view_as(keys)  # equal to the query, it takes other kernels when frozen
            found, _ = layer(query, keys, keys, key_padding_mask=hidden, need_weights=False)
            return query + found if shared.residual else found

        x = shared.norm_text(self.dropout(self.up(attend(self.mix, features, features, frames))))
        g = torch.tanh(attend(self.ask, question, x, frames))  # [B, Lq, Dt]
        y = torch.tanh(attend(self.answer, x, g, words))  # [B, N, Dt]
        y = shared.norm_feature(self.dropout(self.down(y)))  # [B, N, Dv]
        found = self.qformer(
            query_embeds=self.queries.expand(len(y), -1, -1),
            encoder_hidden_states=self.widen(y),
            encoder_attention_mask=None if frames is None else frames.long(),
        ).last_hidden_state
        clues = self.out(found)
        mean = None if self.project is None else self.project(_mean(features, frames))
        if mask is None:
            return clues, mean
        there = mask.any(1)[:, None, None]
        none = clues.new_zeros(())
        return torch.where(there, clues, none), None if mean is None else mean.where(there, none)


def frozen_copy(aggregator: ClueAggregator) -> ClueAggregator:
    """A copy for the reference's passes, as the aggregator is now: it never changes."""
    copied = deepcopy(aggregator)
    copied.zero_grad(set_to_none=True)
    return copied.requires_grad_(False).eval()


def _linear(inputs: int, outputs: int) -> nn.Linear:
    layer = nn.Linear(inputs, outputs)
    nn.init.xavier_uniform_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


def _attended(mask: Tensor | None) -> Tensor | None:
    """The mask, all True in rows without anything: a softmax over nothing is nan."""
    return None if mask is None else mask | ~mask.any(1, keepdim=True)


def _mean(features: Tensor, mask: Tensor | None) -> Tensor:  # [B, 1, D]
    if mask is None:
        return features.mean(1, keepdim=True)
    weight = mask[..., None].to(features.dtype)
    return (features * weight).sum(1, keepdim=True) / weight.sum(1, keepdim=True)


def clue_count(spec: ClueSpec) -> Callable[[bool, bool], int]:
    """Clue tokens of a prompt; widths do not matter to their number."""
    if spec.path is not None:
        return ClueAggregator.load(spec.path).num_clue_tokens
    made = ClueAggregator(
        8, 8, 8, num_queries=spec.num_queries, width=8, num_layers=1, cross_every=1, num_heads=1,
        use_global=spec.use_global,
    )  # fmt: skip
    return made.num_clue_tokens
