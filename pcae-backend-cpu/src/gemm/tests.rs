use super::*;
use pcae_kernel::sizing::Role;
use proptest::prelude::*;

fn values(len: usize, seed: u64) -> Vec<f32> {
    (0..len as u64)
        .map(|i| ((i * 7 + seed) * 2_654_435_761 % 1009) as f32 / 504.5 - 1.0)
        .collect()
}

/// Cuts at which small products have several of everything.
const SMALL: Cuts = Cuts {
    depth: 32,
    run: 2,
    chunk: 48,
    left: 48 * 24,
    group: 2,
    block: 0,
    min_block: 90,
};

fn run(
    isa: Isa,
    precision: Precision,
    threads: &Threads,
    cuts: &Cuts,
    dims: Dims,
    left: Left<View<'_>>,
    right: Right<'_>,
    finish: &Finish<'_>,
) {
    let shape = Shape::of(isa, precision, dims.inner);
    let product = Product {
        isa,
        precision,
        shape,
        dims,
        left,
        right,
        finish,
    };
    // What an earlier product left in the scratch must not matter.
    let mut scratch = Scratch::default();
    scratch.floats(1000).unwrap().fill(f32::NAN);
    product.run(cuts, threads, &mut scratch).unwrap();
}

fn transposed(x: &[f32], rows: usize, cols: usize) -> Vec<f32> {
    (0..rows * cols)
        .map(|i| x[i % rows * cols + i / rows])
        .collect()
}

fn exact(dims: Dims, left: &[f32], right: &[f32]) -> Vec<f64> {
    let Dims { m, n, inner } = dims;
    let at = |i: usize, j: usize| {
        let terms =
            (0..inner).map(|l| f64::from(left[i * inner + l]) * f64::from(right[l * n + j]));
        terms.sum()
    };
    (0..m * n).map(|i| at(i / n, i % n)).collect()
}

/// All ways to give the operands, on pools of 1, 2 and 3 threads: one result, bit by bit, close to `want`.
fn check(isa: Isa, pools: &[Threads], dims: Dims) {
    let Dims { m, n, inner } = dims;
    let (left, right, bias, start) = (
        values(m * inner, 1),
        values(inner * n, 2),
        values(n, 3),
        values(m * n, 4),
    );
    let (left_t, right_t) = (transposed(&left, m, inner), transposed(&right, inner, n));
    let mut panels = right_t.clone();
    pack_weight(isa, &mut panels, &mut vec![0.0; n * inner], n, inner);
    let mut first: Option<Vec<f32>> = None;
    let product = exact(dims, &left, &right);
    for (pool, cuts) in pools
        .iter()
        .flat_map(|pool| [(pool, Cuts::of_this_machine(Precision::F32)), (pool, SMALL)])
    {
        for left in [
            Left::Rows(View::F32(&left)),
            Left::Columns(View::F32(&left_t)),
        ] {
            for right in [
                Right::Rows(&right),
                Right::Columns(&right_t),
                Right::Panels(&panels),
            ] {
                let mut out = start.clone();
                let finish = Finish::new(&mut out, n, &bias, Mode::Add);
                run(isa, Precision::F32, pool, &cuts, dims, left, right, &finish);
                for (i, (got, want)) in out.iter().zip(&product).enumerate() {
                    let want = want + f64::from(bias[i % n]) + f64::from(start[i]);
                    // Sums of inner products of numbers below 1, each rounded once or twice.
                    let bound = (inner + 3) as f64 * f64::from(f32::EPSILON) * 2.0;
                    assert!(
                        (f64::from(*got) - want).abs() <= bound,
                        "{isa} {dims:?} {i}: {got} {want}"
                    );
                }
                match &first {
                    None => first = Some(out),
                    Some(first) => assert!(
                        first
                            .iter()
                            .zip(&out)
                            .all(|(a, b)| a.to_bits() == b.to_bits()),
                        "{isa} {dims:?} {left:?} {right:?}"
                    ),
                }
            }
        }
    }
}

/// [`check`] for bf16: close to the exact product of the rounded operands. Gives the bits.
fn check_bf16(isa: Isa, unit: Bf16Unit, pools: &[Threads], dims: Dims) -> Vec<u32> {
    let Dims { m, n, inner } = dims;
    let (left, right) = (values(m * inner, 1), values(inner * n, 2));
    let (left_t, right_t) = (transposed(&left, m, inner), transposed(&right, inner, n));
    let len = pairs_len(isa, unit, n, inner, Role::Trained);
    let mut packed = vec![f32::NAN; len.total()];
    let pairs = WeightPairs::new(isa, unit, [n, inner], Role::Trained, true, &mut packed);
    assert!(pairs.step().is_multiple_of(2), "{isa} {unit}");
    // The last rows first.
    let whole = (n.div_ceil(2)).next_multiple_of(pairs.step()).min(n);
    for (first, rows) in [(whole, whole..n), (0, 0..whole)] {
        if !rows.is_empty() {
            // SAFETY: there is no other thread, and `whole` is a multiple of the step if there are rows behind it.
            unsafe { pairs.pack(first, &right_t[rows.start * inner..rows.end * inner]) };
        }
    }
    // Those of the backward are those of the forward of the transposed weight.
    let len_turned = pairs_len(isa, unit, inner, n, Role::Frozen);
    let mut turned = vec![f32::NAN; len_turned.total()];
    let pairs = WeightPairs::new(isa, unit, [inner, n], Role::Frozen, false, &mut turned);
    // SAFETY: as above.
    unsafe { pairs.pack(0, &right) };
    assert_eq!(packed[len.forward..], turned, "{isa} {unit} {dims:?}");
    let packed = &packed[..len.forward];
    let (narrow, narrow_t) = (narrowed(&left), narrowed(&left_t));
    let narrow_right = narrowed(&right);
    // Rounded as it is packed, and before.
    let lefts = [
        Left::Rows(View::F32(&left)),
        Left::Columns(View::F32(&left_t)),
        Left::Rows(View::Bf16(&narrow)),
        Left::Columns(View::Bf16(&narrow_t)),
    ];
    let round = |x: &[f32]| x.iter().map(|&x| bf16::rounded(x)).collect::<Vec<_>>();
    let product = exact(dims, &round(&left), &round(&right));
    let mut first: Option<Vec<f32>> = None;
    for (pool, cuts) in pools.iter().flat_map(|pool| {
        [
            (pool, Cuts::of_this_machine(Precision::Bf16(unit))),
            (pool, SMALL),
        ]
    }) {
        for left in lefts {
            for right in [
                Right::Rows(&right),
                Right::NarrowRows(&narrow_right),
                Right::Columns(&right_t),
                Right::Pairs(packed),
            ] {
                let mut out = vec![f32::NAN; m * n];
                let finish = Finish::new(&mut out, n, &[], Mode::Store);
                let precision = Precision::Bf16(unit);
                run(isa, precision, pool, &cuts, dims, left, right, &finish);
                for (i, (got, want)) in out.iter().zip(&product).enumerate() {
                    // Exact products of numbers below 1, whose sum is rounded at each.
                    let bound = (inner + 3) as f64 * f64::from(f32::EPSILON) * 2.0;
                    assert!(
                        (f64::from(*got) - want).abs() <= bound,
                        "{isa} {unit} {dims:?} {i}: {got} {want}"
                    );
                }
                match &first {
                    None => first = Some(out),
                    Some(first) => assert!(
                        first
                            .iter()
                            .zip(&out)
                            .all(|(a, b)| a.to_bits() == b.to_bits()),
                        "{isa} {unit} {dims:?} {left:?} {right:?}"
                    ),
                }
            }
        }
    }
    first.unwrap().into_iter().map(f32::to_bits).collect()
}

#[test]
fn bf16_products_match_the_exact_ones_of_rounded_operands() {
    let pools = pools();
    for isa in Isa::available() {
        let mut in_order: Option<Vec<Vec<u32>>> = None;
        for unit in Bf16Unit::available(isa) {
            println!("{isa}: {unit}");
            let shapes = [
                (1, 1, 1),
                (17, 33, 31),
                (40, 100, 64),
                (131, 517, 300),
                (700, 70, 113),
                (3, 5, 0),
            ];
            let bits =
                shapes.map(|(m, n, inner)| check_bf16(isa, unit, &pools, Dims { m, n, inner }));
            // The emulation adds as AVX512-BF16 does; a tile of AMX adds in an order of its own.
            if !unit.to_string().contains("amx") {
                match &in_order {
                    None => in_order = Some(bits.into()),
                    Some(bits_of_unit) => assert!(*bits_of_unit == bits, "{isa} {unit}"),
                }
            }
        }
    }
}

#[test]
fn rounding_to_bf16_is_to_nearest_even() {
    let cases = [
        (1.0, 1.0),
        (1.0 + 1.0 / 256.0, 1.0),
        (1.0 + 3.0 / 256.0, 1.0 + 4.0 / 256.0),
        (1.0 + 1.1 / 256.0, 1.0 + 2.0 / 256.0),
        (-3.0e38, -3.004e38),
        (f32::MAX, f32::INFINITY),
        (f32::NEG_INFINITY, f32::NEG_INFINITY),
        (0.0, 0.0),
    ];
    for (x, want) in cases {
        let got = bf16::rounded(x);
        assert!(
            got == want || (got / want - 1.0).abs() < 1e-3,
            "{x}: {got} {want}"
        );
    }
    assert!(bf16::rounded(f32::NAN).is_nan());
    assert!(bf16::rounded(f32::from_bits(0x7f80_0001)).is_nan());
}

#[test]
fn sums_of_rows_are_added_as_the_left_operand_is_packed() {
    for isa in Isa::available() {
        let units = Bf16Unit::available(isa).map(Precision::Bf16);
        for precision in core::iter::once(Precision::F32).chain(units) {
            for (m, n, inner) in [
                (131, 50, 300),
                (7, 5, 33),
                (64, 3, 32),
                (1, 1, 1),
                (9, 0, 4),
            ] {
                let dims = Dims { m, n, inner };
                let (left_t, right) = (values(m * inner, 1), values(inner * n, 2));
                let start = values(m, 3);
                let mut first: Option<Vec<f32>> = None;
                for (pool, cuts) in pools()
                    .iter()
                    .flat_map(|pool| [(pool, Cuts::of_this_machine(precision)), (pool, SMALL)])
                {
                    let (mut out, mut sums) = (vec![0.0; m * n], start.clone());
                    let finish = Finish::new(&mut out, n, &[], Mode::Store);
                    let finish = finish.with_row_sums(&mut sums);
                    let left = Left::Columns(View::F32(&left_t));
                    let right = Right::Rows(&right);
                    run(isa, precision, pool, &cuts, dims, left, right, &finish);
                    for (i, sum) in sums.iter().enumerate() {
                        let terms = (0..inner).map(|l| f64::from(left_t[l * m + i]));
                        let want = f64::from(start[i]) + terms.sum::<f64>();
                        // At most 32 numbers below 1 are added, and then as many of these sums.
                        let bound = 32.0 * f64::from(f32::EPSILON) * (inner + 1) as f64;
                        assert!(
                            (f64::from(*sum) - want).abs() <= bound,
                            "{isa} {precision:?} {dims:?} {i}: {sum} {want}"
                        );
                    }
                    let first = first.get_or_insert_with(|| sums.clone());
                    assert!(
                        first
                            .iter()
                            .zip(&sums)
                            .all(|(a, b)| a.to_bits() == b.to_bits())
                    );
                }
            }
        }
    }
}

/// Rows that are read where they lie take no room, long ones and columns do.
#[test]
fn an_operand_that_is_read_in_place_takes_no_scratch() {
    for isa in Isa::available() {
        let [short, long] = [IN_PLACE, IN_PLACE + 1].map(|inner| {
            let dims = Dims {
                m: 640,
                n: 70,
                inner,
            };
            let len = |left| scratch_len(isa, Precision::F32, 2, dims, left);
            let (rows, columns) = (len(Left::Rows(())), len(Left::Columns(())));
            assert!(columns >= dims.m * inner, "{isa} {inner}");
            (rows, dims.m * inner)
        });
        assert!(
            short.0 < short.1 / 2 && long.0 >= long.1,
            "{isa}: {short:?} {long:?}"
        );
    }
}

fn pools() -> Vec<Threads> {
    let counts: &[usize] = if cfg!(feature = "threads") {
        &[1, 2, 3]
    } else {
        &[1]
    };
    counts.iter().map(|&n| Threads::new(n).unwrap()).collect()
}

proptest! {
    #[test]
    fn products_match_f64(m in 0usize..40, n in 0usize..110, inner in 0usize..40) {
        for isa in Isa::available() {
            check(isa, &pools()[..1], Dims { m, n, inner });
        }
    }
}

#[test]
fn bits_do_not_depend_on_operands_order_or_threads() {
    let pools = pools();
    for isa in Isa::available() {
        for (m, n, inner) in [
            (131, 517, 300),
            (1, 1200, 700),
            (700, 70, 113),
            (257, 33, 1),
            (150, 700, 17),
        ] {
            check(isa, &pools, Dims { m, n, inner });
        }
    }
}

#[test]
fn modes_match_their_formulas() {
    let dims = Dims {
        m: 21,
        n: 75,
        inner: 30,
    };
    let Dims { m, n, inner } = dims;
    let (left, right, bias) = (values(m * inner, 1), values(inner * n, 2), values(n, 3));
    let (other, scale) = (values(m * n, 4), values(3, 5));
    let y: Vec<f64> = exact(dims, &left, &right)
        .iter()
        .enumerate()
        .map(|(i, y)| y + f64::from(bias[i % n]))
        .collect();
    let gelu = |y: f64| y * 0.5 * libm::erfc(-y / 2f64.sqrt());
    let density = |y: f64| (-y * y / 2.0).exp() / (2.0 * std::f64::consts::PI).sqrt();
    let gelu_grad = |y: f64| 0.5 * libm::erfc(-y / 2f64.sqrt()) + y * density(y);
    // Results are kept by the caches, or go past them: that must be the same, also where a row is no whole number of lines.
    for (isa, streamed) in Isa::available().flat_map(|isa| [(isa, false), (isa, true)]) {
        let mut pre = vec![f32::NAN; m * n];
        let scaled = Mode::Residual {
            residual: &other,
            scale: Some((&scale, 7)),
        };
        let modes = [
            Mode::Store,
            Mode::Gelu,
            Mode::GeluSaving {
                pre_gelu: pre.as_mut_slice().into(),
            },
            Mode::Residual {
                residual: &other,
                scale: None,
            },
            scaled,
            Mode::GeluGrad {
                pre_gelu: View::F32(&other),
            },
        ];
        for (which, mode) in modes.into_iter().enumerate() {
            let mut out = vec![f32::NAN; m * n];
            let mut finish = Finish::new(&mut out, n, &bias, mode);
            finish.streamed = streamed;
            let (left, right) = (Left::Rows(View::F32(&left)), Right::Rows(&right));
            gemm(
                isa,
                Precision::F32,
                &Threads::one(),
                &mut Scratch::default(),
                dims,
                left,
                right,
                &finish,
            )
            .unwrap();
            for (i, got) in out.iter().enumerate() {
                let (y, other) = (y[i], f64::from(other[i]));
                let want = match which {
                    0 => y,
                    1 | 2 => gelu(y),
                    3 => other + y,
                    4 => other + f64::from(scale[i / n / 7]) * y,
                    _ => y * gelu_grad(other),
                };
                // 30 products of numbers below 1, and the errors stated for GELU.
                assert!(
                    (f64::from(*got) - want).abs() < 2e-5,
                    "{isa} {which} {streamed} {i}: {got} {want}"
                );
            }
        }
        assert!(
            pre.iter()
                .zip(&y)
                .all(|(got, want)| (f64::from(*got) - want).abs() < 1e-5)
        );
    }
}
