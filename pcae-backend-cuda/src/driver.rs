//! The driver: owners of what it hands out, which give it back when they are dropped.
//!
//! Of the driver's functions these are called, here and nowhere else, each loaded when it is first called:
//!
//! - `cuInit`, `cuDriverGetVersion`, `cuGetErrorName`, `cuGetErrorString`
//! - `cuDeviceGetCount`, `cuDeviceGet`, `cuDeviceGetName`, `cuDeviceGetAttribute`, `cuDevicePrimaryCtxRetain`,
//!   `cuDevicePrimaryCtxRelease_v2`, `cuCtxSetCurrent`
//! - `cuMemAlloc_v2`, `cuMemFree_v2`, `cuMemGetInfo_v2`, `cuMemHostAlloc`, `cuMemFreeHost`
//! - `cuCtxGetStreamPriorityRange`, `cuStreamCreateWithPriority`, `cuStreamDestroy_v2`, `cuStreamSynchronize`, `cuStreamWaitEvent`,
//!   `cuEventCreate`, `cuEventRecord`, `cuEventSynchronize`,
//!   `cuEventElapsedTime_v2` (of drivers before CUDA 12.8 `cuEventElapsedTime`), `cuEventDestroy_v2`
//! - `cuMemcpyHtoDAsync_v2`, `cuMemcpyDtoHAsync_v2`, `cuMemcpyDtoDAsync_v2`, `cuMemsetD8Async`
//! - `cuModuleLoadData`, `cuModuleUnload`, `cuModuleGetFunction`, `cuFuncSetAttribute`, `cuLaunchKernel`
//! - `cuStreamBeginCapture_v2`, `cuStreamEndCapture`, `cuGraphInstantiateWithFlags`, `cuGraphLaunch`,
//!   `cuGraphExecDestroy`, `cuGraphDestroy`
//!
//! `versions.rs` calls of cuBLASLt: `cublasLtGetVersion`.
//!
//! `compile.rs` calls of NVRTC: `nvrtcVersion`, `nvrtcGetNumSupportedArchs`, `nvrtcGetSupportedArchs`, `nvrtcCreateProgram`,
//! `nvrtcCompileProgram`, `nvrtcGetProgramLogSize`, `nvrtcGetProgramLog`, `nvrtcGetCUBINSize`, `nvrtcGetCUBIN`,
//! `nvrtcGetPTXSize`, `nvrtcGetPTX`, `nvrtcDestroyProgram`.
//!
//! `gemm.rs` and `gemm/plan.rs` call of cuBLASLt: `cublasLtCreate`, `cublasLtDestroy`, `cublasLtMatmulDescCreate`,
//! `cublasLtMatmulDescSetAttribute` (TRANSA, TRANSB, EPILOGUE, BIAS_POINTER), `cublasLtMatmulDescDestroy`,
//! `cublasLtMatrixLayoutCreate`, `cublasLtMatrixLayoutDestroy`, `cublasLtMatmulPreferenceCreate`,
//! `cublasLtMatmulPreferenceSetAttribute` (REDUCTION_SCHEME_MASK, MAX_WORKSPACE_BYTES, MIN_ALIGNMENT_{A,B,C,D}_BYTES),
//! `cublasLtMatmulPreferenceDestroy`, `cublasLtMatmulAlgoGetHeuristic`, `cublasLtMatmul`.

mod failure;
mod memory;
mod module;
mod stream;

use core::ffi::c_int;
use std::sync::Arc;

use cudarc::driver::result::DriverError;
use cudarc::driver::{result, sys};

use crate::error::Error;
use crate::versions::Version;
use failure::{check, failed};
pub(crate) use memory::{Block, Heap, Memory, Pinned, Plain};
pub(crate) use module::{Function, Module};
pub(crate) use stream::{Event, Graph, MAX_ARGS, Priority, Stream};

/// The oldest devices that have bf16 in their tensor cores and asynchronous copies.
const OLDEST: u32 = 80;

/// What every block of memory is a multiple of.
pub(crate) const GRAIN: usize = 256;

/// A place in device memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) struct DevicePtr(pub(crate) u64);

impl DevicePtr {
    /// `bytes` further on.
    pub(crate) fn plus(self, bytes: usize) -> Self {
        Self(self.0.wrapping_add(bytes as u64))
    }
}

/// The names under which cudarc looks for a library, the usual ones first.
fn names(library: &str) -> String {
    cudarc::get_lib_name_candidates(library)
        .into_iter()
        .filter(|name| !name.contains("64")) // those of Windows
        .collect::<Vec<_>>()
        .join(", ")
}

/// Looks for all libraries: cudarc panics where it calls one that is not there.
///
/// # Errors
/// [`Error::Library`] for the first that is missing.
pub(crate) fn libraries() -> Result<(), Error> {
    driver_library()?;
    nvrtc_library()?;
    // SAFETY: loads a library by name, as any program that uses it does.
    if !unsafe { cudarc::cublaslt::sys::is_culib_present() } {
        return Err(Error::Library {
            what: "cuBLASLt",
            names: names("cublasLt"),
            advice: "install a CUDA toolkit or the wheel nvidia-cublas and put its library folder into LD_LIBRARY_PATH, or use --backend cpu",
        });
    }
    Ok(())
}

fn driver_library() -> Result<(), Error> {
    // SAFETY: as above.
    if unsafe { sys::is_culib_present() } {
        return Ok(());
    }
    Err(Error::Library {
        what: "CUDA driver",
        names: names("cuda"),
        advice: "install NVIDIA's driver, or use --backend cpu",
    })
}

/// Looks for NVRTC, which works without a device and its driver.
///
/// # Errors
/// [`Error::Library`] if it is missing.
pub(crate) fn nvrtc_library() -> Result<(), Error> {
    // SAFETY: as above.
    if unsafe { cudarc::nvrtc::sys::is_culib_present() } {
        return Ok(());
    }
    Err(Error::Library {
        what: "NVRTC",
        names: names("nvrtc"),
        advice: "install a CUDA toolkit or the wheel nvidia-cuda-nvrtc and put its library folder into LD_LIBRARY_PATH, or use --backend cpu",
    })
}

/// How many devices the driver sees.
///
/// # Errors
/// [`Error::Library`] without a driver, [`Error::Driver`] if it fails to start.
pub fn device_count() -> Result<usize, Error> {
    driver_library()?;
    match result::init() {
        // What a driver says that finds no device at all.
        Err(DriverError(sys::CUresult::CUDA_ERROR_NO_DEVICE)) => return Ok(0),
        other => check("cuInit", other)?,
    }
    let count = result::device::get_count().map_err(|error| failed("cuDeviceGetCount", error))?;
    Ok(usize::try_from(count).unwrap_or(0))
}

/// Bytes of the memory of device number `device`, counted from 0, that nobody has, while a context is there.
///
/// # Errors
/// [`Error::Library`] without a driver, [`Error::Device`] if there is no such device, [`Error::Driver`] if the driver fails.
pub fn free_memory(device: usize) -> Result<usize, Error> {
    Context::new(device)?.free_memory()
}

/// A device and its primary context.
#[derive(Debug)]
pub(crate) struct Context {
    device: sys::CUdevice,
    raw: sys::CUcontext,
    /// The device's name.
    pub(crate) name: String,
    /// Compute capability, as 90 for 9.0.
    pub(crate) capability: u32,
    /// Streaming multiprocessors.
    pub(crate) multiprocessors: u32,
    /// Dynamic shared memory that a block may ask for, in bytes.
    pub(crate) shared: u32,
    /// The newest CUDA that the driver knows.
    pub(crate) driver: Version,
}

// SAFETY: contexts may be used by any thread that makes them current, and by several at once.
unsafe impl Send for Context {}
// SAFETY: as above.
unsafe impl Sync for Context {}

impl Context {
    /// The primary context of device number `asked`, current on this thread.
    pub(crate) fn new(asked: usize) -> Result<Arc<Self>, Error> {
        let found = device_count()?;
        let ordinal = match c_int::try_from(asked) {
            Ok(ordinal) if asked < found => ordinal,
            _ => return Err(Error::Device { asked, found }),
        };
        let device = result::device::get(ordinal).map_err(|error| failed("cuDeviceGet", error))?;
        let name =
            result::device::get_name(device).map_err(|error| failed("cuDeviceGetName", error))?;
        let attribute = |attribute| {
            // SAFETY: the device is one that the driver gave.
            unsafe { result::device::get_attribute(device, attribute) }
                .map(|value| u32::try_from(value).unwrap_or(0))
                .map_err(|error| failed("cuDeviceGetAttribute", error))
        };
        use sys::CUdevice_attribute as A;
        let capability = attribute(A::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)? * 10
            + attribute(A::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?;
        if capability < OLDEST {
            return Err(Error::TooOld { name, capability });
        }
        let multiprocessors = attribute(A::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)?;
        let shared = attribute(A::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN)?;
        let mut driver: c_int = 0;
        // SAFETY: writes one integer.
        check("cuDriverGetVersion", unsafe {
            sys::cuDriverGetVersion(&raw mut driver).result()
        })?;
        // SAFETY: the device is one that the driver gave. `Drop` releases what is retained.
        let raw = unsafe { result::primary_ctx::retain(device) }
            .map_err(|error| failed("cuDevicePrimaryCtxRetain", error))?;
        let context = Arc::new(Self {
            device,
            raw,
            name,
            capability,
            multiprocessors,
            shared,
            driver: Version::of_driver(u32::try_from(driver).unwrap_or(0)),
        });
        context.bind()?;
        Ok(context)
    }

    /// Makes it current on this thread: what every other call of the driver needs.
    pub(crate) fn bind(&self) -> Result<(), Error> {
        // SAFETY: retained until `self` is dropped.
        check("cuCtxSetCurrent", unsafe {
            result::ctx::set_current(self.raw)
        })
    }

    fn allocate(&self, bytes: usize) -> Result<Block, Error> {
        self.bind()?;
        // An empty buffer has a place too.
        let bytes = bytes
            .max(1)
            .checked_next_multiple_of(GRAIN)
            .unwrap_or(bytes);
        // SAFETY: no requirement but a current context.
        match unsafe { result::malloc_sync(bytes) } {
            Ok(at) => Ok(Block {
                at: DevicePtr(at),
                bytes,
            }),
            Err(DriverError(
                sys::CUresult::CUDA_ERROR_OUT_OF_MEMORY | sys::CUresult::CUDA_ERROR_INVALID_VALUE,
            )) => Err(Error::OutOfMemory {
                bytes,
                free: result::mem_get_info().map_or(0, |(free, _)| free),
            }),
            Err(error) => Err(failed("cuMemAlloc_v2", error)),
        }
    }

    /// Bytes of the device's memory that nobody has.
    pub(crate) fn free_memory(&self) -> Result<usize, Error> {
        self.bind()?;
        match result::mem_get_info() {
            Ok((free, _)) => Ok(free),
            Err(error) => Err(failed("cuMemGetInfo_v2", error)),
        }
    }

    /// Waits for work that is still running on it.
    fn free(&self, block: Block) {
        if self.bind().is_ok() {
            // SAFETY: allocated above, and its owner gives it up. There is nobody to tell of a failure: one that work
            // before it has caused is found by the next call.
            let _ = unsafe { result::free_sync(block.at.0) };
        }
    }
}

impl Drop for Context {
    fn drop(&mut self) {
        // SAFETY: retained by `new`; everything made in it holds an `Arc` of it and is gone.
        let _ = unsafe { result::primary_ctx::release(self.device) };
    }
}

#[cfg(test)]
mod tests {
    /// A toolkit of either version may be what is there.
    #[test]
    fn libraries_of_cuda_12_and_13_are_looked_for() {
        for library in ["nvrtc", "cublasLt"] {
            let names = super::names(library);
            for version in ["", ".12", ".13"] {
                let name = format!("lib{library}.so{version}");
                let found = names.split(", ").any(|it| it == name);
                assert!(found || !cfg!(target_os = "linux"), "{name} in {names}");
            }
        }
    }
}
