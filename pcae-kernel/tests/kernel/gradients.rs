//! Every backward of `TrainBackend` against central differences of its forward, in f64.
//!
//! Sizes are pairwise different, so that swapped dimensions show. Buffers are longer than needed and hold rubbish where
//! the contract says "overwritten"; vectors of gradients hold `BASE` where it says `+=`.

use pcae_kernel::backend::{
    Accum, AttentionDims, Backend, DecoderDims, EmbedParams, Epilogue, LinearDims, RowDims,
    TokenDims, TrainBackend,
};
use pcae_kernel::float::Float;

use crate::support::{Double, check_gradient, close, dot, linear_at, norm_at, random, span};

/// What gradients are added to.
const BASE: f64 = 0.75;
/// What is to be overwritten.
const RUBBISH: f64 = 1e30;
/// Elements that every buffer is longer than needed.
const SPARE: usize = 2;

fn rubbish(len: usize) -> Vec<f64> {
    vec![RUBBISH; len + SPARE]
}

/// The first `len` elements, after a check that nothing was written behind them.
fn front(x: &[f64], len: usize) -> &[f64] {
    assert!(x[len..].iter().all(|&x| x == RUBBISH));
    &x[..len]
}

/// What was added to a vector of `BASE`.
fn added(grads: &[f64]) -> Vec<f64> {
    grads.iter().map(|g| g - BASE).collect()
}

const LINEAR: LinearDims = LinearDims {
    rows: 3,
    in_features: 5,
    out_features: 4,
};

fn linear(x: &[f64], params: &[f64]) -> Vec<f64> {
    let mut out = rubbish(12);
    let layer = linear_at(2, 5, 4);
    Double::owned()
        .linear(
            LINEAR,
            &mut out,
            &x.to_vec(),
            &params.to_vec(),
            layer,
            Epilogue::Bias,
        )
        .unwrap();
    front(&out, 12).to_vec()
}

#[test]
fn linear_backward() {
    let (x, params, d_y) = (random(1, 15), random(2, 28), random(3, 12));
    let layer = linear_at(2, 5, 4);
    let mut backend = Double::owned();

    let mut d_x = rubbish(15);
    backend
        .linear_backward_input(LINEAR, &mut d_x, &d_y, &params, layer, None)
        .unwrap();
    check_gradient("x", &x, front(&d_x, 15), |x| dot(&linear(x, &params), &d_y));

    let mut grads = vec![BASE; params.len()];
    backend
        .linear_backward_params(LINEAR, &mut grads, layer, &d_y, &x)
        .unwrap();
    check_gradient("params", &params, &added(&grads), |params| {
        dot(&linear(&x, params), &d_y)
    });
}

/// Behind a GELU the gradient is that of what went into it.
#[test]
fn linear_backward_through_gelu() {
    // Values to ±3 reach where the GELU bends and where it is nearly straight.
    let pre: Vec<f64> = random(4, 15).iter().map(|x| 3.0 * x).collect();
    let (params, d_y) = (random(5, 28), random(6, 12));
    let mut d_pre = rubbish(15);
    Double::owned()
        .linear_backward_input(
            LINEAR,
            &mut d_pre,
            &d_y,
            &params,
            linear_at(2, 5, 4),
            Some(&pre),
        )
        .unwrap();
    check_gradient("pre_gelu", &pre, front(&d_pre, 15), |pre| {
        let x: Vec<f64> = pre.iter().map(|&x| gelu(x)).collect();
        dot(&linear(&x, &params), &d_y)
    });
}

fn gelu(x: f64) -> f64 {
    0.5 * x * (1.0 + Float::erf(x / 2f64.sqrt()))
}

/// The saving forward gives both what goes into the GELU and what comes out, and the fused epilogue the same.
#[test]
fn linear_gelu_saving_is_linear_then_gelu() {
    let (x, params) = (random(7, 15), random(8, 28));
    let layer = linear_at(2, 5, 4);
    let (mut out, mut pre, mut fused) = (rubbish(12), rubbish(12), rubbish(12));
    let mut backend = Double::owned();
    backend
        .linear_gelu_saving(LINEAR, &mut out, &mut pre, &x, &params, layer)
        .unwrap();
    backend
        .linear(LINEAR, &mut fused, &x, &params, layer, Epilogue::BiasGelu)
        .unwrap();
    assert_eq!(front(&pre, 12), linear(&x, &params));
    for (i, &pre) in front(&pre, 12).iter().enumerate() {
        // Two ways to write the same product: a few roundings apart.
        close("gelu", out[i], gelu(pre), 1e-15, 1e-15);
        assert_eq!(out[i], fused[i]);
    }
}

/// `residual + scale * linear`, and its backward: the stream's gradient as it is, the branch's by `scale_rows`.
#[test]
fn linear_residual_with_stochastic_depth() {
    let dims = LinearDims { rows: 6, ..LINEAR };
    let layer = linear_at(1, 5, 4);
    let (x, residual, params, d_out) = (
        random(9, 30),
        random(10, 24),
        random(11, 27),
        random(12, 24),
    );
    // Three samples of two rows: dropped, kept and scaled, kept.
    let scale = vec![0.0, 1.25, 1.0];
    let forward = |x: &[f64], residual: &[f64], params: &[f64]| {
        let mut out = rubbish(24);
        let (x, residual, params) = (x.to_vec(), residual.to_vec(), params.to_vec());
        Double::owned()
            .linear_residual(
                dims,
                &mut out,
                &residual,
                &x,
                &params,
                layer,
                Some((&scale, 2)),
            )
            .unwrap();
        dot(front(&out, 24), &d_out)
    };
    let mut backend = Double::owned();
    let (mut d_branch, mut d_x, mut grads) = (rubbish(24), rubbish(30), vec![BASE; 27]);
    let rows = RowDims { rows: 6, dim: 4 };
    backend
        .scale_rows(rows, &mut d_branch, &d_out, &scale, 2)
        .unwrap();
    front(&d_branch, 24);
    backend
        .linear_backward_input(dims, &mut d_x, &d_branch, &params, layer, None)
        .unwrap();
    backend
        .linear_backward_params(dims, &mut grads, layer, &d_branch, &x)
        .unwrap();
    check_gradient("residual", &residual, &d_out, |residual| {
        forward(&x, residual, &params)
    });
    check_gradient("x", &x, front(&d_x, 30), |x| forward(x, &residual, &params));
    check_gradient("params", &params, &added(&grads), |params| {
        forward(&x, &residual, params)
    });
}

/// Without a scale, and in place, the residual epilogues agree.
#[test]
fn residual_epilogues_agree() {
    let (x, residual, params) = (random(13, 15), random(14, 12), random(15, 28));
    let layer = linear_at(2, 5, 4);
    let mut backend = Double::owned();
    let mut in_place = residual.clone();
    backend
        .linear(
            LINEAR,
            &mut in_place,
            &x,
            &params,
            layer,
            Epilogue::BiasResidual,
        )
        .unwrap();
    let mut out = rubbish(12);
    backend
        .linear_residual(LINEAR, &mut out, &residual, &x, &params, layer, None)
        .unwrap();
    assert_eq!(front(&out, 12), in_place);
    let sum: Vec<f64> = linear(&x, &params)
        .iter()
        .zip(&residual)
        .map(|(y, r)| r + y)
        .collect();
    assert_eq!(in_place, sum);
}

/// Both ways of storing `d_x`; the statistics are those that the forward saved.
#[test]
fn layer_norm_backward() {
    let dims = RowDims { rows: 3, dim: 5 };
    let norm = norm_at(1, 5);
    let (x, params, d_y) = (random(16, 15), random(17, 13), random(18, 15));
    let forward = |x: &[f64], params: &[f64]| {
        let mut out = rubbish(15);
        Double::owned()
            .layer_norm(dims, &mut out, &x.to_vec(), &params.to_vec(), norm)
            .unwrap();
        front(&out, 15).to_vec()
    };
    let mut backend = Double::owned();
    let (mut out, mut stats) = (rubbish(15), rubbish(6));
    backend
        .layer_norm_saving(dims, &mut out, &mut stats, &x, &params, norm)
        .unwrap();
    assert_eq!(front(&out, 15), forward(&x, &params));
    for (row, stats) in x.chunks(5).zip(front(&stats, 6).chunks(2)) {
        let mean = row.iter().sum::<f64>() / 5.0;
        let variance = row.iter().map(|x| (x - mean) * (x - mean)).sum::<f64>() / 5.0;
        close("mean", stats[0], mean, 1e-15, 1e-14);
        close("rstd", stats[1], 1.0 / (variance + 1e-6).sqrt(), 0.0, 1e-14);
    }

    for accum in [Accum::Replace, Accum::Add] {
        let mut grads = vec![BASE; 13];
        let mut d_x = match accum {
            Accum::Replace => vec![RUBBISH; 15],
            Accum::Add => vec![BASE; 15],
        };
        backend
            .layer_norm_backward(
                dims, &mut d_x, accum, &mut grads, &d_y, &x, &stats, &params, norm,
            )
            .unwrap();
        if accum == Accum::Add {
            d_x = added(&d_x);
        }
        check_gradient("x", &x, &d_x, |x| dot(&forward(x, &params), &d_y));
        check_gradient("params", &params, &added(&grads), |params| {
            dot(&forward(&x, params), &d_y)
        });
    }
}

/// Queries, keys and values; the saved log-sum-exp is that of the scores.
#[test]
fn attention_backward() {
    let dims = AttentionDims {
        batch: 2,
        tokens: 3,
        num_heads: 4,
        head_dim: 5,
    };
    let (qkv, d_out) = (random(19, 360), random(20, 120));
    let forward = |qkv: &[f64]| {
        let mut out = rubbish(120);
        Double::owned()
            .attention(dims, &mut out, &qkv.to_vec())
            .unwrap();
        front(&out, 120).to_vec()
    };
    let mut backend = Double::owned();
    let (mut out, mut lse, mut d_qkv) = (rubbish(120), rubbish(24), rubbish(360));
    backend
        .attention_saving(dims, &mut out, &mut lse, &qkv)
        .unwrap();
    assert_eq!(front(&out, 120), forward(&qkv));
    let part = |b: usize, token: usize, part: usize, head: usize| {
        &qkv[(((b * 3 + token) * 3 + part) * 4 + head) * 5..][..5]
    };
    for (at, &lse) in front(&lse, 24).iter().enumerate() {
        let (b, head, query) = (at / 12, at / 3 % 4, at % 3);
        let sum: f64 = (0..3)
            .map(|key| (dot(part(b, query, 0, head), part(b, key, 1, head)) / 5f64.sqrt()).exp())
            .sum();
        close("lse", lse, sum.ln(), 1e-14, 1e-14);
    }
    backend
        .attention_backward(dims, &mut d_qkv, &d_out, &qkv, &out, &lse)
        .unwrap();
    check_gradient("qkv", &qkv, front(&d_qkv, 360), |qkv| {
        dot(&forward(qkv), &d_out)
    });
}

/// Patches and class token, with and without one; positions are fixed and get nothing.
#[test]
fn embed_tokens_backward() {
    for prefix in [1, 0] {
        let dims = TokenDims {
            batch: 2,
            prefix,
            tokens: 3,
            dim: 4,
        };
        let embed = EmbedParams {
            cls_token: (prefix == 1).then_some(span(2, 4)),
            pos_embed: span(7, 32),
        };
        let ids = vec![6, 0, 4, 2, 2, 5];
        let (x, params, d_out) = (random(21, 24), random(22, 39), random(23, dims.len()));
        let forward = |x: &[f64], params: &[f64]| {
            let mut out = rubbish(dims.len());
            let (x, params) = (x.to_vec(), params.to_vec());
            Double::owned()
                .embed_tokens(dims, &mut out, &x, Some(&ids), &params, embed)
                .unwrap();
            dot(front(&out, dims.len()), &d_out)
        };
        let (mut d_x, mut grads) = (rubbish(24), vec![BASE; 39]);
        Double::owned()
            .embed_tokens_backward(dims, &mut d_x, &mut grads, &d_out, embed)
            .unwrap();
        check_gradient("x", &x, front(&d_x, 24), |x| forward(x, &params));
        let grads = added(&grads);
        check_gradient("cls_token", &params[..7], &grads[..7], |front| {
            forward(&x, &[front, &params[7..]].concat())
        });
        assert!(grads[7..].iter().all(|&g| g == 0.0), "positions are fixed");
    }
}

/// Latent and mask token; positions are fixed and get nothing.
#[test]
fn decoder_tokens_backward() {
    let dims = DecoderDims {
        batch: 2,
        visible: 3,
        targets: 4,
        dim: 5,
    };
    let (mask_token, pos_embed) = (span(1, 5), span(7, 40));
    let (visible, targets) = (vec![0, 3, 6, 5, 1, 2], vec![1, 2, 4, 5, 0, 3, 4, 6]);
    let (x, params, d_out) = (random(24, 40), random(25, 47), random(26, 80));
    let forward = |x: &[f64], params: &[f64]| {
        let mut out = rubbish(80);
        let (x, params) = (x.to_vec(), params.to_vec());
        Double::owned()
            .decoder_tokens(
                dims, &mut out, &x, &visible, &targets, &params, mask_token, pos_embed,
            )
            .unwrap();
        front(&out, 80).to_vec()
    };
    // The forward itself, by its formula.
    let out = forward(&x, &params);
    for (i, &out) in out.iter().enumerate() {
        let (b, token, column) = (i / 40, i / 5 % 8, i % 5);
        let (value, row) = match token {
            0 => (x[b * 20 + column], 0),
            1..=3 => (
                x[b * 20 + token * 5 + column],
                1 + visible[b * 3 + token - 1],
            ),
            _ => (params[1 + column], 1 + targets[b * 4 + token - 4]),
        };
        assert_eq!(out, value + params[7 + row as usize * 5 + column]);
    }
    let (mut d_x, mut grads) = (rubbish(40), vec![BASE; 47]);
    Double::owned()
        .decoder_tokens_backward(dims, &mut d_x, &mut grads, &d_out, mask_token)
        .unwrap();
    check_gradient("x", &x, front(&d_x, 40), |x| {
        dot(&forward(x, &params), &d_out)
    });
    let grads = added(&grads);
    check_gradient("mask_token", &params[..7], &grads[..7], |front| {
        dot(&forward(&x, &[front, &params[7..]].concat()), &d_out)
    });
    assert!(grads[7..].iter().all(|&g| g == 0.0), "positions are fixed");
}

const TOKENS: TokenDims = TokenDims {
    batch: 2,
    prefix: 3,
    tokens: 5,
    dim: 4,
};

/// Operations that copy, drop or average tokens: linear, so that the step of the differences could be anything.
fn check_tokens(
    what: &str,
    out_len: usize,
    forward: impl Fn(&mut Double, &mut Vec<f64>, &Vec<f64>),
    backward: impl Fn(&mut Double, &mut Vec<f64>, &Vec<f64>),
) {
    let (x, d_out) = (random(27, 64), random(28, out_len));
    let mut d_x = rubbish(64);
    backward(&mut Double::owned(), &mut d_x, &d_out);
    check_gradient(what, &x, front(&d_x, 64), |x| {
        let mut out = rubbish(out_len);
        forward(&mut Double::owned(), &mut out, &x.to_vec());
        dot(front(&out, out_len), &d_out)
    });
}

#[test]
fn strip_prefix_backward() {
    check_tokens(
        "strip_prefix",
        40,
        |backend, out, x| backend.strip_prefix(TOKENS, out, x).unwrap(),
        |backend, d_x, d_out| backend.strip_prefix_backward(TOKENS, d_x, d_out).unwrap(),
    );
}

#[test]
fn gather_tokens_backward() {
    let picked = vec![4, 1, 0, 3];
    check_tokens(
        "gather_tokens",
        40,
        |backend, out, x| backend.gather_tokens(TOKENS, 2, out, x, &picked).unwrap(),
        |backend, d_x, d_out| {
            backend
                .gather_tokens_backward(TOKENS, 2, d_x, d_out, &picked)
                .unwrap();
        },
    );
}

#[test]
fn mean_pool_backward() {
    check_tokens(
        "mean_pool",
        8,
        |backend, out, x| backend.mean_pool(TOKENS, out, x).unwrap(),
        |backend, d_x, d_out| backend.mean_pool_backward(TOKENS, d_x, d_out).unwrap(),
    );
}

/// What dropping leaves is what the gradient returns to: gathering it again gives it back, and all else is zero.
#[test]
fn gather_and_scatter_are_a_round_trip() {
    let picked = vec![4, 1, 0, 3];
    let kept = random(29, 40);
    let (mut scattered, mut again) = (rubbish(64), rubbish(40));
    let mut backend = Double::owned();
    backend
        .gather_tokens_backward(TOKENS, 2, &mut scattered, &kept, &picked)
        .unwrap();
    backend
        .gather_tokens(TOKENS, 2, &mut again, &scattered, &picked)
        .unwrap();
    assert_eq!(front(&again, 40), kept);
    let zeros = front(&scattered, 64).iter().filter(|&&x| x == 0.0).count();
    assert_eq!(zeros, 2 * 3 * 4, "three dropped tokens in each sequence");
}

type Loss = fn(
    &mut Double,
    RowDims,
    &mut Vec<f64>,
    &mut Vec<f64>,
    usize,
    &Vec<f64>,
    &Vec<f64>,
    f64,
) -> Result<(), pcae_kernel::error::Error>;

/// Value against `value`, gradient against central differences, `losses[at] +=`, and the factor.
fn check_loss(
    what: &str,
    loss: Loss,
    pred: &[f64],
    target: &[f64],
    value: impl Fn(&[f64], &[f64]) -> f64,
) {
    let dims = RowDims { rows: 3, dim: 5 };
    let target = target.to_vec();
    let call = |pred: &[f64], d_pred: &mut Vec<f64>, scale: f64| {
        let mut losses = vec![0.0, BASE, 0.0];
        let pred = pred.to_vec();
        loss(
            &mut Double::owned(),
            dims,
            d_pred,
            &mut losses,
            1,
            &pred,
            &target,
            scale,
        )
        .unwrap();
        assert_eq!((losses[0], losses[2]), (0.0, 0.0));
        losses[1] - BASE
    };
    let mut d_pred = rubbish(15);
    let found = call(pred, &mut d_pred, 0.25);
    let want: f64 = (0..3)
        .map(|row| value(&pred[row * 5..][..5], &target[row * 5..][..5]))
        .sum::<f64>()
        / 3.0;
    close(what, found, 0.25 * want, 1e-14, 1e-14);
    check_gradient(what, pred, front(&d_pred, 15), |pred| {
        call(pred, &mut rubbish(15), 0.25)
    });
}

#[test]
fn cosine_loss() {
    let cosine = |p: &[f64], t: &[f64]| 1.0 - dot(p, t) / (dot(p, p) * dot(t, t)).sqrt();
    check_loss(
        "cosine",
        Double::cosine_loss,
        &random(30, 15),
        &random(31, 15),
        cosine,
    );
}

/// Where the prediction is shorter than the lower bound of its norm, the loss is linear in it and the gradient finite.
#[test]
fn cosine_loss_of_a_vanishing_prediction() {
    let dims = RowDims { rows: 1, dim: 3 };
    let target = vec![1.0, -2.0, 2.0];
    let call = |pred: &[f64]| {
        let (mut d_pred, mut losses) = (vec![RUBBISH; 3], vec![0.0]);
        Double::owned()
            .cosine_loss(
                dims,
                &mut d_pred,
                &mut losses,
                0,
                &pred.to_vec(),
                &target,
                1.0,
            )
            .unwrap();
        (losses[0], d_pred)
    };
    for pred in [[0.0; 3], [1e-9, 2e-9, -1e-9]] {
        let (loss, d_pred) = call(&pred);
        // |target| = 3 and the bound is 1e-8.
        close("loss", loss, 1.0 - dot(&pred, &target) / 3e-8, 0.0, 1e-14);
        // Within a ball of 1e-8 the function is linear: a step of 1e-10 keeps inside, moves the loss by 1e-3 of its
        // value and is rounded at 1e-13 of that.
        let step = 1e-10;
        for i in 0..3 {
            let moved = |by: f64| {
                let mut pred = pred;
                pred[i] += by;
                pred
            };
            let numeric = (call(&moved(step)).0 - call(&moved(-step)).0) / (2.0 * step);
            close("d_pred", d_pred[i], numeric, 0.0, 1e-8);
        }
    }
}

#[test]
fn mse_loss() {
    let square =
        |p: &[f64], t: &[f64]| p.iter().zip(t).map(|(p, t)| (p - t) * (p - t)).sum::<f64>() / 5.0;
    check_loss(
        "mse",
        Double::mse_loss,
        &random(32, 15),
        &random(33, 15),
        square,
    );
}

/// Soft labels, one-hot labels, and rows that do not sum to 1, whose gradient is scaled by their sum.
#[test]
fn cross_entropy() {
    let entropy = |p: &[f64], t: &[f64]| {
        let lse = p.iter().map(|p| p.exp()).sum::<f64>().ln();
        dot(t, &p.iter().map(|p| lse - p).collect::<Vec<_>>())
    };
    let logits: Vec<f64> = random(34, 15).iter().map(|x| 4.0 * x).collect();
    let labels = [
        [0.1, 0.2, 0.3, 0.4, 0.0],
        [0.0, 0.0, 1.0, 0.0, 0.0],
        [0.5, 0.5, 0.5, 0.0, 0.1],
    ];
    check_loss(
        "cross_entropy",
        Double::cross_entropy,
        &logits,
        labels.as_flattened(),
        entropy,
    );
}

/// Logits far beyond the range of `exp` neither overflow nor lose the loss.
#[test]
fn cross_entropy_of_large_logits() {
    let dims = RowDims { rows: 1, dim: 2 };
    let (mut d_logits, mut losses) = (vec![0.0; 2], vec![0.0]);
    Double::owned()
        .cross_entropy(
            dims,
            &mut d_logits,
            &mut losses,
            0,
            &vec![5000.0, -5000.0],
            &vec![0.0, 1.0],
            1.0,
        )
        .unwrap();
    assert_eq!(losses, [10_000.0]);
    assert_eq!(d_logits, [1.0, -1.0]);
}
