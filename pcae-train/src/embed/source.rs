//! What is embedded: pictures of a folder, of a list, of tar shards, or of a data set in IDX files.

use std::fs::{self, File};
use std::io::{self, Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};
use std::time::UNIX_EPOCH;

use crate::backends::count;
use crate::data::folder::{self, Archive};
use crate::data::{self, DataError, Picture, Splits};
use crate::inspect::plain;

/// Pictures in a fixed order, each with a name. Only the names are in memory.
#[derive(Debug)]
pub(super) enum Source {
    /// Below a folder, at any depth, in the order of names.
    Folder { root: PathBuf, paths: Vec<PathBuf> },
    /// In the order of a list.
    List(Vec<PathBuf>),
    /// In the order of shards, below `root`, and of what is in them.
    Shards {
        root: PathBuf,
        shards: Vec<PathBuf>,
        members: Vec<Member>,
    },
    /// Training part, then held-out part.
    Parts(Splits),
}

/// A picture in a tar file.
#[derive(Debug)]
pub(super) struct Member {
    shard: usize,
    /// First byte and number of bytes.
    place: (u64, u64),
    path: PathBuf,
}

impl Source {
    /// Opens what is at `path`: a folder of pictures, tar shards or IDX files, a tar file, or a list with the path of a
    /// picture in each line; without a path the embedded pictures.
    pub(super) fn open(path: Option<&Path>, channels: usize) -> Result<Self, DataError> {
        let Some(path) = path else {
            return Ok(Self::Parts(data::open(None, Some(channels))?));
        };
        let read_error = |error| DataError::Read {
            path: path.to_owned(),
            error,
        };
        let source = if !fs::metadata(path).map_err(read_error)?.is_dir() {
            match Archive::of(path) {
                Some(_) => {
                    let root = path.parent().unwrap_or(path).to_owned();
                    Self::shards(root, vec![path.to_owned()])?
                }
                None => Self::list(path)?,
            }
        } else if data::is_idx_folder(path) {
            Self::Parts(data::open(Some(path), Some(channels))?)
        } else {
            let (mut paths, mut shards) = (Vec::new(), Vec::new());
            folder::collect_all(path, 1, &mut paths, &mut shards)?;
            let root = path.to_owned();
            match (&paths[..], &shards[..]) {
                (_, []) => Self::Folder { root, paths },
                ([], _) => Self::shards(root, shards)?,
                // Which of them are meant, or whether both, is not for us to guess.
                ([picture, ..], [shard, ..]) => {
                    return Err(DataError::Layout {
                        path: path.to_owned(),
                        expected: "either pictures or tar files of pictures".to_owned(),
                        found: format!(
                            "{}, the first {}, beside {}, the first {}",
                            count(paths.len(), "picture"),
                            picture.display(),
                            count(shards.len(), "tar file"),
                            shard.display()
                        ),
                        advice: "give a folder of either, or move the others out of it",
                    });
                }
            }
        };
        if source.len() == 0 {
            return Err(DataError::Layout {
                path: path.to_owned(),
                expected: "pictures (.jpg, .jpeg, .png, .webp), tar shards of them, a list with a path in each line, or IDX files"
                    .to_owned(),
                found: "none of these".to_owned(),
                advice: "check the path",
            });
        }
        Ok(source)
    }

    /// A list with the path of a picture in each line.
    fn list(path: &Path) -> Result<Self, DataError> {
        let text = fs::read_to_string(path).map_err(|error| match error.kind() {
            io::ErrorKind::InvalidData => DataError::Layout {
                path: path.to_owned(),
                expected: "a folder, a tar file, or a list with the path of a picture in each line"
                    .to_owned(),
                found: "a file that is no text".to_owned(),
                advice: "for one picture give its folder, or a list with its path",
            },
            _ => DataError::Read {
                path: path.to_owned(),
                error,
            },
        })?;
        let lines = text
            .lines()
            .map(str::trim_end)
            .filter(|line| !line.is_empty());
        Ok(Self::List(lines.map(PathBuf::from).collect()))
    }

    /// Reads the headers alone; the pictures are read where they lie.
    fn shards(root: PathBuf, shards: Vec<PathBuf>) -> Result<Self, DataError> {
        let mut members = Vec::new();
        for (shard, path) in shards.iter().enumerate() {
            if Archive::of(path) == Some(Archive::Packed) {
                return Err(DataError::Layout {
                    path: path.clone(),
                    expected: "a tar file as it is, in which pictures can be read where they lie"
                        .to_owned(),
                    found: "a compressed one".to_owned(),
                    advice: "decompress it to .tar: pictures in it hardly shrink",
                });
            }
            list_members(shard, path, &mut members).map_err(|error| {
                let path = path.clone();
                // What the system reports is about the file, all else about what is in it.
                if error.raw_os_error().is_some() {
                    return DataError::Read { path, error };
                }
                DataError::Layout {
                    path,
                    expected: "a whole tar file".to_owned(),
                    found: format!("one that cannot be read to its end: {error}"),
                    advice: "it is cut short or damaged: fetch it again",
                }
            })?;
        }
        Ok(Self::Shards {
            root,
            shards,
            members,
        })
    }

    pub(super) fn len(&self) -> usize {
        match self {
            Self::Folder { paths, .. } | Self::List(paths) => paths.len(),
            Self::Shards { members, .. } => members.len(),
            Self::Parts(splits) => splits.train.len() + splits.held_out.len(),
        }
    }

    /// One line: the path within the folder, as the list has it, `SHARD/PATH`, or the place in an IDX file.
    pub(super) fn name(&self, i: usize) -> String {
        let path = match self {
            Self::Folder { root, paths } => {
                paths[i].strip_prefix(root).unwrap_or(&paths[i]).to_owned()
            }
            Self::List(paths) => paths[i].clone(),
            Self::Shards {
                root,
                shards,
                members,
            } => {
                let member = &members[i];
                let shard = &shards[member.shard];
                let shard = shard.strip_prefix(root).unwrap_or(shard);
                shard.join(&member.path)
            }
            Self::Parts(splits) => {
                let (part, i) = part(splits, i);
                return plain(&part.name(i));
            }
        };
        plain(&path.to_string_lossy())
    }

    /// Decodes picture `i`.
    pub(super) fn picture(
        &self,
        i: usize,
        channels: usize,
        picture: &mut Picture,
    ) -> Result<(), DataError> {
        match self {
            Self::Folder { paths, .. } | Self::List(paths) => {
                folder::decode(&paths[i], channels, picture)
            }
            Self::Shards {
                shards, members, ..
            } => {
                let Member { shard, place, path } = &members[i];
                folder::decode_within(&shards[*shard], *place, path, channels, picture)
            }
            Self::Parts(splits) => {
                let (part, i) = part(splits, i);
                part.picture(i, picture)
            }
        }
    }

    /// Tells sources apart: by where they are, by the names of the pictures, and by size and time of the files; data sets by all
    /// that is in them.
    pub(super) fn fingerprint(&self) -> Result<String, DataError> {
        let mut sum = 0;
        let mut add = |bytes: &[u8]| sum = crc32c::crc32c_append(sum, bytes);
        for i in 0..self.len() {
            add(self.name(i).as_bytes());
            add(b"\n");
        }
        let files = match self {
            Self::Folder { root, paths } => {
                add(place(root).as_os_str().as_encoded_bytes());
                &paths[..]
            }
            Self::Shards { root, shards, .. } => {
                add(place(root).as_os_str().as_encoded_bytes());
                &shards[..]
            }
            Self::List(paths) => {
                add(place(Path::new(".")).as_os_str().as_encoded_bytes());
                &paths[..]
            }
            Self::Parts(splits) => {
                add(splits.train.fingerprint()?.as_bytes());
                add(splits.held_out.fingerprint()?.as_bytes());
                &[]
            }
        };
        for path in files {
            // What is gone will be found unreadable, then and now.
            let Ok(metadata) = fs::metadata(path) else {
                add(b"gone");
                continue;
            };
            add(&metadata.len().to_le_bytes());
            let modified = metadata.modified().ok();
            let since = modified.and_then(|time| time.duration_since(UNIX_EPOCH).ok());
            add(&since.unwrap_or_default().as_nanos().to_le_bytes());
        }
        Ok(format!("{} pictures, crc32c {sum:08x}", self.len()))
    }
}

/// The one name of a folder that has many.
fn place(folder: &Path) -> PathBuf {
    let is_here = folder.as_os_str().is_empty();
    let folder = if is_here { Path::new(".") } else { folder };
    folder.canonicalize().unwrap_or_else(|_| folder.to_owned())
}

fn part(splits: &Splits, i: usize) -> (&data::Dataset, usize) {
    match i.checked_sub(splits.train.len()) {
        None => (&splits.train, i),
        Some(i) => (&splits.held_out, i),
    }
}

/// What a tar file is made of, and what of it at least ends one, all zeros.
const TAR_BLOCK: u64 = 512;

fn list_members(shard: usize, path: &Path, members: &mut Vec<Member>) -> io::Result<()> {
    let file = File::open(path)?;
    let size = file.metadata()?.len();
    let mut end = 0;
    for entry in tar::Archive::new(&file).entries_with_seek()? {
        let entry = entry?;
        let path = entry.path()?.into_owned();
        let blocks = entry.size().div_ceil(TAR_BLOCK);
        end = blocks
            .saturating_mul(TAR_BLOCK)
            .saturating_add(entry.raw_file_position());
        let hidden = path
            .file_name()
            .is_none_or(|name| name.as_encoded_bytes().starts_with(b"."));
        if !entry.header().entry_type().is_file() || hidden || !folder::has_picture_extension(&path)
        {
            continue;
        }
        let place = (entry.raw_file_position(), entry.size());
        if place.0.checked_add(place.1).is_none_or(|end| end > size) {
            return Err(cut(&format!("within {}", path.display())));
        }
        members.push(Member { shard, place, path });
    }
    // One that was cut between two files, or in one of no interest, looks whole but for this.
    let mut mark = Vec::new();
    (&file).seek(SeekFrom::Start(end))?;
    (&file).take(TAR_BLOCK).read_to_end(&mut mark)?;
    if mark.len() < TAR_BLOCK as usize || mark.iter().any(|&byte| byte != 0) {
        return Err(cut("without the mark that ends a tar file"));
    }
    Ok(())
}

/// A tar file of which a part is missing.
fn cut(how: &str) -> io::Error {
    io::Error::new(io::ErrorKind::UnexpectedEof, format!("it ends {how}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn png(edge: u32, red: u8) -> Vec<u8> {
        let mut bytes = std::io::Cursor::new(Vec::new());
        image::RgbImage::from_pixel(edge, edge, image::Rgb([red, 0, 9]))
            .write_to(&mut bytes, image::ImageFormat::Png)
            .unwrap();
        bytes.into_inner()
    }

    /// Edge and red of each picture, `None` of the unreadable ones.
    fn pictures(source: &Source) -> Vec<Option<(usize, u8)>> {
        let mut picture = Picture::default();
        let read = (0..source.len()).map(|i| {
            source.picture(i, 3, &mut picture).ok()?;
            Some((picture.width, picture.pixels[0]))
        });
        read.collect()
    }

    fn names(source: &Source) -> Vec<String> {
        (0..source.len()).map(|i| source.name(i)).collect()
    }

    #[test]
    fn folders_and_lists() {
        let place = tempfile::tempdir().unwrap();
        let root = place.path().join("album");
        fs::create_dir_all(root.join("b/c")).unwrap();
        fs::write(root.join("z.png"), png(2, 10)).unwrap();
        fs::write(root.join("b/c/a\n.PNG"), png(3, 20)).unwrap();
        fs::write(root.join("b/no.jpg"), "text").unwrap();
        fs::write(root.join("b/.hidden.png"), png(3, 20)).unwrap();
        fs::write(root.join("b/notes.txt"), "text").unwrap();
        let source = Source::open(Some(&root), 3).unwrap();
        assert_eq!(names(&source), ["z.png", "b/no.jpg", "b/c/a\\n.PNG"]);
        assert_eq!(pictures(&source), [Some((2, 10)), None, Some((3, 20))]);

        let list = place.path().join("list.txt");
        let lines = [
            root.join("z.png"),
            root.join("gone.png"),
            root.join("z.png"),
        ];
        let lines = lines.map(|path| path.display().to_string());
        fs::write(&list, lines.join("\r\n") + "\n\n").unwrap();
        let source = Source::open(Some(&list), 3).unwrap();
        assert_eq!(names(&source), lines);
        assert_eq!(pictures(&source), [Some((2, 10)), None, Some((2, 10))]);
        assert_ne!(
            source.fingerprint().unwrap(),
            Source::open(Some(&root), 3).unwrap().fingerprint().unwrap()
        );
    }

    /// An embedding that was interrupted goes on with the same pictures alone: others of the same names are others.
    #[test]
    fn equal_names_are_not_equal_pictures() {
        let place = tempfile::tempdir().unwrap();
        let fingerprint = |path: &Path| {
            let source = Source::open(Some(path), 3).unwrap();
            source.fingerprint().unwrap()
        };
        let (one, other) = (place.path().join("one"), place.path().join("other"));
        for (root, red) in [(&one, 1), (&other, 2)] {
            fs::create_dir(root).unwrap();
            fs::write(root.join("a.png"), png(4, red)).unwrap();
            shard(&root.join("a.tar.part"), &[("a.png", png(4, red))]);
        }
        let before = fingerprint(&one);
        assert_eq!(fingerprint(&one), before);
        assert_eq!(fingerprint(&place.path().join("other/../one")), before);
        assert_ne!(fingerprint(&other), before);
        // Of the same place, name and size.
        let file = File::options()
            .append(true)
            .open(one.join("a.png"))
            .unwrap();
        file.set_modified(UNIX_EPOCH).unwrap();
        let later = fingerprint(&one);
        assert_ne!(later, before);
        fs::write(one.join("a.png"), png(9, 1)).unwrap();
        file.set_modified(UNIX_EPOCH).unwrap();
        assert_ne!(fingerprint(&one), later);
        let shards = [&one, &other].map(|root| {
            fs::rename(root.join("a.tar.part"), root.join("a.tar")).unwrap();
            fingerprint(&root.join("a.tar"))
        });
        assert_ne!(shards[0], shards[1]);
        let list = place.path().join("list.txt");
        fs::write(&list, one.join("a.png").display().to_string()).unwrap();
        let before = fingerprint(&list);
        fs::write(one.join("a.png"), png(5, 1)).unwrap();
        assert_ne!(fingerprint(&list), before);
        fs::remove_file(one.join("a.png")).unwrap();
        assert_ne!(fingerprint(&list), before);
    }

    fn shard(path: &Path, members: &[(&str, Vec<u8>)]) {
        let mut builder = tar::Builder::new(File::create(path).unwrap());
        for (name, bytes) in members {
            let mut header = tar::Header::new_gnu();
            header.set_size(bytes.len() as u64);
            header.set_mode(0o644);
            builder.append_data(&mut header, name, &bytes[..]).unwrap();
        }
        builder.finish().unwrap();
    }

    #[test]
    fn shards() {
        let place = tempfile::tempdir().unwrap();
        // Longer than the 100 bytes that the old format has room for.
        let long = format!("{}/0.png", "deep/".repeat(30));
        let first = [
            ("1.png", png(4, 1)),
            ("1.json", b"{}".to_vec()),
            (&long[..], png(5, 2)),
            ("._1.png", png(4, 1)),
            ("bad.webp", b"RIFF".to_vec()),
        ];
        shard(&place.path().join("b.tar"), &first);
        shard(&place.path().join("a.tar"), &[("x.jpg", png(6, 3))]);
        let source = Source::open(Some(place.path()), 3).unwrap();
        let long = format!("b.tar/{}/0.png", "deep/".repeat(30).trim_end_matches('/'));
        let found: Vec<String> = names(&source)
            .iter()
            .map(|name| name.replace("//", "/"))
            .collect();
        assert_eq!(
            found,
            ["a.tar/x.jpg", "b.tar/1.png", &long, "b.tar/bad.webp"]
        );
        assert_eq!(
            pictures(&source),
            [Some((6, 3)), Some((4, 1)), Some((5, 2)), None]
        );
        let one = Source::open(Some(&place.path().join("a.tar")), 3).unwrap();
        assert_eq!(pictures(&one), [Some((6, 3))]);

        // Cut within a picture, within another file, within a header, and where a header or the end would be.
        let path = place.path().join("b.tar");
        let bytes = fs::read(&path).unwrap();
        let json = bytes.windows(6).position(|at| at == b"1.json").unwrap();
        for length in [0, 560, json + 520, json, json + 160, bytes.len() - 1024] {
            fs::write(&path, &bytes[..length]).unwrap();
            let error = Source::open(Some(place.path()), 3).unwrap_err().to_string();
            assert!(error.contains("b.tar"), "{length}: {error}");
        }
        fs::write(&path, bytes).unwrap();
        assert_eq!(Source::open(Some(place.path()), 3).unwrap().len(), 4);
    }

    /// What would be left out is named instead.
    #[test]
    fn nothing_is_left_out_silently() {
        let place = tempfile::tempdir().unwrap();
        let root = place.path();
        fs::create_dir(root.join("deep")).unwrap();
        shard(&root.join("a.tar"), &[("1.png", png(4, 1))]);
        shard(&root.join("deep/b.tar"), &[("1.png", png(5, 2))]);
        let source = Source::open(Some(root), 3).unwrap();
        assert_eq!(names(&source), ["a.tar/1.png", "deep/b.tar/1.png"]);
        assert_eq!(pictures(&source), [Some((4, 1)), Some((5, 2))]);
        let says = |path: &Path, parts: &[&str]| {
            let error = Source::open(Some(path), 3).unwrap_err().to_string();
            for part in parts {
                assert!(error.contains(part), "{part} in {error}");
            }
        };
        for packed in ["c.tar.gz", "deep/d.TGZ"] {
            fs::write(root.join(packed), [0x1f, 0x8b, 8, 0]).unwrap();
            for path in [root, &root.join(packed)] {
                says(path, &[packed, "found a compressed one", "decompress"]);
            }
            fs::remove_file(root.join(packed)).unwrap();
        }
        fs::write(root.join("deep/x.png"), png(3, 3)).unwrap();
        says(root, &["1 picture", "x.png", "2 tar files", "a.tar"]);
        says(&root.join("deep/x.png"), &["no text", "list"]);
    }

    #[test]
    fn data_sets_come_part_after_part() {
        let source = Source::open(None, 1).unwrap();
        assert_eq!(source.len(), 10_000);
        let splits = data::open(None, None).unwrap();
        assert_eq!(source.name(7999), splits.train.name(7999));
        assert_eq!(source.name(8000), splits.held_out.name(0));
        let (mut a, mut b) = (Picture::default(), Picture::default());
        source.picture(8001, 1, &mut a).unwrap();
        splits.held_out.picture(1, &mut b).unwrap();
        assert_eq!(a, b);
    }

    #[test]
    fn nothing_is_an_error() {
        let place = tempfile::tempdir().unwrap();
        let error = Source::open(Some(place.path()), 3).unwrap_err().to_string();
        assert!(error.contains("found none of these"), "{error}");
        let list = place.path().join("empty.txt");
        fs::write(&list, "\n").unwrap();
        assert!(Source::open(Some(&list), 3).is_err());
        assert!(Source::open(Some(&place.path().join("gone")), 3).is_err());
    }
}
