//! The model, written once for every backend: what is computed, in the order of the paper's Figure 1.
//!
//! [`Vit`] is inference: the teacher of pre-training, the encoder that gives features, the trunk of a classifier. Under
//! feature `train`, [`Trunk`] is a row of blocks that can go backward, and [`Pretrainer`] and [`ClassifierTrainer`] are
//! the two tasks.

mod vit;
pub use vit::{Classifier, MeanSimilarity, Plan, Scorer, Selection, Vit};

#[cfg(feature = "train")]
mod classify;
#[cfg(feature = "train")]
mod pretrain;
#[cfg(feature = "train")]
mod state;
#[cfg(feature = "train")]
mod trunk;
#[cfg(feature = "train")]
pub use {
    classify::ClassifierTrainer,
    pretrain::{CriterionScorer, Pretrainer},
    state::{HALVES, RECORDS, Scalars, TrainState},
    trunk::Trunk,
};
