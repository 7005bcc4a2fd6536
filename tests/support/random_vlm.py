"""Vision-language models made to order: any small transformer that a `Spec` describes.

Plain `nn.Module`s and nothing of the product. The forward has three places at which `Hooks` may change the
tokens (behind an encoder block, at the fusion, before a decoder layer), so that an eager oracle can run
the same modules with other token counts.

Shapes: B prompts, S their length, I images of H x W patches, C and D the channels of encoder and decoder.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.support.random_spec import IMAGE, LONGEST, PATCH, VOCABULARY, Body, Spec


class Rows(NamedTuple):
    """What is known of the rows of a sequence, all `[B or 1, S]`.

    Attributes:
        order: int64, where the row was in the prompt, ascending: who may see whom follows it.
        positions: int64; valid: bool, False on padding.
    """

    ids: Tensor
    order: Tensor
    positions: Tensor
    valid: Tensor


class Hooks:
    """Where an oracle may change the tokens; as it is, nothing changes."""

    def block(self, index: int, x: Tensor, keys: Tensor) -> Tensor:
        """The stream `[I, tokens, C]` behind an encoder block, whose keys are `[I, heads, tokens, d]`."""
        return x

    def fuse(self, embeds: Tensor, rows: Rows, features: Tensor) -> tuple[Tensor, Rows]:
        """Put `features` `[I, N, D]` into `embeds` `[B, S, D]`."""
        raise NotImplementedError

    def layer(self, index: int, x: Tensor, rows: Rows) -> tuple[Tensor, Rows]:
        """The stream `[B, rows, D]` before a decoder layer."""
        return x, rows


class RMSNorm(nn.Module):
    """Written out, as transformers does."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(dim) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))


def make_norm(kind: str, dim: int) -> nn.Module:
    """ "layer" or "rms"."""
    return nn.LayerNorm(dim) if kind == "layer" else RMSNorm(dim)


class Tables(NamedTuple):
    """What the decoder's layers read beside the stream."""

    cos: Tensor | None = None
    sin: Tensor | None = None
    mask: Tensor | None = None
    gate: Tensor | None = None
    bias: Tensor | None = None


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions on `[B, heads, S, d]`."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin


class Layer(nn.Module):
    """Attention and a perceptron around a residual stream."""

    def __init__(self, body: Body, causal: bool) -> None:
        super().__init__()
        dim, self.body, self.causal = body.dim, body, causal
        self.sizes = [dim, body.kv_heads * body.head_dim, body.kv_heads * body.head_dim]
        if body.fused_qkv:
            self.qkv = nn.Linear(dim, sum(self.sizes))
        else:
            self.q, self.k, self.v = (nn.Linear(dim, size) for size in self.sizes)
        self.o, self.up, self.down = nn.Linear(dim, dim), nn.Linear(dim, 2 * dim), nn.Linear(2 * dim, dim)
        self.gate = nn.Linear(dim, 2 * dim) if body.gated else None
        self.pool = nn.Linear(dim, dim) if body.pool else None
        self.norm1, self.norm2 = make_norm(body.norm, dim), make_norm(body.norm, dim)
        self.scale1, self.scale2 = nn.Parameter(torch.rand(dim) + 0.5), nn.Parameter(torch.rand(dim) + 0.5)

    def heads(self, x: Tensor, count: int) -> Tensor:
        """`[B, S, count * d]` to `[B, count, S, d]`."""
        size = self.body.head_dim
        if self.body.split == "unflatten":
            x = x.unflatten(-1, (count, size))
        elif self.body.split == "view":
            x = x.view(x.shape[0], x.shape[1], count, size)
        else:
            x = x.reshape(x.shape[0], -1, count, size)
        return x.transpose(1, 2)

    def attend(self, x: Tensor, tables: Tables) -> tuple[Tensor, Tensor, Tensor]:
        """The attention branch, and the keys and values that a cache would keep."""
        body = self.body
        parts = self.qkv(x).split(self.sizes, dim=-1) if body.fused_qkv else (self.q(x), self.k(x), self.v(x))
        q, k, v = (
            self.heads(part, count)
            for part, count in zip(parts, (body.heads, body.kv_heads, body.kv_heads), strict=True)
        )
        if tables.cos is not None and tables.sin is not None:
            q, k = rotate(q, tables.cos, tables.sin), rotate(k, tables.cos, tables.sin)
        keys, values, times = k, v, body.heads // body.kv_heads
        if times > 1 and body.repeat:
            keys, values = repeat_heads(k, times), repeat_heads(v, times)
        out = F.scaled_dot_product_attention(
            q,
            keys,
            values,
            attn_mask=tables.mask,
            is_causal=self.causal and tables.mask is None,
            enable_gqa=times > 1 and not body.repeat,
        )
        out = out.transpose(1, 2).reshape(x.shape[0], -1, body.dim)
        out = self.o(out)
        return (out if tables.gate is None else out * tables.gate), k, v

    def think(self, x: Tensor, tables: Tables) -> Tensor:
        """The perceptron branch."""
        if tables.bias is not None:
            x = x + tables.bias
        wide = self.up(x)
        return self.down(F.silu(self.gate(x)) * wide if self.gate is not None else F.gelu(wide))

    def mean(self, x: Tensor) -> Tensor:
        """What all tokens together say to each."""
        return x + torch.tanh(self.pool(x.mean(1, keepdim=True))) if self.pool is not None else x

    def forward(
        self, x: Tensor, tables: Tables, hook: Callable[[Tensor, Tensor], Tensor] | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The stream, keys and values; `hook` is applied to the last sum and the keys."""
        kind = self.body.residual
        if kind == "parallel":
            normed = self.norm1(x)
            out, k, v = self.attend(normed, tables)
            return x + (out + self.think(self.mean(normed), tables)), k, v
        if kind == "post":
            out, k, v = self.attend(x, tables)
            x = self.norm1(x + out)
            x = x + self.think(self.mean(x), tables)
            return self.norm2(x if hook is None else hook(x, k)), k, v
        out, k, v = self.attend(self.norm1(x), tables)
        if kind == "scale":
            x = self.mean(x + self.scale1 * out)
            return x + self.scale2 * self.think(self.norm2(x), tables), k, v
        if kind == "skip":
            x = self.mean(0.8 * x + out)
            return 0.8 * x + self.think(self.norm2(x), tables), k, v
        x = self.mean(x + out)
        return x + self.think(self.norm2(x), tables), k, v


def repeat_heads(x: Tensor, times: int) -> Tensor:
    """`[B, heads, S, d]` to `[B, heads * times, S, d]`."""
    batch, heads, length, size = x.shape
    return x[:, :, None].expand(batch, heads, times, length, size).reshape(batch, heads * times, length, size)


class RandomVLM(nn.Module):
    """The model of a `Spec`."""

    def __init__(self, spec: Spec) -> None:
        super().__init__()
        self.spec = spec
        vision, text = spec.vision, spec.decoder
        same = spec.shared == "weights"
        self.patches = nn.Conv2d(3, vision.dim, PATCH, PATCH)
        self.classes = nn.Parameter(torch.randn(1, spec.prefix, vision.dim))
        behind = 1 if spec.trouble == "register behind" else 0
        self.registers = nn.Parameter(torch.randn(1, behind, vision.dim))
        self.places = nn.Parameter(torch.randn(1, spec.prefix + spec.patches + behind, vision.dim))
        self.blocks = stack(vision, spec.blocks + spec.unused_block, False, same)
        wide = vision.dim * (2 if spec.trouble == "two features" else 1)
        self.vision_norm = make_norm(vision.norm, wide)
        self.project, self.project2 = nn.Linear(wide, text.dim), nn.Linear(text.dim, text.dim)
        self.embed = nn.Embedding(VOCABULARY, text.dim)
        self.table = nn.Embedding(LONGEST, text.dim)
        self.kinds = nn.Embedding(2, text.dim)
        self.layers = stack(text, spec.layers, True, same)
        self.norm = make_norm(text.norm, text.dim)
        self.head, self.pooled = nn.Linear(text.dim, VOCABULARY), nn.Linear(text.dim, 3)

    # ------------------------------------------------------------------------------------- encoder

    def flatten(self, x: Tensor) -> Tensor:
        """`[I, C, H, W]` to `[I, H * W, C]`, in one of the ways that models have."""
        images, channels, height, width = x.shape
        if self.spec.trouble == "columns":
            return x.transpose(2, 3).flatten(2).transpose(1, 2)
        if self.spec.trouble == "channels last":
            return x.permute(0, 2, 3, 1).reshape(images, height * width, channels)
        if self.spec.flatten == "flatten":
            return x.flatten(2).transpose(1, 2)
        if self.spec.flatten == "view":
            return x.contiguous().view(images, channels, -1).permute(0, 2, 1)
        return x.reshape(images, channels, height * width).transpose(-1, -2)

    def encode(self, pixels: Tensor, hooks: Hooks | None, out: dict[str, Tensor]) -> Tensor:
        """Features `[I, N, D]`."""
        spec = self.spec
        x = self.flatten(self.patches(pixels))
        parts = [self.classes.expand(x.shape[0], -1, -1)] if spec.prefix else []
        parts += [x] + ([self.registers.expand(x.shape[0], -1, -1)] if self.registers.shape[1] else [])
        if len(parts) > 1:
            x = torch.cat(parts, dim=1)
        if spec.vision_positions:
            x = x + self.places
        states, tables = [], Tables(bias=self.places if spec.trouble == "places in each block" else None)
        for index, block in enumerate(self.blocks[: spec.blocks]):
            if hooks is None:
                x = block(x, tables)[0]
            elif index + 1 == spec.blocks and spec.vision.residual == "post":
                # nothing tells the norm behind the last sum from a final norm, so it belongs to what follows
                x = block(x, tables, partial(hooks.block, index))[0]
            else:
                x, keys, _ = block(x, tables)
                x = hooks.block(index, x, keys)
            states.append(x)
            if "vision" in spec.extras:
                out[f"vision {index}"] = x
        if "vision pooled" in spec.extras:
            out["vision pooled"] = x[:, 0] if spec.prefix else x.mean(1)
        if spec.unused_block and hooks is None:
            self.blocks[-1](x, tables)
        if spec.trouble == "two features":
            x = torch.cat([states[0], x], dim=-1)
        end = x.shape[1] - self.registers.shape[1]
        if self.registers.shape[1]:
            x = x[:, :end]
        if spec.prefix and not spec.cut_late:
            x = x[:, spec.prefix :]
        x = self.project_features(x)
        return x[:, spec.prefix :] if spec.prefix and spec.cut_late else x

    def project_features(self, x: Tensor) -> Tensor:
        """`[I, tokens, C]` to `[I, tokens, D]`."""
        if self.spec.projector == "norm":
            return self.project(self.vision_norm(x))
        if self.spec.projector == "mlp":
            return self.project2(F.gelu(self.project(x)))
        return self.project(x)

    # ------------------------------------------------------------------------------------- decoder

    def fuse(self, embeds: Tensor, ids: Tensor, features: Tensor) -> Tensor:
        """Features where the placeholders are."""
        where = (ids == IMAGE).unsqueeze(-1).expand_as(embeds)
        if self.spec.trouble == "two fusions":
            embeds = embeds.masked_scatter(where, torch.ones_like(features))
        flat = features.reshape(-1, features.shape[-1]) if self.spec.flat_features else features
        return embeds.masked_scatter(where, flat)

    def tables(self, rows: Rows) -> Tables:
        """Everything that goes by rows, made from what is known of them."""
        spec, gate, bias, cos, sin = self.spec, None, None, None, None
        if spec.shared == "gate":
            gate = (1.0 + 0.3 * torch.sin(rows.positions.float()))[:, :, None]
        if spec.shared == "bias":
            bias = self.kinds((rows.ids == 4).long()) * torch.cos(rows.positions.float()).unsqueeze(-1)
        if spec.positions == "rotary":
            size = spec.decoder.head_dim
            speeds = 10.0 ** -torch.arange(0, size, 2, dtype=torch.float32).div(size)
            positions = rows.positions
            if spec.trouble == "flat rotary" and positions.shape[0] == 1:
                angles = positions[0].float()[:, None] * speeds
                cos, sin = torch.cat([angles, angles], -1).cos(), torch.cat([angles, angles], -1).sin()
            else:
                angles = positions[:, :, None].float() * speeds
                angles = torch.cat([angles, angles], dim=-1)[:, None]
                cos, sin = angles.cos(), angles.sin()
        return Tables(cos, sin, self.mask(rows), gate, bias)

    def mask(self, rows: Rows) -> Tensor | None:
        """`[B or 1, 1, S, S]`, or None for `is_causal`."""
        kind, order, valid = self.spec.mask, rows.order, rows.valid
        if kind == "flag":
            return None
        length = order.shape[1]
        if kind == "causal":
            return torch.ones(length, length, dtype=torch.bool).tril()[None, None]
        if kind == "keys":
            return valid[:, None, None, :].expand(valid.shape[0], 1, length, length)
        seen = (order[:, None, :] <= order[:, :, None]) & valid[:, None, :]
        if kind == "bool":
            return seen[:, None]
        apart = (order[:, None, :] - order[:, :, None]).abs().float()
        scores = -0.1 * apart if kind == "distance" else torch.zeros_like(apart)
        return scores.masked_fill(~seen, torch.finfo(torch.float32).min)[:, None]

    def forward(
        self,
        ids: Tensor,
        pixels: Tensor,
        valid: Tensor | None = None,
        positions: Tensor | None = None,
        hooks: Hooks | None = None,
    ) -> dict[str, Tensor]:
        spec, out = self.spec, {}
        features = self.encode(pixels, hooks, out)
        length = ids.shape[1]
        order = torch.arange(length)[None]
        if valid is None:
            valid = torch.ones_like(ids, dtype=torch.bool)
        rows = Rows(ids, order, order if positions is None else positions, valid)
        x = self.embed(ids)
        if spec.positions == "before":
            x = x + self.table(rows.positions)
        if hooks is None:
            x = self.fuse(x, ids, features)
        else:
            x, rows = hooks.fuse(x, rows, features)
        if spec.trouble == "table":
            x = x + (self.table.weight[:length] if hooks is None else self.table(rows.order))
        elif spec.positions == "after":
            x = x + self.table(rows.positions)
        first, tables = x, self.tables(rows)
        for index, layer in enumerate(self.layers):
            if spec.trouble == "shortcut" and index:
                x = x + 0.5 * first
            if hooks is not None:
                x, rows = hooks.layer(index, x, rows)
                tables = self.tables(rows)
            first = first if index else x
            if "hidden" in spec.extras:
                out[f"hidden {index}"] = x
            if index + 1 == spec.layers:
                if "pooled" in spec.extras:
                    out["pooled"] = self.pooled(x.mean(1))
                if spec.trouble == "fixed cut":
                    out["cut"] = self.pooled(x[:, 1:3].sum(1))
                if spec.dead:
                    layer(x, tables)
            x, k, v = layer(x, tables)
            if "caches" in spec.extras:
                out[f"keys {index}"], out[f"values {index}"] = k, v
        x = self.norm(x)
        if spec.head == "last":
            x = x[:, -1:]
        out["logits"] = F.linear(x, self.embed.weight) if spec.head == "tied" else self.head(x)
        return out


def stack(body: Body, count: int, causal: bool, same: bool) -> nn.ModuleList:
    """`count` layers, or `count` times the same."""
    if same:
        return nn.ModuleList([Layer(body, causal)] * count)
    return nn.ModuleList([Layer(body, causal) for _ in range(count)])


def make(spec: Spec) -> RandomVLM:
    """The model of a spec, its weights from the spec's seed."""
    torch.manual_seed(spec.seed)
    return RandomVLM(spec).eval().requires_grad_(False)
