//! All kernels compile, in both formats, for three generations of devices, and stay within what `kernels.rs` states. It needs
//! NVRTC, and no device: without NVRTC it is skipped, unless `PCAE_REQUIRE_NVRTC` says which must be there, as `13.0`. Devices that are
//! newer than the NVRTC are left out.

use std::collections::BTreeMap;
use std::path::Path;

use pcae_backend_cuda::kernels::{File, KERNELS, Kernel};
use pcae_backend_cuda::{Compiler, Error, Precision};

/// Ampere, Hopper, Blackwell. The last one is newer than CUDA 12.1, the oldest whose compiler is held against the limits.
const CAPABILITIES: [u32; 3] = [80, 90, 100];

/// What the compiler made of a kernel.
#[derive(Debug, Default, PartialEq, Eq)]
struct Made {
    args: u32,
    /// Bytes of the largest argument.
    widest: u32,
    threads: u32,
    registers: u32,
    /// Bytes of a thread in local memory: spilled registers, and arrays that are indexed by what is not known.
    local: u32,
    shared: u32,
}

/// A cubin is a 64-bit ELF file, little endian.
struct Elf<'a>(&'a [u8]);

struct Section<'a> {
    name: &'a str,
    kind: u32,
    size: u32,
    link: u32,
    content: &'a [u8],
}

impl<'a> Elf<'a> {
    fn number(&self, at: usize, size: usize) -> usize {
        let bytes = self.0[at..][..size].iter().rev();
        bytes.fold(0, |number, byte| number << 8 | usize::from(*byte))
    }

    /// The characters up to a zero.
    fn text(&self, at: usize) -> &'a str {
        let text = self.0[at..].split(|byte| *byte == 0).next();
        std::str::from_utf8(text.unwrap_or_default()).expect("a name")
    }

    fn sections(&self) -> Vec<Section<'a>> {
        const NO_BITS: usize = 8;
        assert_eq!(&self.0[..6], b"\x7fELF\x02\x01");
        let (table, size) = (self.number(0x28, 8), self.number(0x3a, 2));
        let header = |i: usize| table + i * size;
        let names = self.number(header(self.number(0x3e, 2)) + 0x18, 8);
        (0..self.number(0x3c, 2))
            .map(|i| {
                let at = header(i);
                let (kind, offset, size) = (
                    self.number(at + 4, 4),
                    self.number(at + 0x18, 8),
                    self.number(at + 0x20, 8),
                );
                Section {
                    name: self.text(names + self.number(at, 4)),
                    kind: kind as u32,
                    size: size as u32,
                    link: self.number(at + 0x28, 4) as u32,
                    content: if kind == NO_BITS {
                        &[]
                    } else {
                        &self.0[offset..][..size]
                    },
                }
            })
            .collect()
    }

    /// What is said of each kernel: `.nv.info` of all, `.nv.info.NAME` and `.nv.shared.NAME` of each.
    fn kernels(&self) -> BTreeMap<&'a str, Made> {
        const SYMBOLS: u32 = 2;
        // Attributes that `cuobjdump -elf` calls EIATTR_...
        const MAX_THREADS: u8 = 0x05;
        const FRAME_SIZE: u8 = 0x11;
        const KPARAM_INFO: u8 = 0x17;
        const REGCOUNT: u8 = 0x2f;

        let sections = self.sections();
        let symbols = sections.iter().find(|section| section.kind == SYMBOLS);
        let symbols = symbols.expect("a table of symbols");
        let strings = sections[symbols.link as usize].content;
        let symbol = |i: u32| {
            let name = word(&symbols.content[i as usize * 24..]) as usize;
            Elf(strings).text(name)
        };
        let mut kernels: BTreeMap<_, Made> = BTreeMap::new();
        for section in &sections {
            if section.name == ".nv.info" {
                for (attribute, value) in attributes(section.content) {
                    let made = match attribute {
                        FRAME_SIZE | REGCOUNT => kernels.entry(symbol(word(value))).or_default(),
                        _ => continue,
                    };
                    let number = word(&value[4..]);
                    if attribute == REGCOUNT {
                        made.registers = number;
                    } else {
                        made.local = number;
                    }
                }
            } else if let Some(name) = section.name.strip_prefix(".nv.info.") {
                let made = kernels.entry(name).or_default();
                for (attribute, value) in attributes(section.content) {
                    match attribute {
                        KPARAM_INFO => {
                            made.args += 1;
                            made.widest = made.widest.max(word(&value[8..]) >> 18);
                        }
                        MAX_THREADS => {
                            made.threads = value.chunks(4).map(word).product();
                        }
                        _ => {}
                    }
                }
            } else if let Some(name) = section.name.strip_prefix(".nv.shared.")
                && !name.starts_with("reserved")
            {
                kernels.entry(name).or_default().shared = section.size;
            }
        }
        // Functions of the compiler's own, which kernels call.
        kernels.retain(|name, _| !name.starts_with('$'));
        kernels
    }
}

fn word(bytes: &[u8]) -> u32 {
    u32::from_le_bytes(*bytes.first_chunk().expect("four bytes"))
}

/// Attributes by number. A format says how long each is.
fn attributes(mut bytes: &[u8]) -> Vec<(u8, &[u8])> {
    const SIZED: u8 = 4;
    let mut all = Vec::new();
    while let [format, attribute, low, high, rest @ ..] = bytes {
        if *format == SIZED {
            let (value, after) = rest.split_at(usize::from(u16::from_le_bytes([*low, *high])));
            all.push((*attribute, value));
            bytes = after;
        } else {
            all.push((*attribute, &bytes[2..4]));
            bytes = rest;
        }
    }
    all
}

/// What does not hold of one kernel.
fn wrong(kernel: &Kernel, made: &Made) -> Vec<String> {
    let mut wrong = Vec::new();
    for (what, found, holds, stated) in [
        (
            "arguments",
            made.args,
            made.args == kernel.args,
            kernel.args,
        ),
        // The host writes each into 8 bytes.
        ("bytes of an argument", made.widest, made.widest <= 8, 8),
        (
            "threads in its launch bounds",
            made.threads,
            made.threads == kernel.threads,
            kernel.threads,
        ),
        (
            "registers",
            made.registers,
            (1..=kernel.registers).contains(&made.registers),
            kernel.registers,
        ),
        ("bytes of local memory", made.local, made.local == 0, 0),
        (
            "bytes of shared memory",
            made.shared,
            made.shared <= kernel.shared,
            kernel.shared,
        ),
    ] {
        if !holds {
            wrong.push(format!("{found} {what}, stated are {stated}"));
        }
    }
    wrong
}

#[test]
fn kernels_compile_and_stay_within_their_limits() {
    let required = std::env::var("PCAE_REQUIRE_NVRTC").ok();
    let compiler = match Compiler::new() {
        Ok(compiler) => compiler,
        Err(Error::Library { names, .. }) if required.is_none() => {
            println!("skipped: no NVRTC (looked for {names})");
            return;
        }
        Err(error) => panic!("{error}"),
    };
    let release = compiler.release();
    assert_eq!(required.as_ref().unwrap_or(&release), &release);
    // Compiled once for each change of a file.
    let compiler = compiler
        .cached(&Path::new(env!("CARGO_TARGET_TMPDIR")).join("images"))
        .unwrap();
    let (known, unknown): (Vec<u32>, Vec<u32>) = CAPABILITIES
        .into_iter()
        .partition(|capability| compiler.knows(*capability));
    assert!(known.contains(&90), "NVRTC {release} knows no sm_90");
    for capability in unknown {
        println!("skipped: NVRTC {release} does not know sm_{capability}");
    }
    let verbose = std::env::var_os("PCAE_LIST_KERNELS").is_some();
    let mut failures = Vec::new();
    // Of the longest to compile, first.
    for file in File::ALL.into_iter().rev() {
        std::thread::scope(|scope| {
            let running: Vec<_> = [Precision::F32, Precision::Bf16]
                .into_iter()
                .flat_map(|precision| known.iter().map(move |it| (precision, *it)))
                .map(|(precision, capability)| {
                    let compiler = &compiler;
                    scope.spawn(move || {
                        let image = compiler.cubin(file, precision, capability);
                        (precision, capability, image)
                    })
                })
                .collect();
            for thread in running {
                let (precision, capability, image) = thread.join().unwrap();
                let what = format!("{} in {precision:?} for sm_{capability}", file.name());
                let image = match image {
                    Ok(image) => image,
                    Err(error) => {
                        failures.push(error.to_string());
                        continue;
                    }
                };
                let mut kernels = Elf(&image).kernels();
                if capability >= 90 {
                    // The system's own, in each block that has any.
                    for made in kernels.values_mut() {
                        made.shared = made.shared.saturating_sub(1024);
                    }
                }
                for kernel in KERNELS.iter().filter(|kernel| kernel.file == file) {
                    let Some(made) = kernels.remove(kernel.name) else {
                        failures.push(format!("{what}: no kernel {}", kernel.name));
                        continue;
                    };
                    if verbose {
                        println!("{what}: {} {made:?}", kernel.name);
                    }
                    for wrong in wrong(kernel, &made) {
                        failures.push(format!("{what}: {} has {wrong}", kernel.name));
                    }
                }
                for name in kernels.keys() {
                    failures.push(format!("{what}: {name} is not in KERNELS"));
                }
            }
        });
    }
    assert!(failures.is_empty(), "{}", failures.join("\n"));
}

#[test]
fn entry_points_are_named_once() {
    let mut names: Vec<_> = KERNELS
        .iter()
        .map(|kernel| (kernel.file.name(), kernel.name))
        .collect();
    names.sort_unstable();
    names.dedup();
    assert_eq!(names.len(), KERNELS.len());
}
