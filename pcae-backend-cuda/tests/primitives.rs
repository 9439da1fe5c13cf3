//! What `common.cuh` wraps, beside plain formulas; and mistakes that the emulator must find.
#![allow(
    clippy::unwrap_used,
    reason = "a test stops at what it does not expect"
)]

use std::ffi::{CString, c_void};

use cudarc::driver::sys::{CUdeviceptr, CUfunction_attribute as Attribute, CUstreamCaptureMode};
use cudarc::driver::{DriverError, result};

mod emulated;

#[test]
fn on_the_emulator() {
    emulated::run_again();
}

/// A device with the kernels of `emulator/primitives.cu`, and one stream.
struct Device {
    context: i32,
    /// As (9, 0).
    capability: (i32, i32),
    module: cudarc::driver::sys::CUmodule,
    stream: cudarc::driver::sys::CUstream,
}

/// Memory of so many bytes.
struct Place(CUdeviceptr);

impl Drop for Place {
    fn drop(&mut self) {
        // SAFETY: allocated by `Device`, given up here.
        unsafe { result::free_sync(self.0) }.unwrap();
    }
}

#[derive(Clone, Copy)]
enum Argument {
    Place(CUdeviceptr),
    Number(u32),
}

impl Device {
    fn new() -> Option<Self> {
        if !emulated::has_device() {
            return None;
        }
        result::init().unwrap();
        let device = result::device::get(0).unwrap();
        // SAFETY: a device by the driver, released when `self` is dropped.
        let context = unsafe { result::primary_ctx::retain(device) }.unwrap();
        // SAFETY: retained.
        unsafe { result::ctx::set_current(context) }.unwrap();
        let source = format!(
            "#line 1 \"common.cuh\"\n{}\n#line 1 \"primitives.cu\"\n{}",
            include_str!("../kernels/common.cuh"),
            include_str!("emulator/primitives.cu")
        );
        let program =
            cudarc::nvrtc::result::create_program(&CString::new(source).unwrap(), None).unwrap();
        use cudarc::driver::sys::CUdevice_attribute as A;
        // SAFETY: a device by the driver.
        let [major, minor] = [
            A::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR,
            A::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR,
        ]
        .map(|attribute| unsafe { result::device::get_attribute(device, attribute) }.unwrap());
        let options = [
            format!("--gpu-architecture=sm_{major}{minor}"),
            "--std=c++17".to_owned(),
        ];
        // SAFETY: created above.
        if unsafe { cudarc::nvrtc::result::compile_program(program, &options) }.is_err() {
            // SAFETY: as above.
            let log = unsafe { cudarc::nvrtc::result::get_program_log(program) }.unwrap();
            let log: Vec<u8> = log.iter().map(|c| *c as u8).collect();
            panic!("{}", String::from_utf8_lossy(&log));
        }
        let mut size = 0;
        // SAFETY: compiled; writes one number.
        unsafe { cudarc::nvrtc::sys::nvrtcGetCUBINSize(program, &raw mut size) }
            .result()
            .unwrap();
        let mut image = vec![0u8; size];
        // SAFETY: writes as many bytes as it has said.
        unsafe { cudarc::nvrtc::sys::nvrtcGetCUBIN(program, image.as_mut_ptr().cast()) }
            .result()
            .unwrap();
        // SAFETY: created above, dropped once.
        unsafe { cudarc::nvrtc::result::destroy_program(program) }.unwrap();
        Some(Self {
            context: device,
            capability: (major, minor),
            // SAFETY: an image by the compiler.
            module: unsafe { result::module::load_data(image.as_ptr().cast()) }.unwrap(),
            stream: result::stream::create_with_priority(
                result::stream::StreamKind::NonBlocking,
                0,
            )
            .unwrap(),
        })
    }

    fn allocate(&self, bytes: usize) -> Place {
        // SAFETY: a context is current.
        Place(unsafe { result::malloc_sync(bytes) }.unwrap())
    }

    fn upload<T: Copy>(&self, values: &[T]) -> Place {
        let place = self.allocate(size_of_val(values));
        // SAFETY: as large as the values.
        unsafe { result::memcpy_htod_sync(place.0, values) }.unwrap();
        place
    }

    fn launch(
        &self,
        name: &str,
        blocks: u32,
        threads: u32,
        shared: u32,
        arguments: &[Argument],
    ) -> Result<(), DriverError> {
        // SAFETY: a loaded module.
        let function =
            unsafe { result::module::get_function(self.module, CString::new(name).unwrap()) }?;
        if shared > 0 {
            // SAFETY: a function of it.
            unsafe {
                result::function::set_function_attribute(
                    function,
                    Attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES,
                    shared as i32,
                )
            }?;
        }
        let slots: Vec<u64> = arguments
            .iter()
            .map(|argument| match argument {
                Argument::Place(at) => *at,
                Argument::Number(number) => u64::from(*number),
            })
            .collect();
        let mut places: Vec<*mut c_void> = slots
            .iter()
            .map(|slot| core::ptr::from_ref(slot).cast_mut().cast())
            .collect();
        // SAFETY: arguments as the kernel declares them, read before the call returns.
        unsafe {
            result::launch_kernel(
                function,
                (blocks, 1, 1),
                (threads, 1, 1),
                shared,
                self.stream,
                &mut places,
            )
        }
    }

    fn wait(&self) -> Result<(), DriverError> {
        // SAFETY: the stream exists.
        unsafe { result::stream::synchronize(self.stream) }
    }

    fn download<T: Copy + Default>(&self, place: &Place, len: usize) -> Vec<T> {
        self.wait().unwrap();
        let mut values = vec![T::default(); len];
        // SAFETY: the callers ask for no more than they allocated.
        unsafe { result::memcpy_dtoh_sync(&mut values, place.0) }.unwrap();
        values
    }
}

impl Drop for Device {
    fn drop(&mut self) {
        // SAFETY: created by `new`.
        unsafe {
            let _ = result::stream::destroy(self.stream);
            let _ = result::module::unload(self.module);
            let _ = result::primary_ctx::release(self.context);
        }
    }
}

/// Numbers that bf16 has: products of two, and sums of sixteen of those, are exact in f32.
fn small(len: usize, seed: u32) -> Vec<f32> {
    (0..len as u32)
        .map(|i| ((i * 37 + seed * 11) % 29) as f32 / 4.0 - 3.5)
        .collect()
}

fn bf16(values: &[f32]) -> Vec<u16> {
    values.iter().map(|x| (x.to_bits() >> 16) as u16).collect()
}

#[test]
fn a_tile_on_tensor_cores_is_the_plain_product() {
    let Some(device) = Device::new() else { return };
    let (a, b) = (small(16 * 16, 1), small(16 * 8, 2));
    let want: Vec<f32> = (0..16 * 8)
        .map(|i| (0..16).map(|k| a[i / 8 * 16 + k] * b[k * 8 + i % 8]).sum())
        .collect();
    let (a, b) = (device.upload(&bf16(&a)), device.upload(&bf16(&b)));
    for name in ["product", "product_by_hand"] {
        let c = device.upload(&[f32::NAN; 16 * 8]);
        let arguments = [&c, &a, &b].map(|place| Argument::Place(place.0));
        device.launch(name, 1, 32, 0, &arguments).unwrap();
        assert_eq!(device.download::<f32>(&c, 16 * 8), want, "{name}");
    }
}

#[test]
fn warps_and_blocks_sum_and_exchange() {
    let Some(device) = Device::new() else { return };
    let x = small(96, 3);
    let place = device.upload(&x);
    let out = device.upload(&[f32::NAN; 9 * 96]);
    let arguments = [&out, &place].map(|place| Argument::Place(place.0));
    device.launch("sums", 1, 96, 0, &arguments).unwrap();
    let got = device.download::<f32>(&out, 9 * 96);
    let largest = |x: &[f32]| x.iter().copied().fold(f32::MIN, f32::max);
    for i in 0..96 {
        let (warp, lane) = (i / 32 * 32, i % 32);
        let of_warp = &x[warp..warp + 32];
        let want = [
            of_warp.iter().sum(),
            largest(of_warp),
            x.iter().sum(),
            largest(&x),
            x[if lane % 16 >= 3 { i - 3 } else { i }],
            x[if lane % 16 + 3 < 16 { i + 3 } else { i }],
            x[warp + lane / 8 * 8 + 5],
            of_warp.iter().filter(|x| **x > 0.5).count() as f32,
            if lane < 16 { x[i ^ 1] } else { 0.0 },
        ];
        let got: Vec<f32> = (0..want.len()).map(|row| got[row * 96 + i]).collect();
        assert_eq!(got, want, "thread {i}");
    }
}

#[test]
fn bf16_is_rounded_to_nearest_even() {
    let Some(device) = Device::new() else { return };
    let bits: Vec<u32> = (0..256u32)
        .map(|i| match i {
            0..=3 => [0x7f80_0000, 0xff80_0000, 0x7fc0_0001, 0x7f80_0001][i as usize],
            // Ties in both directions, just below and above them, the largest, subnormals.
            4..=99 => 0x3f80_0000 + ((i / 3) << 16) + 0x7fff + i % 3,
            100..=103 => 0x7f7f_7fff + i - 100,
            104..=119 => i * 0x4321,
            _ => i.wrapping_mul(0x9e37_79b9),
        })
        .collect();
    let want: Vec<u16> = bits
        .iter()
        .map(|bits| {
            let x = f64::from(f32::from_bits(*bits));
            // Of the two neighbours the nearer one; of equally near ones the even one.
            let below = bits >> 16;
            let value = |half: u32| f64::from(f32::from_bits(half << 16));
            let above = below + 1;
            // Beyond the largest the next step would be 2^128.
            let up = if f32::from_bits(above << 16).is_infinite() {
                2f64.powi(128).copysign(x)
            } else {
                value(above)
            };
            let half = if bits & 0xffff == 0 || !x.is_finite() {
                below
            } else {
                match (x - value(below)).abs().total_cmp(&(up - x).abs()) {
                    std::cmp::Ordering::Less => below,
                    std::cmp::Ordering::Greater => above,
                    std::cmp::Ordering::Equal => below + (below & 1),
                }
            };
            half as u16
        })
        .collect();
    let x = device.upload(&bits);
    let (together, alone) = (device.allocate(512), device.allocate(512));
    let arguments = [&together, &alone, &x].map(|place| Argument::Place(place.0));
    device.launch("formats", 1, 32, 0, &arguments).unwrap();
    for (name, place) in [("together", &together), ("alone", &alone)] {
        let got = device.download::<u16>(place, 256);
        for i in 0..256 {
            let value = f32::from_bits(bits[i]);
            if value.is_nan() {
                let got = f32::from_bits(u32::from(got[i]) << 16);
                assert!(got.is_nan(), "{name}: {:#x}", bits[i]);
            } else {
                assert_eq!(got[i], want[i], "{name}: {:#x}", bits[i]);
            }
        }
    }
}

/// Every number that e4m3 has, every middle between two of them, and the f32 next to both; the largest, beyond it, the smallest, NaN.
#[test]
fn e4m3_is_rounded_to_nearest_even_and_ends_at_its_largest() {
    let Some(device) = Device::new() else { return };
    if device.capability < (8, 9) {
        println!("skipped: fp8 is for compute capability 8.9 and newer");
        return;
    }
    // By the definition of the format.
    let table: Vec<f64> = (0..0x7f)
        .map(|code: i32| match (code >> 3, f64::from(code & 7)) {
            (0, mantissa) => mantissa * 2f64.powi(-9),
            (exponent, mantissa) => (1.0 + mantissa / 8.0) * 2f64.powi(exponent - 7),
        })
        .collect();
    assert_eq!(table[0x7e], 448.0);
    let mut values = vec![
        0.0,
        f32::MIN_POSITIVE,
        1e-20,
        464.0,
        465.0,
        1e9,
        f32::MAX,
        f32::INFINITY,
    ];
    for pair in table.windows(2) {
        for exact in [pair[1], (pair[0] + pair[1]) / 2.0] {
            let exact = exact as f32;
            values.extend([exact.next_down(), exact, exact.next_up()]);
        }
    }
    values.extend(values.clone().into_iter().map(|x| -x));
    values.extend([f32::NAN, -f32::NAN]);
    values.resize(values.len().next_multiple_of(8), 0.0);
    let want = |x: f32| {
        let magnitude = f64::from(x.abs()).min(448.0);
        // Of equally near ones the even one.
        let distance = |code: &usize| ((table[*code] - magnitude).abs(), code % 2);
        let nearest = (0..table.len()).min_by(|a, b| {
            let ((near, odd), (other_near, other_odd)) = (distance(a), distance(b));
            near.total_cmp(&other_near).then(odd.cmp(&other_odd))
        });
        nearest.unwrap() as u8 | u8::from(x.is_sign_negative()) << 7
    };
    let len = values.len();
    let x = device.upload(&values);
    let (pairs, vectors) = (device.allocate(len), device.allocate(len));
    let arguments = [&pairs, &vectors, &x].map(|place| Argument::Place(place.0));
    device
        .launch("to_e4m3", 1, len as u32 / 8, 0, &arguments)
        .unwrap();
    for (name, place) in [("pairs", &pairs), ("vectors", &vectors)] {
        for (x, got) in values.iter().zip(device.download::<u8>(place, len)) {
            match x.is_nan() {
                true => assert_eq!(got & 0x7f, 0x7f, "{name}: {x}"),
                false => assert_eq!(got, want(*x), "{name}: {x:e}"),
            }
        }
    }
}

/// What a launch ends in. A real device may not notice, or never recover: only the emulator is asked.
fn emulator() -> Option<Device> {
    let device = Device::new()?;
    let name = result::device::get_name(device.context).unwrap();
    name.starts_with("emulated").then_some(device)
}

#[test]
fn mistakes_of_kernels_are_found() {
    let Some(device) = emulator() else { return };
    drop(device);
    // Name, shared bytes, the last argument of a run that is right, and of runs that are not.
    for (name, shared, right, wrong) in [
        ("some_miss_the_barrier", 0, 0, &[1, 32, 63][..]),
        ("two_barriers", 0, 64, &[1, 32]),
        ("some_miss_the_shuffle", 0, 64, &[1, 33]),
        // No further than the page without access behind each block: beyond it may be what another test's thread has.
        ("writes", 0, 64 * 2 - 1, &[64 * 2, 64 * 2 + 50, 1000]),
        ("writes_dynamic_shared", 400, 99, &[100, 127, 200]),
        ("writes_static_shared", 0, 0, &[1, 64]),
        ("misaligned", 0, 4, &[1, 2, 3]),
        ("endless_stack", 0, 20, &[1000]),
    ] {
        for (which, is_right) in
            std::iter::once((right, true)).chain(wrong.iter().map(|w| (*w, false)))
        {
            // A failure stays with its stream.
            let device = Device::new().unwrap();
            let out = device.allocate(64 * 2 * 4);
            let arguments = [Argument::Place(out.0), Argument::Number(which)];
            device.launch(name, 1, 64, shared, &arguments).unwrap();
            assert_eq!(device.wait().is_ok(), is_right, "{name} with {which}");
        }
    }
}

#[test]
fn an_order_of_threads_that_happens_to_be_right_is_not_kept() {
    let Some(device) = emulator() else { return };
    let out = device.allocate(64 * 64 * 4);
    let arguments = [Argument::Place(out.0), Argument::Number(0)];
    device.launch("no_barrier", 64, 64, 0, &arguments).unwrap();
    let got = device.download::<f32>(&out, 64 * 64);
    for part in 0..2 {
        assert!(got.iter().skip(part).step_by(2).any(|x| x.is_nan()));
    }
}

#[test]
fn copies_that_nobody_waited_for_have_not_come() {
    let Some(device) = emulator() else { return };
    let out = device.allocate(32 * 4);
    let x = device.upload(&[1.0f32; 4]);
    let arguments = [&out, &x].map(|place| Argument::Place(place.0));
    device.launch("no_wait", 1, 32, 0, &arguments).unwrap();
    assert!(device.download::<f32>(&out, 32).iter().all(|x| x.is_nan()));
}

#[test]
fn mistakes_of_the_host_are_found() {
    let Some(device) = emulator() else { return };
    let place = device.upload(&[0.0f32; 64]);
    let stream = device.stream;
    // SAFETY: on the emulator, which keeps count of everything; nothing here is used by another thread.
    unsafe {
        // Priorities are those of the device.
        let (least, greatest) = result::stream::get_priority_range().unwrap();
        assert!(greatest < least);
        for wrong in [least + 1, greatest - 1] {
            let kind = result::stream::StreamKind::NonBlocking;
            assert!(result::stream::create_with_priority(kind, wrong).is_err());
        }

        let pinned = result::malloc_host(256, 0).unwrap().cast::<f32>();
        let values = core::slice::from_raw_parts_mut(pinned, 64);
        values.fill(1.0);

        // Work does not run by itself, and reads pinned memory when it does.
        result::memcpy_htod_async(place.0, values, stream).unwrap();
        let mut seen = [7.0f32; 64];
        result::memcpy_dtoh_sync(&mut seen, place.0).unwrap();
        assert_eq!(
            seen, [0.0; 64],
            "the stream does not wait for the default one"
        );
        device.wait().unwrap();
        result::memcpy_dtoh_sync(&mut seen, place.0).unwrap();
        assert_eq!(seen, [1.0; 64]);

        // What is to be read is not there before the stream is waited for.
        result::memcpy_dtoh_async(values, place.0, stream).unwrap();
        assert!(pinned.add(5).read_volatile().is_nan());
        device.wait().unwrap();
        assert_eq!(pinned.add(5).read_volatile(), 1.0);

        // Under capture nothing runs, nothing waits, and memory must be pinned.
        let mode = CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
        result::stream::begin_capture(stream, mode).unwrap();
        result::memset_d8_async(place.0, 0, 256, stream).unwrap();
        let graph = result::stream::end_capture(stream).unwrap();
        assert_eq!(device.download::<f32>(&place, 64), [1.0; 64]);
        let mut executable = core::ptr::null_mut();
        cudarc::driver::sys::cuGraphInstantiateWithFlags(&raw mut executable, graph, 0)
            .result()
            .unwrap();
        result::graph::destroy(graph).unwrap();
        result::graph::launch(executable, stream).unwrap();
        assert_eq!(device.download::<f32>(&place, 64), [0.0; 64]);
        result::graph::exec_destroy(executable).unwrap();
        for refused in 0..3 {
            result::stream::begin_capture(stream, mode).unwrap();
            let result = match refused {
                0 => device.wait(),
                1 => result::malloc_sync(8).map(|_| ()),
                _ => result::memcpy_htod_async(place.0, &[0.0f32; 4], stream),
            };
            result.unwrap_err();
            result::stream::end_capture(stream).unwrap_err();
        }

        // Freed memory.
        result::memset_d8_async(place.0, 1, 4, stream).unwrap();
        result::free_sync(place.0).unwrap();
        result::memset_d8_async(place.0, 0, 4, stream).unwrap_err();
        core::mem::forget(place);

        // The pinned memory changes before it was copied: the last, for the stream keeps the error.
        let place = device.upload(&[0.0f32; 64]);
        result::memcpy_htod_async(place.0, values, stream).unwrap();
        pinned.write_volatile(2.0);
        device.wait().unwrap_err();
        result::free_host(pinned.cast()).unwrap();
    }
}
