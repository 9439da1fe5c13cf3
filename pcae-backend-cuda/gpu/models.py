"""The modules of the method in plain torch.nn: what `peer.py` here and `pcae-backend-cpu/benches/peers.py` time, and hold against fixtures.

Only the patches that are needed are embedded, and only those that are predicted leave the decoder.
"""
import math

import torch
from torch import nn
from torch.nn import functional as F


def full(x):
    """Statistics, selection and loss are in f32 at least."""
    return x if x.dtype == torch.float64 else x.float()


def take(x, ids):
    return x.gather(1, ids.unsqueeze(-1).expand(-1, -1, x.shape[-1]))


def standardise(t):
    return (t - t.mean(-1, keepdim=True)) / torch.sqrt(t.var(-1, keepdim=True) + 1e-6)


def least_similar(x, count):
    """The `count` tokens least like the mean token."""
    u = F.normalize(full(x), dim=-1)
    scores = (u * u.mean(1, keepdim=True)).sum(-1)
    return scores.argsort(dim=1, stable=True)[:, :count]


def split(images, patch):
    b, c, h, w = images.shape
    return images.reshape(b, c, h // patch, patch, w // patch, patch)


def patchify(images, patch):
    """Each patch as a convolution's kernel sees it: channel, row, column."""
    return split(images, patch).permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)


def pixel_patches(images, patch):
    """Each patch as MAE predicts it: row, column, channel."""
    return split(images, patch).permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)


def random_masking(noise, mask_ratio):
    order = noise.argsort(dim=1, stable=True)
    keep = int(noise.shape[1] * (1 - mask_ratio))
    return order[:, :keep].contiguous(), order[:, keep:].contiguous()


class Attention(nn.Module):
    def __init__(self, dim, heads):
        super().__init__()
        self.heads = heads
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, x):
        b, n, d = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, self.heads, d // self.heads).permute(2, 0, 3, 1, 4).unbind(0)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, n, d))


class Mlp(nn.Module):
    def __init__(self, dim, hidden):
        super().__init__()
        self.fc1, self.act, self.fc2 = nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, dim)

    def forward(self, x):
        return self.fc2(self.act(self.fc1(x)))


class Block(nn.Module):
    def __init__(self, dim, heads, mlp_ratio):
        super().__init__()
        self.norm1, self.attn = nn.LayerNorm(dim, eps=1e-6), Attention(dim, heads)
        self.norm2, self.mlp = nn.LayerNorm(dim, eps=1e-6), Mlp(dim, int(dim * mlp_ratio))

    def forward(self, x):
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class Encoder(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        self.cfg, d, ps = cfg, cfg["embed_dim"], cfg["patch_size"]
        self.num_patches = (cfg["img_size"][0] // ps) * (cfg["img_size"][1] // ps)
        self.patch_embed = nn.Module()
        self.patch_embed.proj = nn.Conv2d(cfg["in_chans"], d, ps, ps)
        self.cls_token = nn.Parameter(torch.randn(1, 1, d) * 0.02)
        self.pos_embed = nn.Parameter(torch.randn(1, 1 + self.num_patches, d) * 0.02, requires_grad=False)
        self.blocks = nn.ModuleList(Block(d, cfg["num_heads"], cfg["mlp_ratio"]) for _ in range(cfg["depth"]))
        self.norm = nn.LayerNorm(d, eps=1e-6)

    def embed(self, patches, ids):
        """Only the patches `ids`; all in their order if there are none."""
        proj, pos = self.patch_embed.proj, self.pos_embed[0, 1:]
        if ids is not None:
            patches, pos = take(patches, ids), pos[ids]
        return F.linear(patches, proj.weight.flatten(1), proj.bias) + pos

    def with_class(self, x):
        return torch.cat([(self.cls_token + self.pos_embed[:, :1]).expand(x.shape[0], 1, -1), x], 1)

    def student(self, patches, ids):
        x = self.with_class(self.embed(patches, ids))
        for block in self.blocks:
            x = block(x)
        return self.norm(x)

    @torch.no_grad()
    def teacher(self, patches, ids):
        """Its tokens, and the patches that each stage keeps."""
        x, stages = self.embed(patches, ids), []
        for i, block in enumerate(self.blocks):
            x = block(x)
            if i in self.cfg["drop_layers"]:
                kept = least_similar(x, int(x.shape[1] * self.cfg["keep_ratio"]))
                x, ids = take(x, kept), ids.gather(1, kept)
                stages.append(ids)
        return self.norm(x), stages


class Classifier(Encoder):
    """Mean pooling; `drop_ratio` of the patch tokens go after each of `drop_layers`."""

    def __init__(self, cfg, num_classes):
        super().__init__(cfg)
        del self.norm
        self.fc_norm = nn.LayerNorm(cfg["embed_dim"], eps=1e-6)
        self.head = nn.Linear(cfg["embed_dim"], num_classes)

    def forward(self, images):
        cfg, x = self.cfg, self.with_class(self.embed(patchify(images, self.cfg["patch_size"]), None))
        for i, block in enumerate(self.blocks):
            x = block(x)
            if i in cfg["drop_layers"] and cfg["drop_ratio"] > 0:
                patches = x[:, 1:]
                count = math.ceil(patches.shape[1] * (1 - cfg["drop_ratio"]) - 1e-9)
                x = torch.cat([x[:, :1], take(patches, least_similar(patches, count))], 1)
        return self.head(self.fc_norm(x[:, 1:].mean(1)))


class Pretrainer(Encoder):
    def __init__(self, cfg):
        super().__init__(cfg)
        d, e, ps = cfg["embed_dim"], cfg["decoder_embed_dim"], cfg["patch_size"]
        self.decoder_embed = nn.Linear(d, e)
        self.mask_token = nn.Parameter(torch.randn(1, 1, e) * 0.02)
        self.decoder_pos_embed = nn.Parameter(torch.randn(1, 1 + self.num_patches, e) * 0.02, requires_grad=False)
        self.decoder_blocks = nn.ModuleList(Block(e, cfg["decoder_num_heads"], cfg["mlp_ratio"])
                                            for _ in range(cfg["decoder_depth"]))
        self.decoder_norm = nn.LayerNorm(e, eps=1e-6)
        self.decoder_pred = nn.Linear(e, d if cfg["task"] == "pcae" else cfg["in_chans"] * ps * ps)

    def decode(self, latent, keep, ids):
        x = self.decoder_embed(latent)
        b, k = ids.shape
        x = torch.cat([x, self.mask_token.to(x.dtype).expand(b, k, -1)], 1)
        x = x + self.decoder_pos_embed[0][torch.cat([torch.zeros_like(keep[:, :1]), 1 + keep, 1 + ids], 1)]
        for block in self.decoder_blocks:
            x = block(x)
        return self.decoder_pred(self.decoder_norm(x[:, -k:]))

    def loss(self, teacher, images, keep, remove):
        patch = self.cfg["patch_size"]
        patches = patchify(images, patch)
        latent = self.student(patches, keep)
        if self.cfg["task"] == "pcae":
            target, stages = teacher.teacher(patches, remove)
            pred = full(self.decode(latent, keep, stages[-1] if stages else remove))
            return 1 - F.cosine_similarity(pred, standardise(full(target)), dim=-1).mean()
        target = take(pixel_patches(images, patch), remove)
        target = standardise(target) if self.cfg["norm_pix"] else target
        return F.mse_loss(full(self.decode(latent, keep, remove)), target)
