//! Code on the device.

use core::ffi::{c_int, c_void};
use std::ffi::CString;
use std::sync::Arc;

use cudarc::driver::{result, sys};

use super::Context;
use super::failure::{check, explained};
use crate::error::Error;

/// Code on the device.
#[derive(Debug)]
pub(crate) struct Module {
    context: Arc<Context>,
    raw: sys::CUmodule,
}

// SAFETY: modules may be used by any thread.
unsafe impl Send for Module {}
// SAFETY: as above.
unsafe impl Sync for Module {}

/// A kernel of a [`Module`], valid as long as that.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Function(pub(super) sys::CUfunction);

// SAFETY: functions may be used by any thread.
unsafe impl Send for Function {}
// SAFETY: as above.
unsafe impl Sync for Function {}

impl Module {
    /// Loads what NVRTC made: a cubin, or PTX with a zero at its end.
    pub(crate) fn new(context: &Arc<Context>, image: &[u8]) -> Result<Self, Error> {
        context.bind()?;
        // SAFETY: an image by the compiler (or the cache, by its sum), which says its length itself.
        let raw = unsafe { result::module::load_data(image.as_ptr().cast::<c_void>()) }.map_err(
            // An old driver may refuse what a new compiler makes.
            |error| {
                let driver = format!("the driver is for CUDA {}", context.driver);
                explained("cuModuleLoadData", &driver, error)
            },
        )?;
        Ok(Self {
            context: Arc::clone(context),
            raw,
        })
    }

    /// Its kernel of that name.
    pub(crate) fn function(&self, name: &'static str) -> Result<Function, Error> {
        let c_name = CString::new(name).unwrap_or_default();
        // SAFETY: loaded by `new`.
        unsafe { result::module::get_function(self.raw, c_name) }
            .map(Function)
            .map_err(|error| explained("cuModuleGetFunction", name, error))
    }
}

impl Drop for Module {
    fn drop(&mut self) {
        if self.context.bind().is_ok() {
            // SAFETY: loaded by `new`.
            let _ = unsafe { result::module::unload(self.raw) };
        }
    }
}

impl Function {
    /// Lets it be launched with this much dynamic shared memory, if it is more than any kernel may have.
    pub(crate) fn allow_shared(self, bytes: u32) -> Result<(), Error> {
        let bytes = c_int::try_from(bytes).unwrap_or(c_int::MAX);
        // SAFETY: a function of a loaded module.
        check("cuFuncSetAttribute", unsafe {
            result::function::set_function_attribute(
                self.0,
                sys::CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES,
                bytes,
            )
        })
    }
}
