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
    /// Attention.
    Attention,
}

impl File {
    /// All of them.
    pub const ALL: [Self; 7] = [
        Self::Patches,
        Self::Tokens,
        Self::Select,
        Self::Rows,
        Self::Loss,
        Self::Optimizer,
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
kernels! {}
