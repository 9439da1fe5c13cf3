//! Waiting for work, the device's clock, and what is measured with it; no figure of an emulated device means anything.
#![allow(
    clippy::unwrap_used,
    reason = "a test stops at what it does not expect"
)]

use pcae_backend_cuda::{Cuda, Error, Precision};
use pcae_kernel::backend::{Backend, RowDims, TokenDims, TrainBackend};
use pcae_kernel::error::Error as KernelError;

mod emulated;

#[test]
fn on_the_emulator() {
    emulated::run_again();
}

const DIMS: RowDims = RowDims { rows: 4, dim: 8 };

/// Three of these are enough for a graph.
fn work(cuda: &mut Cuda, out: &mut <Cuda as Backend>::Buf, x: &<Cuda as Backend>::Buf) {
    for _ in 0..4 {
        cuda.standardise(DIMS, out, x).unwrap();
    }
}

#[test]
fn waiting_runs_what_is_queued_and_reports_faults() {
    if !emulated::has_device() {
        return;
    }
    let mut cuda = Cuda::new(0, Precision::F32).unwrap();
    let (x, mut out) = (cuda.buf(DIMS.len()).unwrap(), cuda.buf(DIMS.len()).unwrap());
    work(&mut cuda, &mut out, &x);
    let before = cuda.runs();
    cuda.wait().unwrap();
    assert_eq!(cuda.runs().issued, before.issued + 1);
    cuda.wait().unwrap();
    assert_eq!(cuda.runs().issued, before.issued + 1, "nothing is queued");

    let dims = TokenDims {
        batch: 1,
        prefix: 0,
        tokens: 4,
        dim: 8,
    };
    let mut ids = cuda.ids(2).unwrap();
    cuda.write_ids(&mut ids, &[0, 9]).unwrap();
    let gathered = cuda.gather_tokens(dims, 2, &mut out, &x, &ids);
    let found = gathered.and_then(|()| cuda.wait());
    assert!(
        matches!(
            found,
            Err(Error::Kernel(KernelError::IndexOutOfRange { found: 9, .. }))
        ),
        "{found:?}"
    );
    cuda.wait().unwrap();
}

#[test]
fn nothing_is_a_graph_while_the_clock_runs() {
    if !emulated::has_device() {
        return;
    }
    let mut cuda = Cuda::new(0, Precision::F32).unwrap();
    let (x, mut out) = (cuda.buf(DIMS.len()).unwrap(), cuda.buf(DIMS.len()).unwrap());
    for _ in 0..3 {
        cuda.start_clock().unwrap();
        work(&mut cuda, &mut out, &x);
        let seconds = cuda.stop_clock().unwrap();
        assert!(seconds.is_some_and(|it| it > 0.0), "{seconds:?}");
    }
    assert_eq!((cuda.runs().made, cuda.runs().graphs), (0, 0));
    for _ in 0..3 {
        work(&mut cuda, &mut out, &x);
        cuda.wait().unwrap();
    }
    assert_eq!((cuda.runs().made, cuda.runs().graphs), (1, 2));
}

#[test]
fn limits_are_measured_and_their_memory_given_back() {
    if !emulated::has_device() {
        return;
    }
    for precision in [Precision::F32, Precision::Bf16] {
        let mut cuda = Cuda::new(0, precision).unwrap();
        let own = cuda.taken();
        let (flops, bandwidth) = (cuda.peak_flops().unwrap(), cuda.memory_bandwidth().unwrap());
        assert!(flops.is_normal() && flops > 0.0, "{flops}");
        assert!(bandwidth.is_normal() && bandwidth > 0.0, "{bandwidth}");
        // What was dropped goes with the next that is made.
        let free = cuda.free().unwrap();
        let small = cuda.vector(1).unwrap();
        assert!(cuda.free().unwrap() > free);
        drop(small);
        assert!(cuda.taken() <= own + 512, "{} after {own}", cuda.taken());
    }
}
