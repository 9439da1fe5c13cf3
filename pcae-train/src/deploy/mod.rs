//! A trained network made ready for a place that can afford so much time or arithmetic: how many tokens it may keep there.

mod search;

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;
use std::time::Instant;

use pcae_kernel::backend::TrainBackend;
use pcae_kernel::rng::{Purpose, Stream};
use serde::Serialize;

use crate::backends::{self, Job};
use crate::bench::MachineReport;
use crate::checkpoint::Which;
use crate::checkpoint::deployment::{Deployment, MeasuredOn};
use crate::checkpoint::exchange::Hints;
use crate::checkpoint::export::Storage;
use crate::error::Error;
use crate::network::{Network, Runner};
use crate::settings::{DropLayersSpec, Machine};
use crate::trained::Trained;
use search::{Found, Timing, search};

/// Drop ratios that are looked at: 0, 0.01, 0.02 and so on.
pub const RATIOS: u32 = 100;
/// Pictures at a time, and repeats: far more than a machine can do.
const MOST: usize = 1 << 16;
/// Each budget is run for as long in all, and more often than asked for if that takes less.
const LEAST_SECONDS: f64 = 0.2;
/// But not more often than this.
const MOST_RUNS: usize = 1000;

/// What a network may take.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Goal {
    /// Median seconds of a batch on this machine, at most.
    Latency(f64),
    /// Multiply-adds of a picture, at most.
    MultiplyAdds(f64),
    /// What it takes at this drop ratio.
    DropRatio(f64),
}

impl fmt::Display for Goal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Latency(seconds) => write!(f, "at most {} ms", 1e3 * seconds),
            Self::MultiplyAdds(count) => write!(f, "at most {:.1} M multiply-adds", count / 1e6),
            Self::DropRatio(drop_ratio) => write!(f, "drop ratio {drop_ratio}"),
        }
    }
}

/// As typed: `20ms`, `0.02s`, `800us`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Latency(pub f64);

impl FromStr for Latency {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let wrong = || {
            format!("expected a time with its unit, such as 20ms, 0.02s or 800us, found {text:?}")
        };
        // Of "ms" also "s" is an end.
        let units = [("us", 1e-6), ("µs", 1e-6), ("ms", 1e-3), ("s", 1.0)];
        let (number, unit) = units
            .iter()
            .find_map(|(name, unit)| Some((text.strip_suffix(name)?, unit)))
            .ok_or_else(wrong)?;
        let number: f64 = number.trim().parse().map_err(|_| wrong())?;
        if number > 0.0 && number.is_finite() {
            Ok(Self(number * unit))
        } else {
            Err(wrong())
        }
    }
}

/// What to deploy, and how.
#[derive(Clone, Debug)]
pub struct Plan {
    /// A run directory, a checkpoint, or another's encoder.
    pub source: PathBuf,
    /// Which of its weights.
    pub which: Which,
    /// What its file does not tell.
    pub hints: Hints,
    /// What it may take.
    pub goal: Goal,
    /// After which blocks tokens are dropped; as in training if `None`, and of an encoder after blocks 0, 7 and 10 of 12.
    pub drop_layers: Option<DropLayersSpec>,
    /// Pictures in a batch, whose time is the latency.
    pub batch_size: usize,
    /// Timed runs of each budget, of which the median counts; quick ones are run more often.
    pub repeats: usize,
    /// Where that is measured.
    pub machine: Machine,
    /// Number format of the parameters in the file.
    pub storage: Storage,
    /// The file to write.
    pub out: PathBuf,
}

/// A budget that was measured.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Tried {
    /// Part of the patch tokens that each stage drops.
    pub drop_ratio: f64,
    /// Patch tokens before, between and after the stages.
    pub tokens: Vec<usize>,
    /// Multiply-adds of a picture.
    pub multiply_adds: u64,
    /// Median milliseconds of a batch.
    pub latency_ms: f64,
    /// Upper less lower quartile, over the median.
    pub spread: f64,
    /// Timed runs.
    pub runs: usize,
}

/// What was chosen.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Report {
    /// The file that was read.
    pub source: PathBuf,
    /// The file that was written.
    pub out: PathBuf,
    /// What its metadata say of the choice.
    pub deployment: Deployment,
    /// All that was measured, one list for each time that budgets took turns.
    pub rounds: Vec<Vec<Tried>>,
    /// What was written, in words.
    pub written: String,
}

/// What [`run`] tells as it goes.
pub enum Progress<'a> {
    /// Nothing has been measured yet.
    Begun {
        /// What was read, in a line.
        origin: &'a str,
        /// What computes.
        backend: &'a str,
        /// How many budgets there are to choose from; `None` where the drop ratio is given.
        budgets: Option<usize>,
    },
    /// Budgets that took turns.
    Round(&'a [Tried]),
}

/// Chooses the largest token budget that meets the goal, measures it, and writes the network with it.
///
/// Budgets are drop ratios of 0 to 0.99 in hundredths, [`RATIOS`] of them, but for those that leave the same tokens as a smaller one.
///
/// # Errors
/// [`Error::Unreachable`] naming the least that can be had, if no budget meets the goal; else as [`Trained::load`] and of the
/// settings. Nothing is written then.
pub fn run(
    plan: &Plan,
    progress: impl FnMut(Progress<'_>) -> Result<(), Error>,
) -> Result<Report, Error> {
    let counts = [
        ("--batch-size", plan.batch_size),
        ("--repeats", plan.repeats),
    ];
    for (name, count) in counts {
        if !(1..=MOST).contains(&count) {
            return Err(Error::Setting {
                name: name.to_owned(),
                reason: format!("expected 1 to {MOST}, found {count}"),
            });
        }
    }
    let trained = Trained::load(&plan.source, plan.which, &plan.hints)?;
    let mut network = trained.network;
    if let Some(layers) = &plan.drop_layers {
        network = network.after(layers.layers(network.vit().depth)?)?;
    }
    let (budgets, wanted) = match plan.goal {
        Goal::Latency(_) => (budgets(network)?, None),
        Goal::MultiplyAdds(most) => {
            let budgets = budgets(network)?;
            let fits = |network: &Network| network.multiply_adds() as f64 <= most;
            let found = budgets.iter().position(fits);
            if let (None, Some(least)) = (found, budgets.last()) {
                return Err(Error::Unreachable {
                    name: "--gflops".to_owned(),
                    reason: format!(
                        "expected {}, found {:.1} M at the least, at drop ratio {} ({} of {} patches left); allow more, or \
                         deploy a smaller model",
                        plan.goal,
                        least.multiply_adds() as f64 / 1e6,
                        least.drop_ratio(),
                        least.tokens().last().copied().unwrap_or(0),
                        network.vit().num_patches()
                    ),
                });
            }
            (budgets, found)
        }
        Goal::DropRatio(0.0) => (vec![network.at(0.0)?], Some(0)),
        Goal::DropRatio(drop_ratio) => (vec![network.at(0.0)?, network.at(drop_ratio)?], Some(1)),
    };
    let job = Choose {
        plan,
        trained: &trained,
        budgets: &budgets,
        wanted,
        rounds: Vec::new(),
        progress,
    };
    let (index, timing, backend, rounds) = backends::run(&plan.machine, job)?;
    let chosen = budgets[index];
    let machine = MachineReport::new();
    let deployment = Deployment {
        drop_ratio: chosen.drop_ratio(),
        drop_layers: chosen.reduction().drop_layers.iter().collect(),
        tokens: chosen.tokens(),
        multiply_adds: chosen.multiply_adds(),
        latency_ms: 1e3 * timing.median,
        measured_on: MeasuredOn {
            cpu: machine.cpu.unwrap_or(machine.arch),
            backend,
            batch_size: plan.batch_size,
            runs: timing.runs,
            spread: timing.spread,
            load_average: machine.load_average.map(|[load, _]| load),
            version: machine.version,
        },
    };
    let written = trained.write(&plan.out, plan.storage, Some(&deployment))?;
    Ok(Report {
        source: trained.path,
        out: plan.out.clone(),
        deployment,
        rounds,
        written: format!("{}, {written}", plan.storage),
    })
}

/// The budgets of `network` that differ, the largest first.
fn budgets(network: Network) -> Result<Vec<Network>, Error> {
    let mut budgets: Vec<Network> = Vec::new();
    for hundredths in 0..RATIOS {
        // Divided, since a multiple of 0.01 would be 0.29000000000000004 in binary.
        let candidate = network.at(f64::from(hundredths) / f64::from(RATIOS))?;
        let same = budgets.last().is_some_and(|last| {
            let (left, before) = (candidate.tokens(), last.tokens());
            // The stages of a dense network are none rather than many that keep everything.
            let stages_keep_all = left.iter().all(|&tokens| tokens == left[0]);
            left == before || (stages_keep_all && before.len() == 1)
        });
        if !same {
            budgets.push(candidate);
        }
    }
    Ok(budgets)
}

struct Choose<'a, P> {
    plan: &'a Plan,
    trained: &'a Trained,
    budgets: &'a [Network],
    /// The one to measure, where time has no part in the choice.
    wanted: Option<usize>,
    rounds: Vec<Vec<Tried>>,
    progress: P,
}

impl<P: FnMut(Progress<'_>) -> Result<(), Error>> Job for Choose<'_, P> {
    type Output = (usize, Timing, String, Vec<Vec<Tried>>);

    fn run<B: TrainBackend>(mut self, backend: &mut B, name: &str) -> Result<Self::Output, Error> {
        let failed = |error: B::Error| Error::backend(name, error);
        let (network, batch) = (&self.trained.network, self.plan.batch_size);
        (self.progress)(Progress::Begun {
            origin: &self.trained.origin,
            backend: name,
            budgets: match self.plan.goal {
                Goal::DropRatio(_) => None,
                Goal::Latency(_) | Goal::MultiplyAdds(_) => Some(self.budgets.len()),
            },
        })?;
        let params = backend
            .frozen_params(&network.layout(), &self.trained.values)
            .map_err(failed)?;
        let mut runner = Runner::new(backend, network, batch).map_err(failed)?;
        let mut stream = Stream::new(0, 0, 0, Purpose::Augment);
        let len = network.images_len(batch);
        let images: Vec<f32> = (0..len).map(|_| stream.normal()).collect();
        let (budgets, repeats) = (self.budgets, self.plan.repeats);
        // From pictures in memory to the result in memory.
        let mut seconds = |budget: usize| {
            let reduction = *budgets[budget].reduction();
            runner.set_reduction(backend, reduction).map_err(failed)?;
            let began = Instant::now();
            runner.load(backend, &images).map_err(failed)?;
            runner.forward(backend, &params).map_err(failed)?;
            Ok::<f64, Error>(began.elapsed().as_secs_f64())
        };
        let mut measure = |asked: &[usize]| {
            let timings = take_turns(asked, repeats, &mut seconds)?;
            let tried = asked.iter().zip(&timings);
            let tried: Vec<Tried> = tried
                .map(|(&budget, timing)| Tried::new(&budgets[budget], timing))
                .collect();
            (self.progress)(Progress::Round(&tried))?;
            self.rounds.push(tried);
            Ok(timings)
        };
        let (index, timing) = match (self.plan.goal, self.wanted) {
            (Goal::Latency(limit), _) => match search(budgets.len(), limit, &mut measure)? {
                Some(Found::Fits(index, timing)) => (index, timing),
                Some(Found::TooSlow(index, timing)) => {
                    return Err(too_slow(self.plan, &budgets[index], &timing));
                }
                None => return Err(Error::backend(name, "there is no token budget")),
            },
            // Beside all tokens, to see what is won.
            (_, wanted) => {
                let index = wanted.unwrap_or(0);
                let both = if index == 0 { vec![0] } else { vec![0, index] };
                let timings = measure(&both)?;
                (index, timings[both.len() - 1])
            }
        };
        Ok((index, timing, name.to_owned(), self.rounds))
    }
}

impl Tried {
    fn new(network: &Network, timing: &Timing) -> Self {
        Self {
            drop_ratio: network.drop_ratio(),
            tokens: network.tokens(),
            multiply_adds: network.multiply_adds(),
            latency_ms: 1e3 * timing.median,
            spread: timing.spread,
            runs: timing.runs,
        }
    }
}

fn too_slow(plan: &Plan, fastest: &Network, timing: &Timing) -> Error {
    Error::Unreachable {
        name: "--latency".to_owned(),
        reason: format!(
            "expected {} for {}, found {:.3} ms at the fastest, at drop ratio {} ({} of {} patches left); allow more, give it \
             more --threads or --precision bf16, or deploy a smaller model",
            plan.goal,
            backends::count(plan.batch_size, "picture"),
            1e3 * timing.median,
            fastest.drop_ratio(),
            fastest.tokens().last().copied().unwrap_or(0),
            fastest.vit().num_patches()
        ),
    }
}

/// Times each of `asked` at least `repeats` times, all taking turns: a shared machine is faster now and slower then.
fn take_turns(
    asked: &[usize],
    repeats: usize,
    seconds: &mut impl FnMut(usize) -> Result<f64, Error>,
) -> Result<Vec<Timing>, Error> {
    let mut slowest: f64 = 0.0;
    for &budget in asked {
        // First for what happens only once.
        seconds(budget)?;
        slowest = slowest.max(seconds(budget)?);
    }
    let enough = (LEAST_SECONDS / slowest).min(MOST_RUNS as f64) as usize;
    let runs = repeats.max(enough);
    let mut taken = vec![Vec::with_capacity(runs); asked.len()];
    for _ in 0..runs {
        for (&budget, taken) in asked.iter().zip(&mut taken) {
            taken.push(seconds(budget)?);
        }
    }
    Ok(taken.into_iter().map(timing).collect())
}

fn timing(mut seconds: Vec<f64>) -> Timing {
    seconds.sort_unstable_by(f64::total_cmp);
    let at = |part: usize| seconds[(seconds.len() - 1) * part / 4];
    // Of an even number the later of the two in the middle.
    let median = seconds[seconds.len() / 2];
    Timing {
        median,
        spread: (at(3) - at(1)) / median,
        runs: seconds.len(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use pcae_kernel::config::VitConfig;

    fn network(preset: &str) -> Network {
        let vit = VitConfig::preset(preset).unwrap();
        Network::Encoder {
            vit,
            reduction: crate::encoder::reduction(&vit, 0.0, None).unwrap(),
        }
    }

    #[test]
    fn latencies_have_a_unit() {
        for (text, seconds) in [
            ("20ms", 0.02),
            ("0.5s", 0.5),
            ("800us", 8e-4),
            ("3 µs", 3e-6),
        ] {
            let Latency(found) = text.parse().unwrap();
            assert!((found / seconds - 1.0).abs() < 1e-12, "{text}: {found}");
        }
        for text in ["20", "", "ms", "-1ms", "0ms", "20min", "nanms", "infs"] {
            let error = text.parse::<Latency>().unwrap_err();
            assert!(error.contains("20ms") && error.contains(text), "{error}");
        }
    }

    /// Each step has fewer tokens than the one before, dense first and once, down to a single token.
    #[test]
    fn budgets_differ() {
        for preset in ["vit-micro", "vit-b16"] {
            let budgets = budgets(network(preset)).unwrap();
            assert_eq!(budgets[0].tokens().len(), 1);
            let all = budgets[0].vit().num_patches();
            for pair in budgets.windows(2) {
                // A stage after the last block changes what is pooled, but no product.
                assert!(pair[1].multiply_adds() <= pair[0].multiply_adds());
                assert!(pair[1].drop_ratio() > pair[0].drop_ratio());
            }
            let last = budgets.last().unwrap().tokens();
            assert_eq!(last[0], all);
            assert_eq!(last[3], 1, "{last:?}");
            // 0.29 and not 0.29000000000000004, which also the command line would give.
            let typed = (1..100).map(|step| format!("0.{step:02}").parse().unwrap());
            let typed: Vec<f64> = [0.0].into_iter().chain(typed).collect();
            assert!(budgets.iter().all(|b| typed.contains(&b.drop_ratio())));
        }
        // ceil(49 * 0.99) is 49, and ceil(49 * 0.98) too: 48.02.
        let micro = budgets(network("vit-micro")).unwrap();
        assert_eq!(micro[1].drop_ratio(), 0.03);
        assert_eq!(micro[1].tokens(), [49, 48, 47, 46]);
    }

    /// Where no stage drops anything there is nothing to choose from.
    #[test]
    fn without_stages_there_is_one_budget() {
        let none = pcae_kernel::config::DropLayers::NONE;
        let network = network("vit-micro").after(none).unwrap();
        assert_eq!(budgets(network).unwrap().len(), 1);
    }

    #[test]
    fn medians_and_quartiles() {
        let found = timing(vec![5.0, 1.0, 3.0, 2.0, 4.0]);
        assert_eq!((found.median, found.runs), (3.0, 5));
        assert!((found.spread - 2.0 / 3.0).abs() < 1e-12);
        let mut calls = [0; 3];
        let turns = take_turns(&[0, 2], 7, &mut |budget| {
            calls[budget] += 1;
            Ok(1.0 + budget as f64)
        });
        let turns = turns.unwrap();
        assert_eq!((turns[0].median, turns[1].median), (1.0, 3.0));
        // Two that do not count.
        assert_eq!(calls, [9, 0, 9]);
    }
}
