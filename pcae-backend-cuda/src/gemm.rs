//! Matrix products by cuBLASLt.
//!
//! A product's descriptors and algorithm are made when it first comes, and kept by its sizes, operands and alignments. cuBLASLt counts
//! along columns: a row-major `y = a @ b` is its `y^T = b^T @ a^T`, with the same memory.
//!
//! f32 is multiplied in f32 (`CUBLAS_COMPUTE_32F`, not TF32). bf16 is summed in f32, and rounded once, after bias and residual.

use core::ffi::c_void;
use core::fmt;
use std::collections::HashMap;
use std::sync::Arc;

use cudarc::cublaslt::result::{self, CublasError};
use cudarc::cublaslt::sys;

use crate::Precision;
use crate::driver::{Context, DevicePtr, Heap, Memory, Stream};
use crate::error::Error;

/// Bytes for sums of a product that is cut along its inner dimension: what NVIDIA recommends for its H100.
pub(crate) const WORKSPACE: usize = 32 << 20;

/// Of operands, in bytes: more does not matter to any algorithm.
const ALIGNED: u32 = 256;

/// A row-major product, `out = op(a) @ op(b) (+ bias) (+ add)`, of operands in the backend's format.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Matmul {
    /// Rows of `out`.
    pub(crate) m: usize,
    /// Columns of `out`.
    pub(crate) n: usize,
    /// What is summed over.
    pub(crate) k: usize,
    /// `[m, k]`, or `[k, m]` if it is transposed.
    pub(crate) a: DevicePtr,
    pub(crate) a_transposed: bool,
    /// `[k, n]`, or `[n, k]` if it is transposed.
    pub(crate) b: DevicePtr,
    pub(crate) b_transposed: bool,
    /// `[n]`, in the backend's format; only where `out` is in that too.
    pub(crate) bias: Option<DevicePtr>,
    /// `[m, n]`, as `out`; may be `out` itself, nothing else of it.
    pub(crate) add: Option<DevicePtr>,
    /// `[m, n]`
    pub(crate) out: DevicePtr,
    /// `out` and `add` are f32 whatever the operands are.
    pub(crate) out_f32: bool,
}

/// Words of a product on a tape.
const WORDS: usize = 9;

impl Matmul {
    pub(crate) fn to_words(self) -> [u64; WORDS] {
        let flags = u64::from(self.a_transposed)
            | u64::from(self.b_transposed) << 1
            | u64::from(self.bias.is_some()) << 2
            | u64::from(self.add.is_some()) << 3
            | u64::from(self.out_f32) << 4;
        let place = |at: Option<DevicePtr>| at.map_or(0, |at| at.0);
        [
            self.m as u64,
            self.n as u64,
            self.k as u64,
            flags,
            self.a.0,
            self.b.0,
            place(self.bias),
            place(self.add),
            self.out.0,
        ]
    }

    pub(crate) fn from_words(words: &[u64; WORDS]) -> Self {
        let [m, n, k, flags, a, b, bias, add, out] = *words;
        let flag = |at: u32| flags >> at & 1 == 1;
        Self {
            m: m as usize,
            n: n as usize,
            k: k as usize,
            a: DevicePtr(a),
            a_transposed: flag(0),
            b: DevicePtr(b),
            b_transposed: flag(1),
            bias: flag(2).then_some(DevicePtr(bias)),
            add: flag(3).then_some(DevicePtr(add)),
            out: DevicePtr(out),
            out_f32: flag(4),
        }
    }
}

impl fmt::Display for Matmul {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "[{}, {}] @ [{}, {}]", self.m, self.k, self.k, self.n)?;
        for (is, text) in [
            (self.a_transposed, ", left transposed"),
            (self.b_transposed, ", right transposed"),
            (self.bias.is_some(), ", bias"),
            (self.add.is_some(), ", added"),
            (self.out_f32, ", to f32"),
        ] {
            if is {
                f.write_str(text)?;
            }
        }
        Ok(())
    }
}

/// What an algorithm depends on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Key {
    m: usize,
    n: usize,
    k: usize,
    a_transposed: bool,
    b_transposed: bool,
    bias: bool,
    add: bool,
    out_f32: bool,
    /// Of `a`, `b`, `add`, `out`, `bias`, in bytes.
    alignments: [u32; 5],
}

/// The largest power of two that a place is a multiple of, up to [`ALIGNED`].
fn alignment(at: DevicePtr) -> u32 {
    1 << at.0.trailing_zeros().min(ALIGNED.trailing_zeros())
}

impl Key {
    fn of(matmul: &Matmul) -> Self {
        let Matmul {
            m,
            n,
            k,
            a,
            a_transposed,
            b,
            b_transposed,
            bias,
            add,
            out,
            out_f32,
        } = *matmul;
        // cuBLASLt takes the bias's alignment from the place that the descriptor names when an algorithm is asked for; some
        // versions go by the output's.
        let bias_alignment = bias.map_or(ALIGNED, alignment);
        let store = alignment(out).min(bias_alignment);
        Self {
            m,
            n,
            k,
            a_transposed,
            b_transposed,
            bias: bias.is_some(),
            add: add.is_some(),
            out_f32,
            alignments: [
                alignment(a),
                alignment(b),
                add.map_or(alignment(out), alignment),
                store,
                bias_alignment,
            ],
        }
    }
}

/// Descriptors of a product, and how it is done.
struct Plan {
    desc: Desc,
    /// Of the first and second operand and the output, as cuBLASLt sees them.
    layouts: [Layout; 3],
    algo: sys::cublasLtMatmulAlgo_t,
    /// Bytes that it wants.
    workspace: usize,
}

struct Desc(sys::cublasLtMatmulDesc_t);

impl Drop for Desc {
    fn drop(&mut self) {
        // SAFETY: created by cuBLASLt, and dropped once.
        let _ = unsafe { result::destroy_matmul_desc(self.0) };
    }
}

struct Layout(sys::cublasLtMatrixLayout_t);

impl Drop for Layout {
    fn drop(&mut self) {
        // SAFETY: as above.
        let _ = unsafe { result::destroy_matrix_layout(self.0) };
    }
}

struct Preference(sys::cublasLtMatmulPreference_t);

impl Drop for Preference {
    fn drop(&mut self) {
        // SAFETY: as above.
        let _ = unsafe { result::destroy_matmul_pref(self.0) };
    }
}

struct Handle(sys::cublasLtHandle_t);

impl Drop for Handle {
    fn drop(&mut self) {
        // SAFETY: as above.
        let _ = unsafe { result::destroy_handle(self.0) };
    }
}

/// cuBLASLt.
pub(crate) struct Gemm {
    precision: Precision,
    plans: HashMap<Key, Plan>,
    workspace: Memory,
    handle: Handle,
}

// SAFETY: cuBLASLt's objects belong to no thread; they are used by one at a time, through `&mut self`.
unsafe impl Send for Gemm {}
// SAFETY: `&self` reaches none of them.
unsafe impl Sync for Gemm {}

impl fmt::Debug for Gemm {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Gemm({} plans)", self.plans.len())
    }
}

fn failed(call: &'static str, error: CublasError, product: String) -> Error {
    Error::Cublas {
        call,
        error: format!("{:?}", error.0),
        product,
    }
}

impl Gemm {
    pub(crate) fn new(
        context: &Context,
        heap: &Arc<Heap>,
        precision: Precision,
    ) -> Result<Self, Error> {
        context.bind()?;
        Ok(Self {
            precision,
            plans: HashMap::new(),
            workspace: heap.allocate(WORKSPACE)?,
            handle: Handle(
                result::create_handle()
                    .map_err(|error| failed("cublasLtCreate", error, String::new()))?,
            ),
        })
    }

    /// Writes zeros over what products use as they go, to keep the device busy.
    pub(crate) fn spoil_workspace(&self, stream: &Stream) -> Result<(), Error> {
        // SAFETY: memory of this, which no product expects anything in.
        unsafe { stream.zero(self.workspace.at(), self.workspace.bytes()) }
    }

    /// Puts a product, of at least one row and column, into a stream.
    pub(crate) fn run(&mut self, stream: &Stream, matmul: &Matmul) -> Result<(), Error> {
        if matmul.k == 0 {
            return self.empty(stream, matmul);
        }
        let key = Key::of(matmul);
        if !self.plans.contains_key(&key) {
            let plan = self.plan(matmul, &key)?;
            self.plans.insert(key, plan);
        }
        let plan = &self.plans[&key];
        if let Some(bias) = matmul.bias {
            let pointer: *const c_void = pointer(bias);
            set_desc(
                &plan.desc,
                sys::cublasLtMatmulDescAttributes_t::CUBLASLT_MATMUL_DESC_BIAS_POINTER,
                &pointer,
            )
            .map_err(|error| failed("cublasLtMatmulDescSetAttribute", error, matmul.to_string()))?;
        }
        let alpha = 1.0_f32;
        let beta = if matmul.add.is_some() { 1.0_f32 } else { 0.0 };
        let [a, b, out] = &plan.layouts;
        // SAFETY: descriptors of this product, kept by the plan; factors are read before the call returns; the operation that
        // queued it has checked where operands lie; the workspace is as large as the plan was made for, and used by one product
        // of this stream after the other.
        unsafe {
            result::matmul(
                self.handle.0,
                plan.desc.0,
                (&raw const alpha).cast(),
                (&raw const beta).cast(),
                pointer(matmul.b),
                a.0,
                pointer(matmul.a),
                b.0,
                pointer(matmul.add.unwrap_or(matmul.out)),
                out.0,
                pointer(matmul.out).cast_mut(),
                out.0,
                &raw const plan.algo,
                pointer(self.workspace.at()).cast_mut(),
                plan.workspace,
                stream.raw().cast(),
            )
        }
        .map_err(|error| failed("cublasLtMatmul", error, matmul.to_string()))
    }

    /// A sum over nothing.
    fn empty(&self, stream: &Stream, matmul: &Matmul) -> Result<(), Error> {
        match (matmul.add, matmul.bias) {
            (Some(add), None) if add == matmul.out => Ok(()),
            (None, None) => {
                let size = self.out_size(matmul);
                // SAFETY: as in `run`.
                unsafe { stream.zero(matmul.out, matmul.m * matmul.n * size) }
            }
            _ => Err(failed(
                "cublasLtMatmul",
                CublasError(sys::cublasStatus_t::CUBLAS_STATUS_INVALID_VALUE),
                matmul.to_string(),
            )),
        }
    }

    fn out_size(&self, matmul: &Matmul) -> usize {
        if matmul.out_f32 {
            size_of::<f32>()
        } else {
            self.precision.size()
        }
    }

    fn plan(&self, matmul: &Matmul, key: &Key) -> Result<Plan, Error> {
        use sys::cublasLtMatmulDescAttributes_t as D;
        use sys::cublasLtMatmulPreferenceAttributes_t as P;
        use sys::cudaDataType_t::{CUDA_R_16BF, CUDA_R_32F};

        let fail = |call| move |error| failed(call, error, matmul.to_string());
        let operand = match self.precision {
            Precision::F32 => CUDA_R_32F,
            Precision::Bf16 => CUDA_R_16BF,
        };
        let out = if matmul.out_f32 { CUDA_R_32F } else { operand };

        let desc =
            result::create_matmul_desc(sys::cublasComputeType_t::CUBLAS_COMPUTE_32F, CUDA_R_32F)
                .map(Desc)
                .map_err(fail("cublasLtMatmulDescCreate"))?;
        let set = |attribute, value: i32| {
            set_desc(&desc, attribute, &value).map_err(fail("cublasLtMatmulDescSetAttribute"))
        };
        // In memory, a row-major matrix is its transpose by columns; so `b` comes first.
        // `CUBLAS_OP_N` is 0, `CUBLAS_OP_T` 1.
        let transpose = i32::from;
        set(
            D::CUBLASLT_MATMUL_DESC_TRANSA,
            transpose(matmul.b_transposed),
        )?;
        set(
            D::CUBLASLT_MATMUL_DESC_TRANSB,
            transpose(matmul.a_transposed),
        )?;
        if let Some(bias) = matmul.bias {
            set(
                D::CUBLASLT_MATMUL_DESC_EPILOGUE,
                sys::cublasLtEpilogue_t::CUBLASLT_EPILOGUE_BIAS as i32,
            )?;
            let pointer: *const c_void = pointer(bias);
            set_desc(&desc, D::CUBLASLT_MATMUL_DESC_BIAS_POINTER, &pointer)
                .map_err(fail("cublasLtMatmulDescSetAttribute"))?;
        }

        let layout = |kind, rows: usize, columns: usize| {
            // Column by column without gaps.
            result::create_matrix_layout(kind, rows as u64, columns as u64, rows as i64)
                .map(Layout)
                .map_err(fail("cublasLtMatrixLayoutCreate"))
        };
        let swapped = |is, rows, columns| if is { (columns, rows) } else { (rows, columns) };
        let (rows, columns) = swapped(matmul.b_transposed, matmul.n, matmul.k);
        let first = layout(operand, rows, columns)?;
        let (rows, columns) = swapped(matmul.a_transposed, matmul.k, matmul.m);
        let second = layout(operand, rows, columns)?;
        let layouts = [first, second, layout(out, matmul.n, matmul.m)?];

        let preference = result::create_matmul_pref()
            .map(Preference)
            .map_err(fail("cublasLtMatmulPreferenceCreate"))?;
        let prefer = |attribute, value: *const c_void, size| {
            // SAFETY: created above; `value` is of that size.
            unsafe { result::set_matmul_pref_attribute(preference.0, attribute, value, size) }
                .map_err(fail("cublasLtMatmulPreferenceSetAttribute"))
        };
        // Sums of a product that is cut along its inner dimension meet in the workspace, in f32 and in order: the other ways round
        // them to the output's format, or add them in the order in which they come.
        let reduction =
            sys::cublasLtReductionScheme_t::CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE as u32;
        prefer(
            P::CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK,
            (&raw const reduction).cast(),
            size_of::<u32>(),
        )?;
        let most = WORKSPACE as u64;
        prefer(
            P::CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES,
            (&raw const most).cast(),
            size_of::<u64>(),
        )?;
        let [a, b, add, store, _] = key.alignments;
        for (attribute, bytes) in [
            (P::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, b),
            (P::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES, a),
            (P::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, add),
            (P::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES, store),
        ] {
            prefer(attribute, (&raw const bytes).cast(), size_of::<u32>())?;
        }
        let [first, second, third] = &layouts;
        // SAFETY: all created above, and alive.
        let found = unsafe {
            result::get_matmul_algo_heuristic(
                self.handle.0,
                desc.0,
                first.0,
                second.0,
                third.0,
                third.0,
                preference.0,
            )
        }
        .map_err(fail("cublasLtMatmulAlgoGetHeuristic"))?;
        Ok(Plan {
            desc,
            layouts,
            algo: found.algo,
            workspace: found.workspaceSize.min(WORKSPACE),
        })
    }
}

fn pointer(at: DevicePtr) -> *const c_void {
    core::ptr::without_provenance(at.0 as usize)
}

fn set_desc<T>(
    desc: &Desc,
    attribute: sys::cublasLtMatmulDescAttributes_t,
    value: &T,
) -> Result<(), CublasError> {
    // SAFETY: the descriptor exists; the value is of the size that is said, and copied.
    unsafe {
        result::set_matmul_desc_attribute(
            desc.0,
            attribute,
            core::ptr::from_ref(value).cast(),
            size_of::<T>(),
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_product_comes_back_from_its_words() {
        let base = Matmul {
            m: 3,
            n: 5,
            k: 7,
            a: DevicePtr(1 << 40),
            a_transposed: false,
            b: DevicePtr(2 << 40),
            b_transposed: false,
            bias: None,
            add: None,
            out: DevicePtr(3 << 40),
            out_f32: false,
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

    /// All forms that layers need, at sizes that no tile divides and places that nothing aligns.
    #[test]
    fn products_are_those_of_the_formula() {
        let sizes = [(1, 1, 1), (2, 3, 5), (17, 9, 31), (64, 48, 40), (3, 129, 7)];
        for precision in [Precision::F32, Precision::Bf16] {
            let Some(mut queue) = crate::testing::queue(precision) else {
                return;
            };
            for ((m, n, k), offset) in sizes.into_iter().flat_map(|size| [(size, 0), (size, 3)]) {
                for form in 0..32 {
                    let flag = |bit: u32| form >> bit & 1 == 1;
                    let [a_transposed, b_transposed, bias, add, out_f32] =
                        [flag(0), flag(1), flag(2), flag(3), flag(4)];
                    if bias && out_f32 && precision == Precision::Bf16 {
                        continue;
                    }
                    let [a, b, c, d] = [(m * k, 1), (k * n, 2), (n, 3), (m * n, 4)]
                        .map(|(len, seed)| values(len, seed));
                    let place = offset * precision.size();
                    let mut upload = |x: &[f32]| {
                        let memory = queue.allocate(place + x.len() * 4).unwrap();
                        queue.write_act(memory.at().plus(place), x).unwrap();
                        memory
                    };
                    let [a_at, b_at, c_at] = [&a, &b, &c].map(|x| upload(x));
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
                        b: b_at.at().plus(place),
                        b_transposed,
                        bias: bias.then(|| c_at.at().plus(place)),
                        add: add.then_some(add_at),
                        out,
                        out_f32,
                    };
                    queue.matmul(matmul).unwrap();
                    let mut found = vec![0.0; m * n];
                    if out_f32 {
                        queue.read_f32(&mut found, out).unwrap();
                    } else {
                        queue.read_act(&mut found, out).unwrap();
                    }
                    for (i, j) in (0..m).flat_map(|i| (0..n).map(move |j| (i, j))) {
                        let mut expected = 0.0;
                        for p in 0..k {
                            expected +=
                                at(&a, m, k, a_transposed, i, p) * at(&b, k, n, b_transposed, p, j);
                        }
                        if bias {
                            expected += c[j];
                        }
                        if add {
                            expected += d[i * n + j];
                        }
                        if precision == Precision::Bf16 && !out_f32 {
                            let bits = crate::ring::to_bf16(expected);
                            expected = f32::from_bits(u32::from(bits) << 16);
                        }
                        assert_eq!(
                            found[i * n + j],
                            expected,
                            "{precision:?} {matmul} at {i}, {j}"
                        );
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
                b: place(3),
                b_transposed: false,
                bias: Some(place(bias)),
                add: None,
                out: place(4),
                out_f32: false,
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
            b: memory.at(),
            b_transposed: false,
            bias: None,
            add: Some(memory.at()),
            out: memory.at(),
            out_f32: true,
        };
        let mut back = [0.0; 6];
        for expected in [7.0, 0.0] {
            queue.matmul(matmul).unwrap();
            queue.read_f32(&mut back, memory.at()).unwrap();
            assert_eq!(back, [expected; 6]);
            matmul.add = None;
        }
    }
}
