//! Work split over threads.
//!
//! Work comes in units, such as the rows of a matrix, each with its own pieces of the outputs. What a unit computes does
//! not depend on the others, so the number of threads decides who runs it, not what comes out. Every thread begins with a part
//! of its own, front to back.
//!
//! An operation takes some 10 µs to 10 ms and a model runs hundreds in a row. So the threads here wait for the next one
//! awake for a while before they sleep, the caller works too, and handing over allocates nothing: a general pool
//! (rayon) wakes a thread per operation, leaves the caller idle and allocates for its queue.

use core::marker::PhantomData;

use crate::error::Error;

/// Elements that are worth handing to another thread: 64 KiB at about 10 GB/s and core take some 6 µs, several times
/// what the hand-over costs, and small enough that many threads find work.
#[cfg(feature = "threads")]
const GRAIN: usize = 16 * 1024;

/// Threads, the caller's among them.
#[derive(Debug)]
pub(crate) struct Threads {
    count: usize,
    #[cfg(feature = "threads")]
    team: Option<team::Team>,
}

/// What the units write to.
pub(crate) trait Parts: Send + Sync {
    /// The piece of one unit.
    type Piece;

    /// Piece `i`.
    ///
    /// # Safety
    /// Nobody else uses piece `i` for as long as this one is used.
    unsafe fn piece(&self, i: usize) -> Self::Piece;
}

/// A slice in pieces of `len` elements, the last of which may be shorter.
pub(crate) struct Pieces<'a, T> {
    start: *mut T,
    total: usize,
    len: usize,
    life: PhantomData<&'a mut [T]>,
}

// SAFETY: it is a `&mut [T]` whose parts are handed out by `Parts::piece`, whose caller keeps them apart.
unsafe impl<T: Send> Send for Pieces<'_, T> {}
// SAFETY: as above.
unsafe impl<T: Send> Sync for Pieces<'_, T> {}

impl<'a, T> Pieces<'a, T> {
    pub(crate) fn new(data: &'a mut [T], len: usize) -> Self {
        Self {
            start: data.as_mut_ptr(),
            total: data.len(),
            len,
            life: PhantomData,
        }
    }
}

impl<'a, T: Send> Parts for Pieces<'a, T> {
    type Piece = &'a mut [T];

    unsafe fn piece(&self, i: usize) -> &'a mut [T] {
        let at = i.saturating_mul(self.len).min(self.total);
        let len = self.len.min(self.total - at);
        // SAFETY: within the slice that `new` borrowed; by contract nobody else uses this piece.
        unsafe { core::slice::from_raw_parts_mut(self.start.add(at), len) }
    }
}

impl Parts for () {
    type Piece = ();

    unsafe fn piece(&self, _: usize) {}
}

impl<A: Parts> Parts for Option<A> {
    type Piece = Option<A::Piece>;

    unsafe fn piece(&self, i: usize) -> Self::Piece {
        // SAFETY: by the same contract.
        self.as_ref().map(|parts| unsafe { parts.piece(i) })
    }
}

impl<A: Parts, B: Parts> Parts for (A, B) {
    type Piece = (A::Piece, B::Piece);

    unsafe fn piece(&self, i: usize) -> Self::Piece {
        // SAFETY: by the same contract.
        unsafe { (self.0.piece(i), self.1.piece(i)) }
    }
}

/// A slice of which several threads write different parts.
#[derive(Clone, Copy)]
pub(crate) struct Shared<'a, T = f32> {
    start: *mut T,
    len: usize,
    life: PhantomData<&'a mut [T]>,
}

// SAFETY: it is a `&mut [T]` whose parts are borrowed by `Shared::part`, whose caller keeps them apart.
unsafe impl<T: Send> Send for Shared<'_, T> {}
// SAFETY: as above.
unsafe impl<T: Send> Sync for Shared<'_, T> {}

impl<'a, T> Shared<'a, T> {
    pub(crate) fn new(data: &'a mut [T]) -> Self {
        Self {
            start: data.as_mut_ptr(),
            len: data.len(),
            life: PhantomData,
        }
    }

    pub(crate) fn len(&self) -> usize {
        self.len
    }

    /// The first element, not to be read.
    pub(crate) fn as_ptr(&self) -> *const T {
        self.start
    }

    /// `len` elements from `at`.
    ///
    /// # Safety
    /// No other part that is in use overlaps it.
    pub(crate) unsafe fn part(&self, at: usize, len: usize) -> &'a mut [T] {
        assert!(
            at <= self.len && len <= self.len - at,
            "a part lies within its slice"
        );
        // SAFETY: the range is within the slice that `new` borrowed, and by contract nobody else uses it.
        unsafe { core::slice::from_raw_parts_mut(self.start.add(at), len) }
    }
}

impl Threads {
    /// `count` threads: the caller's and `count - 1` more.
    pub(crate) fn new(count: usize) -> Result<Self, Error> {
        match count {
            0 => Err(Error::Threads { asked: count }),
            1 => Ok(Self::one()),
            #[cfg(feature = "threads")]
            _ => match team::Team::new(count - 1) {
                Ok(team) => Ok(Self {
                    count,
                    team: Some(team),
                }),
                Err(_) => Err(Error::Threads { asked: count }),
            },
            #[cfg(not(feature = "threads"))]
            _ => Err(Error::Threads { asked: count }),
        }
    }

    /// The caller's thread alone.
    pub(crate) fn one() -> Self {
        Self {
            count: 1,
            #[cfg(feature = "threads")]
            team: None,
        }
    }

    pub(crate) fn count(&self) -> usize {
        self.count
    }

    /// Calls `work(i, piece i of parts)` for every `i` below `units`; each reads or writes about `cost` elements.
    pub(crate) fn for_each<P: Parts>(
        &self,
        units: usize,
        cost: usize,
        parts: P,
        work: impl Fn(usize, P::Piece) + Sync,
    ) {
        self.for_each_with(units, cost, parts, (), |i, piece, ()| work(i, piece));
    }

    /// [`Threads::for_each`] where each call also gets its thread's piece of `scratch`, which has
    /// [`count`](Self::count) pieces, for its use during that call.
    pub(crate) fn for_each_with<P: Parts, S: Parts>(
        &self,
        units: usize,
        cost: usize,
        parts: P,
        scratch: S,
        work: impl Fn(usize, P::Piece, S::Piece) + Sync,
    ) {
        #[cfg(feature = "threads")]
        {
            let worth = (GRAIN / cost.max(1)).max(1);
            if units > worth
                && let Some(team) = &self.team
            {
                // Each thread has its own part of the units, the same in every operation on as many rows: what it wrote is
                // read by the same core. Who is done takes from the parts of the others. Eight rounds even out what
                // disturbs one of them, and cost less than what they even out.
                let count = self.count;
                let grain = worth.max(units / (8 * count));
                let ran = team.run(&|thread, taken| {
                    for owner in (thread..count).chain(0..thread) {
                        let part = units * owner / count..units * (owner + 1) / count;
                        while let Some(first) = taken[owner].take(grain, part.len()) {
                            let first = part.start + first;
                            for i in first..(first + grain).min(part.end) {
                                // SAFETY: `taken` gives every unit to one thread once, and the team runs one thread of
                                // each number.
                                unsafe { work(i, parts.piece(i), scratch.piece(thread)) };
                            }
                        }
                    }
                });
                if ran {
                    return;
                }
            }
        }
        let _ = cost;
        for i in 0..units {
            // SAFETY: one after the other, each once.
            unsafe { work(i, parts.piece(i), scratch.piece(0)) };
        }
    }
}

#[cfg(feature = "threads")]
mod team {
    use std::any::Any;
    use std::cell::UnsafeCell;
    use std::hint::spin_loop;
    use std::io;
    use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
    use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
    use std::sync::{Arc, Mutex, PoisonError, TryLockError};
    use std::thread::{self, JoinHandle};

    /// How often a waiting thread looks before it sleeps: about 50 µs, longer than what lies between two operations of
    /// a model.
    const LOOKS: usize = 2000;

    /// What all threads do once, from the number of the thread and how much of each one's part is taken.
    type Job<'a> = dyn Fn(usize, &[Taken]) + Sync + 'a;

    /// How many units of a thread's part are taken. On cache lines of its own: others look at it seldom.
    #[derive(Debug, Default)]
    #[repr(align(128))]
    pub(super) struct Taken(AtomicUsize);

    impl Taken {
        /// The first of the next `count` units, if fewer than `len` are taken.
        pub(super) fn take(&self, count: usize, len: usize) -> Option<usize> {
            // Looked at first, so that nobody writes to what everybody is done with.
            let left = self.0.load(Ordering::Relaxed) < len;
            let first = left.then(|| self.0.fetch_add(count, Ordering::Relaxed));
            first.filter(|&first| first < len)
        }
    }

    /// Helping threads, numbered from 1; the caller is number 0.
    #[derive(Debug)]
    pub(super) struct Team {
        shared: Arc<Shared>,
        threads: Vec<JoinHandle<()>>,
        /// Held while a job runs.
        busy: Mutex<()>,
    }

    struct Shared {
        /// The job of this round. Written by the caller between rounds, read by helpers during one.
        job: UnsafeCell<Option<*const Job<'static>>>,
        /// Number of the round: a change starts the next.
        round: AtomicUsize,
        /// Helpers that are not done with this round.
        running: AtomicUsize,
        /// Of each thread's part; nothing when a round begins.
        taken: Vec<Taken>,
        /// Whether each helper sleeps, or is about to.
        asleep: Vec<AtomicBool>,
        stop: AtomicBool,
        panic: Mutex<Option<Box<dyn Any + Send>>>,
    }

    impl std::fmt::Debug for Shared {
        fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
            f.debug_struct("Shared").finish_non_exhaustive()
        }
    }

    // SAFETY: `job` is written only while no helper runs (`running` is 0) and read only during a round; `round` and
    // `running` order the two. The job itself is `Sync`.
    unsafe impl Send for Shared {}
    // SAFETY: as above.
    unsafe impl Sync for Shared {}

    impl Team {
        pub(super) fn new(helpers: usize) -> io::Result<Self> {
            let shared = Arc::new(Shared {
                job: UnsafeCell::new(None),
                round: AtomicUsize::new(0),
                running: AtomicUsize::new(0),
                taken: (0..=helpers).map(|_| Taken::default()).collect(),
                asleep: (0..helpers).map(|_| AtomicBool::new(false)).collect(),
                stop: AtomicBool::new(false),
                panic: Mutex::new(None),
            });
            let mut team = Self {
                shared,
                threads: Vec::with_capacity(helpers),
                busy: Mutex::new(()),
            };
            for helper in 0..helpers {
                let shared = Arc::clone(&team.shared);
                // On an error `team` is dropped, which ends those that run.
                let thread = thread::Builder::new()
                    .name(format!("pcae-cpu-{}", helper + 1))
                    .spawn(move || shared.help(helper))?;
                team.threads.push(thread);
            }
            Ok(team)
        }

        /// Runs `job` on all threads and waits for them; `false` if they are busy, with a job that asks for another or
        /// with that of another caller.
        pub(super) fn run(&self, job: &Job<'_>) -> bool {
            // A job that panicked leaves nothing behind that the next one could not use.
            let _busy = match self.busy.try_lock() {
                Ok(busy) => busy,
                Err(TryLockError::Poisoned(busy)) => busy.into_inner(),
                Err(TryLockError::WouldBlock) => return false,
            };
            let shared = &*self.shared;
            // That of a helper, where the caller's own panic was the one that got away.
            drop(
                shared
                    .panic
                    .lock()
                    .unwrap_or_else(PoisonError::into_inner)
                    .take(),
            );
            // SAFETY: only the lifetime changes. No helper uses the job after `Wait` is dropped, before `job` ends.
            let job_static = unsafe {
                core::mem::transmute::<*const Job<'_>, *const Job<'static>>(core::ptr::from_ref(
                    job,
                ))
            };
            // SAFETY: no helper runs, as the last round has been waited for, and `busy` keeps other callers away.
            unsafe { *shared.job.get() = Some(job_static) };
            shared.running.store(self.threads.len(), Ordering::Relaxed);
            for Taken(taken) in &shared.taken {
                taken.store(0, Ordering::Relaxed);
            }
            // Sequentially consistent, as is what `help` does before it sleeps: either it sees the new round, or the
            // flag is seen here.
            shared.round.fetch_add(1, Ordering::SeqCst);
            for (asleep, thread) in shared.asleep.iter().zip(&self.threads) {
                if asleep.load(Ordering::SeqCst) {
                    thread.thread().unpark();
                }
            }
            {
                let _wait = Wait(shared);
                job(0, &shared.taken);
            }
            let mut panic = shared.panic.lock().unwrap_or_else(PoisonError::into_inner);
            if let Some(panic) = panic.take() {
                resume_unwind(panic);
            }
            true
        }
    }

    /// Waits for the helpers when it is dropped, also by a panic of the caller's own share.
    struct Wait<'a>(&'a Shared);

    impl Drop for Wait<'_> {
        fn drop(&mut self) {
            let mut looks = 0;
            while self.0.running.load(Ordering::Acquire) > 0 {
                looks += 1;
                if looks < LOOKS {
                    spin_loop();
                } else {
                    // Somebody else may need this core, a helper perhaps.
                    thread::yield_now();
                }
            }
        }
    }

    impl Shared {
        fn help(&self, helper: usize) {
            let mut seen = 0;
            loop {
                self.await_round(seen, &self.asleep[helper]);
                if self.stop.load(Ordering::Acquire) {
                    return;
                }
                seen = seen.wrapping_add(1);
                // SAFETY: this is a round, which ends only after `running` falls.
                if let Some(job) = unsafe { *self.job.get() } {
                    // SAFETY: the caller keeps the job alive for the round.
                    let job = unsafe { &*job };
                    let result = catch_unwind(AssertUnwindSafe(|| job(helper + 1, &self.taken)));
                    if let Err(panic) = result {
                        let mut first = self.panic.lock().unwrap_or_else(PoisonError::into_inner);
                        first.get_or_insert(panic);
                    }
                }
                self.running.fetch_sub(1, Ordering::Release);
            }
        }

        /// Returns when the number of the round is no longer `seen`, or all shall stop.
        fn await_round(&self, seen: usize, asleep: &AtomicBool) {
            let ready = || self.round.load(Ordering::SeqCst) != seen;
            for _ in 0..LOOKS {
                if ready() {
                    return;
                }
                spin_loop();
            }
            asleep.store(true, Ordering::SeqCst);
            while !ready() {
                thread::park();
            }
            asleep.store(false, Ordering::SeqCst);
        }
    }

    impl Drop for Team {
        fn drop(&mut self) {
            self.shared.stop.store(true, Ordering::Release);
            self.shared.round.fetch_add(1, Ordering::SeqCst);
            for thread in self.threads.drain(..) {
                thread.thread().unpark();
                // A helper's panic was handed to the caller of its job.
                let _ = thread.join();
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicUsize, Ordering};
    use std::time::{Duration, Instant};
    fn pools() -> Vec<Threads> {
        let mut pools = vec![Threads::one()];
        if cfg!(feature = "threads") {
            pools.extend([2, 3].map(|n| Threads::new(n).unwrap()));
        }
        pools
    }

    #[test]
    fn every_unit_comes_once() {
        for pool in pools() {
            for round in 0..50 {
                for (units, len, cost) in [(7, 3, 1 << 14), (1, 5, 1), (801, 2, 300), (0, 4, 4)] {
                    let (mut a, mut b) = (vec![0; units * len], vec![0; units]);
                    let parts = (Pieces::new(&mut a, len), Some(Pieces::new(&mut b, 1)));
                    pool.for_each(units, cost, parts, |i, (a, b)| {
                        a.fill(i + 1);
                        b.unwrap()[0] += i + 1;
                    });
                    assert!((0..units).all(|i| b[i] == i + 1), "round {round}");
                    assert!((0..units * len).all(|i| a[i] == i / len + 1));
                }
            }
        }
        assert_eq!(Threads::new(0).unwrap_err(), Error::Threads { asked: 0 });
    }

    #[test]
    fn scratch_belongs_to_one_thread_at_a_time() {
        for pool in pools() {
            let mut scratch = vec![0_u64; 16 * pool.count()];
            let mut sums = vec![0; 300];
            let parts = Pieces::new(&mut sums, 1);
            let pieces = Pieces::new(&mut scratch, 16);
            pool.for_each_with(300, usize::MAX, parts, pieces, |i, sum, scratch| {
                scratch.fill(i as u64);
                std::thread::yield_now();
                sum[0] = scratch.iter().sum();
            });
            assert!((0..300).all(|i| sums[i] == 16 * i as u64));
        }
    }

    /// Units come to other threads one by one: one that lasts keeps back nothing of its part, the first thread's or the last's.
    #[test]
    fn who_is_done_takes_from_the_parts_of_others() {
        for pool in pools().iter().filter(|pool| pool.count() > 1) {
            let units = 8 * pool.count();
            for lasting in [0, units - 8] {
                let (done, began) = (AtomicUsize::new(0), Instant::now());
                let others = || done.load(Ordering::SeqCst);
                pool.for_each(units, usize::MAX, (), |i, ()| {
                    if i == lasting {
                        while others() < units - 1 && began.elapsed() < Duration::from_secs(10) {
                            std::thread::yield_now();
                        }
                        assert_eq!(others(), units - 1, "unit {i} of {units}");
                    }
                    done.fetch_add(1, Ordering::SeqCst);
                });
            }
        }
    }

    #[test]
    fn sleeping_threads_wake() {
        for pool in pools() {
            for _ in 0..5 {
                std::thread::sleep(std::time::Duration::from_millis(3));
                let mut seen = vec![0; 100];
                pool.for_each(100, usize::MAX, Pieces::new(&mut seen, 1), |i, seen| {
                    seen[0] = i;
                });
                assert!((0..100).all(|i| seen[i] == i));
            }
        }
    }

    #[test]
    fn work_inside_work_runs_on_its_own_thread() {
        for pool in pools() {
            let mut sums = vec![0; 40];
            pool.for_each(40, usize::MAX, Pieces::new(&mut sums, 1), |i, sum| {
                let mut inner = [0; 8];
                pool.for_each(8, usize::MAX, Pieces::new(&mut inner, 1), |j, x| {
                    x[0] = i + j
                });
                sum[0] = inner.iter().sum();
            });
            assert!((0..40).all(|i| sums[i] == 8 * i + 28));
        }
    }

    #[test]
    fn a_panic_reaches_the_caller_and_the_threads_live_on() {
        for pool in pools() {
            for bad in [0, 99] {
                let result = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
                    pool.for_each(100, usize::MAX, (), |i, ()| {
                        assert_ne!(i, bad, "on purpose")
                    });
                }));
                assert!(result.is_err());
            }
            // All threads work again: each waits until the others have come, but not for ever.
            let (arrived, began) = (AtomicUsize::new(0), Instant::now());
            let mut met = vec![false; pool.count()];
            let parts = Pieces::new(&mut met, 1);
            pool.for_each(pool.count(), usize::MAX, parts, |_, met| {
                arrived.fetch_add(1, Ordering::SeqCst);
                while !met[0] && began.elapsed() < Duration::from_secs(10) {
                    met[0] = arrived.load(Ordering::SeqCst) == pool.count();
                    std::thread::yield_now();
                }
            });
            assert!(met.iter().all(|met| *met));
        }
    }
}
