//! A block as the layers that it is made of.

use super::{Backend, BlockDims, Epilogue};
use crate::layout::BlockParams;

/// What [`Backend::block`] does where a backend says nothing else: one layer after the other.
///
/// # Errors
/// As there.
pub fn block_by_layers<B: Backend>(
    backend: &mut B,
    dims: BlockDims,
    x: &mut B::Buf,
    [y, wide]: [&mut B::Buf; 2],
    params: &B::Params,
    block: BlockParams,
) -> Result<(), B::Error> {
    let (rows, d, hidden) = (dims.rows(), dims.rows().dim, dims.hidden);
    let (qkv, proj) = (dims.linear(d, 3 * d), dims.linear(d, d));
    let (fc1, fc2) = (dims.linear(d, hidden), dims.linear(hidden, d));

    backend.layer_norm(rows, y, x, params, block.norm1)?;
    backend.linear(qkv, wide, y, params, block.qkv, Epilogue::BiasQkv)?;
    backend.attention(dims.attention, y, wide)?;
    backend.linear(proj, x, y, params, block.proj, Epilogue::BiasResidual)?;

    backend.layer_norm(rows, y, x, params, block.norm2)?;
    backend.linear(fc1, wide, y, params, block.fc1, Epilogue::BiasGelu)?;
    backend.linear(fc2, x, wide, params, block.fc2, Epilogue::BiasResidual)
}
