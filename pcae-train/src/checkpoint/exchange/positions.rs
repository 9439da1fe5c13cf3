//! Position embeddings for another grid of patches.

/// Resamples the rows of a table of positions from one grid to another, bicubically and channel by channel.
///
/// Without `antialias` it is PyTorch's `interpolate(mode="bicubic", align_corners=False)`, which MAE and Hugging Face's DINOv2 use:
/// cubic convolution with a = -0.75, positions outside the grid taken from its edge. With it, it is the same with
/// `antialias=True`, which timm uses: a = -0.5, the kernel widened where the grid shrinks, and cut off at the edge.
///
/// # Shapes
/// `table: [from[0] * from[1], dim]`; returns `[to[0] * to[1], dim]`.
pub fn resample(
    table: &[f32],
    dim: usize,
    from: [usize; 2],
    to: [usize; 2],
    antialias: bool,
) -> Vec<f32> {
    if from == to {
        return table.to_vec();
    }
    let [rows, columns] = [0, 1].map(|axis| taps(from[axis], to[axis], antialias));
    let mut out = vec![0.0; to[0] * to[1] * dim];
    let mut sum = vec![0.0_f64; dim];
    for (place, out) in out.chunks_exact_mut(dim).enumerate() {
        sum.fill(0.0);
        for &(row, row_weight) in &rows[place / to[1]] {
            for &(column, column_weight) in &columns[place % to[1]] {
                let weight = row_weight * column_weight;
                let source = &table[(row * from[1] + column) * dim..][..dim];
                for (sum, &value) in sum.iter_mut().zip(source) {
                    *sum += weight * f64::from(value);
                }
            }
        }
        for (out, &sum) in out.iter_mut().zip(&sum) {
            *out = sum as f32;
        }
    }
    out
}

/// For each place along an axis, the places it is made of and their weights, which sum to 1.
fn taps(from: usize, to: usize, antialias: bool) -> Vec<Vec<(usize, f64)>> {
    let scale = from as f64 / to as f64;
    let a = if antialias { -0.5 } else { -0.75 };
    let width = if antialias { scale.max(1.0) } else { 1.0 };
    (0..to)
        .map(|i| {
            let centre = (i as f64 + 0.5) * scale - 0.5;
            let reach = 2.0 * width;
            let places = (centre - reach).ceil() as i64..=(centre + reach).floor() as i64;
            let mut taps: Vec<(usize, f64)> = places
                .filter(|place| !antialias || (0..from as i64).contains(place))
                .map(|place| {
                    let inside = place.clamp(0, from as i64 - 1) as usize;
                    (inside, cubic((place as f64 - centre).abs() / width, a))
                })
                .collect();
            let total: f64 = taps.iter().map(|(_, weight)| weight).sum();
            for (_, weight) in &mut taps {
                *weight /= total;
            }
            taps
        })
        .collect()
}

/// Keys' cubic convolution kernel at a distance.
fn cubic(x: f64, a: f64) -> f64 {
    if x < 1.0 {
        ((a + 2.0) * x - (a + 3.0)) * x * x + 1.0
    } else if x < 2.0 {
        (((x - 5.0) * x + 8.0) * x - 4.0) * a
    } else {
        0.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// ONNX Runtime 1.32's `Resize` (cubic, half_pixel) of a table of 4 x 3; Pillow's bicubic gives the antialiased ones too.
    #[test]
    fn as_onnx_runtime() {
        let table: Vec<f32> = (0..12)
            .map(|i| ((3 * (i / 3) * (i / 3) + 5 * (i % 3) + 2 * (i / 3) * (i % 3)) % 7) as f32)
            .collect();
        let cases: [([usize; 2], bool, &[f32]); 6] = [
            (
                [6, 2],
                false,
                &[
                    1.047147, 3.683501, 2.026855, 3.467163, 3.242068, 2.725464, 3.572307, 1.663126,
                    4.686035, 0.819946, 5.56718, 0.505046,
                ],
            ),
            (
                [6, 2],
                true,
                &[
                    1.752873, 3.959723, 2.370503, 3.588519, 3.0662, 2.721097, 3.053226, 1.327704,
                    4.186291, 0.897649, 5.195658, 0.91818,
                ],
            ),
            (
                [3, 5],
                false,
                &[
                    -0.023611, 2.216922, 4.765047, 4.010046, 2.849585, 4.490501, 2.843624, 1.03125,
                    1.817627, 2.846501, 6.215096, 4.743985, 2.517362, 0.898863, 0.053898,
                ],
            ),
            (
                [3, 5],
                true,
                &[
                    0.321315, 2.120189, 4.677346, 3.806824, 2.934934, 4.277679, 3.0513, 1.323994,
                    2.010256, 2.664471, 6.152585, 4.615218, 2.086957, 0.846493, 0.312551,
                ],
            ),
            ([2, 2], false, &[2.026855, 3.467163, 4.686035, 0.819946]),
            ([2, 2], true, &[2.406663, 3.262294, 4.071309, 1.145052]),
        ];
        // Two channels, so that a swapped stride shows.
        let pairs: Vec<f32> = table.iter().flat_map(|&v| [v, -v]).collect();
        for (to, antialias, want) in cases {
            let found = resample(&pairs, 2, [4, 3], to, antialias);
            assert_eq!(found.len(), 2 * want.len());
            for (found, &want) in found.as_chunks::<2>().0.iter().zip(want) {
                // Arithmetic in f32 there: 16 products of up to 7, each rounded to 6e-8 of that. The other kernel differs by 0.01.
                assert!(
                    (found[0] - want).abs() < 1e-5,
                    "{to:?} {antialias}: {found:?} {want}"
                );
                assert_eq!(found[1], -found[0]);
            }
        }
    }

    #[test]
    fn the_same_grid_keeps_its_bits() {
        let table = [0.1, f32::MIN_POSITIVE, 3.0, -4.5];
        assert_eq!(resample(&table, 2, [2, 1], [2, 1], true), table);
    }
}
