//! Elementary functions on vectors.
//!
//! The coefficients are minimax fits (Remez's algorithm in 40 digits) made for this crate.

use crate::simd::Simd;

/// `sum of c[i] * x^i`
#[inline(always)]
fn polynomial<S: Simd, const N: usize>(s: S, c: [f32; N], x: S::V) -> S::V {
    let mut sum = s.splat(0.0);
    for c in c.into_iter().rev() {
        sum = s.mul_add(sum, x, s.splat(c));
    }
    sum
}

/// `e^x`, right to the ends: infinity above 88.72, subnormals below -87.34, NaN for NaN.
///
/// # Accuracy
/// Relative error at most `f32::EPSILON` where the result is normal, one unit in the last place where it is
/// subnormal.
#[inline(always)]
pub(crate) fn exp<S: Simd>(s: S, x: S::V) -> S::V {
    // ln 2 in two parts, the first short enough that its product with an integer below 2^13 is exact.
    const LN2_HIGH: f32 = 355.0 / 512.0;
    const LN2_LOW: f32 = -2.121_944_4e-4;
    // (e^r - 1 - r) / r^2 for |r| <= ln 2 / 2, to 7.6e-9.
    const C: [f32; 5] = [
        0.5,
        0.166_665_76,
        0.041_666_374,
        0.008_363_235,
        0.001_394_122,
    ];
    // Beyond these the result is infinity and zero. NaN is the second operand, and so passes.
    let x = s.max(s.splat(-104.0), s.min(s.splat(89.0), x));
    let n = s.round(s.mul(x, s.splat(core::f32::consts::LOG2_E)));
    let r = s.neg_mul_add(n, s.splat(LN2_HIGH), x);
    let r = s.neg_mul_add(n, s.splat(LN2_LOW), r);
    let y = s.mul_add(s.mul(r, r), polynomial(s, C, r), r);
    s.scale_exp2(s.add(y, s.splat(1.0)), n)
}

/// The upper tail of the normal distribution, `0.5 * erfc(t / sqrt(2))` for `t = |x|`, and `e^(-t^2 / 2)`.
///
/// # Accuracy
/// Relative error of the tail at most `2e-7 + t^2 / 2 * f32::EPSILON`; the second term is the rounding of `t^2 / 2`.
#[inline(always)]
fn tail<S: Simd>(s: S, x: S::V) -> Tail<S::V> {
    // tail(t) * e^(t^2 / 2) as a polynomial in w = 1 / (1 + 0.3 t) without constant term, as it falls as 1 / t:
    // to 5e-8 for t <= 9, where the tail is 1e-19.
    const C: [f32; 8] = [
        0.119_605_49,
        0.121_105_7,
        0.097_783_946,
        0.135_420_17,
        -0.066_402_61,
        0.219_971_27,
        -0.165_019_68,
        0.037_535_712,
    ];
    // From 14.5 on e^(-t^2 / 2) is zero, and infinity must not meet it in a product.
    let t = s.max(x, s.sub(s.splat(0.0), x));
    let t = s.min(s.splat(14.5), t);
    let one = s.splat(1.0);
    let w = s.div(one, s.mul_add(t, s.splat(0.3), one));
    let density = exp(s, s.mul(s.mul(t, s.splat(-0.5)), t));
    let tail = s.mul(s.mul(density, w), polynomial(s, C, w));
    Tail { t, density, tail }
}

struct Tail<V> {
    t: V,
    density: V,
    tail: V,
}

/// `x * (1 + erf(x / sqrt(2))) / 2`, the exact GELU. 0 at minus infinity, NaN for NaN.
///
/// # Accuracy
/// Absolute error at most `f32::EPSILON * max(1, |x|)`.
#[inline(always)]
pub(crate) fn gelu<S: Simd>(s: S, x: S::V) -> S::V {
    let Tail { t, tail, .. } = tail(s, x);
    s.neg_mul_add(t, tail, s.max(s.splat(0.0), x))
}

/// Derivative of [`gelu`]: `Phi(x) + x * phi(x)`, the normal distribution and its density. NaN for NaN.
///
/// # Accuracy
/// Absolute error at most `2.5e-7`.
#[inline(always)]
pub(crate) fn gelu_grad<S: Simd>(s: S, x: S::V) -> S::V {
    const INV_SQRT_2PI: f32 = 0.398_942_3;
    let Tail { t, density, tail } = tail(s, x);
    // For x < 0 it is `lower`, for x > 0 one minus that; at 0 `lower` is 1/2 and both are the same.
    let lower = s.neg_mul_add(s.mul(t, s.splat(INV_SQRT_2PI)), density, tail);
    // `positive` is 1 for x > 0 and 0 for x <= 0: x scaled up so that any normal number is cut to one of them.
    let huge = s.mul(s.mul(x, s.splat(f32::MAX)), s.splat(4.0));
    let positive = s.max(s.splat(0.0), s.min(s.splat(1.0), huge));
    let sign = s.neg_mul_add(s.splat(2.0), positive, s.splat(1.0));
    s.mul_add(sign, lower, positive)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::isa::{Isa, kernel};

    kernel! {
        fn exp_all<'a, S>(s; x: &'a mut [f32]) -> () {
            for x in x.chunks_mut(S::LANES) {
                s.store(x, exp(s, s.load(x)));
            }
        }

        fn gelu_all<'a, S>(s; x: &'a mut [f32]) -> () {
            for x in x.chunks_mut(S::LANES) {
                s.store(x, gelu(s, s.load(x)));
            }
        }

        fn gelu_grad_all<'a, S>(s; x: &'a mut [f32]) -> () {
            for x in x.chunks_mut(S::LANES) {
                s.store(x, gelu_grad(s, s.load(x)));
            }
        }
    }

    /// Every 1001st f32 of either sign, which meets each exponent 8,000 times, and a fine grid where the functions bend.
    fn inputs() -> Vec<f32> {
        let all = (0..=u32::MAX).step_by(1001).map(f32::from_bits);
        let grid = (-2_000_000..2_000_000).map(|i| i as f32 * 1e-5);
        all.filter(|x| x.is_finite()).chain(grid).collect()
    }

    /// The largest of `error(x, got, want)`, and where.
    fn worst(
        isa: Isa,
        run: fn(Isa, &mut [f32]),
        want: fn(f64) -> f64,
        error: fn(f64, f64, f64) -> f64,
    ) -> (f64, f32) {
        let x = inputs();
        let mut y = x.clone();
        run(isa, &mut y);
        let errors = x.iter().zip(&y).map(|(&x, &y)| {
            assert!(!y.is_nan(), "{isa}: NaN for {x}");
            (error(f64::from(x), f64::from(y), want(f64::from(x))), x)
        });
        errors.fold((0.0, 0.0), |a, b| if b.0 > a.0 { b } else { a })
    }

    fn gelu_exact(x: f64) -> f64 {
        0.5 * x * libm::erfc(-x * core::f64::consts::FRAC_1_SQRT_2)
    }

    fn gelu_grad_exact(x: f64) -> f64 {
        let density = (-0.5 * x * x).exp() / core::f64::consts::TAU.sqrt();
        let slope = if density == 0.0 { 0.0 } else { x * density };
        0.5 * libm::erfc(-x * core::f64::consts::FRAC_1_SQRT_2) + slope
    }

    #[test]
    fn exp_is_as_accurate_as_it_says() {
        for isa in Isa::available() {
            let found = worst(isa, exp_all, f64::exp, |_, got, want| {
                let least = f64::from(f32::MIN_POSITIVE);
                if want > f64::from(f32::MAX) {
                    return if got == f64::INFINITY || got == f64::from(f32::MAX) {
                        0.0
                    } else {
                        f64::INFINITY
                    };
                }
                (got - want).abs() / want.max(least)
            });
            println!("{isa}: exp, relative error {:e} at {:e}", found.0, found.1);
            assert!(found.0 <= f64::from(f32::EPSILON), "{isa}: {found:?}");
        }
    }

    #[test]
    fn gelu_is_as_accurate_as_it_says() {
        for isa in Isa::available() {
            let error = |x: f64, got: f64, want: f64| (got - want).abs() / x.abs().max(1.0);
            let found = worst(isa, gelu_all, gelu_exact, error);
            println!("{isa}: gelu, error {:e} at {:e}", found.0, found.1);
            assert!(found.0 <= f64::from(f32::EPSILON), "{isa}: {found:?}");
        }
    }

    #[test]
    fn gelu_grad_is_as_accurate_as_it_says() {
        for isa in Isa::available() {
            let error = |_: f64, got: f64, want: f64| (got - want).abs();
            let found = worst(isa, gelu_grad_all, gelu_grad_exact, error);
            println!("{isa}: gelu', error {:e} at {:e}", found.0, found.1);
            assert!(found.0 <= 2.5e-7, "{isa}: {found:?}");
        }
    }

    #[test]
    fn infinities_and_nan() {
        let x = [f32::INFINITY, f32::NEG_INFINITY, f32::NAN];
        for isa in Isa::available() {
            for (run, want) in [
                (exp_all as fn(Isa, &mut [f32]), [f32::INFINITY, 0.0]),
                (gelu_all, [f32::INFINITY, 0.0]),
                (gelu_grad_all, [1.0, 0.0]),
            ] {
                let mut y = x;
                run(isa, &mut y);
                assert_eq!(y[..2], want, "{isa}");
                assert!(y[2].is_nan(), "{isa}");
            }
        }
    }
}
