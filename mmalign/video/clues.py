"""CAT's clue aggregator: embeddings from question, video and audio, placed before the media."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from mmalign.config import ClueSpec
from mmalign.errors import CheckpointError, ConfigError, DataError
from mmalign.text.packing import uploaded
from mmalign.video.model import Encoded

if TYPE_CHECKING:
    from transformers import PreTrainedModel

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
    Departs: a row may lack a modality. Dropout is 0, not 0.1, since policy and reference must not
        differ by chance. Weights start from Xavier's distribution (0.02 at the released sizes); the
        release starts its query transformer from BLIP-2 FlanT5-XXL, which is not shipped here.
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
        self, question: Tensor, video: Tensor | None = None, audio: Tensor | None = None
    ) -> Tensor:  # [B, K, Dt]
        """Clues of the video, then of the audio, then the global ones in that order.

        Args:
            question: [B, Lq, Dt], embeddings of its tokens.
            video: [B, Nv, Dv]; None when nothing is seen.
            audio: [B, Na, Da]; None when nothing is heard.

        Raises:
            ConfigError: Sound for an aggregator without, or neither video nor audio.
        """
        dtype = self.norm_text.weight.dtype
        clues: list[Tensor] = []
        means: list[Tensor] = []
        for branch, features in ((self.video, video), (self.audio, audio)):
            if features is None:
                continue
            if branch is None:
                raise ConfigError("sound for clues, but the aggregator was made without a sound's")
            features = features.to(dtype)
            clues.append(branch(self, features, question.to(dtype)))
            if branch.project is not None:
                means.append(branch.project(features.mean(1, keepdim=True)))
        if not clues:
            raise ConfigError("clues need the features of an image or of a sound")
        return torch.cat([*clues, *means], 1)

    def num_clue_tokens(self, has_video: bool, has_audio: bool) -> int:
        """Clues of a row with these modalities."""
        if has_audio and self.audio is None:
            raise ConfigError("clues of sound, but the aggregator was made without a sound's")
        return (has_video + has_audio) * (self.num_queries + self.use_global)

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

    def forward(  # [B, N, D], [B, Lq, Dt] -> [B, Q, Dt]
        self, shared: ClueAggregator, features: Tensor, question: Tensor
    ) -> Tensor:
        def attend(layer: nn.Module, query: Tensor, keys: Tensor) -> Tensor:
            keys = keys.view_as(keys)  # equal to the query, it takes other kernels when frozen
            found, _ = layer(query, keys, keys, need_weights=False)
            return query + found if shared.residual else found

        x = shared.norm_text(self.dropout(self.up(attend(self.mix, features, features))))
        g = torch.tanh(attend(self.ask, question, x))  # [B, Lq, Dt]
        y = torch.tanh(attend(self.answer, x, g))  # [B, N, Dt]
        y = shared.norm_feature(self.dropout(self.down(y)))  # [B, N, Dv]
        queries = self.queries.expand(len(y), -1, -1)
        found = self.qformer(query_embeds=queries, encoder_hidden_states=self.widen(y))
        return self.out(found.last_hidden_state)


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


def clue_count(spec: ClueSpec) -> Callable[[bool, bool], int]:
    """Clue tokens of a prompt that is seen, and heard, where no aggregator is made."""
    if spec.path is not None:
        return ClueAggregator.load(spec.path).num_clue_tokens
    each = spec.num_queries + spec.use_global
    return lambda seen, heard: (seen + heard) * each


CLUE_TOKEN = "<|clue|>"
"""Stands for one embedding of the aggregator."""

_OPENERS = (
    "<|vision_start|>",
    "<|vision_bos|>",
    "<|audio_start|>",
    "<|audio_bos|>",
    "<|begin_of_image|>",
    "<|begin_of_video|>",
    "<img>",
)
"""What families write before a medium's token."""


def add_clue_token(model: PreTrainedModel, tokenizer: Any) -> int:
    """Make `CLUE_TOKEN` a token of its own; call it before an adapter is attached.

    The model's tables grow only where they have no spare row. A new row is the mean of the others:
    as an input it is never seen, as an output it is one more token with the mean logit, the same
    for policy and reference.

    Returns:
        Its id.
    """
    from transformers import AddedToken

    token = AddedToken(CLUE_TOKEN, special=True, normalized=False)
    tokenizer.add_tokens([token], special_tokens=True)
    clue_id: int = tokenizer.convert_tokens_to_ids(CLUE_TOKEN)
    table: Any = model.get_input_embeddings()
    rows = len(table.weight)
    if clue_id < rows:
        return clue_id
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    with torch.no_grad():
        for table in (model.get_input_embeddings(), model.get_output_embeddings()):
            if table is not None:
                table.weight[rows:] = table.weight[:rows].mean(0)
    return clue_id


def insert_clues(text: str, count: int, tokens: Iterable[str]) -> str:
    """Put clue tokens before the first medium of a prompt's text.

    They stand before the marker that opens the medium: Omni finds its clips by the token right
    after that marker, and counts positions wrongly otherwise.

    Args:
        text: As the processor takes it, media not yet expanded.
        count: Clues of this prompt.
        tokens: The processor's own tokens for media.

    Raises:
        DataError: The text has none of them.
    """
    tokens = tuple(tokens)
    places = [text.index(token) for token in tokens if token in text]
    if not places:
        raise DataError(
            f"a prompt without {' or '.join(tokens)} cannot get clues: {text[:80]!r}; rows of text "
            "alone are scored without"
        )
    first = min(places)
    first -= next((len(mark) for mark in _OPENERS if text.endswith(mark, 0, first)), 0)
    return text[:first] + CLUE_TOKEN * count + text[first:]


@contextmanager
def placed(embedding: nn.Module, clue_id: int, clues: Tensor) -> Iterator[None]:
    """Passes inside the block see these clues where they have clue tokens, in order.

    The ids stay as they are, so positions in time and space, masks and generation work unchanged. A
    pass without such a token, as every step of generation after the first, is left alone. The hook
    sits outside of every block that is computed again in the backward pass, and so runs once a
    pass; gradients go on to the clues.

    Args:
        embedding: `model.get_input_embeddings()`, of a model with or without an adapter.
        clue_id: From `add_clue_token`.
        clues: [n, D], of all rows of a pass one after another.

    Raises:
        ConfigError: A pass has clue tokens, but not n of them; or no pass had any.
    """
    met = False

    def fill(_: Any, args: Any, keywords: dict[str, Any], embeddings: Tensor) -> Tensor | None:
        nonlocal met
        places = (args[0] if args else keywords["input"]) == clue_id
        count = int(places.sum())
        if not count:
            return None
        if clues.shape != (count, embeddings.shape[-1]):
            raise ConfigError(
                f"a pass has {count} {CLUE_TOKEN} tokens of width {embeddings.shape[-1]}, but the "
                f"clues are of shape {list(clues.shape)}; every row needs as many tokens as "
                "num_clue_tokens says for what it shows"
            )
        met = True
        return embeddings.masked_scatter(places[..., None], clues.to(embeddings))

    handle = embedding.register_forward_hook(fill, with_kwargs=True)
    try:
        yield
        if len(clues) and not met:
            raise ConfigError(
                f"{len(clues)} clues were given, but no pass had a {CLUE_TOKEN} token; put them "
                "into the prompts with insert_clues"
            )
    finally:
        handle.remove()


FOLDER = "clues"  # of a saved aggregator, inside `final/`


class CluePart(nn.Module):
    """The trained aggregator, registered with the adapter; its frozen copy, which is not.

    It looks at the model's own projected features, which get no gradient from it, and is asked by
    the embeddings of the prompt's words behind the media.
    """

    def __init__(
        self, spec: ClueSpec, model: PreTrainedModel, tokenizer: Any, kinds: Mapping[str, int]
    ):
        """Make or load the aggregator, and give its token to model and tokenizer.

        Args:
            spec: The config's `video.clues`.
            model: The base, before an adapter is attached.
            tokenizer: Gets the clue token.
            kinds: Kind of media to the id of its token.

        Raises:
            ConfigError: Loaded weights of other sizes than the model has.
        """
        super().__init__()
        self.clue_id = add_clue_token(model, tokenizer)
        self._kinds = dict(kinds)
        embeddings: Any = model.get_input_embeddings()
        width = embeddings.weight.shape[1]
        audio_width = width if "audio" in kinds else None
        if spec.path is None:
            options = spec.model_dump(exclude={"path", "lr"})
            made = ClueAggregator(width, audio_width, width, **options)
        else:
            made = ClueAggregator.load(spec.path)
            sizes = [made.settings[f"feature_dim_{m}"] for m in "va"], made.settings["text_dim"]
            if sizes != ([width, audio_width], width):
                raise ConfigError(
                    f"video.clues.path {spec.path}: an aggregator for features of {sizes[0]} and "
                    f"a language model of {sizes[1]}, but this model's are "
                    f"{[width, audio_width]} and {width}"
                )
        wide = torch.promote_types(model.dtype, torch.float32)
        self.aggregator = made.to(wide)
        self._start = [frozen_copy(self.aggregator)]  # in a list: no submodule, never trained
        special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
        self._special = {*kinds.values(), self.clue_id, *special}
        self._as_reference = False

    @contextmanager
    def as_reference(self) -> Iterator[None]:
        """Inside, clues come from the copy made at the start."""
        self._as_reference = True
        try:
            yield
        finally:
            self._as_reference = False

    def forward(
        self, model: PreTrainedModel, encoded: Encoded, prompt: Sequence[int]
    ) -> Tensor:  # [K, Dt]
        """The clues of one prompt.

        Args:
            model: Whose embeddings the words get.
            encoded: The features of its media.
            prompt: Its tokens.
        """
        device, kinds = encoded.tokens.device, set(self._kinds.values())
        shown = [token for token in prompt if token in kinds]
        behind = max((i for i, token in enumerate(prompt) if token in kinds), default=-1)
        after = [token for token in prompt[behind + 1 :] if token not in self._special]
        asked = after or [token for token in prompt if token not in self._special]
        with torch.no_grad():
            question = model.get_input_embeddings()(uploaded(asked, device))
        sound = self._kinds.get("audio", -1)
        parts = [
            [i for i, token in enumerate(shown) if (token == sound) is is_sound]
            for is_sound in (False, True)
        ]
        features = encoded.tokens.detach()
        given = [features[uploaded(part, device)][None] if part else None for part in parts]
        aggregator = self._start[0].to(device) if self._as_reference else self.aggregator
        return aggregator(question[None], *given)[0]

    def save(self, directory: Path) -> None:
        """Write the trained aggregator beside the policy's weights."""
        self.aggregator.save(directory / FOLDER)

    def restore(self, directory: Path) -> None:
        """Read what `save` wrote."""
        loaded = ClueAggregator.load(directory / FOLDER)
        self.aggregator.load_state_dict(loaded.state_dict())
