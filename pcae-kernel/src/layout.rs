//! The flat parameter vector: which tensor lies where, under its name in timm/MAE `state_dict`s.
//!
//! The encoder comes first, so that the teacher, which is an encoder alone, has the same spans as the student.

use core::fmt;

use crate::backend::{EmbedParams, Linear, Norm, Span};
use crate::config::{ClassifierConfig, DecoderConfig, Pool, PretrainConfig, VitConfig};
use crate::error::{Error, expect_len, product};

/// Parameters of one transformer block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BlockParams {
    /// Before the attention.
    pub norm1: Norm,
    /// Queries, keys and values: `dim -> 3 * dim`.
    pub qkv: Linear,
    /// Output of the attention: `dim -> dim`.
    pub proj: Linear,
    /// Before the MLP.
    pub norm2: Norm,
    /// `dim -> hidden`.
    pub fc1: Linear,
    /// `hidden -> dim`.
    pub fc2: Linear,
}

impl BlockParams {
    /// Its linear layers.
    pub const fn linears(self) -> [Linear; 4] {
        [self.qkv, self.proj, self.fc1, self.fc2]
    }
}

/// A row of blocks of one size.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Blocks {
    start: usize,
    /// Width of a token.
    pub dim: usize,
    /// Hidden width of the MLP.
    pub hidden: usize,
    /// Heads of the attention.
    pub num_heads: usize,
    /// Number of blocks.
    pub depth: usize,
}

impl Blocks {
    /// Parameters of block `index`, which must be below the depth.
    pub const fn block(&self, index: usize) -> BlockParams {
        let mut at = Cursor {
            at: self.start + index * self.block_len(),
        };
        BlockParams {
            norm1: at.norm(self.dim),
            qkv: at.linear(self.dim, 3 * self.dim),
            proj: at.linear(self.dim, self.dim),
            norm2: at.norm(self.dim),
            fc1: at.linear(self.dim, self.hidden),
            fc2: at.linear(self.hidden, self.dim),
        }
    }

    const fn block_len(&self) -> usize {
        let (d, h) = (self.dim, self.hidden);
        4 * d + (d + 1) * (3 * d) + (d + 1) * d + (d + 1) * h + (h + 1) * d
    }
}

/// Parameters of the encoder.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct EncoderParams {
    /// `[dim]`
    pub cls_token: Span,
    /// `[1 + num_patches, dim]`
    pub pos_embed: Span,
    /// `patch_len -> dim`
    pub patch_embed: Linear,
    /// The blocks.
    pub blocks: Blocks,
    /// After the last block; a classifier's after pooling.
    pub norm: Norm,
}

impl EncoderParams {
    /// What [`crate::backend::Backend::embed_tokens`] needs, with or without the class token.
    pub const fn embed(&self, with_cls_token: bool) -> EmbedParams {
        let cls_token = if with_cls_token {
            Some(self.cls_token)
        } else {
            None
        };
        EmbedParams {
            cls_token,
            pos_embed: self.pos_embed,
        }
    }
}

/// Parameters of the decoder.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DecoderParams {
    /// `[dim]`
    pub mask_token: Span,
    /// `[1 + num_patches, dim]`
    pub pos_embed: Span,
    /// Encoder's width to decoder's.
    pub embed: Linear,
    /// The blocks.
    pub blocks: Blocks,
    /// After the last block.
    pub norm: Norm,
    /// Decoder's width to the target's.
    pub pred: Linear,
    /// Width of the target.
    pub target_dim: usize,
}

/// What follows the encoder.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Tail {
    /// Nothing.
    Encoder,
    /// The decoder of pre-training.
    Decoder(DecoderParams),
    /// The head of a classifier: `dim -> num_classes`.
    Head(Linear, usize),
}

/// Where every tensor of a model lies.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Layout {
    /// The encoder's configuration.
    pub vit: VitConfig,
    /// The encoder.
    pub encoder: EncoderParams,
    /// What follows it.
    pub tail: Tail,
    /// Name of the encoder's last norm: a classifier's is another one where it norms a mean of tokens.
    norm_name: &'static str,
    encoder_len: usize,
    len: usize,
}

impl Layout {
    /// An encoder alone. `vit` must have been checked.
    pub const fn encoder(vit: &VitConfig) -> Self {
        let mut at = Cursor { at: 0 };
        let (d, positions) = (vit.embed_dim, 1 + vit.num_patches());
        let encoder = EncoderParams {
            cls_token: at.take(d),
            pos_embed: at.take(positions * d),
            patch_embed: at.linear(vit.patch_len(), d),
            blocks: at.blocks(d, vit.mlp_hidden(), vit.num_heads, vit.depth),
            norm: at.norm(d),
        };
        Self {
            vit: *vit,
            encoder,
            tail: Tail::Encoder,
            norm_name: "norm.",
            encoder_len: at.at,
            len: at.at,
        }
    }

    /// An encoder and the decoder of pre-training. `config` must have been checked.
    pub const fn pretrain(config: &PretrainConfig) -> Self {
        Self::with_decoder(&config.vit, &config.decoder, config.target_dim())
    }

    /// An encoder and a decoder that predicts `target_dim` values per position.
    pub const fn with_decoder(vit: &VitConfig, decoder: &DecoderConfig, target_dim: usize) -> Self {
        let base = Self::encoder(vit);
        let mut at = Cursor { at: base.len };
        let e = decoder.embed_dim;
        let tail = Tail::Decoder(DecoderParams {
            mask_token: at.take(e),
            pos_embed: at.take((1 + vit.num_patches()) * e),
            embed: at.linear(vit.embed_dim, e),
            blocks: at.blocks(e, decoder.mlp_hidden(vit), decoder.num_heads, decoder.depth),
            norm: at.norm(e),
            pred: at.linear(e, target_dim),
            target_dim,
        });
        Self {
            tail,
            len: at.at,
            ..base
        }
    }

    /// A classifier. `config` must have been checked.
    pub const fn classifier(config: &ClassifierConfig) -> Self {
        let base = Self::encoder(&config.vit);
        let mut at = Cursor { at: base.len };
        let tail = Tail::Head(
            at.linear(config.vit.embed_dim, config.num_classes),
            config.num_classes,
        );
        let norm_name = match config.pool {
            Pool::Mean => "fc_norm.",
            Pool::ClsToken => "norm.",
        };
        Self {
            tail,
            norm_name,
            len: at.at,
            ..base
        }
    }

    /// Elements of the whole vector.
    pub const fn len(&self) -> usize {
        self.len
    }

    /// Whether there is no element: never so for a checked configuration.
    pub const fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Elements of the encoder, which lies at the front.
    pub const fn encoder_len(&self) -> usize {
        self.encoder_len
    }

    /// What a moving average of such a model holds, the front of the vector: not the decoder, which is only trained with.
    pub const fn teacher(&self) -> Self {
        match self.tail {
            Tail::Decoder(_) => Self::encoder(&self.vit),
            Tail::Encoder | Tail::Head(..) => *self,
        }
    }

    /// Calls `visit` for every tensor, in the order of the vector.
    pub fn for_each(&self, mut visit: impl FnMut(Tensor)) {
        let (d, rows, p) = (
            self.vit.embed_dim,
            self.vit.num_patches() + 1,
            self.vit.patch_size,
        );
        let e = &self.encoder;
        let mut at = Visitor {
            visit: &mut visit,
            section: "",
            block: None,
        };
        at.one("cls_token", e.cls_token, &[1, 1, d], Kind::Token);
        at.one("pos_embed", e.pos_embed, &[1, rows, d], Kind::Position);
        at.one(
            "patch_embed.proj.weight",
            e.patch_embed.weight,
            &[d, self.vit.in_chans, p, p],
            Kind::Weight,
        );
        at.one(
            "patch_embed.proj.bias",
            e.patch_embed.bias,
            &[d],
            Kind::Bias,
        );
        at.blocks("blocks.", &e.blocks);
        at.norm(self.norm_name, e.norm, d);
        match self.tail {
            Tail::Encoder => {}
            Tail::Decoder(t) => {
                let e = t.blocks.dim;
                at.one("mask_token", t.mask_token, &[1, 1, e], Kind::Token);
                at.one(
                    "decoder_pos_embed",
                    t.pos_embed,
                    &[1, rows, e],
                    Kind::Position,
                );
                at.linear("decoder_embed.", t.embed, [e, d]);
                at.blocks("decoder_blocks.", &t.blocks);
                at.norm("decoder_norm.", t.norm, e);
                at.linear("decoder_pred.", t.pred, [t.target_dim, e]);
            }
            Tail::Head(head, classes) => at.linear("head.", head, [classes, d]),
        }
    }

    /// The tensor called `name`, if there is one.
    pub fn find(&self, name: &str) -> Option<Tensor> {
        let mut found = None;
        self.for_each(|tensor| {
            if tensor.name.is(name) {
                found = Some(tensor);
            }
        });
        found
    }
}

struct Visitor<'a, F> {
    visit: &'a mut F,
    section: &'static str,
    block: Option<usize>,
}

impl<F: FnMut(Tensor)> Visitor<'_, F> {
    fn tensor(
        &mut self,
        layer: &'static str,
        leaf: &'static str,
        span: Span,
        dims: &[usize],
        kind: Kind,
    ) {
        let mut shape = [1; 4];
        for (to, from) in shape.iter_mut().zip(dims) {
            *to = *from;
        }
        let name = Name {
            section: self.section,
            block: self.block,
            layer,
            leaf,
        };
        (self.visit)(Tensor {
            name,
            span,
            shape,
            rank: dims.len().min(4),
            kind,
        });
    }

    fn one(&mut self, leaf: &'static str, span: Span, dims: &[usize], kind: Kind) {
        self.tensor("", leaf, span, dims, kind);
    }

    fn norm(&mut self, layer: &'static str, norm: Norm, dim: usize) {
        self.tensor(layer, "weight", norm.weight, &[dim], Kind::Norm);
        self.tensor(layer, "bias", norm.bias, &[dim], Kind::Bias);
    }

    fn linear(&mut self, layer: &'static str, linear: Linear, shape: [usize; 2]) {
        self.tensor(layer, "weight", linear.weight, &shape, Kind::Weight);
        self.tensor(layer, "bias", linear.bias, &shape[..1], Kind::Bias);
    }

    fn blocks(&mut self, section: &'static str, blocks: &Blocks) {
        let (d, h) = (blocks.dim, blocks.hidden);
        self.section = section;
        for index in 0..blocks.depth {
            let block = blocks.block(index);
            self.block = Some(index);
            self.norm("norm1.", block.norm1, d);
            self.linear("attn.qkv.", block.qkv, [3 * d, d]);
            self.linear("attn.proj.", block.proj, [d, d]);
            self.norm("norm2.", block.norm2, d);
            self.linear("mlp.fc1.", block.fc1, [h, d]);
            self.linear("mlp.fc2.", block.fc2, [d, h]);
        }
        (self.section, self.block) = ("", None);
    }
}

/// What a tensor is, which decides its initial values, its weight decay and whether it is trained.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Weight of a linear layer, `[out_features, in_features…]`.
    Weight,
    /// Bias of a linear layer or a norm.
    Bias,
    /// Scale of a norm.
    Norm,
    /// Class or mask token.
    Token,
    /// Fixed position table.
    Position,
}

/// One named tensor of a model.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Tensor {
    /// Its name in a `state_dict`.
    pub name: Name,
    /// Where it lies in the flat vector.
    pub span: Span,
    /// What it is.
    pub kind: Kind,
    shape: [usize; 4],
    rank: usize,
}

impl Tensor {
    /// The tensor's dimensions.
    pub fn shape(&self) -> &[usize] {
        &self.shape[..self.rank]
    }

    /// Whether training changes it.
    pub fn is_trained(&self) -> bool {
        self.kind != Kind::Position
    }

    /// Whether weight decay applies: not to biases, norms and tokens, nor to what has a single dimension above 1.
    pub fn decays(&self) -> bool {
        self.kind == Kind::Weight && self.shape.iter().filter(|&&n| n > 1).count() > 1
    }
}

/// A tensor's name, such as `blocks.3.attn.qkv.weight`; text through `Display`, so that no allocator is needed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Name {
    section: &'static str,
    block: Option<usize>,
    layer: &'static str,
    leaf: &'static str,
}

impl Name {
    /// Number of the block that the tensor belongs to, and whether that is an encoder block.
    pub fn block(&self) -> Option<(usize, bool)> {
        self.block.map(|block| (block, self.section == "blocks."))
    }

    /// Whether this is the name `text`.
    pub fn is(&self, text: &str) -> bool {
        struct Rest<'a>(&'a str);
        impl fmt::Write for Rest<'_> {
            fn write_str(&mut self, part: &str) -> fmt::Result {
                self.0 = self.0.strip_prefix(part).ok_or(fmt::Error)?;
                Ok(())
            }
        }
        let mut rest = Rest(text);
        fmt::write(&mut rest, format_args!("{self}")).is_ok() && rest.0.is_empty()
    }
}

impl fmt::Display for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.section)?;
        if let Some(block) = self.block {
            write!(f, "{block}.")?;
        }
        f.write_str(self.layer)?;
        f.write_str(self.leaf)
    }
}

/// Hands out consecutive spans.
struct Cursor {
    at: usize,
}

impl Cursor {
    const fn take(&mut self, len: usize) -> Span {
        let span = Span {
            start: self.at,
            len,
        };
        self.at += len;
        span
    }

    const fn norm(&mut self, dim: usize) -> Norm {
        Norm {
            weight: self.take(dim),
            bias: self.take(dim),
        }
    }

    const fn linear(&mut self, in_features: usize, out_features: usize) -> Linear {
        Linear {
            weight: self.take(out_features * in_features),
            bias: self.take(out_features),
        }
    }

    const fn blocks(
        &mut self,
        dim: usize,
        hidden: usize,
        num_heads: usize,
        depth: usize,
    ) -> Blocks {
        let blocks = Blocks {
            start: self.at,
            dim,
            hidden,
            num_heads,
            depth,
        };
        self.at += depth * blocks.block_len();
        blocks
    }
}

/// Fills a fixed two-dimensional sine-cosine position table: the first half of the channels encodes the column, the
/// second half the row; in each, sines come before cosines, with frequencies `10000^(-i / (dim / 4))`.
///
/// # Shapes
/// `out: [1 + grid[0] * grid[1], dim]`; row 0, the class token's, is zero.
///
/// # Errors
/// [`Error::TooShort`] if `out` is shorter, [`Error::Dimensions`] if `dim` is no multiple of 4.
pub fn sincos_2d(out: &mut [f32], dim: usize, grid: [usize; 2]) -> Result<(), Error> {
    const OP: &str = "sincos_2d";
    if dim == 0 || !dim.is_multiple_of(4) {
        return Err(Error::Dimensions {
            op: OP,
            expected: "a width divisible by 4",
            found: dim,
        });
    }
    let rows = product(&grid).saturating_add(1);
    expect_len(OP, "out", out.len(), product(&[rows, dim]))?;
    let quarter = dim / 4;
    let (first, rest) = out.split_at_mut(dim);
    first.fill(0.0);
    for (patch, row) in rest.chunks_exact_mut(dim).take(rows - 1).enumerate() {
        let position = [(patch % grid[1]) as f64, (patch / grid[1]) as f64];
        for (half, position) in row.chunks_exact_mut(2 * quarter).zip(position) {
            let (sines, cosines) = half.split_at_mut(quarter);
            for (i, (sine, cosine)) in sines.iter_mut().zip(cosines).enumerate() {
                let angle = position / libm::pow(10000.0, i as f64 / quarter as f64);
                (*sine, *cosine) = (libm::sin(angle) as f32, libm::cos(angle) as f32);
            }
        }
    }
    Ok(())
}
