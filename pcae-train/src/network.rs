//! A trained network as it is used: a classifier or an encoder, at any token budget.

use pcae_kernel::backend::{Backend, TrainBackend};
use pcae_kernel::config::{
    Budget, ClassifierConfig, ConfigError, Criterion, DropLayers, Reduction, VitConfig,
};
use pcae_kernel::flops;
use pcae_kernel::layout::Layout;
use pcae_kernel::model::{Classifier, CriterionScorer, Vit};

use crate::training::draws::{self, Key};

/// What is computed of a picture.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Network {
    /// Logits.
    Classifier(ClassifierConfig),
    /// The class token and the patch tokens that are left, behind the last norm.
    Encoder {
        /// Its sizes.
        vit: VitConfig,
        /// Which patch tokens are dropped on the way.
        reduction: Reduction,
    },
}

impl Network {
    /// The sizes of the encoder.
    pub const fn vit(&self) -> &VitConfig {
        match self {
            Self::Classifier(config) => &config.vit,
            Self::Encoder { vit, .. } => vit,
        }
    }

    /// Which patch tokens are dropped on the way.
    pub const fn reduction(&self) -> &Reduction {
        match self {
            Self::Classifier(config) => &config.reduction,
            Self::Encoder { reduction, .. } => reduction,
        }
    }

    /// Part of the patch tokens that each stage drops.
    pub const fn drop_ratio(&self) -> f64 {
        drop_ratio(self.reduction())
    }

    /// The same network with another reduction, checked.
    ///
    /// # Errors
    /// The first [`ConfigError`] found.
    pub fn with(mut self, other: Reduction) -> Result<Self, ConfigError> {
        match &mut self {
            Self::Classifier(config) => config.reduction = other,
            Self::Encoder { reduction, .. } => *reduction = other,
        }
        other.check(self.vit().num_patches(), self.vit().depth)?;
        Ok(self)
    }

    /// The same network at another drop ratio, checked.
    ///
    /// # Errors
    /// As [`Network::with`].
    pub fn at(self, drop_ratio: f64) -> Result<Self, ConfigError> {
        self.with(Reduction {
            budget: Budget::Drop(drop_ratio),
            ..*self.reduction()
        })
    }

    /// The same network with tokens dropped after other blocks, checked.
    ///
    /// # Errors
    /// As [`Network::with`].
    pub fn after(self, drop_layers: DropLayers) -> Result<Self, ConfigError> {
        self.with(Reduction {
            drop_layers,
            ..*self.reduction()
        })
    }

    /// Where its parameters lie.
    pub fn layout(&self) -> Layout {
        match self {
            Self::Classifier(config) => Layout::classifier(config),
            Self::Encoder { vit, .. } => Layout::encoder(vit),
        }
    }

    /// Multiply-adds of a picture, as papers count them.
    pub fn multiply_adds(&self) -> u64 {
        match self {
            Self::Classifier(config) => flops::classifier(config),
            Self::Encoder { vit, reduction } => {
                flops::encoder(vit, 1, vit.num_patches(), reduction)
            }
        }
    }

    /// Patch tokens before, between and after the stages.
    pub fn tokens(&self) -> Vec<usize> {
        let patches = self.vit().num_patches();
        let mut tokens = vec![patches];
        self.reduction()
            .for_each_stage(patches, self.vit().depth, |_, keep| tokens.push(keep));
        tokens
    }

    /// Elements of `batch` pictures.
    pub const fn images_len(&self, batch: usize) -> usize {
        let vit = self.vit();
        batch * vit.in_chans * vit.img_size[0] * vit.img_size[1]
    }
}

/// Part of the patch tokens that each stage drops.
pub(crate) const fn drop_ratio(reduction: &Reduction) -> f64 {
    match reduction.budget {
        Budget::Drop(drop_ratio) => drop_ratio,
        Budget::Keep(keep_ratio) => 1.0 - keep_ratio,
    }
}

/// What commands say of the token budget that they took, in a line.
pub(crate) fn budget(vit: &VitConfig, reduction: &Reduction) -> String {
    let network = Network::Encoder {
        vit: *vit,
        reduction: *reduction,
    };
    match &network.tokens()[..] {
        [all] => format!("all {all} patch tokens"),
        tokens => {
            let blocks: Vec<String> = reduction
                .drop_layers
                .iter()
                .map(|block| block.to_string())
                .collect();
            format!(
                "{} patch tokens: drop ratio {} after blocks {}",
                arrows(tokens),
                drop_ratio(reduction),
                blocks.join(", ")
            )
        }
    }
}

/// `196 -> 178 -> 161`
pub(crate) fn arrows(tokens: &[usize]) -> String {
    let tokens: Vec<String> = tokens.iter().map(usize::to_string).collect();
    tokens.join(" -> ")
}

enum Model<B: Backend> {
    Classifier(Classifier<B>),
    Encoder(Vit<B>),
}

/// A network on a backend, with room for a batch of pictures.
pub(crate) struct Runner<B: TrainBackend> {
    network: Network,
    batch: usize,
    model: Model<B>,
    scorer: CriterionScorer<B>,
    images: B::Buf,
    out: Vec<f32>,
}

impl<B: TrainBackend> Runner<B> {
    /// Makes room for `batch` pictures. `network` must have been checked.
    ///
    /// # Errors
    /// If memory is short.
    pub(crate) fn new(backend: &mut B, network: &Network, batch: usize) -> Result<Self, B::Error> {
        let (vit, reduction) = (network.vit(), network.reduction());
        let (patches, depth) = (vit.num_patches(), vit.depth);
        let (model, out) = match network {
            Network::Classifier(config) => (
                Model::Classifier(Classifier::new(backend, config, batch)?),
                config.num_classes,
            ),
            Network::Encoder { .. } => (
                Model::Encoder(Vit::new(backend, vit, batch, patches, true, *reduction)?),
                (1 + patches) * vit.embed_dim,
            ),
        };
        Ok(Self {
            network: *network,
            batch,
            model,
            scorer: CriterionScorer::new(backend, reduction, batch, patches, depth)?,
            images: backend.buf(network.images_len(batch))?,
            out: vec![0.0; batch * out],
        })
    }

    /// Changes what is dropped from the next forward on. `reduction` must have been checked.
    ///
    /// # Errors
    /// If memory is short.
    pub(crate) fn set_reduction(
        &mut self,
        backend: &mut B,
        reduction: Reduction,
    ) -> Result<(), B::Error> {
        let vit = *self.network.vit();
        match &mut self.model {
            Model::Classifier(model) => model.set_reduction(reduction),
            Model::Encoder(model) => model.set_reduction(reduction),
        }
        match &mut self.network {
            Network::Classifier(config) => config.reduction = reduction,
            Network::Encoder { reduction: own, .. } => *own = reduction,
        }
        self.scorer = CriterionScorer::new(
            backend,
            &reduction,
            self.batch,
            vit.num_patches(),
            vit.depth,
        )?;
        Ok(())
    }

    /// Takes a batch of pictures.
    ///
    /// # Shapes
    /// `images: [batch, in_chans, height, width]`, normalised.
    ///
    /// # Errors
    /// What the backend reports.
    pub(crate) fn load(&mut self, backend: &mut B, images: &[f32]) -> Result<(), B::Error> {
        backend.write(&mut self.images, images)?;
        let (vit, reduction) = (*self.network.vit(), *self.network.reduction());
        if reduction.criterion != Criterion::Random {
            return Ok(());
        }
        let samples: Vec<u64> = (0..self.batch as u64).collect();
        let key = Key {
            seed: 0,
            epoch: 0,
            samples: &samples,
        };
        let (patches, scorer) = (vit.num_patches(), &mut self.scorer);
        draws::selection(backend, key, &reduction, patches, vit.depth, scorer)
    }

    /// Computes, and reads what comes out.
    ///
    /// # Errors
    /// What the backend reports.
    pub(crate) fn forward(&mut self, backend: &mut B, params: &B::Params) -> Result<(), B::Error> {
        let (batch, images, scorer) = (self.batch, &self.images, &mut self.scorer);
        match &mut self.model {
            Model::Classifier(model) => {
                let logits = model.forward(backend, params, batch, images, scorer)?;
                backend.read(&mut self.out, logits)
            }
            Model::Encoder(model) => {
                model.forward(backend, params, batch, images, None, scorer)?;
                let len = model.dims().len();
                let tokens = model.final_norm(backend, params)?;
                backend.read(&mut self.out[..len], tokens)
            }
        }
    }
}
