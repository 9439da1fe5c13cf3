//! What is embedded: pictures of a folder, of a list, of tar shards, or of a data set in IDX files.

use std::fs::{self, File};
use std::path::{Path, PathBuf};

use tar::Archive;

use crate::data::{self, DataError, Picture, Splits, folder};
use crate::inspect::plain;

/// Pictures in a fixed order, each with a name. Only the names are in memory.
#[derive(Debug)]
pub(super) enum Source {
    /// Below a folder, at any depth, in the order of names.
    Folder { root: PathBuf, paths: Vec<PathBuf> },
    /// In the order of a list.
    List(Vec<PathBuf>),
    /// In the order of shards and of what is in them.
    Shards {
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
            if is_tar(path) {
                Self::shards(vec![path.to_owned()])?
            } else {
                let text = fs::read_to_string(path).map_err(read_error)?;
                let lines = text.lines().map(str::trim_end);
                Self::List(
                    lines
                        .filter(|line| !line.is_empty())
                        .map(PathBuf::from)
                        .collect(),
                )
            }
        } else if data::is_idx_folder(path) {
            Self::Parts(data::open(Some(path), Some(channels))?)
        } else {
            let mut shards = Vec::new();
            for entry in fs::read_dir(path).map_err(read_error)? {
                let file = entry.map_err(read_error)?.path();
                if is_tar(&file) {
                    shards.push(file);
                }
            }
            shards.sort_unstable();
            if shards.is_empty() {
                let mut paths = Vec::new();
                folder::collect(path, 1, &mut paths)?;
                let root = path.to_owned();
                Self::Folder { root, paths }
            } else {
                Self::shards(shards)?
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

    /// Reads the headers alone; the pictures are read where they lie.
    fn shards(shards: Vec<PathBuf>) -> Result<Self, DataError> {
        let mut members = Vec::new();
        for (shard, path) in shards.iter().enumerate() {
            list_members(shard, path, &mut members).map_err(|error| DataError::Read {
                path: path.clone(),
                error,
            })?;
        }
        Ok(Self::Shards { shards, members })
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
            Self::Shards { shards, members } => {
                let member = &members[i];
                let shard = shards[member.shard].file_name().unwrap_or_default();
                Path::new(shard).join(&member.path)
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
            Self::Shards { shards, members } => {
                let Member { shard, place, path } = &members[i];
                folder::decode_within(&shards[*shard], *place, path, channels, picture)
            }
            Self::Parts(splits) => {
                let (part, i) = part(splits, i);
                part.picture(i, picture)
            }
        }
    }

    /// Tells sources apart by their names.
    pub(super) fn fingerprint(&self) -> String {
        let mut sum = 0;
        for i in 0..self.len() {
            sum = crc32c::crc32c_append(sum, self.name(i).as_bytes());
            sum = crc32c::crc32c_append(sum, b"\n");
        }
        format!("{} pictures, crc32c {sum:08x}", self.len())
    }
}

fn part(splits: &Splits, i: usize) -> (&data::Dataset, usize) {
    match i.checked_sub(splits.train.len()) {
        None => (&splits.train, i),
        Some(i) => (&splits.held_out, i),
    }
}

fn is_tar(path: &Path) -> bool {
    path.extension()
        .is_some_and(|extension| extension.eq_ignore_ascii_case("tar"))
}

fn list_members(shard: usize, path: &Path, members: &mut Vec<Member>) -> std::io::Result<()> {
    let file = File::open(path)?;
    let size = file.metadata()?.len();
    for entry in Archive::new(file).entries_with_seek()? {
        let entry = entry?;
        let path = entry.path()?.into_owned();
        let hidden = path
            .file_name()
            .is_none_or(|name| name.as_encoded_bytes().starts_with(b"."));
        if !entry.header().entry_type().is_file() || hidden || !folder::has_picture_extension(&path)
        {
            continue;
        }
        let place = (entry.raw_file_position(), entry.size());
        if place.0.checked_add(place.1).is_none_or(|end| end > size) {
            return Err(std::io::Error::new(
                std::io::ErrorKind::UnexpectedEof,
                format!("it ends within {}", path.display()),
            ));
        }
        members.push(Member { shard, place, path });
    }
    Ok(())
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
            source.fingerprint(),
            Source::open(Some(&root), 3).unwrap().fingerprint()
        );
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

        // Cut within a picture.
        let path = place.path().join("a.tar");
        let bytes = fs::read(&path).unwrap();
        fs::write(&path, &bytes[..560]).unwrap();
        let error = Source::open(Some(place.path()), 3).unwrap_err().to_string();
        assert!(error.contains("a.tar"), "{error}");
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
