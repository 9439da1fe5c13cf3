use arbitrary::{Result, Unstructured};
use pcae_kernel::backend::{Backend, TokenDims};
use pcae_kernel::error::Error;
use pcae_kernel::reference::{Arena, Reference, Storage};
use pcae_kernel::schedule::random_masking;

/// Sorts noise, selects tokens by score and gathers them, on the reference backend with owned buffers and in an arena.
///
/// Oracle: a token's place is the number of tokens with a lower score, or an equal one and a lower index. NaN, short
/// buffers and indices out of range are errors and change nothing.
pub fn masking_selection(bytes: &[u8]) {
    // Bytes that run out are zeros, so every input is a case.
    let Ok(case) = Case::new(&mut Unstructured::new(bytes)) else {
        return;
    };
    case.masking();
    case.selection(&mut Reference::owned());
    let (mut floats, mut ids) = ([0.0; 4096], [0; 4096]);
    case.selection(&mut Reference::new(Arena::new(&mut floats, &mut ids)));
}

struct Case {
    dims: TokenDims,
    keep: usize,
    /// `[batch, tokens]`
    scores: Vec<f32>,
    /// How many elements the output of `select` has more (or fewer) than needed.
    slack: isize,
    /// An index to spoil, and the value to spoil it with.
    spoiled: (usize, u32),
}

impl Case {
    fn new(u: &mut Unstructured<'_>) -> Result<Self> {
        let dims = TokenDims {
            batch: u.int_in_range(1..=3)?,
            prefix: u.int_in_range(0..=2)?,
            tokens: u.int_in_range(0..=64)?,
            dim: u.int_in_range(1..=3)?,
        };
        // One more than there are is an error to be seen, too.
        let keep = u.int_in_range(0..=dims.tokens + 1)?;
        let slack = u.int_in_range(-2..=2)?;
        let spoiled = (u.arbitrary()?, u.arbitrary()?);
        let raw: bool = u.arbitrary()?;
        let score = |u: &mut Unstructured<'_>| {
            if raw {
                return Ok(f32::from_bits(u.arbitrary()?));
            }
            // Few values: ties of every kind.
            let common = [
                0.0,
                -0.0,
                1.0,
                -1.0,
                f32::INFINITY,
                f32::NEG_INFINITY,
                1e-45,
            ];
            Ok(*u.choose(&common)?)
        };
        let scores = (0..dims.batch * dims.tokens)
            .map(|_| score(u))
            .collect::<Result<_>>()?;
        Ok(Self {
            dims,
            keep,
            scores,
            slack,
            spoiled,
        })
    }

    /// Scores of one sequence.
    fn sequence(&self, b: usize) -> &[f32] {
        &self.scores[b * self.dims.tokens..][..self.dims.tokens]
    }

    fn masking(&self) {
        const UNTOUCHED: u32 = 77;
        for b in 0..self.dims.batch {
            let noise = self.sequence(b);
            let len = noise.len().saturating_add_signed(self.slack);
            let mut order = vec![UNTOUCHED; len];
            let result = random_masking(noise, &mut order);
            if len < noise.len() {
                assert!(matches!(result, Err(Error::TooShort { .. })), "{result:?}");
                assert!(order.iter().all(|&id| id == UNTOUCHED));
            } else if let Some(nan) = noise.iter().position(|x| x.is_nan()) {
                assert!(
                    matches!(result, Err(Error::NotANumber { at, .. }) if at == nan),
                    "{result:?}"
                );
                assert!(order.iter().all(|&id| id == UNTOUCHED));
            } else {
                result.expect("numbers can be sorted");
                assert_eq!(order[..noise.len()], sorted(noise));
                assert!(order[noise.len()..].iter().all(|&id| id == UNTOUCHED));
            }
        }
    }

    fn selection<S: Storage<f32>>(&self, backend: &mut Reference<f32, S>) {
        const UNTOUCHED: u32 = 77;
        const ROOM: &str = "there is room for every case";
        let TokenDims {
            batch,
            prefix,
            tokens,
            dim,
        } = self.dims;
        let keep = self.keep;
        let needed = batch * keep;
        let len = needed.saturating_add_signed(self.slack);

        let mut scores = backend.scores(self.scores.len()).expect(ROOM);
        backend.write_scores(&mut scores, &self.scores).expect(ROOM);
        let mut picked = backend.ids(len).expect(ROOM);
        backend
            .write_ids(&mut picked, &vec![UNTOUCHED; len])
            .expect(ROOM);
        let result = backend.select(batch, tokens, keep, &mut picked, &scores);
        let nan = self.scores.iter().any(|x| x.is_nan());
        if keep > tokens || len < needed || nan {
            result.expect_err("too many tokens, a short buffer or NaN");
            assert!(picked.as_ref().iter().all(|&id| id == UNTOUCHED));
            return;
        }
        result.expect("numbers can be sorted");
        let want: Vec<u32> = (0..batch)
            .flat_map(|b| sorted(self.sequence(b)).into_iter().take(keep))
            .collect();
        assert_eq!(picked.as_ref()[..needed], want);
        assert!(picked.as_ref()[needed..].iter().all(|&id| id == UNTOUCHED));

        // Every element is its own index, so a moved one shows.
        let kept = self.dims.with_tokens(keep);
        let values: Vec<f32> = (0..self.dims.len()).map(|i| i as f32).collect();
        let mut x = backend.buf(values.len()).expect(ROOM);
        backend.write(&mut x, &values).expect(ROOM);
        let mut out = backend.buf(kept.len()).expect(ROOM);
        backend
            .gather_tokens(self.dims, keep, &mut out, &x, &picked)
            .expect("the picked tokens exist");
        let row = |b: usize, token: usize| &values[(b * (prefix + tokens) + token) * dim..][..dim];
        let mut want_out: Vec<f32> = Vec::new();
        for b in 0..batch {
            (0..prefix).for_each(|token| want_out.extend(row(b, token)));
            for &token in &want[b * keep..][..keep] {
                want_out.extend(row(b, prefix + token as usize));
            }
        }
        assert_eq!(out.as_ref(), want_out);

        let positions: Vec<u32> = (0..batch * tokens).map(|i| 1000 + i as u32).collect();
        let mut ids = backend.ids(positions.len()).expect(ROOM);
        backend.write_ids(&mut ids, &positions).expect(ROOM);
        let mut followed = backend.ids(needed).expect(ROOM);
        backend
            .gather_ids(batch, tokens, keep, &mut followed, Some(&ids), &picked)
            .expect("the picked tokens exist");
        let want_ids: Vec<u32> = (0..needed)
            .map(|i| 1000 + (i / keep * tokens) as u32 + want[i])
            .collect();
        assert_eq!(followed.as_ref(), want_ids);
        backend
            .gather_ids(batch, tokens, keep, &mut followed, None, &picked)
            .expect("the picked tokens exist");
        assert_eq!(followed.as_ref(), want);

        if needed > 0 {
            let (at, value) = self.spoiled;
            picked.as_mut()[at % needed] = value;
            let gathered = backend.gather_tokens(self.dims, keep, &mut out, &x, &picked);
            let followed =
                backend.gather_ids(batch, tokens, keep, &mut followed, Some(&ids), &picked);
            let in_range = (value as usize) < tokens;
            assert_eq!(gathered.is_ok(), in_range, "index {value} of {tokens}");
            assert_eq!(followed.is_ok(), in_range, "index {value} of {tokens}");
            if !in_range {
                assert_eq!(out.as_ref(), want_out, "an error changed the output");
            }
        }
    }
}

/// The indices in stable ascending order, by counting what comes before each.
fn sorted(x: &[f32]) -> Vec<u32> {
    if x.iter().any(|x| x.is_nan()) {
        return Vec::new();
    }
    let mut order = vec![0; x.len()];
    for (i, a) in x.iter().enumerate() {
        let before = |(j, b): (usize, &f32)| b < a || (b == a && j < i);
        let place = x.iter().enumerate().filter(|&pair| before(pair)).count();
        order[place] = i as u32;
    }
    order
}
