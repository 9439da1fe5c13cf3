//! Elementary functions on vectors.
//!
//! The coefficients are minimax fits (Remez's algorithm in 40 digits) made for this crate.

use crate::simd::Simd;

/// `sum of c[i] * x^i`
#[inline(always)]
fn polynomial<S: Simd, const N: usize>(s: S, c: [f32; N], x: S::V) -> S::V {
    let mut sum = s.splat(c[N - 1]);
    for c in c[..N - 1].iter().rev() {
        sum = s.mul_add(sum, x, s.splat(*c));
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

/// `2^z` for `-252 <= z <= 0`, subnormals and zero among the results, NaN for NaN.
///
/// # Accuracy
/// Relative error at most `2e-7` where the result is normal. 1 for 0.
#[inline(always)]
pub(crate) fn exp2<S: Simd>(s: S, z: S::V) -> S::V {
    // 2^r for |r| <= 1 / 2, to 9.4e-8.
    #[expect(
        clippy::approx_constant,
        reason = "a minimax coefficient, close to ln 2 but not it"
    )]
    const C: [f32; 6] = [
        1.0,
        0.693_147,
        0.240_222_47,
        0.055_507_11,
        0.009_671_291,
        0.001_326_952_1,
    ];
    let n = s.round(z);
    s.scale_exp2(polynomial(s, C, s.sub(z, n)), n)
}

/// `log2(e) / 2`: `e^(-t^2 / 2) = 2^(-HALF_LOG2_E * t^2)`.
const HALF_LOG2_E: f32 = core::f32::consts::LOG2_E / 2.0;
/// From here on the tail of the normal distribution is below half the smallest f32, and its logarithm still finite.
const END: f32 = 14.5;

/// `x * (1 + erf(x / sqrt(2))) / 2`, the exact GELU. 0 at minus infinity, NaN for NaN.
///
/// # Accuracy
/// Absolute error at most `f32::EPSILON * max(1, |x|)`; relative error at most `8 * f32::EPSILON` for `x >= -1/2`.
#[inline(always)]
pub(crate) fn gelu<S: Simd>(s: S, x: S::V) -> S::V {
    // log2(tail(t) * e^(t^2 / 2)) for the upper tail of the normal distribution, 0.5 * erfc(t / sqrt(2)). To 4.1e-8 in
    // t * tail(t) / max(1, t), and such that the tail is 0 at `END`. Neither a division nor a second polynomial.
    const C: [f32; 9] = [
        -1.0,
        -1.151_129_1,
        0.262_320_43,
        -0.052_993_815,
        0.007_725_901,
        -0.000_607_146_8,
        -5.963_705e-6,
        4.544_412_6e-6,
        -2.018_806e-7,
    ];
    let t = s.min(s.splat(END), s.abs(x));
    let log = s.neg_mul_add(s.mul(t, t), s.splat(HALF_LOG2_E), polynomial(s, C, t));
    // x * Phi(x) is x - x * tail(x) for x > 0 and x * tail(-x) below.
    s.neg_mul_add(t, exp2(s, log), s.max(s.splat(0.0), x))
}

/// Derivative of [`gelu`]: `Phi(x) + x * phi(x)`, the normal distribution and its density. 0 and 1 at the infinities,
/// NaN for NaN.
///
/// # Accuracy
/// Absolute error at most `2.5e-7`.
#[inline(always)]
pub(crate) fn gelu_grad<S: Simd>(s: S, x: S::V) -> S::V {
    // (tail(t) - t * phi(t)) * e^(t^2 / 2), which is the derivative at -t but for a factor: to 4.5e-8 in the product.
    const C: [f32; 12] = [
        0.5,
        -0.797_882,
        0.249_953_61,
        -0.132_688_16,
        0.061_583_634,
        -0.024_926_323,
        0.008_478_482,
        -0.002_274_877,
        0.000_445_382_12,
        -5.788_669e-5,
        4.334_048_3e-6,
        -1.365_666_4e-7,
    ];
    let t = s.min(s.splat(END), s.abs(x));
    let bell = exp2(s, s.mul(s.mul(t, t), s.splat(-HALF_LOG2_E)));
    // The derivative is 1/2 and an odd function.
    let half = s.splat(0.5);
    let odd = s.neg_mul_add(bell, polynomial(s, C, t), half);
    s.add(half, s.flip(odd, x))
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
            // What is subnormal has no relative accuracy.
            let relative = |x: f64, got: f64, want: f64| {
                let normal = want.abs() >= f64::from(f32::MIN_POSITIVE);
                if x >= -0.5 && normal {
                    (got - want).abs() / want.abs()
                } else {
                    0.0
                }
            };
            let found = worst(isa, gelu_all, gelu_exact, relative);
            println!("{isa}: gelu, relative error {:e} at {:e}", found.0, found.1);
            assert!(found.0 <= 8.0 * f64::from(f32::EPSILON), "{isa}: {found:?}");
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
