//! The numbers of the loop, checked and completed in one place for every kind of training.

use std::fmt;

use crate::error::{Error, flag};

/// More threads than this are a typing error, and starting them would bring a machine down.
pub(crate) const MAX_THREADS: usize = 1024;

/// The numbers of the loop, all of them checked.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Plan {
    /// Optimizer steps.
    pub steps: u64,
    /// Optimizer steps of a pass over the data, rounded up.
    pub steps_per_epoch: u64,
    /// Steps of rising learning rate.
    pub warmup_steps: u64,
    /// Peak learning rate.
    pub lr: f64,
    /// Last learning rate.
    pub min_lr: f64,
    /// AdamW's decay of the mean gradient.
    pub beta1: f64,
    /// AdamW's decay of the mean squared gradient.
    pub beta2: f64,
    /// Decoupled weight decay of the weights of linear layers.
    pub weight_decay: f64,
    /// Bound on the norm of the gradient; 0 for none.
    pub clip_grad: f64,
    /// Pictures in a micro-batch.
    pub batch_size: usize,
    /// Micro-batches in a step.
    pub accum: u64,
    /// Epochs between two evaluations; 0 for none but the last.
    pub eval_every: u64,
    /// Steps between two checkpoints.
    pub save_every: u64,
    /// Seed of everything random.
    pub seed: u64,
}

/// What the settings say about it. What is `None` is filled in.
pub(crate) struct Knobs<'a> {
    pub(crate) epochs: &'a mut Option<u64>,
    pub(crate) steps: Option<u64>,
    pub(crate) lr: Option<f64>,
    pub(crate) blr: &'a mut Option<f64>,
    pub(crate) min_lr: f64,
    pub(crate) warmup_steps: &'a mut Option<u64>,
    pub(crate) beta1: f64,
    pub(crate) beta2: f64,
    pub(crate) weight_decay: f64,
    pub(crate) clip_grad: f64,
    pub(crate) drop_path: f64,
    pub(crate) batch_size: usize,
    pub(crate) accum: u64,
    pub(crate) eval_every: u64,
    pub(crate) save_every: &'a mut Option<u64>,
    pub(crate) seed: u64,
    pub(crate) workers: usize,
}

/// What is filled in where the settings say nothing.
pub(crate) struct Defaults {
    pub(crate) epochs: u64,
    pub(crate) blr: f64,
    /// One warm-up step for so many steps.
    pub(crate) steps_per_warmup_step: u64,
}

/// Passes if `holds`, or says what the setting `name` should be.
///
/// # Errors
/// [`Error::Setting`].
pub(crate) fn require(
    name: &str,
    holds: bool,
    expected: &str,
    found: &dyn fmt::Display,
) -> Result<(), Error> {
    if holds {
        return Ok(());
    }
    Err(Error::Setting {
        name: flag(name),
        reason: format!("expected {expected}, found {found}"),
    })
}

/// Requires a number of at least 0 and less than 1.
///
/// # Errors
/// [`Error::Setting`].
pub(crate) fn require_fraction(name: &str, found: f64) -> Result<(), Error> {
    let holds = (0.0..1.0).contains(&found);
    require(name, holds, "at least 0 and less than 1", &found)
}

impl Knobs<'_> {
    /// Checks everything and fills in what is missing, for a data set of `pictures`.
    ///
    /// # Errors
    /// [`Error::Setting`].
    pub(crate) fn resolve(self, defaults: &Defaults, pictures: usize) -> Result<Plan, Error> {
        let positive = |x: f64| x > 0.0 && x.is_finite();
        let not_negative = |x: f64| x >= 0.0 && x.is_finite();
        let accum = self.accum;
        require(
            "accum",
            (1..=1 << 20).contains(&accum),
            "1 to 1048576",
            &accum,
        )?;
        let fits = (1..=pictures).contains(&self.batch_size);
        let expected =
            format!("1 to {pictures}, the number of training pictures (more come with --data)");
        require("batch_size", fits, &expected, &self.batch_size)?;
        require_fraction("beta1", self.beta1)?;
        require_fraction("beta2", self.beta2)?;
        require_fraction("drop_path", self.drop_path)?;
        let limit = self.clip_grad;
        let holds = limit == 0.0 || positive(limit);
        require("clip_grad", holds, "a positive norm, or 0 for none", &limit)?;
        let decay = self.weight_decay;
        require("weight_decay", not_negative(decay), "at least 0", &decay)?;
        require(
            "min_lr",
            not_negative(self.min_lr),
            "at least 0",
            &self.min_lr,
        )?;
        let workers = self.workers;
        require("workers", workers <= MAX_THREADS, "at most 1024", &workers)?;

        let steps_per_epoch = (pictures as u64 / self.batch_size as u64).div_ceil(accum);
        if let (Some(_), Some(_)) = (&self.epochs, self.steps) {
            return Err(both("--steps", "--epochs or --steps"));
        }
        let steps = match self.steps {
            Some(steps) => steps,
            None => {
                let epochs = *self.epochs.get_or_insert(defaults.epochs);
                require(
                    "epochs",
                    (1..1 << 40).contains(&epochs),
                    "at least 1",
                    &epochs,
                )?;
                epochs.saturating_mul(steps_per_epoch)
            }
        };
        require("steps", (1..1 << 60).contains(&steps), "at least 1", &steps)?;
        if let (Some(_), Some(_)) = (self.lr, &self.blr) {
            return Err(both("--lr", "--lr or blr"));
        }
        let effective_batch = self.batch_size as u64 * accum;
        let (name, lr) = match self.lr {
            Some(lr) => ("lr", lr),
            None => {
                let blr = *self.blr.get_or_insert(defaults.blr);
                ("blr", blr * effective_batch as f64 / 256.0)
            }
        };
        require(name, positive(lr), "a positive number", &lr)?;
        let warmup_steps = *self
            .warmup_steps
            .get_or_insert(steps / defaults.steps_per_warmup_step);
        let expected = "at most the number of steps";
        require(
            "warmup_steps",
            warmup_steps <= steps,
            expected,
            &warmup_steps,
        )?;
        let save_every = *self.save_every.get_or_insert(steps_per_epoch);
        require("save_every", save_every >= 1, "at least 1", &save_every)?;
        Ok(Plan {
            steps,
            steps_per_epoch,
            warmup_steps,
            lr,
            min_lr: self.min_lr,
            beta1: self.beta1,
            beta2: self.beta2,
            weight_decay: self.weight_decay,
            clip_grad: self.clip_grad,
            batch_size: self.batch_size,
            accum,
            eval_every: self.eval_every,
            save_every,
            seed: self.seed,
        })
    }
}

fn both(name: &str, pair: &str) -> Error {
    Error::Setting {
        name: name.to_owned(),
        reason: format!("expected either {pair}, found both"),
    }
}
