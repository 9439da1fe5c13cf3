//! The kernels: which files there are, and what each kernel asks of the device.
//!
//! A file is compiled as `common.cuh` followed by its own text, once for activations in f32 and once, with `PCAE_BF16`
//! defined, in bf16.

use crate::Precision;

/// What is put in front of each file.
const COMMON: &str = include_str!("../kernels/common.cuh");

/// A file of kernels, which becomes one module.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum File {
    /// Patches and pixels of pictures.
    Patches,
    /// Tokens that are embedded, gathered, pooled.
    Tokens,
    /// Scores and selection.
    Select,
    /// Norms and everything else that goes row by row.
    Rows,
    /// Losses and targets.
    Loss,
    /// Norm of a vector, AdamW and moving average.
    Optimizer,
    /// Matrix products that cuBLASLt does not do.
    Product,
    /// What a teacher in fp8 multiplies.
    Fp8,
    /// Attention.
    Attention,
}

impl File {
    /// All of them.
    pub const ALL: [Self; 9] = [
        Self::Patches,
        Self::Tokens,
        Self::Select,
        Self::Rows,
        Self::Loss,
        Self::Optimizer,
        Self::Product,
        Self::Fp8,
        Self::Attention,
    ];

    /// Its name.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Patches => "patches.cu",
            Self::Tokens => "tokens.cu",
            Self::Select => "select.cu",
            Self::Rows => "rows.cu",
            Self::Loss => "loss.cu",
            Self::Optimizer => "optimizer.cu",
            Self::Product => "product.cu",
            Self::Fp8 => "fp8.cu",
            Self::Attention => "attention.cu",
        }
    }

    /// What the compiler gets. `#line` makes it name the lines of the two files.
    pub fn source(self) -> String {
        let text = match self {
            Self::Patches => include_str!("../kernels/patches.cu"),
            Self::Tokens => include_str!("../kernels/tokens.cu"),
            Self::Select => include_str!("../kernels/select.cu"),
            Self::Rows => include_str!("../kernels/rows.cu"),
            Self::Loss => include_str!("../kernels/loss.cu"),
            Self::Optimizer => include_str!("../kernels/optimizer.cu"),
            Self::Product => include_str!("../kernels/product.cu"),
            Self::Fp8 => include_str!("../kernels/fp8.cu"),
            Self::Attention => include_str!("../kernels/attention.cu"),
        };
        format!(
            "#line 1 \"common.cuh\"\n{COMMON}\n#line 1 \"{}\"\n{text}",
            self.name()
        )
    }

    /// What the compiler is told beside the architecture.
    pub const fn options(precision: Precision) -> &'static [&'static str] {
        match precision {
            Precision::F32 => &["--std=c++17"],
            Precision::Bf16 => &["--std=c++17", "-DPCAE_BF16"],
        }
    }
}

/// One kernel, with limits that `tests/compile.rs` holds against what the compiler made of it, in both formats, for all
/// architectures.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Kernel {
    /// Its place in [`KERNELS`].
    pub(crate) id: u16,
    /// Where it is.
    pub file: File,
    /// Its name there.
    pub name: &'static str,
    /// How many arguments it takes.
    pub args: u32,
    /// Threads of a block at most, its `__launch_bounds__`.
    pub threads: u32,
    /// Registers of a thread at most. None may be spilled to memory.
    pub registers: u32,
    /// Bytes of static shared memory at most.
    pub shared: u32,
}

macro_rules! kernels {
    ($($name:ident = $file:ident $entry:literal (args $args:literal, threads $threads:literal, registers $registers:literal, shared $shared:literal);)*) => {
        #[expect(clippy::upper_case_acronyms, non_camel_case_types, reason = "the names of constants, to count them")]
        enum Id { $($name,)* COUNT }
        $(
            pub(crate) const $name: Kernel = Kernel {
                id: Id::$name as u16,
                file: File::$file,
                name: $entry,
                args: $args,
                threads: $threads,
                registers: $registers,
                shared: $shared,
            };
        )*
        /// All kernels.
        pub const KERNELS: [Kernel; Id::COUNT as usize] = [$($name),*];
    };
}

// NAME = File "entry point" (args, threads, registers, shared);
// Registers are as few as NVRTC 12.1 and 13.0 both keep to. For some norms the former takes up to 16 more, which leaves room for as many
// blocks as their launch bounds ask for.
kernels! {
    GELU_IN_PLACE = Rows "gelu_in_place" (args 2, threads 256, registers 64, shared 0);
    ADD_COLUMN_SUMS = Rows "add_column_sums" (args 6, threads 256, registers 64, shared 2048);
    GATHER_PATCHES = Patches "gather_patches" (args 11, threads 256, registers 64, shared 0);
    PIXEL_TARGETS = Patches "pixel_targets" (args 11, threads 256, registers 80, shared 0);
    NORMALISE_PIXELS = Patches "normalise_pixels" (args 6, threads 256, registers 64, shared 3072);
    CROP_TAPS = Patches "crop_taps" (args 4, threads 256, registers 64, shared 128);
    RESIZE_CROPS = Patches "resize_crops" (args 8, threads 256, registers 48, shared 3840);
    EMBED_TOKENS = Tokens "embed_tokens" (args 11, threads 256, registers 64, shared 0);
    DECODER_TOKENS = Tokens "decoder_tokens" (args 14, threads 256, registers 64, shared 0);
    SHIFT_TOKENS = Tokens "shift_tokens" (args 8, threads 256, registers 64, shared 0);
    GATHER_TOKENS = Tokens "gather_tokens" (args 10, threads 256, registers 64, shared 0);
    GATHER_TOKENS_BACKWARD = Tokens "gather_tokens_backward" (args 10, threads 256, registers 64, shared 0);
    GATHER_IDS = Tokens "gather_ids" (args 8, threads 256, registers 32, shared 0);
    MEAN_POOL = Tokens "mean_pool" (args 5, threads 256, registers 64, shared 9216);
    MEAN_POOL_BACKWARD = Tokens "mean_pool_backward" (args 6, threads 256, registers 64, shared 0);
    SUM_TOKENS = Tokens "sum_tokens" (args 8, threads 256, registers 64, shared 9216);
    MEAN_SIMILARITY = Select "mean_similarity" (args 5, threads 512, registers 128, shared 0);
    SIMILARITY_SUMS = Select "similarity_sums" (args 6, threads 512, registers 128, shared 0);
    SIMILARITY_SCORES = Select "similarity_scores" (args 7, threads 512, registers 128, shared 0);
    SELECT_BY_RANK = Select "select_by_rank" (args 6, threads 256, registers 40, shared 1024);
    SELECT_BY_SORT = Select "select_by_sort" (args 7, threads 1024, registers 64, shared 0);
    PIVOTED_QR_SCORES = Select "pivoted_qr_scores" (args 8, threads 512, registers 64, shared 256);
    LAYER_NORM_256 = Rows "layer_norm_256" (args 8, threads 256, registers 48, shared 0);
    LAYER_NORM_512 = Rows "layer_norm_512" (args 8, threads 256, registers 64, shared 0);
    LAYER_NORM_768 = Rows "layer_norm_768" (args 8, threads 256, registers 64, shared 0);
    LAYER_NORM_1024 = Rows "layer_norm_1024" (args 8, threads 256, registers 80, shared 0);
    LAYER_NORM_1536 = Rows "layer_norm_1536" (args 8, threads 256, registers 72, shared 128);
    LAYER_NORM_2048 = Rows "layer_norm_2048" (args 8, threads 256, registers 80, shared 128);
    LAYER_NORM_4096 = Rows "layer_norm_4096" (args 8, threads 256, registers 80, shared 128);
    LAYER_NORM_ODD_1024 = Rows "layer_norm_odd_1024" (args 8, threads 256, registers 112, shared 0);
    LAYER_NORM_ODD_16384 = Rows "layer_norm_odd_16384" (args 8, threads 1024, registers 64, shared 128);
    LAYER_NORM_BACKWARD_256 = Rows "layer_norm_backward_256" (args 10, threads 128, registers 80, shared 0);
    LAYER_NORM_BACKWARD_512 = Rows "layer_norm_backward_512" (args 10, threads 128, registers 128, shared 0);
    LAYER_NORM_BACKWARD_768 = Rows "layer_norm_backward_768" (args 10, threads 128, registers 168, shared 0);
    LAYER_NORM_BACKWARD_1024 = Rows "layer_norm_backward_1024" (args 10, threads 128, registers 232, shared 0);
    LAYER_NORM_BACKWARD_1536 = Rows "layer_norm_backward_1536" (args 10, threads 128, registers 168, shared 256);
    LAYER_NORM_BACKWARD_2048 = Rows "layer_norm_backward_2048" (args 10, threads 128, registers 240, shared 256);
    LAYER_NORM_BACKWARD_4096 = Rows "layer_norm_backward_4096" (args 10, threads 128, registers 232, shared 256);
    LAYER_NORM_BACKWARD_ODD_256 = Rows "layer_norm_backward_odd_256" (args 10, threads 128, registers 96, shared 0);
    LAYER_NORM_BACKWARD_ODD_4096 = Rows "layer_norm_backward_odd_4096" (args 10, threads 512, registers 112, shared 256);
    COLUMN_SUMS = Rows "column_sums" (args 5, threads 256, registers 48, shared 4096);
    COLUMN_SUMS_ODD = Rows "column_sums_odd" (args 5, threads 256, registers 48, shared 4096);
    COSINE_LOSS = Rows "cosine_loss" (args 7, threads 256, registers 96, shared 0);
    COSINE_LOSS_ODD = Rows "cosine_loss_odd" (args 7, threads 256, registers 104, shared 0);
    GELU_OF = Rows "gelu_of" (args 3, threads 256, registers 64, shared 0);
    GELU_TO_E4M3 = Rows "gelu_to_e4m3" (args 3, threads 256, registers 64, shared 0);
    GELU_BACKWARD = Rows "gelu_backward" (args 6, threads 256, registers 64, shared 4096);
    GELU_BACKWARD_ODD = Rows "gelu_backward_odd" (args 6, threads 256, registers 80, shared 4096);
    SCALE_ROWS = Rows "scale_rows" (args 5, threads 256, registers 64, shared 0);
    ADD_SCALED_ROWS = Rows "add_scaled_rows" (args 5, threads 256, registers 80, shared 0);
    FINISH_SUM = Loss "finish_sum" (args 7, threads 1024, registers 32, shared 256);
    MSE_LOSS = Loss "mse_loss" (args 6, threads 256, registers 40, shared 128);
    CROSS_ENTROPY = Loss "cross_entropy" (args 6, threads 256, registers 40, shared 256);
    COLUMN_MOMENTS = Loss "column_moments" (args 5, threads 256, registers 48, shared 16384);
    COLUMN_SPREADS = Loss "column_spreads" (args 5, threads 256, registers 40, shared 4096);
    SUM_SQUARES = Optimizer "sum_squares" (args 3, threads 256, registers 48, shared 128);
    ADAMW_EMA = Optimizer "adamw_ema" (args 16, threads 256, registers 48, shared 0);
    PRODUCT = Product "product" (args 11, threads 256, registers 64, shared 8192);
    SPREAD_BIAS = Product "spread_bias" (args 6, threads 256, registers 32, shared 0);
    WIDEN_ROWS = Product "widen_rows" (args 5, threads 256, registers 48, shared 0);
    TO_E4M3 = Fp8 "to_e4m3" (args 3, threads 256, registers 72, shared 0);
    WEIGHT_MAXIMA = Fp8 "weight_maxima" (args 3, threads 256, registers 72, shared 128);
    WEIGHTS_TO_E4M3 = Fp8 "weights_to_e4m3" (args 5, threads 256, registers 72, shared 0);
    ATTENTION_32 = Attention "attention_32" (args 10, threads 128, registers 128, shared 0);
    ATTENTION_BACKWARD_32 = Attention "attention_backward_32" (args 11, threads 128, registers 168, shared 0);
    ATTENTION_64 = Attention "attention_64" (args 10, threads 128, registers 168, shared 0);
    ATTENTION_BACKWARD_64 = Attention "attention_backward_64" (args 11, threads 128, registers 224, shared 0);
    ATTENTION_80 = Attention "attention_80" (args 10, threads 128, registers 224, shared 0);
    ATTENTION_BACKWARD_80 = Attention "attention_backward_80" (args 11, threads 128, registers 255, shared 0);
    ATTENTION_96 = Attention "attention_96" (args 10, threads 128, registers 168, shared 0);
    ATTENTION_BACKWARD_96 = Attention "attention_backward_96" (args 11, threads 128, registers 255, shared 0);
    ATTENTION_128 = Attention "attention_128" (args 10, threads 128, registers 240, shared 0);
    ATTENTION_BACKWARD_128 = Attention "attention_backward_128" (args 11, threads 128, registers 255, shared 0);
}
