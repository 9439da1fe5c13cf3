//! What the shapes of a file's tensors say about its network.

use std::path::Path;

use pcae_kernel::config::MAX_DEPTH;

use super::names::{Scheme, obstacle};
use crate::checkpoint::file::Reader;
use crate::error::Error;

/// Sizes that the tensors tell.
pub(super) struct Shapes {
    pub(super) embed_dim: usize,
    pub(super) in_chans: usize,
    pub(super) patch_size: usize,
    pub(super) depth: usize,
    pub(super) hidden: usize,
    /// Rows of the position table.
    pub(super) positions: usize,
    pub(super) layer_scale: bool,
}

impl Shapes {
    pub(super) fn find(path: &Path, reader: &Reader, scheme: &Scheme) -> Result<Self, Error> {
        let wrong = |reason: String| Error::Checkpoint {
            path: path.to_owned(),
            reason,
        };
        let Scheme { names, prefix } = scheme;
        let shape = |name: &str| reader.shape(&format!("{prefix}{name}"));
        let patch = format!("{}.weight", names.patch_embed);
        let &[embed_dim, in_chans, patch_size, width] = shape(&patch).unwrap_or_default() else {
            return Err(wrong(format!(
                "{prefix}{patch}: expected a convolution of shape [width, channels, patch, patch], found {:?}; only plain \
                 vision transformers can be read",
                shape(&patch).unwrap_or_default()
            )));
        };
        if patch_size != width {
            return Err(wrong(format!(
                "{prefix}{patch}: expected square patches, found {patch_size}x{width}; there is no way to read it"
            )));
        }
        let all = reader.names();
        let local = || {
            all.iter()
                .filter_map(|name| name.strip_prefix(prefix.as_str()))
        };
        let depth = local()
            .filter_map(|name| Some(names.block_of(name)?.0.saturating_add(1)))
            .max();
        let depth = depth.unwrap_or(0);
        if !(1..=MAX_DEPTH).contains(&depth) {
            return Err(wrong(format!(
                "expected 1 to {MAX_DEPTH} blocks {prefix}{}.0 and so on, found {depth}; only plain vision transformers can be read",
                names.blocks
            )));
        }
        if let Some(what) = local().find_map(obstacle) {
            return Err(wrong(format!(
                "expected a plain vision transformer, found {what}; this program cannot compute it, use a checkpoint without"
            )));
        }
        let gated = [
            "mlp.w12.weight",
            "mlp.w3.weight",
            "mlp.weights_in.weight",
            "mlp.fc1_g.weight",
        ];
        let hidden = |layer: &str, axis: usize| {
            let shape = shape(&names.in_block(0, &format!("{layer}.weight")))?;
            shape.get(axis).copied()
        };
        let (up, down) = (hidden(names.fc1, 0), hidden(names.fc2, 1));
        let packed = matches!((up, down), (Some(up), Some(down)) if up == 2 * down);
        if packed
            || gated
                .iter()
                .any(|name| shape(&names.in_block(0, name)).is_some())
        {
            return Err(wrong(
                "expected an MLP of two layers with GELU, found SwiGLU; this program cannot compute it, use a checkpoint without \
                 (DINOv2's giant has it, small, base and large do not)"
                    .to_owned(),
            ));
        }
        let Some(hidden) = up.or(down) else {
            return Err(wrong(format!(
                "expected {prefix}{}, found none; only plain vision transformers can be read",
                names.in_block(0, &format!("{}.weight", names.fc1))
            )));
        };
        let table = shape(names.pos_embed).unwrap_or_default();
        let positions = match *table {
            [] => 0,
            [1, rows, _] => rows,
            _ => {
                return Err(wrong(format!(
                    "{prefix}{}: expected shape [1, positions, {embed_dim}], found {table:?}; only plain vision transformers \
                     can be read",
                    names.pos_embed
                )));
            }
        };
        Ok(Self {
            embed_dim,
            in_chans,
            patch_size,
            depth,
            hidden,
            positions,
            layer_scale: shape(&names.in_block(0, names.scale1)).is_some(),
        })
    }

    /// The grid of the position table, and whether the class token has a row in front: as `sizes`, in this order, say, or
    /// else square.
    pub(super) fn grid(&self, sizes: [Option<[usize; 2]>; 2]) -> Option<(bool, [usize; 2])> {
        for size in sizes.into_iter().flatten() {
            let grid = size.map(|edge| edge / self.patch_size.max(1));
            let patches = grid[0].saturating_mul(grid[1]);
            for (with_cls, rows) in [(true, patches.saturating_add(1)), (false, patches)] {
                if rows == self.positions && patches > 0 {
                    return Some((with_cls, grid));
                }
            }
        }
        [
            (true, self.positions.saturating_sub(1)),
            (false, self.positions),
        ]
        .into_iter()
        .map(|(with_cls, patches)| (with_cls, patches, patches.isqrt()))
        .find(|(_, patches, edge)| *patches > 0 && edge * edge == *patches)
        .map(|(with_cls, _, edge)| (with_cls, [edge, edge]))
    }
}
