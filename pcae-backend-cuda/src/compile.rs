//! NVRTC, and a cache of what it made.
//!
//! Compiling all files takes seconds, so an image is kept on disk, named by the sum of everything that it depends on: source,
//! options, architecture, NVRTC's version. An entry is written beside its place and renamed, carries its whole key and the sum of
//! its bytes, and is made again where either does not fit. Entries that were not used for long go when there are many. Without a usable
//! folder everything works, only slower.

use core::ffi::{CStr, c_char, c_int};
use std::ffi::CString;
use std::fs;
use std::hash::{BuildHasher, RandomState};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use cudarc::nvrtc::result::NvrtcError;
use cudarc::nvrtc::{result, sys};

use crate::Precision;
use crate::driver::{Context, nvrtc_library};
use crate::error::Error;
use crate::kernels::File;
use crate::versions::Version;

/// Entries that are kept: those of nine files in two formats, for some devices and versions of this program.
const ENTRIES: usize = 128;

/// What was used within this time is kept in any case: another process may be about to read it, or be writing it.
const RECENT: Duration = Duration::from_secs(24 * 60 * 60);

/// NVRTC, as it is on this machine.
#[derive(Debug)]
pub struct Compiler {
    version: (c_int, c_int),
    /// Compute capabilities that it compiles for, as 90 for 9.0.
    capabilities: Vec<u32>,
    /// Where images are kept, if they are.
    folder: Option<Folder>,
}

/// What an image is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Target {
    /// One compute capability.
    Cubin(u32),
    /// That and all later ones, by the driver's compiler.
    Ptx(u32),
}

impl Target {
    fn option(self) -> String {
        match self {
            Self::Cubin(capability) => format!("--gpu-architecture=sm_{capability}"),
            Self::Ptx(capability) => format!("--gpu-architecture=compute_{capability}"),
        }
    }
}

fn failed(call: &'static str, error: NvrtcError) -> Error {
    Error::Nvrtc {
        call,
        error: format!("{:?}", error.0),
    }
}

/// A program of NVRTC's.
struct Program(sys::nvrtcProgram);

impl Drop for Program {
    fn drop(&mut self) {
        // SAFETY: created by NVRTC, and dropped once.
        let _ = unsafe { result::destroy_program(self.0) };
    }
}

impl Compiler {
    /// Looks for NVRTC. No device is needed, nor its driver.
    ///
    /// # Errors
    /// [`Error::Library`] if it is not there, [`Error::Nvrtc`] if it does not say what it is.
    pub fn new() -> Result<Self, Error> {
        nvrtc_library()?;
        let (mut major, mut minor): (c_int, c_int) = (0, 0);
        // SAFETY: writes two integers.
        unsafe { sys::nvrtcVersion(&raw mut major, &raw mut minor) }
            .result()
            .map_err(|error| failed("nvrtcVersion", error))?;
        let mut count: c_int = 0;
        // SAFETY: writes one integer.
        unsafe { sys::nvrtcGetNumSupportedArchs(&raw mut count) }
            .result()
            .map_err(|error| failed("nvrtcGetNumSupportedArchs", error))?;
        let mut capabilities: Vec<c_int> = vec![0; usize::try_from(count).unwrap_or(0)];
        // SAFETY: writes as many as it has said.
        unsafe { sys::nvrtcGetSupportedArchs(capabilities.as_mut_ptr()) }
            .result()
            .map_err(|error| failed("nvrtcGetSupportedArchs", error))?;
        Ok(Self {
            version: (major, minor),
            capabilities: capabilities
                .into_iter()
                .filter_map(|capability| u32::try_from(capability).ok())
                .collect(),
            folder: None,
        })
    }

    /// Whether it makes cubins for this compute capability (90 for 9.0): older ones know no newer devices.
    pub fn knows(&self, capability: u32) -> bool {
        self.capabilities.contains(&capability)
    }

    /// The same compiler with its images kept in `folder`, which is made where it is not there.
    ///
    /// # Errors
    /// If it cannot be made.
    pub fn cached(mut self, folder: &Path) -> io::Result<Self> {
        fs::create_dir_all(folder)?;
        self.folder = Some(Folder(folder.to_owned()));
        Ok(self)
    }

    /// A cubin of `file` for one compute capability (90 for 9.0).
    ///
    /// # Errors
    /// [`Error::Compile`] with the compiler's messages.
    pub fn cubin(
        &self,
        file: File,
        precision: Precision,
        capability: u32,
    ) -> Result<Vec<u8>, Error> {
        let (image, _) = self.image(file, precision, Target::Cubin(capability))?;
        Ok(image)
    }

    /// Its CUDA release, as `13.0`.
    pub fn release(&self) -> String {
        self.version().to_string()
    }

    pub(crate) fn version(&self) -> Version {
        let small = |x| u32::try_from(x).unwrap_or(0);
        Version {
            major: small(self.version.0),
            minor: small(self.version.1),
        }
    }

    /// Whether it knows no device as new as this.
    pub(crate) fn needs_ptx(&self, capability: u32) -> bool {
        matches!(self.target(capability), Target::Ptx(_))
    }

    /// A device that is newer than the compiler gets PTX.
    fn target(&self, capability: u32) -> Target {
        let older = self
            .capabilities
            .iter()
            .filter(|known| **known <= capability);
        match older.max() {
            Some(newest) if *newest < capability => Target::Ptx(*newest),
            _ => Target::Cubin(capability),
        }
    }

    fn compile(&self, file: File, precision: Precision, target: Target) -> Result<Vec<u8>, Error> {
        let architecture = target.option();
        let refused = |log: String| Error::Compile {
            file: file.name(),
            architecture: architecture
                .trim_start_matches("--gpu-architecture=")
                .to_owned(),
            log,
        };
        let text = |text: String| {
            CString::new(text).map_err(|_| refused("a zero within the source".to_owned()))
        };
        let (source, name) = (text(file.source())?, text(file.name().to_owned())?);
        let program = result::create_program(&source, Some(&name))
            .map(Program)
            .map_err(|error| failed("nvrtcCreateProgram", error))?;
        let mut options = vec![architecture.as_str()];
        options.extend(File::options(precision));
        // SAFETY: created above.
        if let Err(error) = unsafe { result::compile_program(program.0, &options) } {
            // SAFETY: as above.
            let log = unsafe { result::get_program_log(program.0) };
            let log = log.ok().and_then(|log| {
                let log: Vec<u8> = log.into_iter().map(|c: c_char| c as u8).collect();
                let log = CStr::from_bytes_until_nul(&log).ok()?;
                Some(log.to_string_lossy().trim_end().to_owned())
            });
            return Err(match (error.0, log) {
                (sys::nvrtcResult::NVRTC_ERROR_COMPILATION, Some(log)) => refused(log),
                _ => failed("nvrtcCompileProgram", error),
            });
        }
        match target {
            Target::Cubin(_) => {
                let mut len = 0;
                // SAFETY: compiled above; writes one number.
                unsafe { sys::nvrtcGetCUBINSize(program.0, &raw mut len) }
                    .result()
                    .map_err(|error| failed("nvrtcGetCUBINSize", error))?;
                let mut image = vec![0_u8; len];
                // SAFETY: writes as many bytes as it has said.
                unsafe { sys::nvrtcGetCUBIN(program.0, image.as_mut_ptr().cast()) }
                    .result()
                    .map_err(|error| failed("nvrtcGetCUBIN", error))?;
                Ok(image)
            }
            Target::Ptx(_) => {
                // SAFETY: compiled above.
                let ptx = unsafe { result::get_ptx(program.0) }
                    .map_err(|error| failed("nvrtcGetPTX", error))?;
                Ok(ptx.into_iter().map(|c: c_char| c as u8).collect())
            }
        }
    }

    /// From the cache if it is there. The second is why it cannot be kept, if it cannot.
    fn image(
        &self,
        file: File,
        precision: Precision,
        target: Target,
    ) -> Result<(Vec<u8>, Option<io::Error>), Error> {
        let Some(folder) = &self.folder else {
            return Ok((self.compile(file, precision, target)?, None));
        };
        let key = self.key(file, precision, target);
        if let Some(image) = folder.read(&key) {
            return Ok((image, None));
        }
        let image = self.compile(file, precision, target)?;
        let kept = folder.write(&key, &image);
        Ok((image, kept.err()))
    }

    /// Images of all files for a device, in their order, with the user's cache. The second is why that could not be used, if it
    /// could not.
    pub(crate) fn all(
        self,
        context: &Context,
        precision: Precision,
    ) -> Result<(Vec<Vec<u8>>, Option<String>), Error> {
        let target = self.target(context.capability);
        let (compiler, mut warning) = match Folder::find() {
            Ok(folder) => {
                let folder = Some(folder);
                (Self { folder, ..self }, None)
            }
            Err(warning) => (self, Some(warning)),
        };
        // NVRTC may be called from several threads.
        let made: Vec<_> = std::thread::scope(|scope| {
            let running = File::ALL.map(|file| {
                let compiler = &compiler;
                scope.spawn(move || compiler.image(file, precision, target))
            });
            running.into_iter().map(|thread| thread.join()).collect()
        });
        let mut images = Vec::with_capacity(made.len());
        for made in made {
            let (image, kept) = made.unwrap_or_else(|_| {
                Err(Error::Nvrtc {
                    call: "nvrtcCompileProgram",
                    error: "panicked".to_owned(),
                })
            })?;
            images.push(image);
            if let (Some(error), Some(folder)) = (kept, &compiler.folder) {
                warning.get_or_insert(format!(
                    "kernels are compiled anew each time: cannot write to {}: {error}; PCAE_CACHE names another folder",
                    folder.0.display()
                ));
            }
        }
        Ok((images, warning))
    }

    fn key(&self, file: File, precision: Precision, target: Target) -> Key {
        let source = file.source();
        let (major, minor) = self.version;
        let text = format!(
            "pcae kernels: {}, nvrtc {major}.{minor}, {} {}, source {:016x}{:016x}\n",
            file.name(),
            target.option(),
            File::options(precision).join(" "),
            fnv(source.as_bytes(), 0),
            fnv(source.as_bytes(), 1),
        );
        let stem = file.name().trim_end_matches(".cu");
        Key {
            name: format!("{stem}-{:016x}.image", fnv(text.as_bytes(), 0)),
            text,
        }
    }
}

/// What an image depends on.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Key {
    name: String,
    /// All of it, one line.
    text: String,
}

/// Fowler-Noll-Vo, 64 bits, from one of its usual start and others.
fn fnv(bytes: &[u8], start: u64) -> u64 {
    bytes.iter().fold(
        0xcbf2_9ce4_8422_2325 ^ start.rotate_left(32),
        |sum, byte| (sum ^ u64::from(*byte)).wrapping_mul(0x0000_0100_0000_01b3),
    )
}

/// What a file's name has behind that of an entry, as [`Compiler::key`] makes them; `None` for files of others.
fn behind_entry(name: &str) -> Option<&str> {
    let (stem, rest) = name.split_once(".image")?;
    let (file, sum) = stem.rsplit_once('-')?;
    let is_sum = sum.len() == 16 && sum.bytes().all(|byte| byte.is_ascii_hexdigit());
    (is_sum && !file.is_empty()).then_some(rest)
}

fn is_old(used: SystemTime, now: SystemTime) -> bool {
    now.duration_since(used).is_ok_and(|age| age > RECENT)
}

/// Where images are kept.
#[derive(Debug)]
struct Folder(PathBuf);

impl Folder {
    /// `PCAE_CACHE`, or `pcae` in `XDG_CACHE_HOME` or `~/.cache`; made where it is not there.
    fn find() -> Result<Self, String> {
        let set = |name| std::env::var_os(name).filter(|value| !value.is_empty());
        let path = set("PCAE_CACHE")
            .map(PathBuf::from)
            .or_else(|| set("XDG_CACHE_HOME").map(|home| Path::new(&home).join("pcae")))
            .or_else(|| set("HOME").map(|home| Path::new(&home).join(".cache").join("pcae")))
            .ok_or("kernels are compiled anew each time: none of PCAE_CACHE, XDG_CACHE_HOME and HOME is set")?;
        match fs::create_dir_all(&path) {
            Ok(()) => Ok(Self(path)),
            Err(error) => Err(format!(
                "kernels are compiled anew each time: cannot make {}: {error}; PCAE_CACHE names another folder",
                path.display()
            )),
        }
    }

    /// `None` if it is not there, or is anything but what was written.
    fn read(&self, key: &Key) -> Option<Vec<u8>> {
        let path = self.0.join(&key.name);
        let bytes = fs::read(&path).ok()?;
        let (sum, image) = bytes
            .strip_prefix(key.text.as_bytes())?
            .split_first_chunk()?;
        if fnv(image, 0) != u64::from_le_bytes(*sum) {
            return None;
        }
        // When it was used last. A folder that cannot be written to is never cleaned either.
        let used = fs::File::options().append(true).open(&path);
        let _ = used.and_then(|file| file.set_modified(SystemTime::now()));
        Some(image.to_vec())
    }

    /// Removes all but [`ENTRIES`] entries, those first that were used longest ago, and what writers have left that did not come to
    /// their end; nothing that is [`RECENT`]. What another process removes at the same time is gone as well.
    fn clean(&self) {
        let Ok(files) = fs::read_dir(&self.0) else {
            return;
        };
        let now = SystemTime::now();
        let mut entries = Vec::new();
        for file in files.flatten() {
            let name = file.file_name();
            let Some(rest) = name.to_str().and_then(behind_entry) else {
                continue;
            };
            let Ok(used) = file.metadata().and_then(|it| it.modified()) else {
                continue;
            };
            if rest.is_empty() {
                entries.push((used, file.path()));
            } else if is_old(used, now) {
                let _ = fs::remove_file(file.path());
            }
        }
        entries.sort_by_key(|(used, _)| core::cmp::Reverse(*used));
        for (used, path) in entries.into_iter().skip(ENTRIES) {
            if is_old(used, now) {
                let _ = fs::remove_file(path);
            }
        }
    }

    fn write(&self, key: &Key, image: &[u8]) -> io::Result<()> {
        // Containers that share a folder may have the same process ids.
        let random = RandomState::new().hash_one(std::process::id());
        let temporary = self.0.join(format!("{}.{random:016x}", key.name));
        self.write_by(&temporary, key, image)?;
        self.clean();
        Ok(())
    }

    /// Writes to `temporary`, which must not be there yet, and renames it.
    fn write_by(&self, temporary: &Path, key: &Key, image: &[u8]) -> io::Result<()> {
        // What another process is writing there is left alone.
        let mut file = fs::File::create_new(temporary)?;
        let mut write = || {
            file.write_all(key.text.as_bytes())?;
            file.write_all(&fnv(image, 0).to_le_bytes())?;
            file.write_all(image)?;
            file.sync_all()?;
            fs::rename(temporary, self.0.join(&key.name))
        };
        write().inspect_err(|_| {
            let _ = fs::remove_file(temporary);
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn folder(name: &str) -> Folder {
        let path = std::env::temp_dir().join(format!("pcae-cache-{}-{name}", std::process::id()));
        fs::create_dir_all(&path).unwrap();
        Folder(path)
    }

    #[test]
    fn an_image_comes_back_only_whole_and_for_its_key() {
        let folder = folder("entry");
        let compiler = Compiler {
            version: (13, 0),
            capabilities: vec![80, 90],
            folder: None,
        };
        let key = compiler.key(File::Rows, Precision::F32, Target::Cubin(90));
        let image: Vec<u8> = (0..1000).map(|i| (i * 7 % 251) as u8).collect();
        assert_eq!(folder.read(&key), None);
        folder.write(&key, &image).unwrap();
        assert_eq!(folder.read(&key), Some(image.clone()));
        assert_eq!(
            fs::read_dir(&folder.0).unwrap().count(),
            1,
            "no temporary is left"
        );

        // The name's sum met by another key.
        let other = Key {
            text: key.text.replace("13.0", "13.1"),
            ..key.clone()
        };
        assert_eq!(folder.read(&other), None);
        let path = folder.0.join(&key.name);
        let whole = fs::read(&path).unwrap();
        for len in [0, 1, key.text.len(), key.text.len() + 7, whole.len() - 1] {
            fs::write(&path, &whole[..len]).unwrap();
            assert_eq!(folder.read(&key), None, "of {len} bytes");
        }
        for at in [0, key.text.len(), key.text.len() + 8, whole.len() - 1] {
            let mut broken = whole.clone();
            broken[at] ^= 4;
            fs::write(&path, &broken).unwrap();
            assert_eq!(folder.read(&key), None, "byte {at}");
        }
        folder.write(&key, &image).unwrap();
        assert_eq!(folder.read(&key), Some(image));
        fs::remove_dir_all(&folder.0).unwrap();
    }

    #[test]
    fn what_another_process_is_writing_is_left_alone() {
        let folder = folder("others");
        let key = Key {
            name: format!("rows-{:016x}.image", 1),
            text: "an entry\n".to_owned(),
        };
        let temporary = folder.0.join(format!("{}.0", key.name));
        fs::write(&temporary, b"half an im").unwrap();
        let error = folder.write_by(&temporary, &key, b"image").unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::AlreadyExists);
        assert_eq!(fs::read(&temporary).unwrap(), b"half an im");
        assert_eq!(folder.read(&key), None);
        // By a name of its own it is written, all the same.
        folder.write(&key, b"image").unwrap();
        assert_eq!(folder.read(&key).as_deref(), Some(&b"image"[..]));
        assert_eq!(fs::read(&temporary).unwrap(), b"half an im");
        fs::remove_dir_all(&folder.0).unwrap();
    }

    #[test]
    fn entries_that_were_not_used_for_long_go_when_there_are_many() {
        let folder = folder("old");
        let key = |i: usize| Key {
            name: format!("rows-{:016x}.image", 7 * i),
            text: format!("entry {i}\n"),
        };
        let aged = |name: &str, hours: u64| {
            let path = folder.0.join(name);
            let file = fs::File::options().append(true).create(true).open(path);
            let age = Duration::from_secs(hours * 60 * 60);
            file.unwrap().set_modified(SystemTime::now() - age).unwrap();
        };
        let old = ENTRIES + 20;
        for i in 0..old {
            folder.write(&key(i), b"image").unwrap();
            aged(&key(i).name, 30 + i as u64);
        }
        // What others have there, and what they are writing now; then what was left two days ago.
        let others = ["notes.image", "rows-12.image", "model.bin"];
        for name in others {
            aged(name, 1000);
        }
        let writing = format!("{}.17-0", key(0).name);
        aged(&writing, 1);
        let left = format!("{}.18-0", key(0).name);
        aged(&left, 48);
        // The oldest was used just now.
        assert!(folder.read(&key(old - 1)).is_some());

        folder.write(&key(old), b"image").unwrap();
        let is_there = |name: &str| folder.0.join(name).exists();
        assert!(others.into_iter().all(is_there));
        assert!(is_there(&writing) && !is_there(&left));
        let kept: Vec<_> = (0..=old).filter(|i| is_there(&key(*i).name)).collect();
        let mut expected: Vec<_> = (0..ENTRIES - 2).collect();
        expected.extend([old - 1, old]);
        assert_eq!(kept, expected);

        // Nothing that is recent goes, however many there are.
        for i in 0..old {
            folder.write(&key(i), b"image").unwrap();
        }
        assert!((0..=old).all(|i| is_there(&key(i).name)));
        fs::remove_dir_all(&folder.0).unwrap();
    }

    #[test]
    fn everything_that_an_image_depends_on_is_in_its_name() {
        let compiler = |minor| Compiler {
            version: (13, minor),
            capabilities: Vec::new(),
            folder: None,
        };
        let mut names: Vec<String> = Vec::new();
        for minor in [0, 1] {
            for file in File::ALL {
                for precision in [Precision::F32, Precision::Bf16] {
                    for target in [Target::Cubin(90), Target::Ptx(90), Target::Cubin(100)] {
                        names.push(compiler(minor).key(file, precision, target).name);
                    }
                }
            }
        }
        let count = names.len();
        names.sort();
        names.dedup();
        assert_eq!(names.len(), count);
    }

    #[test]
    fn a_device_newer_than_the_compiler_gets_ptx() {
        let compiler = Compiler {
            version: (13, 0),
            capabilities: vec![75, 80, 90, 100],
            folder: None,
        };
        assert_eq!(compiler.target(90), Target::Cubin(90));
        assert_eq!(compiler.target(89), Target::Ptx(80));
        assert_eq!(compiler.target(130), Target::Ptx(100));
        assert_eq!(compiler.target(70), Target::Cubin(70));
    }

    #[test]
    fn sums_depend_on_every_byte_and_its_place() {
        assert_eq!(fnv(b"a", 0), 0xaf63_dc4c_8601_ec8c); // published
        assert_ne!(fnv(b"ab", 0), fnv(b"ba", 0));
        assert_ne!(fnv(b"a", 0), fnv(b"a", 1));
    }
}
