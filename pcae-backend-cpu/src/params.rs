//! Parameters as the backend keeps them.

use core::ops::Range;

use pcae_kernel::backend::{LinearDims, Span};
use pcae_kernel::layout::{Kind, Layout};
use pcae_kernel::sizing::Role;

use crate::buf::Floats;
use crate::checks::check_span;
use crate::cpu::grown;
use crate::error::Error;
use crate::gemm::{Bf16Unit, PairsLen, Precision, Right, WeightPairs, pack_weight, pairs_len};
use crate::isa::Isa;
use crate::memory;

/// All parameters of a model.
#[derive(Debug)]
pub struct Params {
    /// All of them, or those that are in no weight where [`Packed::has_all`].
    values: Floats,
    len: usize,
    /// Of the operands of linear layers.
    pub(crate) precision: Precision,
    /// Weights of linear layers as one instruction set wants them, if they are.
    packed: Option<Packed>,
}

/// Packed weights: f32 in the place of the unpacked; bf16 beside them, or of frozen ones instead of them.
#[derive(Debug)]
pub(crate) struct Packed {
    isa: Isa,
    role: Role,
    /// By their first parameter.
    weights: Vec<Weight>,
    /// Of bf16.
    pairs: Floats,
}

/// A packed weight, `[n, inner]`.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Weight {
    /// Its first parameter.
    start: usize,
    /// Parameters of the weights before it.
    before: usize,
    n: usize,
    inner: usize,
    /// Where its pairs are, of bf16.
    at: usize,
    len: PairsLen,
    /// Whether its values have changed since.
    is_stale: bool,
}

impl Weight {
    /// Its parameters.
    pub(crate) fn range(&self) -> Range<usize> {
        self.start..self.start + self.n * self.inner
    }

    /// Elements of a row.
    pub(crate) fn inner(&self) -> usize {
        self.inner
    }
}

/// Parameters to be updated.
pub(crate) struct Trainable<'a> {
    pub(crate) values: &'a mut [f32],
    /// Pairs to be packed anew with them, and their unit.
    pub(crate) packed: Option<(Bf16Unit, &'a mut Packed)>,
}

impl Params {
    /// `values` as they are, and what products read beside them or in their place. What is trained or a teacher's is packed in
    /// bf16 alone; see [`crate::gemm`].
    pub(crate) fn new(
        values: &[f32],
        precision: Precision,
        isa: Isa,
        layout: &Layout,
        role: Role,
    ) -> Result<Self, Error> {
        precision.check(isa)?;
        let packed = match role == Role::Frozen || precision != Precision::F32 {
            true => Some(Packed::new(values, precision, isa, layout, role)?),
            false => None,
        };
        let gaps = match &packed {
            Some(packed) if packed.has_all() => packed.weights(),
            _ => &[],
        };
        let gone: usize = gaps.iter().map(|gap| gap.range().len()).sum();
        let mut kept = Floats::zeros(values.len().saturating_sub(gone))?;
        let (mut to, mut from) = (0, 0);
        let mut keep = |part: &[f32]| {
            kept[to..to + part.len()].copy_from_slice(part);
            to += part.len();
        };
        for gap in gaps.iter().map(Weight::range) {
            keep(&values[from..gap.start]);
            from = gap.end;
        }
        keep(&values[from..]);
        if let Some(packed) = &packed
            && precision == Precision::F32
        {
            packed.pack_in_place(&mut kept)?;
        }
        Ok(Self {
            values: kept,
            len: values.len(),
            precision,
            packed,
        })
    }

    /// The weight of a linear layer as the right operand of its forward.
    pub(crate) fn weight(
        &self,
        op: &'static str,
        isa: Isa,
        span: Span,
        dims: LinearDims,
    ) -> Result<Right<'_>, Error> {
        let len = dims.weight_len();
        check_span(op, "weight", self.len, span, len)?;
        match self.packed_weight(isa, span, dims) {
            Some((packed, place)) => Ok(match self.precision {
                Precision::F32 => Right::Panels(self.part(op, "weight", span, len)?),
                Precision::Bf16(_) => Right::Pairs(&packed.pairs[place.at..][..place.len.forward]),
            }),
            // In panels a weight has one shape only.
            None => match self.is_frozen() {
                true => Err(Error::Frozen { op }),
                false => Ok(Right::Columns(self.part(op, "weight", span, len)?)),
            },
        }
    }

    /// The weight of a linear layer as the right operand of its input's gradient.
    pub(crate) fn weight_backward(
        &self,
        op: &'static str,
        isa: Isa,
        span: Span,
        dims: LinearDims,
    ) -> Result<Right<'_>, Error> {
        self.check_trainable(op)?;
        let weight = self.part(op, "weight", span, dims.weight_len())?;
        Ok(match self.packed_weight(isa, span, dims) {
            Some((packed, place)) if place.len.backward > 0 => {
                let at = place.at + place.len.forward;
                Right::Pairs(&packed.pairs[at..][..place.len.backward])
            }
            _ => Right::Rows(weight),
        })
    }

    fn packed_weight(&self, isa: Isa, span: Span, dims: LinearDims) -> Option<(&Packed, Weight)> {
        let packed = self.packed.as_ref().filter(|packed| packed.isa == isa)?;
        let weight = packed.weights[packed.position(span.start)?];
        ((weight.n, weight.inner) == (dims.out_features, dims.in_features))
            .then_some((packed, weight))
    }

    /// To read and write all of them, which frozen ones do not allow.
    pub(crate) fn trainable(&mut self, op: &'static str) -> Result<Trainable<'_>, Error> {
        self.check_trainable(op)?;
        Ok(Trainable {
            values: &mut self.values,
            packed: match self.precision {
                Precision::F32 => None,
                Precision::Bf16(unit) => self.packed.as_mut().map(|packed| (unit, packed)),
            },
        })
    }

    pub(crate) fn check_trainable(&self, op: &'static str) -> Result<(), Error> {
        match self.is_frozen() {
            true => Err(Error::Frozen { op }),
            false => Ok(()),
        }
    }

    fn is_frozen(&self) -> bool {
        (self.packed.as_ref()).is_some_and(|packed| packed.role == Role::Frozen)
    }

    /// The first `len` parameters of `span`.
    pub(crate) fn part(
        &self,
        op: &'static str,
        what: &'static str,
        span: Span,
        len: usize,
    ) -> Result<&[f32], Error> {
        let mut range = check_span(op, what, self.len, span, len)?;
        if let Some(packed) = &self.packed
            && packed.has_all()
        {
            let gone = packed.before(&range).ok_or(Error::Frozen { op })?;
            range = range.start - gone..range.end - gone;
        }
        Ok(&self.values[range])
    }

    /// The table of positions and how many patches have one; row 0 is the class token's.
    pub(crate) fn positions(
        &self,
        op: &'static str,
        span: Span,
        dim: usize,
    ) -> Result<(&[f32], usize), Error> {
        let table = self.part(op, "pos_embed", span, span.len)?;
        Ok((table, (table.len() / dim.max(1)).saturating_sub(1)))
    }
}

impl Packed {
    fn new(
        values: &[f32],
        precision: Precision,
        isa: Isa,
        layout: &Layout,
        role: Role,
    ) -> Result<Self, Error> {
        let mut weights = Vec::new();
        let mut at = 0_usize;
        layout.for_each(|tensor| {
            if tensor.kind == Kind::Weight {
                let n = tensor.shape().first().copied().unwrap_or(0);
                let inner = tensor.span.len / n.max(1);
                let len = match precision {
                    Precision::F32 => PairsLen::default(),
                    Precision::Bf16(unit) => pairs_len(isa, unit, n, inner, role),
                };
                let start = tensor.span.start;
                weights.push(Weight {
                    start,
                    before: 0,
                    n,
                    inner,
                    at,
                    len,
                    is_stale: false,
                });
                at = at.saturating_add(len.total());
            }
        });
        weights.sort_unstable_by_key(|weight| weight.start);
        let mut before = 0;
        for weight in &mut weights {
            weight.before = before;
            before += weight.range().len();
        }
        let mut packed = Self {
            isa,
            role,
            weights,
            pairs: Floats::zeros(at)?,
        };
        if let Precision::Bf16(unit) = precision {
            for i in 0..packed.weights.len() {
                packed.repack(unit, packed.weights[i], values);
            }
        }
        Ok(packed)
    }

    /// Packs all weights in f32, in the place where they are among all parameters.
    fn pack_in_place(&self, values: &mut [f32]) -> Result<(), Error> {
        let mut copy = Vec::new();
        for weight in &self.weights {
            let values = &mut values[weight.range()];
            let copy = grown(&mut copy, values.len())?;
            pack_weight(self.isa, values, copy, weight.n, weight.inner);
        }
        Ok(())
    }

    /// Whether nothing reads the weights in f32: they are frozen and in bf16, without a backward and an update.
    fn has_all(&self) -> bool {
        self.role == Role::Frozen && !self.pairs.is_empty()
    }

    /// How many parameters of weights come before these; none if some of these are in a weight.
    fn before(&self, these: &Range<usize>) -> Option<usize> {
        let next = self.weights.partition_point(|w| w.start < these.end);
        let Some(last) = next.checked_sub(1).map(|last| &self.weights[last]) else {
            return Some(0);
        };
        let range = last.range();
        (range.end <= these.start || these.is_empty()).then_some(last.before + range.len())
    }

    /// All that are packed, by their first parameter.
    pub(crate) fn weights(&self) -> &[Weight] {
        &self.weights
    }

    /// Of the weight with this first parameter.
    fn position(&self, start: usize) -> Option<usize> {
        let found = self
            .weights
            .binary_search_by_key(&start, |weight| weight.start);
        found.ok()
    }

    /// The place of the pairs of the same weight as another's, if it has them, for all of them to be written.
    pub(crate) fn pairs(&mut self, unit: Bf16Unit, like: &Weight) -> Option<WeightPairs<'_>> {
        let i = self.position(like.start)?;
        let weight = &mut self.weights[i];
        if (weight.n, weight.inner) != (like.n, like.inner) {
            return None;
        }
        weight.is_stale = false;
        let streamed = memory::is_streamed(size_of_val::<[f32]>(&self.pairs));
        let to = &mut self.pairs[weight.at..][..weight.len.total()];
        let dims = [weight.n, weight.inner];
        let (isa, role) = (self.isa, self.role);
        Some(WeightPairs::new(isa, unit, dims, role, streamed, to))
    }

    /// Says that these parameters change.
    pub(crate) fn mark_stale(&mut self, range: Range<usize>) {
        let first = self
            .weights
            .partition_point(|w| w.range().end <= range.start);
        let rest = self.weights[first..].iter_mut();
        for weight in rest.take_while(|w| w.start < range.end) {
            weight.is_stale = true;
        }
    }

    /// Packs anew what has changed and was not packed since.
    pub(crate) fn repack_stale(&mut self, unit: Bf16Unit, values: &[f32]) {
        for i in 0..self.weights.len() {
            if self.weights[i].is_stale {
                self.repack(unit, self.weights[i], values);
            }
        }
    }

    /// Packs one of the weights.
    fn repack(&mut self, unit: Bf16Unit, weight: Weight, values: &[f32]) {
        if let Some(pairs) = self.pairs(unit, &weight) {
            // SAFETY: there is no other thread.
            unsafe { pairs.pack(0, &values[weight.range()]) };
        }
    }
}
