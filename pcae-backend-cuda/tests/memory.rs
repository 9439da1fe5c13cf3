//! What a task takes from the device is what was planned.

use pcae_backend_cuda::{Cuda, Precision, memory};
use pcae_kernel::backend::{AdamW, Backend, PixelDims, Pixels, TrainBackend};
use pcae_kernel::config::{
    Budget, Criterion, DecoderConfig, DropLayers, Place, PretrainConfig, Reduction, Target,
    VitConfig,
};
use pcae_kernel::layout::Layout;
use pcae_kernel::model::{MeanSimilarity, Pretrainer, TrainState};
use pcae_kernel::resize::Crop;
use pcae_kernel::sizing::Sizing;

mod emulated;

#[test]
fn on_the_emulator() {
    emulated::run_again();
}

const BATCH: usize = 3;

const PIXELS: PixelDims = PixelDims {
    batch: 5,
    channels: 3,
    height: 20,
    width: 36,
};

fn task() -> PretrainConfig {
    PretrainConfig {
        vit: VitConfig {
            img_size: [24, 40],
            in_chans: 2,
            patch_size: 4,
            embed_dim: 48,
            depth: 3,
            num_heads: 3,
            mlp_ratio: 3.0,
        },
        decoder: DecoderConfig {
            embed_dim: 40,
            depth: 1,
            num_heads: 2,
        },
        mask_ratio: 0.6,
        target: Target::Teacher(Reduction {
            criterion: Criterion::MeanSimilarity,
            place: Place::Progressive,
            drop_layers: DropLayers::new(&[0, 1], 3).expect("layers of three"),
            budget: Budget::Keep(0.6),
        }),
    }
}

struct Training<B: TrainBackend> {
    state: TrainState<B>,
    model: Pretrainer<B>,
}

impl<B: TrainBackend> Training<B> {
    fn new(backend: &mut B) -> Result<Self, B::Error> {
        let layout = Layout::pretrain(&task());
        let values: Vec<f32> = (0..layout.len()).map(|i| (i as f32).sin() / 9.0).collect();
        let teacher = Some(&values[..layout.encoder_len()]);
        Ok(Self {
            state: TrainState::new(backend, layout, &values, teacher, 0.05)?,
            model: Pretrainer::new(backend, &task(), BATCH, false)?,
        })
    }

    fn step(&mut self, backend: &mut B) -> Result<(), B::Error> {
        let adamw = AdamW {
            lr: 1e-4,
            beta1: 0.9,
            beta2: 0.95,
            eps: 1e-8,
            step: 1,
            momentum: 0.99,
        };
        let task = task();
        let values: Vec<u8> = (0..BATCH * 2 * 24 * 40).map(|i| (i * 37) as u8).collect();
        let pixels = Pixels {
            values: &values,
            crops: None,
            flips: None,
            mean: &[0.5; 2],
            std: &[0.3; 2],
        };
        let (keep, remove): (Vec<_>, Vec<_>) =
            (0..task.vit.num_patches() as u32).partition(|&i| (i as usize) < task.visible());
        let (keep, remove) = (keep.repeat(BATCH), remove.repeat(BATCH));
        self.state.begin_step(backend)?;
        self.model.load_pixels(backend, pixels, &keep, &remove)?;
        self.model
            .accumulate(backend, &mut self.state, 1.0, &mut MeanSimilarity)?;
        self.state.update(backend, &adamw, Some(1.0))?;
        self.state.scalars(backend)?;
        Ok(())
    }
}

#[test]
fn memory_is_planned_before_it_is_taken() {
    for (precision, fp8_teacher) in [
        (Precision::F32, false),
        (Precision::Bf16, false),
        (Precision::Bf16, true),
    ] {
        if !emulated::has_device() {
            return;
        }
        let mut sizing = Sizing::default();
        let mut training = Training::new(&mut sizing).unwrap();
        training.step(&mut sizing).unwrap();
        let plan = memory(&sizing, precision, fp8_teacher);

        let mut cuda = Cuda::new(0, precision).unwrap();
        if fp8_teacher && cuda.capability() < (8, 9) {
            println!("skipped: fp8 is for compute capability 8.9 and newer");
            return;
        }
        if fp8_teacher {
            cuda = cuda.with_fp8_teacher().unwrap();
        }
        let own = cuda.taken();
        let mut training = Training::new(&mut cuda).unwrap();
        let buffers = cuda.taken() - own;
        // Each is rounded up to 256 bytes, some hundred of 3 MB.
        let share = buffers as f64 / (plan.activations + plan.state) as f64;
        assert!(
            (1.0..1.02).contains(&share),
            "{precision:?} {fp8_teacher}: {share}"
        );

        training.step(&mut cuda).unwrap();
        let scratch = cuda.taken() - buffers;
        assert!(
            scratch <= plan.scratch && plan.scratch < scratch + scratch / 20,
            "{precision:?} {fp8_teacher}: {scratch} of {} planned",
            plan.scratch
        );
        // Of the first step, the workspaces that were too small.
        training.step(&mut cuda).unwrap();
        let taken = cuda.taken();
        assert!(taken <= plan.total() + (buffers as f64 * 0.02) as usize);
        training.step(&mut cuda).unwrap();
        assert_eq!(cuda.taken(), taken, "a step allocates");

        // All of it comes back.
        drop(training);
        let layout = Layout::pretrain(&task());
        let zeros = vec![0.0; layout.len()];
        let params = cuda.params(&layout, &zeros).unwrap();
        assert!(cuda.taken() - own < buffers / 3);
        drop(params);
    }
}

/// Pictures that are values go through stages of their own size.
#[test]
fn values_are_planned() {
    if !emulated::has_device() {
        return;
    }
    let dims = PIXELS;
    for precision in [Precision::F32, Precision::Bf16] {
        let mut sizing = Sizing::default();
        let mut to = sizing.buf(dims.len()).unwrap();
        let before = memory(&sizing, precision, false).scratch;
        sizing.write_values(dims, &mut to, &[]).unwrap();
        let planned = memory(&sizing, precision, false).scratch - before;
        assert!(planned >= 2 * dims.len() * precision.size(), "{planned}");

        let mut cuda = Cuda::new(0, precision).unwrap();
        let mut to = cuda.buf(dims.len()).unwrap();
        let before = cuda.taken();
        let values = vec![0.25; dims.len()];
        for _ in 0..3 {
            cuda.write_values(dims, &mut to, &values).unwrap();
            assert_eq!(cuda.taken() - before, planned);
        }
    }
}

/// Crops take as much more as is planned for them, once.
#[test]
fn crops_are_planned() {
    if !emulated::has_device() {
        return;
    }
    let dims = PIXELS;
    let size = 4 * dims.len() / dims.batch;
    let values = vec![7; dims.batch * size];
    let crops: Vec<Crop> = (0..dims.batch)
        .map(|b| Crop {
            start: b * size,
            height: 40,
            width: 72,
        })
        .collect();
    fn write<B: Backend>(
        backend: &mut B,
        to: &mut B::Buf,
        dims: PixelDims,
        values: &[u8],
        crops: Option<&[Crop]>,
    ) {
        let pixels = Pixels {
            values,
            crops,
            flips: None,
            mean: &[0.5; 3],
            std: &[0.3; 3],
        };
        backend.write_pixels(dims, to, pixels).unwrap();
    }
    let planned = |crops| {
        let mut sizing = Sizing::default();
        let mut to = sizing.buf(dims.len()).unwrap();
        write(&mut sizing, &mut to, dims, &[], crops);
        memory(&sizing, Precision::F32, false).scratch
    };
    let mut cuda = Cuda::new(0, Precision::F32).unwrap();
    let mut to = cuda.buf(dims.len()).unwrap();
    write(&mut cuda, &mut to, dims, &values, None);
    let before = cuda.taken();
    for _ in 0..3 {
        write(&mut cuda, &mut to, dims, &values, Some(&crops));
        let more = planned(Some(&[])) - planned(None);
        assert_eq!(cuda.taken() - before, more);
    }
}
