//! Products, by every way that there is to one.

use super::*;
use crate::queue::Queue;

#[test]
fn a_product_comes_back_from_its_words() {
    let base = Matmul {
        m: 3,
        n: 5,
        k: 7,
        a: DevicePtr(1 << 40),
        a_transposed: false,
        a_row: 7,
        b: DevicePtr(2 << 40),
        b_transposed: false,
        b_row: 5,
        bias: None,
        add: None,
        out: DevicePtr(3 << 40),
        out_f32: false,
        scale: None,
    };
    let some = |at| Some(DevicePtr(at));
    for matmul in [
        base,
        Matmul {
            a_transposed: true,
            ..base
        },
        Matmul {
            b_transposed: true,
            a_row: 9,
            b_row: 11,
            ..base
        },
        Matmul {
            bias: some(4 << 40),
            ..base
        },
        Matmul {
            add: some(5 << 40),
            ..base
        },
        Matmul {
            out_f32: true,
            ..base
        },
        Matmul {
            b_transposed: true,
            scale: some(6 << 40),
            ..base
        },
    ] {
        assert_eq!(Matmul::from_words(&matmul.to_words()), matmul);
    }
}

#[test]
fn alignments_are_those_of_the_places() {
    for (at, expected) in [
        (0x1000, 256),
        (0x1010, 16),
        (0x1002, 2),
        (0x1041, 1),
        (0x10c0, 64),
    ] {
        assert_eq!(alignment(DevicePtr(at)), expected);
    }
}

/// Numbers of few bits, so that sums are exact in any order and only the last rounding differs.
fn values(len: usize, seed: usize) -> Vec<f32> {
    let value = |i: usize| ((i * 37 + seed * 11) % 23) as f32 / 4.0 - 2.5;
    (0..len).map(value).collect()
}

fn at(x: &[f32], rows: usize, columns: usize, transposed: bool, i: usize, j: usize) -> f32 {
    if transposed {
        x[j * rows + i]
    } else {
        x[i * columns + j]
    }
}

/// A product with its operands on the device, and what it must be.
struct Case {
    matmul: Matmul,
    /// In f32, without the last rounding; of each element its sum of products, what is added, and its bias.
    sums: Vec<[f32; 3]>,
    _memory: Vec<Memory>,
}

impl Case {
    /// `form` has a bit for each of the forms that layers need; operands begin `offset` elements behind an aligned place.
    fn new(queue: &mut Queue, (m, n, k): (usize, usize, usize), form: u32, offset: usize) -> Self {
        let flag = |bit: u32| form >> bit & 1 == 1;
        let [a_transposed, b_transposed, bias, add, out_f32] =
            [flag(0), flag(1), flag(2), flag(3), flag(4)];
        let [a, b, c, d] =
            [(m * k, 1), (k * n, 2), (n, 3), (m * n, 4)].map(|(len, seed)| values(len, seed));
        let place = offset * queue.precision.size();
        // What lies between rows is nobody's.
        let mut upload = |x: &[f32], row: usize, gap: usize| {
            let rows = x.chunks(row);
            let spaced: Vec<f32> = rows
                .flat_map(|row| row.iter().copied().chain((0..gap).map(|_| f32::NAN)))
                .collect();
            let memory = queue.allocate(place + spaced.len() * 4).unwrap();
            queue.write_act(memory.at().plus(place), &spaced).unwrap();
            memory
        };
        let a_len = if a_transposed { m } else { k };
        let b_len = if b_transposed { k } else { n };
        let [a_gap, b_gap] = [offset, 2 * offset];
        let a_at = upload(&a, a_len, a_gap);
        let b_at = upload(&b, b_len, b_gap);
        let c_at = upload(&c, n, 0);
        let out_place = if out_f32 { offset * 4 } else { place };
        let out_at = queue.allocate(out_place + d.len() * 4).unwrap();
        // In place with transposed operands, out of another buffer without.
        let d_at = queue.allocate(out_place + d.len() * 4).unwrap();
        let [d_to, out] = [&d_at, &out_at].map(|memory| memory.at().plus(out_place));
        let add_at = if a_transposed { out } else { d_to };
        if out_f32 {
            queue.write_f32(add_at, &d).unwrap();
        } else {
            queue.write_act(add_at, &d).unwrap();
        }
        let matmul = Matmul {
            m,
            n,
            k,
            a: a_at.at().plus(place),
            a_transposed,
            a_row: a_len + a_gap,
            b: b_at.at().plus(place),
            b_transposed,
            b_row: b_len + b_gap,
            bias: bias.then(|| c_at.at().plus(place)),
            add: add.then_some(add_at),
            out,
            out_f32,
            scale: None,
        };
        let element = |i: usize| {
            let (i, j) = (i / n, i % n);
            let term = |p| at(&a, m, k, a_transposed, i, p) * at(&b, k, n, b_transposed, p, j);
            [
                (0..k).map(term).sum(),
                if add { d[i * n + j] } else { 0.0 },
                if bias { c[j] } else { 0.0 },
            ]
        };
        Self {
            matmul,
            sums: (0..m * n).map(element).collect(),
            _memory: vec![a_at, b_at, c_at, d_at, out_at],
        }
    }

    /// Computes it and holds it against the formula, rounded as that way rounds.
    fn check(&self, queue: &mut Queue) {
        let Matmul { out, out_f32, .. } = self.matmul;
        queue.matmul(self.matmul).unwrap();
        let mut found = vec![0.0; self.sums.len()];
        if out_f32 {
            queue.read_f32(&mut found, out).unwrap();
        } else {
            queue.read_act(&mut found, out).unwrap();
        }
        let rounded = |x: f32| match queue.precision {
            Precision::Bf16 if !out_f32 => f32::from_bits(u32::from(crate::ring::to_bf16(x)) << 16),
            _ => x,
        };
        let apart = queue.gemm.ways[&Key::of(&self.matmul)].bias_apart;
        for (i, (found, [sum, add, bias])) in found.iter().zip(&self.sums).enumerate() {
            let expected = match apart {
                true => rounded(sum + rounded(add + bias)),
                false => rounded(sum + add + bias),
            };
            let precision = queue.precision;
            assert_eq!(*found, expected, "{precision:?} {} at {i}", self.matmul);
        }
    }
}

/// Sizes that no tile divides, one that every tile does, one whose first algorithm the emulator
/// refuses when it is launched, and one of which it refuses all.
const SIZES: [(usize, usize, usize); 9] = [
    (1, 1, 1),
    (2, 3, 5),
    (17, 9, 31),
    (64, 48, 40),
    (3, 129, 7),
    (5, 8, 6),
    (16, 16, 47),
    (16, 16, 30),
    (70, 67, 33),
];

/// All forms that layers need, at places that nothing aligns, too; on the emulator by every way that there is.
#[test]
fn products_are_those_of_the_formula() {
    for precision in [Precision::F32, Precision::Bf16] {
        let Some(mut queue) = crate::testing::queue(precision) else {
            return;
        };
        // By cuBLASLt, onto a bias, and both by our kernel.
        let mut ways = [0; 4];
        for (size, offset) in SIZES.into_iter().flat_map(|size| [(size, 0), (size, 3)]) {
            for form in 0..32 {
                if form & 0b10100 == 0b10100 && precision == Precision::Bf16 {
                    continue;
                }
                let case = Case::new(&mut queue, size, form, offset);
                case.check(&mut queue);
                let way = &queue.gemm.ways[&Key::of(&case.matmul)];
                ways[usize::from(way.bias_apart) + 2 * usize::from(way.plan.is_none())] += 1;
            }
        }
        if crate::testing::is_emulated() {
            assert!(
                ways.iter().all(|count| *count >= 8),
                "{precision:?}: {ways:?}"
            );
        }
    }
}

/// Each product that is not cuBLASLt's as a whole counts once, and is named once.
#[test]
fn products_that_fall_back_are_counted_and_named() {
    for precision in [Precision::F32, Precision::Bf16] {
        let Some(mut queue) = crate::testing::queue(precision) else {
            return;
        };
        if !crate::testing::is_emulated() {
            return;
        }
        let counts = |queue: &Queue| (queue.runs().own_products, queue.runs().spread_biases);
        // By cuBLASLt; onto its bias, as the output has no rows of 16 bytes; by our kernel, as every algorithm is refused.
        for size in [(16, 16, 32), (5, 9, 6), (16, 16, 30)] {
            let case = Case::new(&mut queue, size, 0b100, 0);
            case.check(&mut queue);
            case.check(&mut queue);
        }
        assert_eq!(counts(&queue), (1, 1), "{precision:?}");
        let mut told = Vec::new();
        while let Some(warning) = queue.warning() {
            told.push(warning.to_owned());
        }
        assert_eq!(told.len(), 2, "{told:?}");
        assert!(told[0].contains("[5, 6] @ [6, 9], bias: "), "{told:?}");
        assert!(told[1].contains("[16, 30] @ [30, 16], bias: "), "{told:?}");
        assert!(told[1].contains("many times slower"), "{told:?}");
        // At another alignment it is another product, of the same shape.
        Case::new(&mut queue, (5, 9, 6), 0b100, 3).check(&mut queue);
        assert_eq!(counts(&queue), (1, 2), "{precision:?}");
        assert_eq!(queue.warning(), None);
    }
}

/// cuBLASLt is not asked about a bias that is not aligned, whatever was asked for before: the emulated one fails then.
#[test]
fn a_bias_between_alignments_is_spread() {
    for precision in [Precision::F32, Precision::Bf16] {
        let Some(mut queue) = crate::testing::queue(precision) else {
            return;
        };
        let size = precision.size();
        let [bias, a, b, out] = [(); 4].map(|()| queue.allocate(256 * 4).unwrap());
        let values: Vec<f32> = (0..64).map(|i| f32::from(i as u8)).collect();
        queue.write_act(bias.at(), &values).unwrap();
        queue.write_act(a.at(), &[2.0; 64]).unwrap();
        queue.write_act(b.at(), &[3.0; 64]).unwrap();
        for elements in [0, 1, 16 / size, 2, 4, 8] {
            let matmul = Matmul {
                m: 8,
                n: 8,
                k: 8,
                a: a.at(),
                a_transposed: false,
                a_row: 8,
                b: b.at(),
                b_transposed: false,
                b_row: 8,
                bias: Some(bias.at().plus(elements * size)),
                add: None,
                out: out.at(),
                out_f32: false,
                scale: None,
            };
            queue.matmul(matmul).unwrap();
            let mut found = [0.0; 8];
            queue.read_act(&mut found, out.at()).unwrap();
            let expected: Vec<f32> = values[elements..][..8].iter().map(|x| 48.0 + x).collect();
            assert_eq!(found[..], expected[..], "{precision:?}, {elements}");
            let way = &queue.gemm.ways[&Key::of(&matmul)];
            let apart = elements * size % 16 != 0;
            assert!(way.bias_apart || !apart, "{precision:?}, {elements}");
        }
    }
}

/// Timing algorithms changes no result, not even of a product that is added to what is there; and it finds the fastest.
#[test]
fn the_fastest_algorithm_is_taken_where_that_is_asked_for() {
    for precision in [Precision::F32, Precision::Bf16] {
        let Some(mut queue) = crate::testing::queue(precision) else {
            return;
        };
        queue.time_products(true);
        for size in [(64, 48, 40), (16, 16, 47), (16, 16, 30), (3, 129, 7)] {
            for form in 0..32 {
                if form & 0b10100 == 0b10100 && precision == Precision::Bf16 {
                    continue;
                }
                let case = Case::new(&mut queue, size, form, 0);
                let taken = queue.taken();
                case.check(&mut queue);
                // No copy of an output is left.
                assert_eq!(queue.taken(), taken, "{}", case.matmul);
                let way = &queue.gemm.ways[&Key::of(&case.matmul)];
                let Some(plan) = &way.plan else { continue };
                if crate::testing::is_emulated() {
                    let part = match way.bias_apart {
                        true => case.matmul.onto_bias(),
                        false => case.matmul,
                    };
                    let handle = queue.gemm.handle.0;
                    let offered = Plan::new(handle, precision, &part).unwrap().unwrap();
                    // Without the second, which is no algorithm for it at all.
                    assert_eq!(offered.algorithms.len(), 3);
                    assert_eq!(plan.algorithms[0], offered.algorithms[1], "{}", case.matmul);
                }
            }
        }
    }
}

#[test]
fn a_plan_is_for_any_bias() {
    let Some(mut queue) = crate::testing::queue(Precision::F32) else {
        return;
    };
    // Two biases, each as aligned as the other; the operands; the output.
    let memory = queue.allocate(5 * 256).unwrap();
    let place = |i: usize| memory.at().plus(i * 256);
    for (i, x) in [10.0, 20.0, 2.0, 3.0].into_iter().enumerate() {
        queue.write_f32(place(i), &[x]).unwrap();
    }
    for (bias, expected) in [(0, 16.0), (1, 26.0), (0, 16.0)] {
        let matmul = Matmul {
            m: 1,
            n: 1,
            k: 1,
            a: place(2),
            a_transposed: false,
            a_row: 1,
            b: place(3),
            b_transposed: false,
            b_row: 1,
            bias: Some(place(bias)),
            add: None,
            out: place(4),
            out_f32: false,
            scale: None,
        };
        queue.matmul(matmul).unwrap();
        let mut back = [0.0];
        queue.read_f32(&mut back, place(4)).unwrap();
        assert_eq!(back, [expected]);
    }
}

#[test]
fn a_sum_over_nothing_is_nothing() {
    let Some(mut queue) = crate::testing::queue(Precision::F32) else {
        return;
    };
    let memory = queue.allocate(24).unwrap();
    queue.write_f32(memory.at(), &[7.0; 6]).unwrap();
    let mut matmul = Matmul {
        m: 2,
        n: 3,
        k: 0,
        a: memory.at(),
        a_transposed: true,
        a_row: 2,
        b: memory.at(),
        b_transposed: false,
        b_row: 3,
        bias: None,
        add: Some(memory.at()),
        out: memory.at(),
        out_f32: true,
        scale: None,
    };
    let mut back = [0.0; 6];
    for expected in [7.0, 0.0] {
        queue.matmul(matmul).unwrap();
        queue.read_f32(&mut back, memory.at()).unwrap();
        assert_eq!(back, [expected; 6]);
        matmul.add = None;
    }
}

/// Rows of e4m3 that are no whole 16 bytes are not multiplied otherwise: cuBLASLt has no product, and this has none either.
#[test]
fn a_product_of_e4m3_that_cublaslt_refuses_is_an_error() {
    let Some(mut queue) = crate::testing::queue(Precision::Bf16) else {
        return;
    };
    if queue.context.capability < crate::fp8::CAPABILITY {
        println!("skipped: fp8 is for compute capability 8.9 and newer");
        return;
    }
    let memory = queue.allocate(1 << 16).unwrap();
    let at = |part: usize| memory.at().plus(part << 12);
    let product = |k: usize, row: usize| Matmul {
        m: 5,
        n: 16,
        k,
        a: at(0),
        a_transposed: false,
        a_row: row,
        b: at(1),
        b_transposed: true,
        b_row: row,
        bias: Some(at(2)),
        add: None,
        out: at(3),
        out_f32: false,
        scale: Some(at(4)),
    };
    queue.matmul(product(32, 32)).unwrap();
    queue.wait().unwrap();
    if !crate::testing::is_emulated() {
        println!("skipped: which rows it refuses differs from version to version of cuBLASLt");
        return;
    }
    for (k, row) in [(24, 24), (32, 40)] {
        queue.matmul(product(k, row)).unwrap();
        let refused = queue.wait().unwrap_err();
        assert!(
            matches!(refused, Error::NoFp8 { .. }),
            "{k} {row}: {refused}"
        );
        assert!(refused.to_string().contains("of e4m3"), "{refused}");
    }
}
