//! Which vector instructions to use: chosen once, passed by value.

use core::fmt;
use core::str::FromStr;

use crate::error::Error;
#[cfg(target_arch = "aarch64")]
use crate::simd::Neon;
#[cfg(target_arch = "x86_64")]
use crate::simd::{Avx2, Avx512};
use crate::simd::{Portable, Simd};

/// An instruction set that this processor has: holding one is the proof.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Isa(Kind);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    #[cfg(target_arch = "x86_64")]
    Avx512(Avx512),
    #[cfg(target_arch = "x86_64")]
    Avx2(Avx2),
    #[cfg(target_arch = "aarch64")]
    Neon(Neon),
    Portable(Portable),
}

/// Names of all instruction sets, whether this processor has them or not.
const NAMES: [&str; 4] = ["avx512", "avx2", "neon", "portable"];

impl Isa {
    /// The instruction sets that this processor has, the widest first.
    pub fn available() -> impl Iterator<Item = Self> {
        let found = [
            #[cfg(target_arch = "x86_64")]
            Avx512::new().map(Kind::Avx512),
            #[cfg(target_arch = "x86_64")]
            Avx2::new().map(Kind::Avx2),
            #[cfg(target_arch = "aarch64")]
            Neon::new().map(Kind::Neon),
            Some(Kind::Portable(Portable)),
        ];
        found.into_iter().flatten().map(Self)
    }

    /// The widest instruction set that this processor has.
    pub fn detect() -> Self {
        Self::available()
            .next()
            .unwrap_or(Self(Kind::Portable(Portable)))
    }

    /// [`Isa::available`], and AVX-512 as on a processor without AVX512-BF16.
    #[cfg(test)]
    pub(crate) fn variants() -> impl Iterator<Item = Self> {
        let more = [
            #[cfg(target_arch = "x86_64")]
            Avx512::without_bf16().map(|isa| Self(Kind::Avx512(isa))),
        ];
        Self::available().chain(more.into_iter().flatten())
    }

    #[cfg(target_arch = "x86_64")]
    pub(crate) const fn is_avx512(self) -> bool {
        matches!(self.0, Kind::Avx512(_))
    }

    const fn name(self) -> &'static str {
        match self.0 {
            #[cfg(target_arch = "x86_64")]
            Kind::Avx512(_) => "avx512",
            #[cfg(target_arch = "x86_64")]
            Kind::Avx2(_) => "avx2",
            #[cfg(target_arch = "aarch64")]
            Kind::Neon(_) => "neon",
            Kind::Portable(_) => "portable",
        }
    }

    /// Runs a kernel compiled for this instruction set.
    #[inline]
    pub(crate) fn run<K: Kernel>(self, kernel: K) -> K::Output {
        match self.0 {
            #[cfg(target_arch = "x86_64")]
            Kind::Avx512(simd) => {
                // SAFETY: an `Avx512` exists only where `Avx512::new` found AVX-512F, AVX2 and FMA.
                unsafe { run_avx512(simd, kernel) }
            }
            #[cfg(target_arch = "x86_64")]
            Kind::Avx2(simd) => {
                // SAFETY: an `Avx2` exists only where `Avx2::new` found AVX2 and FMA.
                unsafe { run_avx2(simd, kernel) }
            }
            #[cfg(target_arch = "aarch64")]
            Kind::Neon(simd) => {
                // SAFETY: a `Neon` exists only where `Neon::new` found NEON.
                unsafe { run_neon(simd, kernel) }
            }
            Kind::Portable(simd) => kernel.run(simd),
        }
    }
}

impl fmt::Display for Isa {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for Isa {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self, Error> {
        if let Some(isa) = Self::available().find(|isa| isa.name() == text) {
            return Ok(isa);
        }
        let name = NAMES.into_iter().find(|&name| name == text);
        Err(name.map_or(Error::UnknownIsa, |name| Error::MissingIsa { name }))
    }
}

/// An algorithm that is written once and compiled for every instruction set.
///
/// `run` and everything generic that it calls must be `#[inline(always)]`: only what ends up inside the function that
/// enables the instructions is compiled with them.
pub(crate) trait Kernel {
    /// What it gives.
    type Output;

    /// The algorithm.
    fn run<S: Simd>(self, simd: S) -> Self::Output;
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx2,fma")]
fn run_avx512<K: Kernel>(simd: Avx512, kernel: K) -> K::Output {
    kernel.run(simd)
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma")]
fn run_avx2<K: Kernel>(simd: Avx2, kernel: K) -> K::Output {
    kernel.run(simd)
}

#[cfg(target_arch = "aarch64")]
#[target_feature(enable = "neon")]
fn run_neon<K: Kernel>(simd: Neon, kernel: K) -> K::Output {
    kernel.run(simd)
}

/// What the processor says of itself.
#[cfg(target_arch = "x86_64")]
#[allow(
    unused_unsafe,
    reason = "CPUID has become safe to ask for since the oldest compiler that is supported"
)]
pub(crate) fn cpuid(leaf: u32, subleaf: u32) -> core::arch::x86_64::CpuidResult {
    // SAFETY: every x86-64 processor has the instruction.
    unsafe { core::arch::x86_64::__cpuid_count(leaf, subleaf) }
}

/// Defines a function `name(isa, arguments…)` whose body is compiled for every instruction set.
macro_rules! kernel {
    ($(
        $(#[$meta:meta])*
        fn $name:ident<$life:lifetime, $S:ident>($simd:ident; $($arg:ident: $ty:ty),* $(,)?) -> $ret:ty $body:block
    )*) => {$(
        $(#[$meta])*
        #[inline]
        pub(crate) fn $name<$life>(isa: $crate::isa::Isa, $($arg: $ty),*) -> $ret {
            struct Run<$life> {
                $($arg: $ty,)*
            }
            impl<$life> $crate::isa::Kernel for Run<$life> {
                type Output = $ret;

                #[inline(always)]
                fn run<$S: $crate::simd::Simd>(self, $simd: $S) -> $ret {
                    let Self { $($arg),* } = self;
                    $body
                }
            }
            isa.run(Run { $($arg),* })
        }
    )*};
}
pub(crate) use kernel;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_round_trip() {
        for isa in Isa::available() {
            assert_eq!(isa.to_string().parse::<Isa>().unwrap(), isa);
        }
        assert!(matches!("mmx".parse::<Isa>(), Err(Error::UnknownIsa)));
        for name in NAMES {
            let here = Isa::available().any(|isa| isa.to_string() == name);
            assert_eq!(name.parse::<Isa>().is_ok(), here, "{name}");
        }
    }
}
