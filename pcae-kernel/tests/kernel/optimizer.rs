//! AdamW, clipping and the moving average against their formulas, in f64.

use pcae_kernel::backend::{AdamW, Clip, Segment, TrainBackend};
use pcae_kernel::config::{ClassifierConfig, Pool, Reduction, VitConfig};
use pcae_kernel::layout::Layout;
use pcae_kernel::model::TrainState;
use pcae_kernel::reference::{Heap, Reference};
use proptest::prelude::*;

use crate::support::{Double, close, dot, random, span};

const TINY: ClassifierConfig = ClassifierConfig {
    vit: VitConfig {
        img_size: [4, 8],
        in_chans: 1,
        patch_size: 4,
        embed_dim: 4,
        depth: 2,
        num_heads: 1,
        mlp_ratio: 1.5,
    },
    num_classes: 3,
    pool: Pool::Mean,
    reduction: Reduction::NONE,
};

/// The first step of AdamW moves each element by its learning rate, whatever its gradient: it shows the layer's.
#[test]
fn layers_have_their_own_learning_rate() {
    let layout = Layout::classifier(&TINY);
    let backend = &mut Double::owned();
    let start = vec![0.0; layout.len()];
    let mut state = TrainState::new(backend, layout, &start, None, 0.0).unwrap();
    state.set_layer_decay(0.5);
    state.grads.fill(1.0);
    let step = AdamW {
        lr: 1.0,
        beta1: 0.9,
        beta2: 0.99,
        eps: 0.0,
        step: 1,
        momentum: 0.0,
    };
    state.update(backend, &step, None).unwrap();
    for (name, scale) in [
        ("cls_token", 0.125),
        ("patch_embed.proj.weight", 0.125),
        ("blocks.0.attn.qkv.weight", 0.25),
        ("blocks.1.norm1.weight", 0.5),
        ("blocks.1.mlp.fc2.bias", 0.5),
        ("fc_norm.weight", 1.0),
        ("head.bias", 1.0),
        ("pos_embed", 0.0),
    ] {
        let span = layout.find(name).unwrap().span;
        for &moved in &state.student[span.start..span.end()] {
            close(name, -moved, scale, 0.0, 1e-12);
        }
    }
}

/// The moving average of a classifier follows every trained tensor, its head too.
#[test]
fn a_classifiers_average_follows_all_of_it() {
    let layout = Layout::classifier(&TINY);
    let backend = &mut Double::owned();
    let start: Vec<f32> = random(80, layout.len()).iter().map(|&x| x as f32).collect();
    let mut state = TrainState::new(backend, layout, &start, Some(&start), 0.0).unwrap();
    state.grads.fill(1.0);
    let step = AdamW {
        lr: 0.25,
        beta1: 0.9,
        beta2: 0.99,
        eps: 0.0,
        step: 1,
        momentum: 0.75,
    };
    state.update(backend, &step, None).unwrap();
    let teacher = state.teacher.unwrap();
    layout.for_each(|tensor| {
        let moved = if tensor.is_trained() {
            0.25 * 0.25
        } else {
            0.0
        };
        for i in tensor.span.start..tensor.span.end() {
            close(
                "teacher",
                teacher[i],
                f64::from(start[i]) - moved,
                0.0,
                1e-12,
            );
        }
    });
}

/// One element's state, stepped literally as the oracle writes it.
#[derive(Clone, Copy)]
struct Naive {
    w: f64,
    m: f64,
    v: f64,
}

impl Naive {
    fn step(&mut self, g: f64, lr: f64, decay: f64, step: i32) {
        self.m = 0.9 * self.m + 0.1 * g;
        self.v = 0.95 * self.v + 0.05 * g * g;
        let m = self.m / (1.0 - 0.9f64.powi(step));
        let v = self.v / (1.0 - 0.95f64.powi(step));
        self.w = self.w * (1.0 - lr * decay) - lr * m / (v.sqrt() + 1e-8);
    }
}

/// Six steps on three segments of different decay, learning rate and teacher, with a gap that no segment covers; two
/// steps of three clip, one of them by little. Each step rounds some ten times, so that 1e-12 leaves a hundredfold of room.
#[test]
fn adamw_is_the_formula() {
    const LEN: usize = 12;
    let segment = |start, len, weight_decay, lr_scale, ema| Segment {
        span: span(start, len),
        weight_decay,
        lr_scale,
        ema,
    };
    let segments = [
        segment(0, 3, 0.05, 1.0, true),
        segment(3, 2, 0.0, 0.5, true),
        // Element 5 belongs to no segment.
        segment(6, 6, 0.3, 2.0, false),
    ];
    let mut student = random(70, LEN);
    // The teacher ends where the segments that it follows do.
    let mut teacher = random(71, 5);
    let (start, start_teacher) = (student.clone(), teacher.clone());
    let (mut grads, mut m, mut v) = (vec![0.0; LEN], vec![0.0; LEN], vec![0.0; LEN]);
    let state = |&w: &f64| Naive { w, m: 0.0, v: 0.0 };
    let mut naive: Vec<Naive> = student.iter().map(state).collect();
    let mut naive_teacher = teacher.clone();
    let mut backend = Double::owned();
    for step in 1..=6 {
        grads.clone_from_slice(&random(71 + step, LEN));
        let mut norms = vec![7.0, 0.0];
        backend.norm(&mut norms, 1, &grads).unwrap();
        let norm = dot(&grads, &grads).sqrt();
        close("norm", norms[1], norm, 0.0, 1e-15);
        assert_eq!(norms[0], 7.0);
        // A bound above the norm changes nothing, one below scales to it.
        let max_norm = [1e3, 0.5, 0.9 * norm][step as usize % 3];
        let shrink = f64::min(1.0, max_norm / norm);
        let adamw = AdamW {
            lr: 0.01 * step as f64,
            beta1: 0.9,
            beta2: 0.95,
            eps: 1e-8,
            step,
            momentum: 0.8,
        };
        for segment in &segments {
            for i in segment.span.start..segment.span.end() {
                let lr = adamw.lr * segment.lr_scale;
                naive[i].step(grads[i] * shrink, lr, segment.weight_decay, step as i32);
                if segment.ema {
                    naive_teacher[i] = 0.8 * naive_teacher[i] + 0.2 * naive[i].w;
                }
            }
        }
        let clip = Clip {
            norms: &norms,
            at: 1,
            max_norm,
        };
        backend
            .adamw_ema(
                &mut student,
                Some(&mut teacher),
                &mut grads,
                &mut m,
                &mut v,
                &segments,
                &adamw,
                Some(clip),
            )
            .unwrap();
        assert!(
            grads.iter().all(|&g| g == 0.0),
            "gradients start again at 0"
        );
        for i in 0..LEN {
            close("student", student[i], naive[i].w, 1e-12, 1e-12);
            close("mean", m[i], naive[i].m, 1e-12, 1e-12);
            close("square", v[i], naive[i].v, 1e-12, 1e-12);
        }
        for (teacher, naive) in teacher.iter().zip(&naive_teacher) {
            close("teacher", *teacher, *naive, 1e-12, 1e-12);
        }
    }
    assert_eq!((student[5], m[5], v[5]), (start[5], 0.0, 0.0));
    assert!(teacher.iter().zip(&start_teacher).all(|(a, b)| a != b));
}

/// A segment that leaves a vector is refused before anything moves, whichever vector it is; and the teacher need only
/// reach as far as the segments that it follows.
#[test]
fn segments_must_fit_every_vector() {
    let adamw = AdamW {
        lr: 0.1,
        beta1: 0.9,
        beta2: 0.95,
        eps: 1e-8,
        step: 1,
        momentum: 0.5,
    };
    for short in 0..5 {
        let mut vectors: [Vec<f64>; 5] = std::array::from_fn(|i| random(80 + i as u64, 4));
        vectors[short].pop();
        let before = vectors.clone();
        let [student, teacher, grads, m, v] = &mut vectors;
        for ema in [true, false] {
            let part = |start| Segment {
                span: span(start, 2),
                weight_decay: 0.1,
                lr_scale: 1.0,
                ema,
            };
            let segments = [part(0), part(2)];
            let result = Double::owned().adamw_ema(
                student,
                Some(teacher),
                grads,
                m,
                v,
                &segments,
                &adamw,
                None,
            );
            if short == 1 && !ema {
                result.unwrap();
                assert_eq!(*teacher, before[1]);
            } else {
                result.unwrap_err();
                let now = [&*student, &*teacher, &*grads, &*m, &*v];
                assert!(now.into_iter().eq(&before));
            }
        }
    }
}

fn ema_step(student: &mut Vec<f32>, teacher: &mut Vec<f32>, momentum: f64) {
    let len = student.len();
    let segment = Segment {
        span: span(0, len),
        weight_decay: 0.0,
        lr_scale: 1.0,
        ema: true,
    };
    let adamw = AdamW {
        lr: 0.0,
        beta1: 0.9,
        beta2: 0.95,
        eps: 1e-8,
        step: 1,
        momentum,
    };
    let mut zeros = [vec![0.0; len], vec![0.0; len], vec![0.0; len]];
    let [grads, m, v] = &mut zeros;
    Reference::<f32, Heap<f32>>::owned()
        .adamw_ema(
            student,
            Some(teacher),
            grads,
            m,
            v,
            &[segment],
            &adamw,
            None,
        )
        .unwrap();
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    /// A teacher that has arrived stays, to the bit, at any momentum, in the training's own precision.
    #[test]
    fn an_equal_teacher_stays(mut student in prop::collection::vec(-1e6..1e6f32, 1..9), momentum in 0.0..=1.0f64) {
        let before = student.clone();
        let mut teacher = student.clone();
        ema_step(&mut student, &mut teacher, momentum);
        prop_assert_eq!(&student, &before);
        prop_assert_eq!(&teacher, &before);
    }

    /// Any other comes closer by the factor of the momentum, up to a rounding of each value, and at 1 does not move.
    #[test]
    fn another_teacher_comes_closer(
        pairs in prop::collection::vec((-10.0..10.0f32, -10.0..10.0f32), 1..9),
        momentum in 0.0..=1.0f64,
    ) {
        let (mut student, mut teacher): (Vec<f32>, Vec<f32>) = pairs.iter().copied().unzip();
        ema_step(&mut student, &mut teacher, momentum);
        for ((student, start), now) in pairs.iter().zip(&teacher) {
            let (before, after) = (f64::from(start - student).abs(), f64::from(now - student).abs());
            // Values below 20, each of four operations rounded by half a unit of 2⁻²⁴ relative.
            let rounding = 20.0 * 4.0 * f64::from(f32::EPSILON);
            prop_assert!((after - momentum * before).abs() <= rounding);
        }
        let still = teacher.clone();
        ema_step(&mut student, &mut teacher, 1.0);
        prop_assert_eq!(still, teacher);
    }
}
