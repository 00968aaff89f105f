"""ImageReward as published: its names and shapes, and its forward pass in plain functions."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def released_shapes(
    width: int, depth: int, text: int, text_depth: int, patch: int, patches: int, vocab: int
) -> dict[str, list[int]]:
    """Names and shapes as THUDM/ImageReward has them, from its public model files."""
    shapes: dict[str, list[int]] = {}

    def linear(name: str, inputs: int, outputs: int) -> None:
        shapes[f"{name}.weight"], shapes[f"{name}.bias"] = [outputs, inputs], [outputs]

    def norm(name: str, size: int) -> None:
        shapes[f"{name}.weight"], shapes[f"{name}.bias"] = [size], [size]

    tower = "blip.visual_encoder"
    shapes[f"{tower}.cls_token"] = [1, 1, width]
    shapes[f"{tower}.pos_embed"] = [1, patches + 1, width]
    shapes[f"{tower}.patch_embed.proj.weight"] = [width, 3, patch, patch]
    shapes[f"{tower}.patch_embed.proj.bias"] = [width]
    for i in range(depth):
        norm(f"{tower}.blocks.{i}.norm1", width)
        linear(f"{tower}.blocks.{i}.attn.qkv", width, 3 * width)
        linear(f"{tower}.blocks.{i}.attn.proj", width, width)
        norm(f"{tower}.blocks.{i}.norm2", width)
        linear(f"{tower}.blocks.{i}.mlp.fc1", width, 4 * width)
        linear(f"{tower}.blocks.{i}.mlp.fc2", 4 * width, width)
    norm(f"{tower}.norm", width)
    encoder = "blip.text_encoder"
    shapes[f"{encoder}.embeddings.position_ids"] = [1, 512]
    shapes[f"{encoder}.embeddings.word_embeddings.weight"] = [vocab, text]
    shapes[f"{encoder}.embeddings.position_embeddings.weight"] = [512, text]
    norm(f"{encoder}.embeddings.LayerNorm", text)
    for i in range(text_depth):
        layer = f"{encoder}.encoder.layer.{i}"
        for block, source in (("attention", text), ("crossattention", width)):
            linear(f"{layer}.{block}.self.query", text, text)
            linear(f"{layer}.{block}.self.key", source, text)
            linear(f"{layer}.{block}.self.value", source, text)
            linear(f"{layer}.{block}.output.dense", text, text)
            norm(f"{layer}.{block}.output.LayerNorm", text)
        linear(f"{layer}.intermediate.dense", text, 4 * text)
        linear(f"{layer}.output.dense", 4 * text, text)
        norm(f"{layer}.output.LayerNorm", text)
    linear("blip.vision_proj", width, 256)
    linear("blip.text_proj", text, 256)
    for i, (inputs, outputs) in zip(
        (0, 2, 4, 6, 7),
        ((text, 1024), (1024, 128), (128, 64), (64, 16), (16, 1)),
        strict=True,
    ):
        linear(f"mlp.layers.{i}", inputs, outputs)
    return shapes


class Blip:
    """The published forward pass under the released names, in plain functions: an independent one.

    Source: BLIP's vit.py and med.py as descriptions of the order of operations.
    """

    def __init__(self, state: dict[str, Tensor], heads: int, text_heads: int) -> None:
        self.state, self.heads, self.text_heads = state, heads, text_heads

    def linear(self, name: str, x: Tensor) -> Tensor:
        return x @ self.state[f"{name}.weight"].T + self.state[f"{name}.bias"]

    def norm(self, name: str, x: Tensor, eps: float) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        scaled = centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt()
        return scaled * self.state[f"{name}.weight"] + self.state[f"{name}.bias"]

    @staticmethod
    def attend(q: Tensor, k: Tensor, v: Tensor, heads: int, mask: Tensor | None = None) -> Tensor:
        def split(x: Tensor) -> Tensor:
            return x.view(*x.shape[:2], heads, -1).transpose(1, 2)

        weights = split(q) @ split(k).transpose(-1, -2) / math.sqrt(q.shape[-1] // heads)
        if mask is not None:
            weights = weights.masked_fill(~mask[:, None, None, :].bool(), -math.inf)
        return (weights.softmax(-1) @ split(v)).transpose(1, 2).flatten(2)

    def look(self, pixels: Tensor) -> Tensor:
        root = "blip.visual_encoder"
        kernel = self.state[f"{root}.patch_embed.proj.weight"]
        x = F.conv2d(
            pixels, kernel, self.state[f"{root}.patch_embed.proj.bias"], stride=kernel.shape[-1]
        )
        x = x.flatten(2).transpose(1, 2)
        first = self.state[f"{root}.cls_token"].expand(len(x), -1, -1)
        x = torch.cat([first, x], 1) + self.state[f"{root}.pos_embed"]
        i = 0
        while f"{root}.blocks.{i}.norm1.weight" in self.state:
            block = f"{root}.blocks.{i}"
            q, k, v = self.linear(f"{block}.attn.qkv", self.norm(f"{block}.norm1", x, 1e-6)).chunk(
                3, -1
            )
            x = x + self.linear(f"{block}.attn.proj", self.attend(q, k, v, self.heads))
            inner = self.linear(f"{block}.mlp.fc1", self.norm(f"{block}.norm2", x, 1e-6))
            x = x + self.linear(f"{block}.mlp.fc2", F.gelu(inner))
            i += 1
        return self.norm(f"{root}.norm", x, 1e-6)

    def read(self, ids: Tensor, mask: Tensor, patches: Tensor) -> Tensor:
        root = "blip.text_encoder"
        x = self.state[f"{root}.embeddings.word_embeddings.weight"][ids]
        x = x + self.state[f"{root}.embeddings.position_embeddings.weight"][: ids.shape[1]]
        x = self.norm(f"{root}.embeddings.LayerNorm", x, 1e-12)
        i = 0
        while f"{root}.encoder.layer.{i}.output.dense.weight" in self.state:
            layer = f"{root}.encoder.layer.{i}"
            for block, source, seen in (
                ("attention", None, mask),
                ("crossattention", patches, None),
            ):
                at = f"{layer}.{block}"
                other = x if source is None else source
                mixed = self.attend(
                    self.linear(f"{at}.self.query", x),
                    self.linear(f"{at}.self.key", other),
                    self.linear(f"{at}.self.value", other),
                    self.text_heads,
                    seen,
                )
                x = self.norm(
                    f"{at}.output.LayerNorm", self.linear(f"{at}.output.dense", mixed) + x, 1e-12
                )
            inner = F.gelu(self.linear(f"{layer}.intermediate.dense", x))
            x = self.norm(
                f"{layer}.output.LayerNorm", self.linear(f"{layer}.output.dense", inner) + x, 1e-12
            )
            i += 1
        return x[:, 0]

    def score(self, pixels: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
        x = self.read(ids, mask, self.look(pixels))
        for i in (0, 2, 4, 6, 7):
            x = self.linear(f"mlp.layers.{i}", x)
        return (x[:, 0] - 0.16717362830052426) / 1.0333394966054072
