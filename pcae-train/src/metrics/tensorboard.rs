//! TensorBoard event files with scalars.
//!
//! Written here, because of the crates for it `tboard` needs `protoc` to build, `tensorboard-rs` protobuf 2 and
//! `syntaxdot-summary` prost 0.9, and scalars need no more of the format than the four messages below.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use prost::Message;

/// `Event` of TensorFlow's `event.proto`, as far as scalars need it.
#[derive(Clone, PartialEq, Message)]
struct Event {
    /// Seconds since 1970.
    #[prost(double, tag = "1")]
    wall_time: f64,
    #[prost(int64, tag = "2")]
    step: i64,
    #[prost(string, optional, tag = "3")]
    file_version: Option<String>,
    #[prost(message, optional, tag = "5")]
    summary: Option<Summary>,
    #[prost(message, optional, tag = "7")]
    session_log: Option<SessionLog>,
}

#[derive(Clone, PartialEq, Message)]
struct Summary {
    #[prost(message, repeated, tag = "1")]
    value: Vec<SummaryValue>,
}

#[derive(Clone, PartialEq, Message)]
struct SummaryValue {
    #[prost(string, tag = "1")]
    tag: String,
    /// Optional, since a member of a `oneof` is written even when it is 0.
    #[prost(float, optional, tag = "2")]
    simple_value: Option<f32>,
}

#[derive(Clone, PartialEq, Message)]
struct SessionLog {
    #[prost(enumeration = "SessionStatus", tag = "1")]
    status: i32,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, prost::Enumeration)]
#[repr(i32)]
enum SessionStatus {
    Unspecified = 0,
    Start = 1,
}

/// The first version whose readers honour a session start.
const FILE_VERSION: &str = "brain.Event:2";
/// What readers look for in file names.
const FILE_PREFIX: &str = "events.out.tfevents.";

/// One event file, written record by record.
#[derive(Debug)]
pub(super) struct EventWriter {
    file: File,
}

impl EventWriter {
    /// Starts an event file in `folder` whose events replace those of earlier files from step `purge_step` on.
    pub(super) fn create(folder: &Path, purge_step: u64) -> io::Result<Self> {
        let file = OpenOptions::new()
            .write(true)
            .create_new(true)
            .open(next_path(folder)?)?;
        let mut writer = Self { file };
        let start = SessionLog {
            status: SessionStatus::Start.into(),
        };
        writer.write(Event {
            file_version: Some(FILE_VERSION.to_owned()),
            ..event_at(purge_step)
        })?;
        writer.write(Event {
            session_log: Some(start),
            ..event_at(purge_step)
        })?;
        Ok(writer)
    }

    /// Adds one event with all `scalars`.
    pub(super) fn scalars<'a>(
        &mut self,
        step: u64,
        scalars: impl Iterator<Item = (&'a str, f64)>,
    ) -> io::Result<()> {
        let value = scalars.map(|(tag, value)| SummaryValue {
            tag: tag.to_owned(),
            simple_value: Some(value as f32),
        });
        let summary = Summary {
            value: value.collect(),
        };
        self.write(Event {
            summary: Some(summary),
            ..event_at(step)
        })
    }

    fn write(&mut self, event: Event) -> io::Result<()> {
        self.file.write_all(&framed(&event.encode_to_vec()))
    }

    /// Waits until the events so far are on the disk.
    pub(super) fn sync(&self) -> io::Result<()> {
        self.file.sync_data()
    }
}

/// An empty event of this moment.
fn event_at(step: u64) -> Event {
    Event {
        wall_time: since_epoch().as_secs_f64(),
        step: i64::try_from(step).unwrap_or(i64::MAX),
        ..Event::default()
    }
}

fn since_epoch() -> std::time::Duration {
    // A clock before 1970 is wrong anyway: times only label the plots.
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap_or_default()
}

/// A name that sorts after the files already there: readers take them in this order, whatever the clock did.
fn next_path(folder: &Path) -> io::Result<PathBuf> {
    let mut stamp = since_epoch().as_secs();
    for entry in fs::read_dir(folder)? {
        let name = entry?.file_name();
        let taken = name.to_str().and_then(|name| {
            let digits = name.strip_prefix(FILE_PREFIX)?.split('.').next()?;
            digits.parse::<u64>().ok()
        });
        if let Some(taken) = taken {
            stamp = stamp.max(taken.saturating_add(1));
        }
    }
    Ok(folder.join(format!("{FILE_PREFIX}{stamp:010}.pcae")))
}

/// A TFRecord: length, its checksum, data, its checksum; all little-endian.
fn framed(data: &[u8]) -> Vec<u8> {
    let length = (data.len() as u64).to_le_bytes();
    let mut record = Vec::with_capacity(data.len() + 16);
    record.extend(length);
    record.extend(masked_crc(&length).to_le_bytes());
    record.extend(data);
    record.extend(masked_crc(data).to_le_bytes());
    record
}

/// CRC-32C, rotated and shifted as TFRecord asks, since a checksum of data with checksums in it is weak.
fn masked_crc(data: &[u8]) -> u32 {
    crc32c::crc32c(data)
        .rotate_right(15)
        .wrapping_add(0xa282_ead8)
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    /// Step and scalars of every event, in the order of a reader that honours session starts.
    pub(crate) fn read_scalars(folder: &Path) -> Vec<(i64, String, f32)> {
        let mut paths: Vec<_> = fs::read_dir(folder)
            .unwrap()
            .map(|entry| entry.unwrap().path())
            .collect();
        paths.sort();
        let mut scalars = Vec::new();
        for event in paths.iter().flat_map(|path| read_events(path)) {
            if let Some(session) = &event.session_log {
                assert_eq!(session.status(), SessionStatus::Start);
                scalars.retain(|(step, _, _)| *step < event.step);
            }
            for value in event.summary.iter().flat_map(|summary| &summary.value) {
                scalars.push((event.step, value.tag.clone(), value.simple_value.unwrap()));
            }
        }
        scalars
    }

    fn read_events(path: &Path) -> Vec<Event> {
        let bytes = fs::read(path).unwrap();
        let mut rest = bytes.as_slice();
        let mut events = Vec::new();
        let crc = |bytes: &[u8]| u32::from_le_bytes(bytes.try_into().unwrap());
        while !rest.is_empty() {
            let length = u64::from_le_bytes(rest[..8].try_into().unwrap()) as usize;
            assert_eq!(crc(&rest[8..12]), masked_crc(&rest[..8]));
            let data = &rest[12..12 + length];
            assert_eq!(crc(&rest[12 + length..][..4]), masked_crc(data));
            events.push(Event::decode(data).unwrap());
            rest = &rest[16 + length..];
        }
        events
    }

    #[test]
    fn checksum_of_the_standard_check_string() {
        // CRC-32C of "123456789" is 0xe3069283; rotated and shifted by hand.
        assert_eq!(
            masked_crc(b"123456789"),
            0x2507_c60d_u32.wrapping_add(0xa282_ead8)
        );
    }

    #[test]
    fn a_scalar_event_has_the_bytes_of_the_schema() {
        let event = Event {
            wall_time: 1.0,
            step: 300,
            summary: Some(Summary {
                value: vec![SummaryValue {
                    tag: "a".to_owned(),
                    simple_value: Some(0.0),
                }],
            }),
            ..Event::default()
        };
        let mut want = vec![0x09, 0, 0, 0, 0, 0, 0, 0xf0, 0x3f]; // field 1, fixed 64
        want.extend([0x10, 0xac, 0x02]); // field 2, varint 300
        want.extend([0x2a, 10, 0x0a, 8]); // field 5, its field 1
        want.extend([0x0a, 1, b'a', 0x15, 0, 0, 0, 0]); // field 1, "a"; field 2, fixed 32
        assert_eq!(event.encode_to_vec(), want);
    }

    #[test]
    fn a_later_file_replaces_from_its_purge_step() {
        let folder = tempfile::tempdir().unwrap();
        let mut first = EventWriter::create(folder.path(), 0).unwrap();
        for step in 0..4 {
            first.scalars(step, [("loss", 1.0)].into_iter()).unwrap();
        }
        // In the same second: the name must still sort after.
        let mut second = EventWriter::create(folder.path(), 2).unwrap();
        second
            .scalars(2, [("loss", 0.0), ("lr", 0.5)].into_iter())
            .unwrap();
        let want = [
            (0, "loss", 1.0),
            (1, "loss", 1.0),
            (2, "loss", 0.0),
            (2, "lr", 0.5),
        ];
        assert_eq!(
            read_scalars(folder.path()),
            want.map(|(step, tag, value)| (step, tag.to_owned(), value))
        );
        for entry in fs::read_dir(folder.path()).unwrap() {
            let events = read_events(&entry.unwrap().path());
            assert_eq!(events[0].file_version.as_deref(), Some(FILE_VERSION));
        }
    }
}
