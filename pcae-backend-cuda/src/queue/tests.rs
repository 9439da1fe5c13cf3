//! The queue by products alone, whose results are known: `y += a * b`.

use super::*;
use crate::testing::{allocations, queue};

/// A number on the device.
struct Scalar(Memory);

impl Scalar {
    fn new(queue: &mut Queue, x: f32) -> Self {
        let memory = queue.allocate(size_of::<f32>()).unwrap();
        queue.write_f32(memory.at(), &[x]).unwrap();
        Self(memory)
    }

    fn at(&self) -> DevicePtr {
        self.0.at()
    }

    fn read(&self, queue: &mut Queue) -> f32 {
        let mut x = [0.0];
        queue.read_f32(&mut x, self.at()).unwrap();
        x[0]
    }
}

/// Queues `y += a * b`.
fn add_product(queue: &mut Queue, y: DevicePtr, a: DevicePtr, b: DevicePtr) {
    queue
        .matmul(Matmul {
            m: 1,
            n: 1,
            k: 1,
            a,
            a_transposed: false,
            a_row: 1,
            b,
            b_transposed: false,
            b_row: 1,
            bias: None,
            add: Some(y),
            out: y,
            out_f32: true,
            scale: None,
        })
        .unwrap();
}

#[test]
fn work_runs_between_the_writes_around_it() {
    let Some(mut queue) = queue(Precision::F32) else {
        return;
    };
    let [y, a, b] = [1.0, 2.0, 3.0].map(|x| Scalar::new(&mut queue, x));
    add_product(&mut queue, y.at(), a.at(), b.at());
    queue.write_f32(a.at(), &[10.0]).unwrap();
    add_product(&mut queue, y.at(), a.at(), b.at());
    queue.zero(b.at(), 4).unwrap();
    add_product(&mut queue, y.at(), a.at(), b.at());
    queue.write_f32(a.at(), &[f32::NAN]).unwrap();
    assert_eq!(y.read(&mut queue), 1.0 + 6.0 + 30.0);
    assert_eq!(b.read(&mut queue), 0.0);
}

#[test]
fn work_that_repeats_becomes_a_graph_and_allocates_nothing() {
    let Some(mut queue) = queue(Precision::F32) else {
        return;
    };
    let [y, a] = [0.0, 1.0].map(|x| Scalar::new(&mut queue, x));
    let mut expected = 0.0;
    let mut step = |queue: &mut Queue, rate: f32| {
        queue.write_f32(a.at(), &[rate + 1.0]).unwrap();
        for factor in [1.0, 2.0, 3.0] {
            let changing = queue.changing(&[0.0, factor * rate]).unwrap();
            add_product(queue, y.at(), a.at(), changing.plus(4));
            expected += (rate + 1.0) * factor * rate;
        }
        queue.flush().unwrap();
    };
    let before = queue.runs;
    for rate in 0..3_u8 {
        step(&mut queue, rate.into());
    }
    // Whatever wraps around has wrapped.
    for rate in 0..70_u8 {
        step(&mut queue, rate.into());
    }
    let allocated = allocations(|| (0..20_u8).for_each(|rate| step(&mut queue, rate.into())));
    assert_eq!(allocated, 0);
    assert_eq!(y.read(&mut queue), expected);
    assert_eq!(
        queue.runs,
        Runs {
            issued: before.issued + 1,
            made: before.made + 1,
            graphs: before.graphs + 92,
            refused: 0,
            ..before
        }
    );
}

#[test]
fn graphs_are_bounded_and_the_oldest_goes() {
    let Some(mut queue) = queue(Precision::F32) else {
        return;
    };
    let [y, a, b] = [0.0, 1.0, 1.0].map(|x| Scalar::new(&mut queue, x));
    let step = |queue: &mut Queue, products: usize| {
        for _ in 0..products {
            add_product(queue, y.at(), a.at(), b.at());
        }
        queue.flush().unwrap();
    };
    let mut expected = 0;
    for products in WORTH..WORTH + GRAPHS + 5 {
        for _ in 0..2 {
            step(&mut queue, products);
            // The first is in use all the time.
            step(&mut queue, WORTH);
            expected += products + WORTH;
        }
    }
    assert_eq!(queue.known.len(), GRAPHS);
    let made = queue.runs.made;
    step(&mut queue, WORTH);
    assert_eq!(queue.runs.made, made, "the first is kept");
    step(&mut queue, WORTH + 1);
    assert_eq!(queue.runs.made, made + 1, "the second is made again");
    expected += 2 * WORTH + 1;
    assert_eq!(y.read(&mut queue), expected as f32);
    assert_eq!(queue.known.len(), GRAPHS);
}

#[test]
fn a_buffer_may_be_dropped_while_work_refers_to_it() {
    let Some(mut queue) = queue(Precision::F32) else {
        return;
    };
    let y = Scalar::new(&mut queue, 0.0);
    for round in 0..4_u8 {
        let [a, b] = [round.into(), 2.0].map(|x| Scalar::new(&mut queue, x));
        for _ in 0..3 {
            for _ in 0..WORTH {
                add_product(&mut queue, y.at(), a.at(), b.at());
            }
            queue.flush().unwrap();
        }
        assert_eq!(queue.known.len(), 1, "its graph");
        add_product(&mut queue, y.at(), a.at(), b.at());
        let place = a.at();
        drop(a);
        drop(b);
        // Freed after that product, together with the graphs that refer to it.
        let other = Scalar::new(&mut queue, 1e6);
        assert!(queue.known.is_empty());
        assert!(!queue.heap.has_dropped());
        // It may lie in the same place: nothing of before may touch it.
        println!("{place:?} then {:?}", other.at());
        assert_eq!(other.read(&mut queue), 1e6);
    }
    assert_eq!(y.read(&mut queue), (1 + 2 + 3) as f32 * 2.0 * 10.0);
}

#[test]
fn buffers_may_outlive_the_queue_and_queues_their_work() {
    let Some(mut queue) = queue(Precision::F32) else {
        return;
    };
    let [y, a, b] = [0.0, 1.0, 1.0].map(|x| Scalar::new(&mut queue, x));
    for _ in 0..3 {
        (0..WORTH).for_each(|_| add_product(&mut queue, y.at(), a.at(), b.at()));
        queue.flush().unwrap();
    }
    add_product(&mut queue, y.at(), a.at(), b.at());
    drop(a);
    drop(queue);
    drop((y, b));
}

#[test]
fn long_copies_go_through_in_pieces() {
    for precision in [Precision::F32, Precision::Bf16] {
        let Some(mut queue) = queue(precision) else {
            return;
        };
        // More than the ring holds, and no multiple of a piece.
        let len = crate::ring::RING * 5 / 4 / precision.size() + 3;
        let x: Vec<f32> = (0..len).map(|i| (i % 251) as f32 - 100.0).collect();
        let memory = queue.allocate(len * precision.size()).unwrap();
        queue.write_act(memory.at(), &x).unwrap();
        let mut back = vec![0.0; len];
        queue.read_act(&mut back, memory.at()).unwrap();
        assert!(x == back);
        // From within.
        let (at, len) = (7, len - 11);
        queue
            .read_act(&mut back[..len], memory.at().plus(at * precision.size()))
            .unwrap();
        assert!(back[..len] == x[at..][..len]);
        queue.read_act(&mut [], memory.at()).unwrap();
        queue.write_act(memory.at(), &[]).unwrap();
    }
}

#[test]
fn many_short_writes_keep_their_order() {
    let Some(mut queue) = queue(Precision::F32) else {
        return;
    };
    let memory = queue.allocate(4 * 300).unwrap();
    for i in 0..3000_u32 {
        let at = memory.at().plus((i % 300) as usize * 4);
        queue.write_u32(at, &[i]).unwrap();
    }
    let mut back = [0; 300];
    queue.read_u32(&mut back, memory.at()).unwrap();
    assert!(
        back.iter()
            .enumerate()
            .all(|(i, x)| *x as usize == 2700 + i)
    );
}

/// Uploads of pictures and small writes share a ring, on two streams that wait for each other. More of them than it has events for, and
/// nobody waits in between.
#[test]
fn uploads_and_small_writes_never_wait_for_ever() {
    use pcae_kernel::backend::{PixelDims, Pixels};
    let Some(mut queue) = queue(Precision::F32) else {
        return;
    };
    let dims = PixelDims {
        batch: 2,
        channels: 1,
        height: 4,
        width: 4,
    };
    let [images, sum, weight] = [32, 1, 1].map(|len| queue.allocate(4 * len).unwrap());
    queue.write_f32(sum.at(), &[0.0]).unwrap();
    let mut expected = 0.0;
    for round in 0..400_u16 {
        let pixel = (round % 7) as u8;
        let pixels = Pixels {
            values: &[pixel; 32],
            crops: None,
            flips: None,
            mean: &[0.0],
            std: &[1.0 / 255.0],
        };
        queue.write_pixels(dims, images.at(), pixels).unwrap();
        let factor = f32::from(round % 5);
        queue.write_f32(weight.at(), &[factor]).unwrap();
        let last = images.at().plus(4 * 31);
        add_product(&mut queue, sum.at(), last, weight.at());
        queue.flush().unwrap();
        expected += f32::from(pixel) * factor;
    }
    let mut found = [0.0];
    queue.read_f32(&mut found, sum.at()).unwrap();
    // A pixel over 255 times 255 may be off by a rounding.
    assert!(
        (found[0] / expected - 1.0).abs() < 1e-5,
        "{found:?}, {expected}"
    );
}

/// Crops of so many channels that a block cannot hold their rows are refused, and leave nothing to run on another stream.
#[test]
fn crops_that_are_refused_leave_nothing_queued() {
    use pcae_kernel::backend::{PixelDims, Pixels};
    use pcae_kernel::resize::Crop;
    let Some(mut queue) = queue(Precision::F32) else {
        return;
    };
    let crops = [Crop {
        start: 0,
        height: 2,
        width: 2,
    }];
    for (channels, is_refused) in [(64, true), (1, false)] {
        let dims = PixelDims {
            batch: 1,
            channels,
            height: 4,
            width: 64,
        };
        let to = queue.allocate(4 * dims.len()).unwrap();
        let pixels = Pixels {
            values: &vec![51; 4 * channels],
            crops: Some(&crops),
            flips: None,
            mean: &vec![0.0; channels],
            std: &vec![1.0; channels],
        };
        let written = queue.write_pixels(dims, to.at(), pixels);
        assert!(queue.tape.is_empty() && queue.pieces == 0, "{written:?}");
        if is_refused {
            assert!(matches!(written, Err(Error::Launch { .. })), "{written:?}");
            continue;
        }
        written.unwrap();
        let mut found = vec![0.0; dims.len()];
        queue.read_f32(&mut found, to.at()).unwrap();
        assert!(
            found.iter().all(|x| (x - 0.2_f32).abs() < 1e-6),
            "{found:?}"
        );
    }
}

#[test]
fn a_fault_is_returned_by_one_read() {
    let Some(mut queue) = queue(Precision::F32) else {
        return;
    };
    let error = |found| KernelError::IndexOutOfRange {
        op: "op",
        what: "ids",
        limit: 5,
        found,
    };
    let nan = |at| KernelError::NotANumber {
        op: "op",
        what: "x",
        at,
    };
    let codes = [error(0), nan(0), error(0)].map(|error| queue.code(error));
    assert!(codes[0] == codes[2] && codes[0] != codes[1] && !codes.contains(&0));
    for (code, expected) in [(codes[0], error(9)), (codes[1], nan(9))] {
        queue.write_u32(queue.fault(), &[code, 9]).unwrap();
        let y = Scalar::new(&mut queue, 1.0);
        assert_eq!(
            queue.read_f32(&mut [0.0], y.at()),
            Err(Error::Kernel(expected))
        );
        assert_eq!(y.read(&mut queue), 1.0);
    }
}

#[test]
fn a_tape_without_end_runs_by_itself() {
    let Some(mut queue) = queue(Precision::F32) else {
        return;
    };
    let [y, a, b] = [0.0, 1.0, 1.0].map(|x| Scalar::new(&mut queue, x));
    let mut expected = 0.0;
    for i in 0..TAPE / 4 {
        if i % 4 == 0 {
            let changing = queue.changing(&[2.0]).unwrap();
            add_product(&mut queue, y.at(), a.at(), changing);
            expected += 2.0;
        } else {
            add_product(&mut queue, y.at(), a.at(), b.at());
            expected += 1.0;
        }
        assert!(queue.tape.len() <= TAPE && queue.changing.len() <= CHANGING / 2);
    }
    assert!(queue.runs.issued + queue.runs.graphs > 1);
    assert_eq!(y.read(&mut queue), expected);
    // Of more values than there is room for.
    assert!(queue.changing(&[0.0; CHANGING + 1]).is_err());
}

#[test]
fn impossible_launches_are_refused() {
    let Some(mut queue) = queue(Precision::F32) else {
        return;
    };
    let kernel = crate::kernels::GELU_IN_PLACE;
    let args = [Arg::from(0_u64); MAX_ARGS];
    let args = &args[..kernel.args as usize];
    let shape = |grid, block, shared| Shape {
        grid,
        block,
        shared,
    };
    for shape in [
        shape([1 << 31, 1, 1], 32, 0),
        shape([1, 1 << 16, 1], 32, 0),
        shape([1, 1, 1 << 16], 32, 0),
        shape([1, 1, 1], 0, 0),
        shape([1, 1, 1], kernel.threads + 1, 0),
        shape([1, 1, 1], 32, 1 << 20),
    ] {
        let refused = queue.launch(kernel, shape, UNCOUNTED, args);
        assert!(matches!(refused, Err(Error::Launch { .. })), "{shape:?}");
    }
    queue
        .launch(kernel, shape([0, 1, 1], 32, 0), UNCOUNTED, args)
        .unwrap();
    assert!(queue.tape.is_empty());
}

#[test]
fn a_workspace_grows_and_keeps_its_place() {
    let Some(mut queue) = queue(Precision::F32) else {
        return;
    };
    let first = queue.workspace(1000).unwrap();
    assert_eq!(queue.workspace(10).unwrap(), first);
    let [y, a] = [1.0, 2.0].map(|x| Scalar::new(&mut queue, x));
    queue.write_f32(first, &[3.0]).unwrap();
    add_product(&mut queue, y.at(), a.at(), first);
    let second = queue.workspace(100_000).unwrap();
    assert_eq!(queue.workspace(100_000).unwrap(), second);
    queue.write_f32(second, &[5.0]).unwrap();
    add_product(&mut queue, y.at(), a.at(), second.plus(0));
    assert_eq!(y.read(&mut queue), 1.0 + 6.0 + 10.0);
}

/// What is read is what was there at the start, and the host waits for no more than that; without a start, or of other elements, it is
/// a read as any other.
#[test]
fn a_read_that_was_started_does_not_wait_for_what_comes_after() {
    let Some(mut queue) = queue(Precision::F32) else {
        return;
    };
    let values = queue.allocate(12).unwrap();
    queue.write_f32(values.at(), &[1.0, 2.0, 3.0]).unwrap();
    let [y, b] = [0.0, 5.0].map(|x| Scalar::new(&mut queue, x));
    queue.start_read(values.at(), 3).unwrap();
    add_product(&mut queue, y.at(), values.at(), b.at());
    queue.flush().unwrap();
    let mut read = [0.0; 3];
    queue.finish_read(&mut read, values.at()).unwrap();
    assert_eq!(read, [1.0, 2.0, 3.0]);
    assert_eq!(y.read(&mut queue), 5.0);

    queue.write_f32(values.at(), &[4.0, 5.0, 6.0]).unwrap();
    queue.start_read(values.at(), 2).unwrap();
    queue.finish_read(&mut read, values.at()).unwrap();
    assert_eq!(read, [4.0, 5.0, 6.0]);
    // Nobody has asked for the one before.
    queue.start_read(values.at(), 3).unwrap();
    queue.write_f32(values.at(), &[7.0]).unwrap();
    queue.start_read(values.at(), 3).unwrap();
    queue.finish_read(&mut read, values.at()).unwrap();
    assert_eq!(read, [7.0, 5.0, 6.0]);
    let many = queue.allocate(4 * 5000).unwrap();
    let mut read = vec![1.0; 5000];
    queue.start_read(many.at(), 5000).unwrap();
    queue.finish_read(&mut read, many.at()).unwrap();
    assert!(read.iter().all(|x| *x == 0.0));
}

/// What is copied into a stage is there when the stream of copies is done, whatever the queue has still to do.
#[test]
fn values_cross_beside_the_work_that_is_queued() {
    let Some(mut queue) = queue(Precision::F32) else {
        return;
    };
    let [y, a, b] = [0.0, 1.0, 1.0].map(|x| Scalar::new(&mut queue, x));
    let to = queue.allocate(64 * size_of::<f32>()).unwrap();
    let mut pinned = Pinned::new(&queue.context, 64 * size_of::<f32>()).unwrap();
    for round in 0..16_u8 {
        let values = [f32::from(round); 64];
        add_product(&mut queue, y.at(), a.at(), b.at());
        let stage = queue.upload.next;
        queue.write_values(to.at(), &values).unwrap();
        let at = upload::place(queue.upload.memory.as_ref().unwrap(), stage);
        // SAFETY: nothing else is copied there, and it is looked at behind the copy.
        let seen = unsafe { pinned.part::<f32>(0, 64) };
        // SAFETY: a stage is as large as the values.
        unsafe { queue.upload.stream.download(seen, at).unwrap() };
        queue.upload.stream.wait().unwrap();
        assert_eq!(seen, values);
    }
    assert_eq!(y.read(&mut queue), 16.0);
}
