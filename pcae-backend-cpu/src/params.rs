//! Parameters as the backend keeps them.

use pcae_kernel::backend::{LinearDims, Span};
use pcae_kernel::error::Error as KernelError;
use pcae_kernel::layout::{Kind, Layout};

use crate::buf::Floats;
use crate::checks::check_span;
use crate::cpu::grown;
use crate::error::Error;
use crate::gemm::{Precision, Right, pack_weight, pack_weight_bf16, packed_len_bf16};
use crate::isa::Isa;

/// All parameters of a model.
#[derive(Debug)]
pub struct Params {
    values: Floats,
    /// Of the operands of linear layers.
    pub(crate) precision: Precision,
    /// Weights of linear layers as one instruction set wants them, if they are.
    frozen: Option<Frozen>,
}

/// Packed weights: f32 in the place of the unpacked, or bf16 beside them.
#[derive(Debug)]
struct Frozen {
    isa: Isa,
    pairs: Floats,
    /// By their first parameter.
    places: Vec<Packed>,
}

/// A packed weight, `[n, inner]`.
#[derive(Clone, Copy, Debug)]
struct Packed {
    /// Its first parameter.
    start: usize,
    n: usize,
    inner: usize,
    /// Where its pairs begin, of bf16.
    at: usize,
}

impl Params {
    /// `values` as they are.
    pub(crate) fn new(values: &[f32], precision: Precision) -> Result<Self, Error> {
        let mut all = Floats::zeros(values.len())?;
        all.copy_from_slice(values);
        Ok(Self {
            values: all,
            precision,
            frozen: None,
        })
    }

    /// Packs the weights of linear layers.
    pub(crate) fn freeze(&mut self, isa: Isa, layout: &Layout) -> Result<(), Error> {
        let mut weights = Vec::new();
        layout.for_each(|tensor| {
            if tensor.kind == Kind::Weight {
                let n = tensor.shape().first().copied().unwrap_or(0);
                weights.push((tensor.span, n, tensor.span.len / n.max(1)));
            }
        });
        self.precision.check(isa)?;
        let mut frozen = Frozen {
            isa,
            pairs: Floats::default(),
            places: Vec::new(),
        };
        let len = |precision, n, inner| match precision {
            Precision::F32 => 0,
            Precision::Bf16(unit) => packed_len_bf16(isa, unit, n, inner),
        };
        let mut total = 0;
        for &(span, n, inner) in &weights {
            frozen.places.push(Packed {
                start: span.start,
                n,
                inner,
                at: total,
            });
            total += len(self.precision, n, inner);
        }
        frozen.places.sort_unstable_by_key(|packed| packed.start);
        match self.precision {
            Precision::F32 => {
                let mut copy = Vec::new();
                for (span, n, inner) in weights {
                    let weight = &mut self.values[span.start..span.end()];
                    pack_weight(isa, weight, grown(&mut copy, span.len)?, n, inner);
                }
            }
            Precision::Bf16(unit) => {
                frozen.pairs = Floats::zeros(total)?;
                let mut rest = &mut *frozen.pairs;
                for (span, n, inner) in weights {
                    let (to, after) = rest.split_at_mut(len(self.precision, n, inner));
                    let weight = &self.values[span.start..span.end()];
                    pack_weight_bf16(isa, unit, to, weight, n, inner);
                    rest = after;
                }
            }
        }
        self.frozen = Some(frozen);
        Ok(())
    }

    /// The weight of a linear layer as the right operand of its forward.
    pub(crate) fn weight(
        &self,
        op: &'static str,
        isa: Isa,
        span: Span,
        dims: LinearDims,
    ) -> Result<Right<'_>, Error> {
        let weight = self.part(op, "weight", span, dims.weight_len())?;
        let Some(frozen) = &self.frozen else {
            return Ok(Right::Columns(weight));
        };
        let place = frozen
            .places
            .binary_search_by_key(&span.start, |packed| packed.start);
        // In panels a weight has one shape only.
        match place.map(|i| &frozen.places[i]) {
            Ok(packed)
                if frozen.isa == isa
                    && (packed.n, packed.inner) == (dims.out_features, dims.in_features) =>
            {
                Ok(match self.precision {
                    Precision::F32 => Right::Panels(weight),
                    Precision::Bf16(_) => Right::Pairs(&frozen.pairs[packed.at..]),
                })
            }
            _ => Err(Error::Frozen { op }),
        }
    }

    pub(crate) fn values(&self) -> &[f32] {
        &self.values
    }

    /// To read and write all of them, which frozen ones do not allow.
    pub(crate) fn trainable(&mut self, op: &'static str) -> Result<&mut [f32], Error> {
        self.check_trainable(op)?;
        Ok(&mut self.values)
    }

    pub(crate) fn check_trainable(&self, op: &'static str) -> Result<(), Error> {
        match self.frozen {
            Some(_) => Err(Error::Frozen { op }),
            None => Ok(()),
        }
    }

    /// The first `len` parameters of `span`.
    pub(crate) fn part(
        &self,
        op: &'static str,
        what: &'static str,
        span: Span,
        len: usize,
    ) -> Result<&[f32], KernelError> {
        let values = self.values();
        Ok(&values[check_span(op, what, values.len(), span, len)?])
    }

    /// The table of positions and how many patches have one; row 0 is the class token's.
    pub(crate) fn positions(
        &self,
        op: &'static str,
        span: Span,
        dim: usize,
    ) -> Result<(&[f32], usize), KernelError> {
        let table = self.part(op, "pos_embed", span, span.len)?;
        Ok((table, (table.len() / dim.max(1)).saturating_sub(1)))
    }
}
