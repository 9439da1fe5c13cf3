//! Tensors of a file on their way to their places in the flat parameter vector.

use pcae_kernel::backend::{Linear, Norm};
use pcae_kernel::layout::Layout;

use super::names::{Names, Qkv};
use super::take::Taker;
use super::{positions, timm};
use crate::error::Error;

/// Puts tensors of a file where the layout wants them.
pub(super) struct Filler<'a, 'b> {
    pub(super) names: &'a Names,
    pub(super) layout: Layout,
    pub(super) values: Vec<f32>,
    pub(super) taker: &'a mut Taker<'b>,
}

impl Filler<'_, '_> {
    fn put(&mut self, name: &str, shape: &[usize], start: usize) -> Result<(), Error> {
        if let Some(found) = self.taker.take(name, shape)? {
            self.values[start..start + found.len()].copy_from_slice(&found);
        }
        Ok(())
    }

    fn linear(&mut self, name: &str, shape: [usize; 2], to: Linear) -> Result<(), Error> {
        self.put(&format!("{name}.weight"), &shape, to.weight.start)?;
        self.put(&format!("{name}.bias"), &shape[..1], to.bias.start)
    }

    pub(super) fn layer_norm(&mut self, name: &str, to: Norm) -> Result<(), Error> {
        let dim = [self.layout.vit.embed_dim];
        self.put(&format!("{name}.weight"), &dim, to.weight.start)?;
        self.put(&format!("{name}.bias"), &dim, to.bias.start)
    }

    /// Class token, positions and patch projection.
    pub(super) fn tokens(&mut self, with_cls: bool, from: Option<[usize; 2]>) -> Result<(), Error> {
        let (names, vit, to) = (self.names, self.layout.vit, self.layout.encoder);
        let d = vit.embed_dim;
        self.put(names.cls_token, &[1, 1, d], to.cls_token.start)?;
        let patch = vit.patch_size;
        let weight = format!("{}.weight", names.patch_embed);
        self.put(
            &weight,
            &[d, vit.in_chans, patch, patch],
            to.patch_embed.weight.start,
        )?;
        let bias = format!("{}.bias", names.patch_embed);
        self.put(&bias, &[d], to.patch_embed.bias.start)?;
        let from = from.unwrap_or(vit.grid());
        let rows = from[0] * from[1] + usize::from(with_cls);
        if let Some(table) = self.taker.take(names.pos_embed, &[1, rows, d])? {
            let (cls, patches) = table.split_at(if with_cls { d } else { 0 });
            let patches = positions::resample(patches, d, from, vit.grid(), names.antialias);
            let out = &mut self.values[to.pos_embed.start..to.pos_embed.end()];
            let (first, rest) = out.split_at_mut(d);
            first.fill(0.0);
            first[..cls.len()].copy_from_slice(cls);
            rest.copy_from_slice(&patches);
        }
        Ok(())
    }

    /// The last norm; returns whether it comes after pooling.
    pub(super) fn norm(&mut self) -> Result<bool, Error> {
        let to = self.layout.encoder.norm;
        let pooled = self.names.head == timm::NAMES.head
            && self
                .taker
                .shape(&format!("{}.weight", timm::FC_NORM))
                .is_some()
            && self
                .taker
                .shape(&format!("{}.weight", self.names.norm))
                .is_none();
        let name = if pooled {
            timm::FC_NORM
        } else {
            self.names.norm
        };
        self.layer_norm(name, to)?;
        Ok(pooled)
    }

    pub(super) fn block(&mut self, index: usize, layer_scale: bool) -> Result<(), Error> {
        let (names, to) = (self.names, self.layout.encoder.blocks.block(index));
        let (d, hidden) = (self.layout.vit.embed_dim, self.layout.vit.mlp_hidden());
        let name = |name: &str| names.in_block(index, name);
        self.layer_norm(&name(names.norm1), to.norm1)?;
        match names.qkv {
            Qkv::Joined(qkv) => self.linear(&name(qkv), [3 * d, d], to.qkv)?,
            Qkv::Split(parts) => {
                for (part, layer) in parts.into_iter().enumerate() {
                    let layer = name(layer);
                    let (weight, bias) = (to.qkv.weight.start, to.qkv.bias.start);
                    self.put(&format!("{layer}.weight"), &[d, d], weight + part * d * d)?;
                    self.put(&format!("{layer}.bias"), &[d], bias + part * d)?;
                }
            }
        }
        self.linear(&name(names.proj), [d, d], to.proj)?;
        self.layer_norm(&name(names.norm2), to.norm2)?;
        self.linear(&name(names.fc1), [hidden, d], to.fc1)?;
        self.linear(&name(names.fc2), [d, hidden], to.fc2)?;
        if layer_scale {
            self.fold(&name(names.scale1), to.proj, d)?;
            self.fold(&name(names.scale2), to.fc2, hidden)?;
        }
        Ok(())
    }

    /// `scale * (W x + b) = (scale W) x + scale b`, channel by channel.
    fn fold(&mut self, name: &str, layer: Linear, in_features: usize) -> Result<(), Error> {
        let Some(scale) = self.taker.take(name, &[self.layout.vit.embed_dim])? else {
            return Ok(());
        };
        let weight = &mut self.values[layer.weight.start..layer.weight.end()];
        for (row, scale) in weight.chunks_exact_mut(in_features).zip(&scale) {
            row.iter_mut().for_each(|value| *value *= scale);
        }
        let bias = &mut self.values[layer.bias.start..layer.bias.end()];
        for (value, scale) in bias.iter_mut().zip(&scale) {
            *value *= scale;
        }
        Ok(())
    }
}
