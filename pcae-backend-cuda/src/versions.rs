//! Which CUDA the driver, NVRTC and cuBLASLt are of, and whether they go together.
//!
//! A driver runs cubins of compilers of its own or an earlier major version, whatever their minor one, and compiles PTX of those that are
//! no newer than it; cuBLASLt needs a driver of its own major version at least (NVIDIA, CUDA Compatibility).

use core::fmt;

use cudarc::cublaslt::sys;

use crate::error::Error;

/// Of a CUDA release.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Version {
    pub(crate) major: u32,
    pub(crate) minor: u32,
}

impl Version {
    /// From 13000 for 13.0, as `cuDriverGetVersion` says it.
    pub(crate) fn of_driver(number: u32) -> Self {
        Self {
            major: number / 1000,
            minor: number % 1000 / 10,
        }
    }

    /// Of cuBLASLt: from 130100 for 13.1, or 11603 for 11.6.
    fn of_cublas(number: usize) -> Self {
        let (major, minor) = match number {
            100_000.. => (number / 10_000, number / 100 % 100),
            _ => (number / 1000, number / 100 % 10),
        };
        let small = |x| u32::try_from(x).unwrap_or(u32::MAX);
        Self {
            major: small(major),
            minor: small(minor),
        }
    }

    /// Of the cuBLASLt that was found, which must be there.
    pub(crate) fn of_cublas_found() -> Self {
        // SAFETY: takes nothing.
        Self::of_cublas(unsafe { sys::cublasLtGetVersion() })
    }
}

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.major, self.minor)
    }
}

/// The first for which this program has been written: cuBLASLt's descriptors, and all functions of the driver but the clock's.
const OLDEST: Version = Version {
    major: 12,
    minor: 0,
};

/// The first NVRTC whose assembler rounds to e4m3 for sm_89, too.
const OLDEST_NVRTC: Version = Version {
    major: 12,
    minor: 1,
};

/// From which on the driver has `cuEventElapsedTime_v2`.
pub(crate) const CLOCK: Version = Version {
    major: 12,
    minor: 8,
};

/// What was found on a machine.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Found {
    pub(crate) driver: Version,
    pub(crate) nvrtc: Version,
    pub(crate) cublas: Version,
    /// The device is newer than NVRTC, so that the driver has to compile what that makes.
    pub(crate) needs_ptx: bool,
}

impl Found {
    /// # Errors
    /// [`Error::Version`] if they do not go together.
    pub(crate) fn check(self) -> Result<(), Error> {
        let Self {
            driver,
            nvrtc,
            cublas,
            needs_ptx,
        } = self;
        let fail = |what: &'static str, found: Version, needed: String, advice: String| {
            Err(Error::Version {
                what,
                found: found.to_string(),
                needed,
                advice,
            })
        };
        if driver < OLDEST {
            let advice = "update NVIDIA's driver, or use --backend cpu".to_owned();
            return fail(
                "the CUDA driver",
                driver,
                format!("at least {OLDEST}"),
                advice,
            );
        }
        for (what, package, version, oldest) in [
            ("NVRTC", "nvidia-cuda-nvrtc", nvrtc, OLDEST_NVRTC),
            ("cuBLASLt", "nvidia-cublas", cublas, OLDEST),
        ] {
            if version < oldest {
                let advice = format!(
                    "let LD_LIBRARY_PATH lead to that of CUDA {} alone (of a toolkit, or of the wheel {package})",
                    driver.major
                );
                return fail(what, version, format!("at least {oldest}"), advice);
            }
        }
        for (what, version) in [("cuBLASLt", cublas), ("NVRTC", nvrtc)] {
            if version.major > driver.major {
                let advice = format!(
                    "update the driver, or let LD_LIBRARY_PATH lead to the libraries of CUDA {0} alone (of a toolkit, or of the wheels \
                     nvidia-cublas-cu{0} and nvidia-cuda-nvrtc-cu{0})",
                    driver.major
                );
                let needed = format!(
                    "at most {}, as the driver is for CUDA {driver}",
                    driver.major
                );
                return fail(what, version, needed, advice);
            }
        }
        if needs_ptx && nvrtc > driver {
            let advice = "the device is newer than this NVRTC, so that the driver compiles for it: update the driver, or put an NVRTC that \
                          knows the device into LD_LIBRARY_PATH"
                .to_owned();
            return fail(
                "NVRTC",
                nvrtc,
                format!("at most {driver}, as the driver"),
                advice,
            );
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn version(major: u32, minor: u32) -> Version {
        Version { major, minor }
    }

    #[test]
    fn versions_are_read_as_each_library_writes_them() {
        assert_eq!(Version::of_driver(12040), version(12, 4));
        assert_eq!(Version::of_driver(13000), version(13, 0));
        for (number, expected) in [
            (130_002, (13, 0)),
            (120_304, (12, 3)),
            (121_001, (12, 10)),
            (11_603, (11, 6)),
        ] {
            let (major, minor) = expected;
            assert_eq!(Version::of_cublas(number), version(major, minor));
        }
    }

    #[test]
    fn what_goes_together_is_taken_and_nothing_else() {
        let found = |driver, nvrtc, cublas, needs_ptx| {
            let found = Found {
                driver,
                nvrtc,
                cublas,
                needs_ptx,
            };
            found.check().map_err(|error| error.to_string())
        };
        let [v11, v12, v12_1, v12_4, v13, v13_1] =
            [(11, 8), (12, 0), (12, 1), (12, 4), (13, 0), (13, 1)].map(|(a, b)| version(a, b));
        for (driver, nvrtc, cublas, needs_ptx) in [
            (v13, v13, v13, true),
            (v13, v12_1, v12, true),
            (v13, v13_1, v13_1, false),
            (v12, v12_4, v12_4, false),
        ] {
            assert_eq!(found(driver, nvrtc, cublas, needs_ptx), Ok(()));
        }
        for (driver, nvrtc, cublas, needs_ptx, words) in [
            (
                v11,
                v12,
                v12,
                false,
                ["the CUDA driver", "11.8", "at least 12.0"],
            ),
            (v13, v11, v13, false, ["NVRTC", "11.8", "at least 12.1"]),
            (v12_4, v12, v12, false, ["NVRTC", "12.0", "at least 12.1"]),
            (v13, v13, v11, false, ["cuBLASLt", "11.8", "at least 12.0"]),
            (v12_4, v12_1, v13, false, ["cuBLASLt", "13.0", "CUDA 12.4"]),
            // Whether it knows the device or not.
            (v12_4, v13, v12, false, ["NVRTC", "13.0", "CUDA 12.4"]),
            (v12_4, v13, v12, true, ["NVRTC", "13.0", "CUDA 12.4"]),
            (v12, v12_4, v12, true, ["NVRTC", "12.4", "at most 12.0"]),
            (v13, v13_1, v13, true, ["NVRTC", "13.1", "at most 13.0"]),
        ] {
            let said = found(driver, nvrtc, cublas, needs_ptx).unwrap_err();
            for word in words.iter().chain(&["LD_LIBRARY_PATH"]) {
                let is_driver = words[0] == "the CUDA driver";
                assert!(
                    said.contains(word) || is_driver && *word == "LD_LIBRARY_PATH",
                    "{said}"
                );
            }
        }
    }
}
