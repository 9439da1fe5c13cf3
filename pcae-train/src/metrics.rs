//! What a run measured: `metrics.jsonl`, one JSON object a line, and the same scalars for TensorBoard.
//!
//! ```json
//! {"step":200,"epoch":3.2,"time_s":25.5,"loss":0.31,"lr":0.001}
//! ```

mod tensorboard;

use std::collections::BTreeMap;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Deserializer, Serialize};

use crate::durable::atomic_write;
use crate::run_dir::RunDir;
use tensorboard::EventWriter;

/// The keys of a line that are no scalars.
const RESERVED: [&str; 3] = ["step", "epoch", "time_s"];

/// Why metrics could not be written or read. Every message is one line and says what to do.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum MetricsError {
    /// The file system failed.
    #[error("cannot {action} '{}': {cause}; check permissions and free space", path.display())]
    Io {
        /// The file or folder.
        path: PathBuf,
        /// What was tried.
        action: &'static str,
        /// What the file system said.
        cause: io::Error,
    },
    /// A line that was completely written is no record.
    #[error("'{}', line {line}: {cause}; correct or delete the line", path.display())]
    InvalidLine {
        /// The file.
        path: PathBuf,
        /// Its number, from 1.
        line: usize,
        /// What the parser said.
        cause: serde_json::Error,
    },
    /// A scalar has the name of another key of the line: an error of the calling code.
    #[error("a scalar cannot be called '{0}'")]
    ReservedName(String),
}

/// The measurements of one step.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Record {
    /// Optimizer steps done.
    pub step: u64,
    /// Passes over the data set done, with fraction.
    pub epoch: f64,
    /// Seconds of training so far, over all resumptions.
    pub time_s: f64,
    /// The other values by name. JSON has no NaN and no infinity: both are written `null` and read as NaN.
    #[serde(flatten, deserialize_with = "null_as_nan")]
    pub scalars: BTreeMap<String, f64>,
}

fn null_as_nan<'de, D: Deserializer<'de>>(
    deserializer: D,
) -> Result<BTreeMap<String, f64>, D::Error> {
    let scalars = BTreeMap::<String, Option<f64>>::deserialize(deserializer)?;
    let scalars = scalars.into_iter();
    Ok(scalars
        .map(|(name, value)| (name, value.unwrap_or(f64::NAN)))
        .collect())
}

/// The open metrics of a run. Each record is handed to the system as it comes: `kill -9` loses none.
#[derive(Debug)]
pub struct Metrics {
    path: PathBuf,
    lines: File,
    events: EventWriter,
}

impl Metrics {
    /// Starts the metrics of `run` from nothing, also where an earlier start of the run left some.
    ///
    /// # Errors
    /// [`MetricsError::Io`].
    pub fn create(run: &RunDir) -> Result<Self, MetricsError> {
        Self::start(run, &[], 0)
    }

    /// Continues the metrics of `run` after `step`: records of later steps, and a torn last line, are removed.
    ///
    /// # Errors
    /// [`MetricsError::InvalidLine`] or [`MetricsError::Io`].
    pub fn resume(run: &RunDir, step: u64) -> Result<Self, MetricsError> {
        let path = run.metrics();
        let content = match fs::read(&path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Vec::new(),
            content => content.context(&path, "read")?,
        };
        let mut kept = Vec::with_capacity(content.len());
        for (line, record) in parse(&path, &content)? {
            if record.step <= step {
                // The bytes of the line, not the record written anew: what is kept does not change.
                kept.extend_from_slice(line);
                kept.push(b'\n');
            }
        }
        Self::start(run, &kept, step.saturating_add(1))
    }

    fn start(run: &RunDir, content: &[u8], purge_step: u64) -> Result<Self, MetricsError> {
        let path = run.metrics();
        atomic_write(&path, |out| out.write_all(content)).context(&path, "write")?;
        let lines = OpenOptions::new().append(true).open(&path);
        let folder = run.tensorboard();
        let events = EventWriter::create(&folder, purge_step);
        Ok(Self {
            lines: lines.context(&path, "open")?,
            events: events.context(&folder, "write an event file in")?,
            path,
        })
    }

    /// Appends one record to both files.
    ///
    /// # Errors
    /// [`MetricsError::ReservedName`] before anything is written, or [`MetricsError::Io`].
    pub fn log(&mut self, record: &Record) -> Result<(), MetricsError> {
        if let Some(name) = RESERVED
            .iter()
            .find(|&&name| record.scalars.contains_key(name))
        {
            return Err(MetricsError::ReservedName((*name).to_owned()));
        }
        let mut line = serde_json::to_vec(record)
            .map_err(io::Error::from)
            .context(&self.path, "write")?;
        line.push(b'\n');
        // One call for the whole line, so that a kill tears it only if the disk is full.
        self.lines.write_all(&line).context(&self.path, "write")?;
        let scalars = record.scalars.iter();
        self.events
            .scalars(
                record.step,
                scalars.map(|(name, &value)| (name.as_str(), value)),
            )
            .context(&self.path, "write the events beside")
    }

    /// Waits until all records are on the disk; call it before saving a checkpoint that counts on them.
    ///
    /// # Errors
    /// [`MetricsError::Io`].
    pub fn sync(&self) -> Result<(), MetricsError> {
        let synced = self.lines.sync_data().and_then(|()| self.events.sync());
        synced.context(&self.path, "sync")
    }
}

/// Reads a `metrics.jsonl`, also while it is written: a torn last line is left out.
///
/// # Errors
/// [`MetricsError::Io`], or [`MetricsError::InvalidLine`] for any line that ends in a newline and is no record.
pub fn read_metrics(path: &Path) -> Result<Vec<Record>, MetricsError> {
    let content = fs::read(path).context(path, "read")?;
    let lines = parse(path, &content)?;
    Ok(lines.into_iter().map(|(_, record)| record).collect())
}

/// The values of one scalar, as `(step, value)`, where it was recorded.
pub fn series(records: &[Record], name: &str) -> Vec<(u64, f64)> {
    records
        .iter()
        .filter_map(|record| Some((record.step, *record.scalars.get(name)?)))
        .collect()
}

/// Every line without its newline, and what it says.
fn parse<'a>(path: &Path, content: &'a [u8]) -> Result<Vec<(&'a [u8], Record)>, MetricsError> {
    let mut parsed = Vec::new();
    for (index, line) in content.split_inclusive(|&byte| byte == b'\n').enumerate() {
        // Only a line whose newline was written is complete.
        let Some(line) = line.strip_suffix(b"\n") else {
            break;
        };
        let record = serde_json::from_slice(line).map_err(|cause| MetricsError::InvalidLine {
            path: path.to_owned(),
            line: index + 1,
            cause,
        })?;
        parsed.push((line, record));
    }
    Ok(parsed)
}

/// Adds to a file system error the file and what was tried.
trait Context<T> {
    fn context(self, path: &Path, action: &'static str) -> Result<T, MetricsError>;
}

impl<T> Context<T> for io::Result<T> {
    fn context(self, path: &Path, action: &'static str) -> Result<T, MetricsError> {
        self.map_err(|cause| MetricsError::Io {
            path: path.to_owned(),
            action,
            cause,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(step: u64, loss: f64) -> Record {
        Record {
            step,
            epoch: step as f64 / 8.0,
            time_s: step as f64 * 0.5,
            scalars: BTreeMap::from([("loss".to_owned(), loss)]),
        }
    }

    fn new_run() -> (tempfile::TempDir, RunDir) {
        let folder = tempfile::tempdir().unwrap();
        let run = RunDir::create(folder.path(), "").unwrap();
        (folder, run)
    }

    fn steps(run: &RunDir) -> Vec<u64> {
        let records = read_metrics(&run.metrics()).unwrap();
        records.iter().map(|record| record.step).collect()
    }

    fn event_steps(run: &RunDir) -> Vec<i64> {
        let scalars = tensorboard::tests::read_scalars(&run.tensorboard());
        scalars.iter().map(|(step, _, _)| *step).collect()
    }

    #[test]
    fn reads_what_it_logged() {
        let (_folder, run) = new_run();
        let mut metrics = Metrics::create(&run).unwrap();
        let records = [record(1, 0.75), record(2, 0.1_f32.into()), record(3, -0.0)];
        for record in &records {
            metrics.log(record).unwrap();
        }
        metrics.sync().unwrap();
        let text = fs::read_to_string(run.metrics()).unwrap();
        let first = r#"{"step":1,"epoch":0.125,"time_s":0.5,"loss":0.75}"#;
        assert_eq!(text.lines().next(), Some(first));
        let read = read_metrics(&run.metrics()).unwrap();
        assert_eq!(read, records);
        assert_eq!(
            series(&read, "loss"),
            [(1, 0.75), (2, 0.1_f32.into()), (3, -0.0)]
        );
        assert!(series(&read, "lr").is_empty());
        assert_eq!(
            tensorboard::tests::read_scalars(&run.tensorboard())[1],
            (2, "loss".to_owned(), 0.1)
        );
    }

    #[test]
    fn what_is_not_finite_reads_as_nan() {
        let (_folder, run) = new_run();
        let mut metrics = Metrics::create(&run).unwrap();
        metrics.log(&record(1, f64::NAN)).unwrap();
        metrics.log(&record(2, f64::INFINITY)).unwrap();
        let read = read_metrics(&run.metrics()).unwrap();
        assert!(series(&read, "loss").iter().all(|(_, loss)| loss.is_nan()));
    }

    #[test]
    fn resuming_removes_later_steps_and_the_torn_line() {
        let (_folder, run) = new_run();
        let mut metrics = Metrics::create(&run).unwrap();
        for step in 1..=5 {
            metrics.log(&record(step, 1.0)).unwrap();
        }
        drop(metrics);
        let mut content = fs::read(run.metrics()).unwrap();
        // The value does not survive a round trip through f64; the line must stay as it is.
        content.splice(
            0..0,
            *b"{\"step\":1,\"epoch\":0,\"time_s\":0,\"x\":0.10000000000000000001}\n",
        );
        let kept = content.split_inclusive(|&byte| byte == b'\n').take(4);
        let kept: Vec<u8> = kept.flatten().copied().collect();
        content.extend(b"{\"step\":6,\"epo");
        fs::write(run.metrics(), &content).unwrap();
        assert_eq!(steps(&run), [1, 1, 2, 3, 4, 5]);

        let mut metrics = Metrics::resume(&run, 3).unwrap();
        assert_eq!(fs::read(run.metrics()).unwrap(), kept);
        metrics.log(&record(4, 2.0)).unwrap();
        assert_eq!(steps(&run), [1, 1, 2, 3, 4]);
        assert_eq!(event_steps(&run), [1, 2, 3, 4]);
    }

    #[test]
    fn creating_again_starts_from_nothing() {
        let (_folder, run) = new_run();
        for _ in 0..2 {
            let mut metrics = Metrics::create(&run).unwrap();
            metrics.log(&record(0, 1.0)).unwrap();
            metrics.log(&record(1, 1.0)).unwrap();
        }
        assert_eq!(steps(&run), [0, 1]);
        assert_eq!(event_steps(&run), [0, 1]);
    }

    #[test]
    fn a_run_without_metrics_can_be_resumed() {
        let (_folder, run) = new_run();
        Metrics::resume(&run, 7).unwrap();
        assert!(steps(&run).is_empty());
    }

    #[test]
    fn every_truncation_reads_as_whole_lines() {
        let (_folder, run) = new_run();
        let mut metrics = Metrics::create(&run).unwrap();
        for step in 1..=3 {
            metrics.log(&record(step, 1.0)).unwrap();
        }
        let content = fs::read(run.metrics()).unwrap();
        for length in 0..content.len() {
            fs::write(run.metrics(), &content[..length]).unwrap();
            let lines = content[..length].iter().filter(|&&byte| byte == b'\n');
            assert_eq!(steps(&run).len(), lines.count());
        }
    }

    #[test]
    fn a_complete_line_that_is_no_record_is_an_error() {
        let (_folder, run) = new_run();
        fs::write(
            run.metrics(),
            "{\"step\":1,\"epoch\":0,\"time_s\":0}\n{\"step\":\n",
        )
        .unwrap();
        let error = read_metrics(&run.metrics()).unwrap_err();
        assert!(matches!(error, MetricsError::InvalidLine { line: 2, .. }));
        assert!(error.to_string().contains("line 2"), "{error}");
        Metrics::resume(&run, 1).unwrap_err();
    }

    #[test]
    fn a_scalar_cannot_hide_the_step() {
        let (_folder, run) = new_run();
        let mut metrics = Metrics::create(&run).unwrap();
        let mut record = record(1, 1.0);
        record.scalars.insert("epoch".to_owned(), 1.0);
        let error = metrics.log(&record).unwrap_err();
        assert!(matches!(error, MetricsError::ReservedName(_)), "{error}");
        assert!(steps(&run).is_empty());
    }
}
