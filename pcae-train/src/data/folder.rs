//! Data sets in folders of pictures.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io::ErrorKind::{NotFound, PermissionDenied};
use std::io::{self, Cursor, Read, Seek, SeekFrom};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};

use image::metadata::Orientation;
use image::{ColorType, DynamicImage, ImageDecoder, ImageFormat, ImageReader, Limits};

use crate::backends::count;

use super::{Classes, DataError, Picture, Source, Splits, join, luma, split, whole};

const EXTENSIONS: [&str; 4] = ["jpg", "jpeg", "png", "webp"];

/// A tenth of the pictures is held out where no folder says otherwise.
const HELD_OUT_EVERY: usize = 10;

/// Folders within folders; deeper is most likely a link that leads back.
const MAX_DEPTH: usize = 16;

/// Bytes of a file, and of its pixels once decoded (89 megapixels of RGB), beyond which it is refused.
const MAX_BYTES: u64 = 1 << 28;

/// Pictures in files.
#[derive(Debug)]
pub(super) struct Files {
    pub(super) entries: Vec<Entry>,
}

#[derive(Debug)]
pub(super) struct Entry {
    pub(super) path: PathBuf,
    pub(super) label: Option<u32>,
}

/// The pictures below one folder.
enum Listing {
    Flat(Vec<PathBuf>),
    /// By name of the class, none empty, and the names of the folders that are.
    Classes(BTreeMap<String, Vec<PathBuf>>, Vec<String>),
}

/// Opens a folder of pictures.
pub(super) fn open(root: &Path, channels: usize) -> Result<Splits, DataError> {
    let title = root.display().to_string();
    let train = root.join("train");
    if !train.is_dir() {
        let (files, classes) = label([list(root)?]);
        let [files] = files;
        let parts = split(root, &title, Source::Files(files), channels, HELD_OUT_EVERY)?;
        return Ok(join(parts, classes));
    }
    let held_out = ["val", "test"]
        .map(|name| root.join(name))
        .into_iter()
        .find(|path| path.is_dir());
    let Some(held_out) = held_out else {
        let ([files], classes) = label([list(&train)?]);
        let parts = split(
            &train,
            &title,
            Source::Files(files),
            channels,
            HELD_OUT_EVERY,
        )?;
        return Ok(join(parts, classes));
    };
    pair(&train, &held_out, channels)
}

/// Opens two folders of pictures as the parts of one data set.
pub(super) fn open_pair(
    root: &Path,
    held_out: &Path,
    channels: usize,
) -> Result<Splits, DataError> {
    let train = root.join("train");
    let train = if train.is_dir() { &train } else { root };
    pair(train, held_out, channels)
}

fn pair(train: &Path, held_out: &Path, channels: usize) -> Result<Splits, DataError> {
    let ([train_files, held_out_files], classes) = label([list(train)?, list(held_out)?]);
    let part =
        |path: &Path, files| whole(path.display().to_string(), Source::Files(files), channels);
    Ok(join(
        (part(train, train_files), part(held_out, held_out_files)),
        classes,
    ))
}

/// Numbers the classes of all listings by their sorted names: a name has one label in every part.
fn label<const N: usize>(listings: [Listing; N]) -> ([Files; N], Classes) {
    let mut labels = BTreeMap::new();
    let mut empty = BTreeSet::new();
    for listing in &listings {
        if let Listing::Classes(classes, without) = listing {
            labels.extend(classes.keys().map(|name| (name.clone(), 0)));
            empty.extend(without.iter().cloned());
        }
    }
    empty.retain(|name| !labels.contains_key(name));
    for (next, label) in (0..).zip(labels.values_mut()) {
        *label = next;
    }
    let files = listings.map(|listing| Files {
        entries: match listing {
            Listing::Flat(paths) => paths
                .into_iter()
                .map(|path| Entry { path, label: None })
                .collect(),
            Listing::Classes(classes, _) => classes
                .into_iter()
                .flat_map(|(name, paths)| {
                    let label = labels.get(&name).copied();
                    paths.into_iter().map(move |path| Entry { path, label })
                })
                .collect(),
        },
    });
    let names: Vec<String> = labels.into_keys().collect();
    let classes = Classes {
        count: names.len(),
        names: names.into(),
        empty: empty.into_iter().collect(),
    };
    (files, classes)
}

/// What a folder holds, in the order of names, without hidden entries.
struct Entries {
    folders: Vec<PathBuf>,
    pictures: Vec<PathBuf>,
    archives: Vec<PathBuf>,
}

fn entries(folder: &Path) -> Result<Entries, DataError> {
    let failed = |error| DataError::Read {
        path: folder.to_owned(),
        error,
    };
    let mut found = Entries {
        folders: Vec::new(),
        pictures: Vec::new(),
        archives: Vec::new(),
    };
    for entry in fs::read_dir(folder).map_err(failed)? {
        let entry = entry.map_err(failed)?;
        if entry.file_name().as_encoded_bytes().starts_with(b".") {
            continue;
        }
        let path = entry.path();
        let mut kind = entry.file_type().map_err(failed)?;
        if kind.is_symlink() {
            // A link to nothing is no picture.
            let Ok(target) = fs::metadata(&path) else {
                continue;
            };
            kind = target.file_type();
        }
        if kind.is_dir() {
            found.folders.push(path);
        } else if kind.is_file() && has_picture_extension(&path) {
            found.pictures.push(path);
        } else if kind.is_file() && Archive::of(&path).is_some() {
            found.archives.push(path);
        }
    }
    found.archives.sort_unstable();
    found.folders.sort_unstable();
    found.pictures.sort_unstable();
    Ok(found)
}

pub(crate) fn has_picture_extension(path: &Path) -> bool {
    path.extension().is_some_and(|extension| {
        EXTENSIONS
            .iter()
            .any(|known| extension.eq_ignore_ascii_case(known))
    })
}

/// A file that holds others, by its name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Archive {
    /// As it is: what is in it can be read where it lies.
    Tar,
    /// Compressed.
    Packed,
}

impl Archive {
    pub(crate) fn of(path: &Path) -> Option<Self> {
        let name = path.file_name()?.to_string_lossy().to_ascii_lowercase();
        let (stem, extension) = name.rsplit_once('.')?;
        match extension {
            "tar" => Some(Self::Tar),
            "tgz" | "tbz" | "tbz2" | "txz" | "tzst" => Some(Self::Packed),
            "gz" | "bz2" | "xz" | "zst" if stem.ends_with(".tar") => Some(Self::Packed),
            _ => None,
        }
    }
}

fn list(root: &Path) -> Result<Listing, DataError> {
    let found = entries(root)?;
    let (mut classes, mut empty) = (BTreeMap::new(), Vec::new());
    for folder in found.folders {
        let mut pictures = Vec::new();
        collect(&folder, 1, &mut pictures)?;
        let name = folder.file_name().unwrap_or_default();
        let name = name.to_string_lossy().into_owned();
        if pictures.is_empty() {
            empty.push(name);
        } else {
            // Two names that differ only in bytes that are not UTF-8 are one class.
            classes
                .entry(name)
                .or_insert_with(Vec::new)
                .append(&mut pictures);
        }
    }
    match (found.pictures, classes) {
        (pictures, classes) if pictures.is_empty() && classes.is_empty() => {
            Err(DataError::Layout {
                path: root.to_owned(),
                expected: "pictures (.jpg, .jpeg, .png, .webp), a folder of them for each class, or train-images-idx3-ubyte[.gz]".to_owned(),
                found: "none of these".to_owned(),
                advice: "check the path, or leave --data away to use the embedded pictures",
            })
        }
        (pictures, classes) if classes.is_empty() => Ok(Listing::Flat(pictures)),
        (pictures, classes) if pictures.is_empty() => Ok(Listing::Classes(classes, empty)),
        (pictures, classes) => Err(DataError::Layout {
            path: root.to_owned(),
            expected: "either a folder of pictures for each class, or pictures alone".to_owned(),
            found: format!(
                "{}, the first {}, beside {} of pictures",
                count(pictures.len(), "picture"),
                pictures[0].display(),
                count(classes.len(), "folder")
            ),
            advice: "move the pictures into a class folder or out of the data set",
        }),
    }
}

/// The pictures at `path`, a file or a folder.
pub(super) fn files(path: &Path) -> Result<Vec<PathBuf>, DataError> {
    let metadata = fs::metadata(path).map_err(|error| DataError::Read {
        path: path.to_owned(),
        error,
    })?;
    if !metadata.is_dir() {
        return Ok(vec![path.to_owned()]);
    }
    let mut pictures = Vec::new();
    collect(path, 0, &mut pictures)?;
    if pictures.is_empty() {
        return Err(DataError::Layout {
            path: path.to_owned(),
            expected: "pictures (.jpg, .jpeg, .png, .webp) at any depth".to_owned(),
            found: "none".to_owned(),
            advice: "check the path",
        });
    }
    Ok(pictures)
}

/// Appends the pictures at any depth below `folder`.
fn collect(folder: &Path, depth: usize, pictures: &mut Vec<PathBuf>) -> Result<(), DataError> {
    collect_all(folder, depth, pictures, &mut Vec::new())
}

/// Appends the pictures and the archives at any depth below `folder`.
pub(crate) fn collect_all(
    folder: &Path,
    depth: usize,
    pictures: &mut Vec<PathBuf>,
    archives: &mut Vec<PathBuf>,
) -> Result<(), DataError> {
    if depth > MAX_DEPTH {
        return Err(DataError::Layout {
            path: folder.to_owned(),
            expected: format!("at most {MAX_DEPTH} folders within each other"),
            found: "more".to_owned(),
            advice: "look for a link that leads back to a folder above it",
        });
    }
    let mut found = entries(folder)?;
    pictures.append(&mut found.pictures);
    archives.append(&mut found.archives);
    for folder in found.folders {
        collect_all(&folder, depth + 1, pictures, archives)?;
    }
    Ok(())
}

/// Decodes a file to `channels` (1 or 3) channels, upright by its EXIF orientation.
///
/// The format is told by the content. Only the pixels of ordinary pictures go straight into `picture`; what has alpha,
/// 16 bits, another number of channels or a rotation takes a detour over RGBA.
pub(crate) fn decode(path: &Path, channels: usize, picture: &mut Picture) -> Result<(), DataError> {
    guarded(path, || try_decode(path, channels, picture))
}

/// [`decode`] for the `len` bytes from `offset` on in the file at `archive`; `path` is their name in errors.
pub(crate) fn decode_within(
    archive: &Path,
    (offset, len): (u64, u64),
    path: &Path,
    channels: usize,
    picture: &mut Picture,
) -> Result<(), DataError> {
    guarded(path, || {
        check_size(len)?;
        let mut file = fs::File::open(archive)?;
        file.seek(SeekFrom::Start(offset))?;
        let mut bytes = Vec::with_capacity(usize::try_from(len)?);
        file.take(len).read_to_end(&mut bytes)?;
        decode_bytes(&bytes, channels, picture)
    })
}

fn guarded(
    path: &Path,
    decode: impl FnOnce() -> Result<(), Box<dyn std::error::Error>>,
) -> Result<(), DataError> {
    // Decoders are large and meet untrusted files: a bug in one should cost one picture, not a run of days.
    let decoded = catch_unwind(AssertUnwindSafe(decode));
    let reason = match decoded {
        Ok(Ok(())) => return Ok(()),
        Ok(Err(error)) => match error.downcast::<io::Error>() {
            // It may be a good picture: nothing was seen of it.
            Ok(error) if matches!(error.kind(), NotFound | PermissionDenied) => {
                return Err(DataError::Read {
                    path: path.to_owned(),
                    error: *error,
                });
            }
            Ok(error) => error.to_string(),
            Err(error) => error.to_string().replace(['\n', '\r'], " "),
        },
        Err(_) => "a picture that makes the decoder panic".to_owned(),
    };
    Err(DataError::Picture {
        path: path.to_owned(),
        reason,
    })
}

fn try_decode(
    path: &Path,
    channels: usize,
    picture: &mut Picture,
) -> Result<(), Box<dyn std::error::Error>> {
    let bytes = fs::metadata(path)?.len();
    check_size(bytes)?;
    decode_bytes(&fs::read(path)?, channels, picture)
}

/// Refuses what would take too much memory.
fn check_size(bytes: u64) -> Result<(), String> {
    if bytes > MAX_BYTES {
        return Err(format!("a file of {bytes} bytes, more than {MAX_BYTES}"));
    }
    Ok(())
}

fn decode_bytes(
    file: &[u8],
    channels: usize,
    picture: &mut Picture,
) -> Result<(), Box<dyn std::error::Error>> {
    let mut reader = ImageReader::new(Cursor::new(file)).with_guessed_format()?;
    if reader.format() == Some(ImageFormat::Jpeg) && is_cut_short(file) {
        return Err("a JPEG file without its end".into());
    }
    let mut limits = Limits::default();
    limits.max_alloc = Some(2 * MAX_BYTES);
    reader.limits(limits);
    let mut decoder = reader.into_decoder()?;
    let (width, height) = decoder.dimensions();
    let bytes = decoder.total_bytes();
    if bytes == 0 || bytes > MAX_BYTES {
        return Err(
            format!("{width}x{height} pixels in {bytes} bytes, not 1 to {MAX_BYTES}").into(),
        );
    }
    // A damaged EXIF block says nothing about the pixels.
    let orientation = decoder.orientation().unwrap_or(Orientation::NoTransforms);
    picture.channels = channels;
    picture.pixels.clear();
    let direct = matches!(
        (decoder.color_type(), channels),
        (ColorType::L8, 1) | (ColorType::Rgb8, 3)
    );
    if direct && orientation == Orientation::NoTransforms {
        picture.pixels.resize(usize::try_from(bytes)?, 0);
        decoder.read_image(&mut picture.pixels)?;
        (picture.width, picture.height) = (width as usize, height as usize);
        return Ok(());
    }
    let mut decoded = DynamicImage::from_decoder(decoder)?;
    decoded.apply_orientation(orientation);
    let rgba = decoded.into_rgba8();
    (picture.width, picture.height) = (rgba.width() as usize, rgba.height() as usize);
    for &[r, g, b, alpha] in rgba.as_raw().as_chunks().0 {
        let rgb = [r, g, b].map(|v| on_white(v, alpha));
        match channels {
            1 => picture.pixels.push(luma(rgb)),
            _ => picture.pixels.extend(rgb),
        }
    }
    Ok(())
}

/// Whether a JPEG file lacks the marker of its end, as after a broken download. The decoder would fill in grey.
fn is_cut_short(jpeg: &[u8]) -> bool {
    let mut rest = jpeg.get(2..).unwrap_or_default();
    loop {
        rest = match rest {
            [0xff, 0xff, ..] => &rest[1..],
            // The first scan: all before it, which may hold a thumbnail with an end of its own, is skipped by now.
            [0xff, 0xda, scan @ ..] => return !scan.windows(2).rev().any(|w| w == [0xff, 0xd9]),
            [0xff, 0x01 | 0xd0..=0xd8, tail @ ..] => tail,
            [0xff, _, high, low, ..] => {
                let length = usize::from(u16::from_be_bytes([*high, *low]));
                rest.get(2 + length..).unwrap_or_default()
            }
            [] => return true,
            // Not for this function to judge.
            _ => return false,
        };
    }
}

/// `v` with opacity `alpha` over white, rounded to the nearest.
fn on_white(v: u8, alpha: u8) -> u8 {
    let (v, alpha) = (u32::from(v), u32::from(alpha));
    ((v * alpha + 255 * (255 - alpha) + 127) / 255) as u8
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::Dataset;
    use image::{GrayImage, ImageBuffer, Luma, LumaA, Rgb, RgbImage, Rgba};

    fn flat(width: u32, height: u32, rgb: [u8; 3]) -> RgbImage {
        RgbImage::from_pixel(width, height, Rgb(rgb))
    }

    fn pixels(dataset: &Dataset, i: usize) -> Picture {
        let mut picture = Picture::default();
        dataset.picture(i, &mut picture).unwrap();
        picture
    }

    #[test]
    fn class_folders() {
        let dir = tempfile::tempdir().unwrap();
        for (class, grey) in [("cat", 10), ("dog", 200)] {
            let deep = dir.path().join(class).join("more");
            fs::create_dir_all(&deep).unwrap();
            for i in 0..10 {
                let name = ["a.png", "b.JPG", "c.jpeg", "d.WebP", "e.PNG"][i % 5];
                let folder = if i < 5 { deep.parent().unwrap() } else { &deep };
                flat(4, 3, [grey; 3]).save(folder.join(name)).unwrap();
            }
            fs::write(deep.join("notes.txt"), "no picture").unwrap();
            fs::write(deep.join("._a.png"), "no picture").unwrap();
        }
        fs::create_dir(dir.path().join("empty")).unwrap();
        let Splits { train, held_out } = crate::data::open(Some(dir.path()), None).unwrap();
        assert_eq!((train.len(), held_out.len()), (18, 2));
        assert_eq!(train.num_classes(), 2);
        assert_eq!(train.empty_classes(), ["empty"]);
        assert_eq!(train.class_name(1), Some("dog"));
        assert_eq!(held_out.label(0).unwrap() + held_out.label(1).unwrap(), 1);
        for i in 0..train.len() {
            let picture = pixels(&train, i);
            let wanted = if train.label(i) == Some(0) { 10 } else { 200 };
            assert_eq!((picture.width, picture.height), (4, 3));
            // JPEG and lossy WebP may be off by a little.
            assert!(
                picture.pixels.iter().all(|v| v.abs_diff(wanted) <= 2),
                "{}",
                train.name(i)
            );
        }
        let again = crate::data::open(Some(dir.path()), None).unwrap().train;
        assert!((0..18).all(|i| train.name(i) == again.name(i)));
    }

    #[test]
    fn train_and_val_folders_share_labels() {
        let dir = tempfile::tempdir().unwrap();
        for place in ["train/b", "train/c", "val/a", "val/b"] {
            let folder = dir.path().join(place);
            fs::create_dir_all(&folder).unwrap();
            flat(2, 2, [1, 2, 3]).save(folder.join("x.png")).unwrap();
        }
        let Splits { train, held_out } = crate::data::open(Some(dir.path()), None).unwrap();
        assert_eq!((train.label(0), train.label(1)), (Some(1), Some(2)));
        assert_eq!((held_out.label(0), held_out.label(1)), (Some(0), Some(1)));
        assert_eq!((train.num_classes(), held_out.num_classes()), (3, 3));
        assert_eq!(held_out.classes_without([0, 1]), ["c"]);
        assert_eq!(train.classes_without([0, 1, 2, 1]), [""; 0]);

        fs::remove_dir_all(dir.path().join("val")).unwrap();
        let Splits { train, held_out } = crate::data::open(Some(dir.path()), None).unwrap();
        assert_eq!((train.len(), held_out.len()), (1, 1));
    }

    #[test]
    fn pictures_beside_class_folders_are_an_error() {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir(dir.path().join("a")).unwrap();
        flat(2, 2, [0; 3]).save(dir.path().join("a/x.png")).unwrap();
        flat(2, 2, [0; 3]).save(dir.path().join("y.png")).unwrap();
        let error = crate::data::open(Some(dir.path()), None).unwrap_err();
        assert!(error.to_string().contains("y.png"), "{error}");
    }

    #[cfg(unix)]
    #[test]
    fn a_link_that_leads_back_is_an_error() {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir(dir.path().join("a")).unwrap();
        std::os::unix::fs::symlink(dir.path().join("a"), dir.path().join("a/loop")).unwrap();
        let error = crate::data::open(Some(dir.path()), None).unwrap_err();
        assert!(error.to_string().contains("leads back"), "{error}");
    }

    #[test]
    fn broken_files_are_replaced_and_counted() {
        let dir = tempfile::tempdir().unwrap();
        for i in 0..8 {
            flat(2, 2, [i; 3])
                .save(dir.path().join(format!("{i}.png")))
                .unwrap();
        }
        let Splits { train, .. } = crate::data::open(Some(dir.path()), None).unwrap();
        assert_eq!((train.len(), train.num_classes()), (7, 0));
        let last = pixels(&train, 0);
        for i in [5, 6] {
            fs::write(train.name(i), "not a picture").unwrap();
        }
        let mut picture = Picture::default();
        let error = train.picture(5, &mut picture).unwrap_err().to_string();
        assert!(error.contains(&train.name(5)), "{error}");
        assert!(!error.contains('\n'));
        for _ in 0..2 {
            assert_eq!(train.load(5, &mut picture).unwrap(), 0);
            assert_eq!(picture, last);
            assert_eq!(train.num_broken(), 2);
        }
        for i in 0..7 {
            fs::write(train.name(i), "not a picture").unwrap();
        }
        let error = train.load(3, &mut picture).unwrap_err().to_string();
        assert!(error.contains("found 7 in a row"), "{error}");
        assert!(error.contains(&train.name(3)), "{error}");
    }

    /// Of what cannot be opened nobody knows whether it is a picture: it is not to be removed.
    #[test]
    fn what_is_gone_is_not_called_broken() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x.png");
        let mut picture = Picture::default();
        let error = decode(&path, 3, &mut picture).unwrap_err().to_string();
        assert!(
            error.contains("x.png cannot be read") && error.contains("check the path"),
            "{error}"
        );
        fs::write(&path, "no picture").unwrap();
        let error = decode(&path, 3, &mut picture).unwrap_err().to_string();
        assert!(error.contains("save it anew"), "{error}");
    }

    #[test]
    fn every_kind_of_pixel() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x.png");
        let decoded = |channels| {
            let mut picture = Picture::default();
            decode(&path, channels, &mut picture).unwrap();
            assert_eq!(picture.channels, channels);
            assert_eq!(
                picture.pixels.len(),
                picture.width * picture.height * channels
            );
            picture.pixels
        };
        GrayImage::from_pixel(1, 1, Luma([7])).save(&path).unwrap();
        assert_eq!((decoded(1), decoded(3)), (vec![7], vec![7, 7, 7]));
        flat(1, 1, [255, 0, 0]).save(&path).unwrap();
        assert_eq!((decoded(1), decoded(3)), (vec![76], vec![255, 0, 0]));
        ImageBuffer::from_pixel(1, 1, Rgba([0_u8, 100, 255, 0]))
            .save(&path)
            .unwrap();
        assert_eq!((decoded(1), decoded(3)), (vec![255], vec![255; 3]));
        ImageBuffer::from_pixel(1, 1, LumaA([0_u8, 128]))
            .save(&path)
            .unwrap();
        assert_eq!((decoded(1), decoded(3)), (vec![127], vec![127; 3]));
        ImageBuffer::from_pixel(1, 1, Luma([0x8080_u16]))
            .save(&path)
            .unwrap();
        assert_eq!((decoded(1), decoded(3)), (vec![128], vec![128; 3]));
    }

    #[test]
    fn exif_orientation_is_applied() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x.jpg");
        RgbImage::from_fn(16, 8, |x, _| Rgb([if x < 8 { 0 } else { 255 }; 3]))
            .save(&path)
            .unwrap();
        // An EXIF block with one entry, orientation 6 (turn clockwise), right after the start of the JPEG.
        let mut jpeg = fs::read(&path).unwrap();
        let tiff = b"Exif\0\0II*\0\x08\0\0\0\x01\0\x12\x01\x03\0\x01\0\0\0\x06\0\0\0\0\0\0\0";
        let mut segment = vec![0xff, 0xe1, 0, tiff.len() as u8 + 2];
        segment.extend(tiff);
        jpeg.splice(2..2, segment);
        fs::write(&path, jpeg).unwrap();
        let mut picture = Picture::default();
        decode(&path, 1, &mut picture).unwrap();
        assert_eq!((picture.width, picture.height), (8, 16));
        assert!(picture.pixels[..4].iter().all(|&v| v < 16));
        assert!(picture.pixels[8 * 15..].iter().all(|&v| v > 240));
    }

    /// Cut anywhere, with a thumbnail's end in the header and other data after the end.
    #[test]
    fn truncated_files_are_errors() {
        let dir = tempfile::tempdir().unwrap();
        let mut picture = Picture::default();
        for name in ["x.jpg", "x.png", "x.webp"] {
            let path = dir.path().join(name);
            RgbImage::from_fn(40, 30, |x, y| Rgb([(x * y) as u8, x as u8, y as u8]))
                .save(&path)
                .unwrap();
            let mut whole = fs::read(&path).unwrap();
            if name == "x.jpg" {
                whole.splice(2..2, *b"\xff\xe7\0\x06\xff\xd9\xff\xda");
            }
            for length in 0..whole.len() {
                // The last bytes of a PNG and a WebP carry no pixels.
                if name == "x.jpg" || length < whole.len() * 9 / 10 {
                    fs::write(&path, &whole[..length]).unwrap();
                    let decoded = decode(&path, 3, &mut picture);
                    assert!(decoded.is_err(), "{length} bytes of {name}");
                }
            }
            whole.extend(b"\xff\xda and more");
            fs::write(&path, &whole).unwrap();
            decode(&path, 3, &mut picture).unwrap();
        }
    }

    /// A small file that claims 60,000 x 60,000 pixels costs an error, not memory.
    #[test]
    fn bombs_are_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x.jpg");
        flat(8, 8, [0; 3]).save(&path).unwrap();
        let mut jpeg = fs::read(&path).unwrap();
        let frame = jpeg.windows(2).position(|w| w == [0xff, 0xc0]).unwrap();
        jpeg[frame + 5..frame + 9].copy_from_slice(&[0xea, 0x60, 0xea, 0x60]);
        fs::write(&path, jpeg).unwrap();
        let error = decode(&path, 3, &mut Picture::default()).unwrap_err();
        assert!(error.to_string().contains("60000x60000"), "{error}");
    }
}
