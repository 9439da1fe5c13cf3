//! What cuBLASLt needs for a product, and which of its algorithms may do it.

use core::ffi::{c_int, c_void};
use core::fmt;

use cudarc::cublaslt::result::{self, CublasError};
use cudarc::cublaslt::sys;

use super::{Key, Matmul, WORKSPACE, failed, is_refusal};
use crate::Precision;
use crate::driver::{DevicePtr, Stream};
use crate::error::Error;

/// Algorithms that are asked for.
const MOST: usize = 8;

/// An algorithm of cuBLASLt's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Algorithm {
    raw: sys::cublasLtMatmulAlgo_t,
    /// Bytes that it wants.
    workspace: usize,
}

/// Descriptors of a product, and algorithms that may do it, of which the first is taken.
pub(super) struct Plan {
    desc: Desc,
    /// Of the first and second operand and the output, as cuBLASLt sees them.
    layouts: [Layout; 3],
    pub(super) algorithms: Vec<Algorithm>,
}

impl fmt::Debug for Plan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Plan({} algorithms)", self.algorithms.len())
    }
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
        // SAFETY: created by cuBLASLt, and dropped once.
        let _ = unsafe { result::destroy_matrix_layout(self.0) };
    }
}

struct Preference(sys::cublasLtMatmulPreference_t);

impl Drop for Preference {
    fn drop(&mut self) {
        // SAFETY: created by cuBLASLt, and dropped once.
        let _ = unsafe { result::destroy_matmul_pref(self.0) };
    }
}

impl Plan {
    /// `None` if cuBLASLt knows no algorithm for it.
    pub(super) fn new(
        handle: sys::cublasLtHandle_t,
        precision: Precision,
        matmul: &Matmul,
    ) -> Result<Option<Self>, Error> {
        use sys::cublasLtMatmulDescAttributes_t as D;
        use sys::cublasLtMatmulPreferenceAttributes_t as P;
        use sys::cudaDataType_t::{CUDA_R_8F_E4M3, CUDA_R_16BF, CUDA_R_32F};

        let fail = |call| move |error| failed(call, error, matmul.to_string());
        let format = match precision {
            Precision::F32 => CUDA_R_32F,
            Precision::Bf16 => CUDA_R_16BF,
        };
        let out = if matmul.out_f32 { CUDA_R_32F } else { format };
        let operand = match matmul.scale {
            Some(_) => CUDA_R_8F_E4M3,
            None => format,
        };

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
        if let Some(scale) = matmul.scale {
            // Tensor cores then add up to the end what Ada and Hopper otherwise move to f32 after every few terms, and keep fewer bits of
            // a sum than f32 has: far more than operands of 4 bits are worth, which round by up to 2^-4.
            set_desc(&desc, D::CUBLASLT_MATMUL_DESC_FAST_ACCUM, &1_i8)
                .and_then(|()| set_scale(&desc, scale))
                .map_err(fail("cublasLtMatmulDescSetAttribute"))?;
        }
        if let Some(bias) = matmul.bias {
            set(
                D::CUBLASLT_MATMUL_DESC_EPILOGUE,
                sys::cublasLtEpilogue_t::CUBLASLT_EPILOGUE_BIAS as i32,
            )?;
            let pointer: *const c_void = pointer(bias);
            set_desc(&desc, D::CUBLASLT_MATMUL_DESC_BIAS_POINTER, &pointer)
                .map_err(fail("cublasLtMatmulDescSetAttribute"))?;
        }

        let layout = |kind, rows: usize, columns: usize, row: usize| {
            result::create_matrix_layout(kind, rows as u64, columns as u64, row as i64)
                .map(Layout)
                .map_err(fail("cublasLtMatrixLayoutCreate"))
        };
        let swapped = |is, rows, columns| if is { (columns, rows) } else { (rows, columns) };
        let (rows, columns) = swapped(matmul.b_transposed, matmul.n, matmul.k);
        let first = layout(operand, rows, columns, matmul.b_row)?;
        let (rows, columns) = swapped(matmul.a_transposed, matmul.k, matmul.m);
        let second = layout(operand, rows, columns, matmul.a_row)?;
        let layouts = [first, second, layout(out, matmul.n, matmul.m, matmul.n)?];

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
        let [a, b, add, store, _] = Key::of(matmul).alignments;
        for (attribute, bytes) in [
            (P::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, b),
            (P::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES, a),
            (P::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, add),
            (P::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES, store),
        ] {
            prefer(attribute, (&raw const bytes).cast(), size_of::<u32>())?;
        }
        let [first, second, third] = &layouts;
        // SAFETY: a status of 0 is one, and so are all numbers of the other fields.
        let mut found: [sys::cublasLtMatmulHeuristicResult_t; MOST] =
            unsafe { core::mem::zeroed() };
        let mut count: c_int = 0;
        // SAFETY: all created above, and alive; as many results as are asked for.
        let asked = unsafe {
            sys::cublasLtMatmulAlgoGetHeuristic(
                handle,
                desc.0,
                first.0,
                second.0,
                third.0,
                third.0,
                preference.0,
                MOST as c_int,
                found.as_mut_ptr(),
                &raw mut count,
            )
        };
        match asked.result() {
            Ok(()) => {}
            Err(error) if is_refusal(error, matmul) => return Ok(None),
            Err(error) => return Err(fail("cublasLtMatmulAlgoGetHeuristic")(error)),
        }
        let works = |found: &&sys::cublasLtMatmulHeuristicResult_t| {
            found.state == sys::cublasStatus_t::CUBLAS_STATUS_SUCCESS
                && found.workspaceSize <= WORKSPACE
        };
        let found = found.iter().take(usize::try_from(count).unwrap_or(0));
        let algorithms: Vec<_> = found
            .filter(works)
            .map(|found| Algorithm {
                raw: found.algo,
                workspace: found.workspaceSize,
            })
            .collect();
        Ok((!algorithms.is_empty()).then_some(Self {
            desc,
            layouts,
            algorithms,
        }))
    }

    pub(super) fn has_algorithm(&self) -> bool {
        !self.algorithms.is_empty()
    }

    /// Forgets the first algorithm.
    pub(super) fn pass_over(&mut self) {
        self.algorithms.remove(0);
    }

    /// Moves the algorithm of the least of `times` to the front, if that is worth it.
    pub(super) fn prefer(&mut self, times: &[f64]) {
        /// Below which part of the first's time another is taken; less may be by chance.
        const LESS: f64 = 0.98;
        let least = (0..times.len()).min_by(|&a, &b| times[a].total_cmp(&times[b]));
        if let Some(least) = least
            && times[least] < LESS * times[0]
        {
            self.algorithms.swap(0, least);
        }
    }

    /// Puts the product into a stream, by algorithm number `algorithm`.
    ///
    /// # Safety
    /// `matmul` has the key of the product that this was made for, its operands are memory, and so are [`WORKSPACE`] bytes from
    /// `workspace` on, which nobody else uses meanwhile.
    pub(super) unsafe fn launch(
        &self,
        handle: sys::cublasLtHandle_t,
        stream: &Stream,
        matmul: &Matmul,
        algorithm: usize,
        workspace: DevicePtr,
    ) -> Result<(), CublasError> {
        if let Some(bias) = matmul.bias {
            let pointer: *const c_void = pointer(bias);
            let attribute = sys::cublasLtMatmulDescAttributes_t::CUBLASLT_MATMUL_DESC_BIAS_POINTER;
            set_desc(&self.desc, attribute, &pointer)?;
        }
        if let Some(scale) = matmul.scale {
            set_scale(&self.desc, scale)?;
        }
        let alpha = 1.0_f32;
        let beta = if matmul.add.is_some() { 1.0_f32 } else { 0.0 };
        let [a, b, out] = &self.layouts;
        let Algorithm {
            raw,
            workspace: bytes,
        } = &self.algorithms[algorithm];
        // SAFETY: descriptors of this product, kept by the plan; factors are read before the call returns; the rest by the caller.
        unsafe {
            result::matmul(
                handle,
                self.desc.0,
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
                core::ptr::from_ref(raw),
                pointer(workspace).cast_mut(),
                *bytes,
                stream.raw().cast(),
            )
        }
    }
}

fn pointer(at: DevicePtr) -> *const c_void {
    core::ptr::without_provenance(at.0 as usize)
}

/// Of `b`, which cuBLASLt sees first.
fn set_scale(desc: &Desc, scale: DevicePtr) -> Result<(), CublasError> {
    let attribute = sys::cublasLtMatmulDescAttributes_t::CUBLASLT_MATMUL_DESC_A_SCALE_POINTER;
    set_desc(desc, attribute, &pointer(scale))
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
